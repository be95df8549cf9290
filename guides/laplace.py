"""Laplace's approximation around a point estimate."""

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_blora.guides._site_guide import Site
from pyro_blora.guides.delta import Delta


class Laplace(Delta):
    r"""A normal whose precision is the curvature of the loss at the trained point.

    .. math::

        q(U) = \mathcal{N}\left(\hat U, (H + \delta I)^{-1}\right), \qquad
        H = \sum_b J_b^\top \Lambda_b J_b,

    with :math:`J_b` the Jacobian of example :math:`b`'s logits and :math:`\Lambda_b =
    \mathrm{diag}(p_b) - p_b p_b^\top` (generalized Gauss-Newton). It trains like :class:`Delta`;
    then :func:`pyro_blora.inference.finish` computes ``H`` by one backward pass for each class, and
    chooses :math:`\delta` for each site by the marginal likelihood. A site of which the logits know
    nothing keeps the width of its prior.

    Args:
        structure: ``"kron"`` for a Kronecker product of a row and a column factor in each layer,
            ``"diag"`` for the diagonal. A site whose event is not a matrix, or a matrix with a
            side longer than ``max_side``, 1024, takes the diagonal. Default: kron.

    Parameters, for a site of batch shape ``(n,)``: ``loc``, ``(n, *event_shape)``. Buffers: the
    eigenvectors ``row_basis`` (n, m_r, m_r) and ``col_basis`` (n, m_c, m_c) of the factors, and
    ``width``, the standard deviations in their basis.

    Reference:
        Yang et al. 2024, "Bayesian low-rank adaptation for large language models",
        arXiv:2308.13111; Daxberger et al. 2021, "Laplace redux", arXiv:2106.14806.

    Example::

        blora = BayesianLoRA(net, guide=Laplace())
        fit(blora, train, collate=collate, num_steps=300)  # also computes the curvature
        blora.predict(batch, linearized=True)  # the usual predictive of Laplace-LoRA
    """

    is_point: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    max_side: ClassVar[int] = 1024
    finished = False  # whether the width is known; a plain bool, so that no device is synchronized
    row_basis: Tensor
    col_basis: Tensor
    width: Tensor

    def __init__(self, *, structure: Literal["kron", "diag"] = "kron") -> None:
        super().__init__()

    @property
    def is_kron(self) -> bool:
        """Whether this site has a row and a column factor."""
        shape = self.site.event_shape
        fits = len(shape) == 2 and max(shape) <= self.max_side
        return self.structure == "kron" and fits and len(self.site.batch_shape) == 1

    def setup(self, site: Site) -> None:
        """Registers ``loc``, the widths and the bases."""
        super().setup(site)
        self.register_buffer("width", torch.zeros_like(self.loc))
        if self.is_kron:
            for name, size in zip(("row_basis", "col_basis"), site.event_shape, strict=True):
                eye = torch.eye(size, device=self.loc.device)
                self.register_buffer(name, eye.repeat(*site.batch_shape, 1, 1))

    def get_extra_state(self) -> Tensor:
        """``finished`` as a tensor of the state dict."""
        return torch.tensor(self.finished)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores ``finished`` from a state dict."""
        self.finished = bool(state)

    @classmethod
    def finish(
        cls,
        families: Mapping[str, "Laplace"],
        scores: Iterable[Mapping[str, Tensor]],
        num_data: int | None = None,
    ) -> dict[str, float]:
        r"""Sums the curvature, scaled to ``num_data``; chooses and returns the prior precisions.

        ``scores`` has for each batch, by site, :math:`g_{bc} = \sqrt{p_{bc}} (J_{bc} - \sum_k
        p_{bk} J_{bk})`, ``(B, C, n, *event_shape)``, unconstrained; ``sum g g^T`` is ``H``.
        """
        sums: dict[str, list[Tensor]] = {}
        seen = 0
        for batch in scores:
            for name, family in families.items():
                g = batch[name]
                moments = family._second_moments(g)
                before = sums.get(name, [g.new_zeros(())] * len(moments))
                sums[name] = [a + b for a, b in zip(before, moments, strict=True)]
            seen += len(g)
        chosen = {}
        for name, family in families.items():
            values, *bases = family._eigen(sums[name], (num_data or seen) / seen)
            if values.any():
                chosen[name] = delta = best_precision(values, family.loc)
                family.width.copy_((values + delta).rsqrt())
            else:  # it is in the density of another site alone, and keeps its prior's width
                family.width.copy_(family.site.start()[1])
                chosen[name] = float(family.width.square().mean().reciprocal())
            for side, basis in zip(("row_basis", "col_basis"), bases, strict=False):
                getattr(family, side).copy_(basis)
            family.finished = True
        return chosen

    def _second_moments(self, g: Tensor) -> list[Tensor]:
        """Second moments of the rows and of the columns of scores, or the diagonal of all."""
        if not self.is_kron:
            return [g.square().sum((0, 1))]
        return [torch.einsum("bcnij,bcnkj->nik", g, g), torch.einsum("bcnij,bcnik->njk", g, g)]

    def _eigen(self, sums: list[Tensor], scale: float) -> tuple[Tensor, ...]:
        """Eigenvalues of ``scale H``, ``(n, *event_shape)``, and the bases of the two factors."""
        if not self.is_kron:
            return (scale * sums[0],)
        # H = R (x) C / tr R, which is exact if H is a Kronecker product
        trace = sums[0].diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)
        (rows, row_basis), (cols, col_basis) = map(torch.linalg.eigh, sums)
        values = rows.clamp_min(0).unsqueeze(-1) * cols.clamp_min(0).unsqueeze(-2)
        return scale * values / trace[:, None, None], row_basis, col_basis

    def distribution(self) -> TorchDistribution:
        """The point mass at ``loc``, or the normal around it once the width is known."""
        if not self.finished:
            return super().distribution()
        if not self.is_kron:
            return dist.Normal(self.loc, self.width).to_event(self.site.event_dim)
        noise = dist.Normal(torch.zeros_like(self.loc), self.width).to_event(2)
        turn = _Rotation(self.row_basis, self.col_basis, self.loc)
        return dist.TransformedDistribution(noise, [turn])

    def center(self) -> Tensor:
        """The image of ``loc``."""
        return self.loc if self.site.is_real else self.site.transform(self.loc)


class _Rotation(Transform):
    """``y = loc + R x C^T`` with orthogonal ``R`` and ``C``."""

    domain = codomain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(self, row: Tensor, col: Tensor, loc: Tensor) -> None:
        super().__init__()
        self.row, self.col, self.loc = row, col, loc

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + self.row @ x @ self.col.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return self.row.mT @ (y - self.loc) @ self.col

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-2])


def best_precision(values: Tensor, loc: Tensor) -> float:
    r"""The prior precision :math:`\delta` of the highest marginal likelihood, from 1e-6 to 1e6.

    It is the root of :math:`\sum_i \lambda_i / (\lambda_i + \delta) - \delta |\hat U|^2`.
    """
    values, square = values.double(), float(loc.detach().double().square().sum())
    low, high = -6.0, 6.0
    for _ in range(50):
        middle = (low + high) / 2
        delta = 10.0**middle
        rises = float((values / (values + delta)).sum()) > delta * square
        low, high = (middle, high) if rises else (low, middle)
    return float(10.0**low)
