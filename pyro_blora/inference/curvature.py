r"""Laplace's approximation: the curvature of the loss at a point estimate.

With a particle for each example every example has its own copy of the core, so that one backward
pass for each class gives the Jacobian of *every* example's logits. The scores
:math:`g_{bc} = \sqrt{p_{bc}} (J_{bc} - \sum_k p_{bk} J_{bk})` then add up to the generalised
Gauss-Newton matrix, :math:`H = \sum_{bc} g_{bc} g_{bc}^\top`.
"""

from collections.abc import Iterable, Iterator

import pyro
import torch
from torch import Tensor

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guide import StructuredGuide
from pyro_blora.guides.laplace import Laplace
from pyro_blora.likelihoods import Batch

__all__ = ["Curvature", "best_precision", "fit_laplace", "scores"]


def scores(blora: BayesianLoRA, batch: Batch) -> Iterator[dict[str, Tensor]]:
    """The scores of a batch at the guide's centre, one class after the other.

    Args:
        blora: the trained adapter, with a guide family of this library.
        batch: ``B`` examples.

    Yields:
        For each class ``c`` and each site ``g_bc``, ``(B, n, *event_shape)``, in unconstrained
        coordinates.

    Raises:
        ConfigurationError: the likelihood has more than one choice for each example.
    """
    assert isinstance(blora.guide, StructuredGuide)
    families = blora.guide.families()
    examples = blora.likelihood.examples(batch)
    leaves, values = {}, {}
    for name, family in families.items():
        assert isinstance(family, Laplace)
        leaf = family.loc.detach().expand(examples, *family.site.shape).clone().requires_grad_()
        leaves[name] = leaf
        values[name] = leaf if family.site.is_real else family.site.transform(leaf)
    with torch.enable_grad():
        updates = pyro.poutine.condition(blora.model.updates, data=values)()
        updates = {name: update.without_noise() for name, update in updates.items()}
        with blora.model.applied(updates) as net:
            logits = blora.likelihood.logits(net, batch)
        if logits.dim() != 2:
            raise ConfigurationError(
                "Laplace needs one choice among a few classes for each example, (B, C) logits; "
                f"{type(blora.likelihood).__name__} has {tuple(logits.shape)}."
            )
        jacobian = []
        for c in range(logits.shape[-1]):
            total = logits[:, c].sum()
            grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
            jacobian.append([g.detach().float() for g in grads])
    p = logits.detach().float().softmax(-1)
    for site, name in enumerate(leaves):
        stacked = torch.stack([row[site] for row in jacobian], 1)  # B x C x n x event
        weight = p.reshape(*p.shape, *(1,) * (stacked.dim() - 2))
        centred = stacked - (weight * stacked).sum(1, keepdim=True)
        yield {name: weight.sqrt() * centred}


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


def best_precision(values: Tensor, loc: Tensor, iterations: int = 200) -> float:
    r"""The prior precision :math:`\delta` of the highest marginal likelihood.

    .. math::

        \log Z(\delta) = -\tfrac{\delta}{2} |\hat U|^2 + \tfrac{k}{2} \log \delta
        - \tfrac12 \sum_i \log(\lambda_i + \delta) + \text{const},

    by MacKay's fixed point :math:`\delta = \gamma / |\hat U|^2`,
    :math:`\gamma = \sum_i \lambda_i / (\lambda_i + \delta)`.

    Args:
        values: the eigenvalues of the curvature.
        loc: the point estimate.
        iterations: of the fixed point.

    Returns:
        ``delta``, between 1e-6 and 1e6.

    Example::

        >>> round(best_precision(torch.full((4,), 1e9), torch.ones(4)), 3)
        1.0
    """
    values, square = values.double(), float(loc.detach().double().square().sum())
    delta = 1.0
    for _ in range(iterations):
        gamma = float((values / (values + delta)).sum())
        delta = min(max(gamma / max(square, 1e-12), 1e-6), 1e6)
    return delta


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
        for site in scores(blora, batch):
            for name, g in site.items():
                curvature[name].add(g)
    chosen = {}
    for name, part in curvature.items():
        scale = (blora.likelihood.num_data or seen) / seen
        values, row_basis, col_basis = part.eigen(scale)
        chosen[name] = delta = best_precision(values, part.family.loc)
        part.family.finish((values + delta).rsqrt(), row_basis, col_basis)
    return chosen
