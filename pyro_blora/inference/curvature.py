r"""Laplace's approximation: the curvature of the loss at a point estimate.

From the Jacobian of every example's logits the scores :math:`g_{bc} = \sqrt{p_{bc}} (J_{bc} -
\sum_k p_{bk} J_{bk})` add up to the generalised Gauss-Newton matrix, :math:`H = \sum_{bc} g_{bc}
g_{bc}^\top`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.guides.laplace import Laplace
from pyro_blora.likelihoods import Batch
from pyro_blora.posterior.linearised import logit_jacobian
from pyro_blora.posterior.structured_guide import StructuredGuide

__all__ = ["Curvature", "best_precision", "fit_laplace", "scores"]


def scores(blora: BayesianLoRA, batch: Batch) -> dict[str, Tensor]:
    """The scores of a batch at the guide's centre.

    Args:
        blora: the trained adapter, with a guide family of this library.
        batch: ``B`` examples.

    Returns:
        For each site ``g_bc``, ``(B, C, n, *event_shape)``, in unconstrained coordinates.

    Raises:
        ConfigurationError: the likelihood has more than one choice for each example.
    """
    logits, jacobian = logit_jacobian(blora, batch)
    p = logits.softmax(-1)
    found = {}
    for name, J in jacobian.items():
        weight = p.reshape(*p.shape, *(1,) * (J.dim() - 2))
        found[name] = weight.sqrt() * (J - (weight * J).sum(1, keepdim=True))
    return found


class Curvature:
    """The sum over the data of the outer products of a site's scores, in a family's structure.

    Attributes:
        diagonal: ``(n, *event_shape)``, or ``None`` for a Kronecker structure.
        row: ``sum g g^T``, ``(n, m_r, m_r)``.
        col: ``sum g^T g``, ``(n, m_c, m_c)``.
    """

    def __init__(self, family: Laplace) -> None:
        self.family = family
        self.diagonal: Tensor | None = None
        self.row: Tensor | None = None
        self.col: Tensor | None = None

    def add(self, g: Tensor) -> None:
        """Adds scores, ``(B, C, n, *event_shape)``."""
        if self.family.is_kron:
            row = torch.einsum("bcnij,bcnkj->nik", g, g)
            col = torch.einsum("bcnij,bcnik->njk", g, g)
            self.row = row if self.row is None else self.row + row
            self.col = col if self.col is None else self.col + col
        else:
            square = g.square().sum((0, 1))
            self.diagonal = square if self.diagonal is None else self.diagonal + square

    def eigen(self, scale: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Eigenvalues of ``scale H``, ``(n, *event_shape)``, and the bases of rows and columns.

        The Kronecker structure is ``H = R (x) C / tr R``, exact where ``H`` is such a product.
        """
        if self.diagonal is not None:
            return scale * self.diagonal, None, None
        assert self.row is not None
        assert self.col is not None
        trace = self.row.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)
        rows, row_basis = torch.linalg.eigh(self.row)
        cols, col_basis = torch.linalg.eigh(self.col)
        values = rows.clamp_min(0).unsqueeze(-1) * cols.clamp_min(0).unsqueeze(-2)
        return scale * values / trace[:, None, None], row_basis, col_basis


def best_precision(values: Tensor, loc: Tensor) -> float:
    r"""The prior precision :math:`\delta` of the highest marginal likelihood.

    .. math::

        \log Z(\delta) = -\tfrac{\delta}{2} |\hat U|^2 + \tfrac{k}{2} \log \delta
        - \tfrac12 \sum_i \log(\lambda_i + \delta) + \text{const},

    whose slope has the sign of :math:`\gamma - \delta |\hat U|^2`, :math:`\gamma = \sum_i \lambda_i
    / (\lambda_i + \delta)`. That falls with :math:`\delta`, so bisection of the logarithm finds
    the one root (MacKay's fixed point :math:`\delta = \gamma / |\hat U|^2` may go in circles).

    Args:
        values: the eigenvalues of the curvature.
        loc: the point estimate.

    Returns:
        ``delta``, between 1e-6 and 1e6.

    Example::

        >>> round(best_precision(torch.full((4,), 1e9), torch.ones(4)), 3)
        1.0
    """
    values, square = values.double(), float(loc.detach().double().square().sum())
    low, high = -6.0, 6.0
    for _ in range(50):
        middle = (low + high) / 2
        delta = 10.0**middle
        rises = float((values / (values + delta)).sum()) > delta * square
        low, high = (middle, high) if rises else (low, middle)
    return float(10.0**low)


def fit_laplace(blora: BayesianLoRA, batches: Iterable[Batch]) -> dict[str, float]:
    """Computes the curvature over ``batches`` and finishes every :class:`Laplace` family.

    Args:
        blora: the trained adapter.
        batches: the data, or a part of it, which is scaled to the likelihood's ``num_data``.

    Returns:
        The prior precision chosen for each site.
    """
    assert isinstance(blora.guide, StructuredGuide)
    families = blora.guide.families()
    curvature = {name: Curvature(f) for name, f in families.items() if isinstance(f, Laplace)}
    seen = 0
    for batch in batches:
        seen += blora.likelihood.examples(batch)
        for name, g in scores(blora, batch).items():
            curvature[name].add(g)
    chosen = {}
    for name, part in curvature.items():
        scale = (blora.likelihood.num_data or seen) / seen
        values, row_basis, col_basis = part.eigen(scale)
        chosen[name] = delta = best_precision(values, part.family.loc)
        part.family.finish((values + delta).rsqrt(), row_basis, col_basis)
    return chosen
