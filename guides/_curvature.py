"""The curvature of the loss at a point estimate, as Laplace's approximation needs it."""

import torch
from torch import Tensor

__all__ = ["Curvature", "best_precision"]


class Curvature:
    """The sum over the data of the outer products of a site's scores, in one structure.

    Args:
        is_kron: whether it is a Kronecker product of a row and a column factor, not a diagonal.
    """

    def __init__(self, is_kron: bool) -> None:
        self.is_kron = is_kron
        self.sums: list[Tensor] = []

    def add(self, g: Tensor) -> None:
        """Adds scores, ``(B, C, n, *event_shape)``."""
        if self.is_kron:
            found = [torch.einsum("bcnij,bcnkj->nik", g, g), torch.einsum("bcnij,bcnik->njk", g, g)]
        else:
            found = [g.square().sum((0, 1))]
        self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.sums else found

    def eigen(self, scale: float) -> tuple[Tensor, ...]:
        """Eigenvalues of ``scale H``, ``(n, *event_shape)``, and the bases of a Kronecker product.

        The Kronecker structure is ``H = R (x) C / tr R``, exact where ``H`` is such a product.
        """
        if not self.is_kron:
            return (scale * self.sums[0],)
        trace = self.sums[0].diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)
        (rows, row_basis), (cols, col_basis) = map(torch.linalg.eigh, self.sums)
        values = rows.clamp_min(0).unsqueeze(-1) * cols.clamp_min(0).unsqueeze(-2)
        return scale * values / trace[:, None, None], row_basis, col_basis


def best_precision(values: Tensor, loc: Tensor) -> float:
    r"""The prior precision :math:`\delta` of the highest marginal likelihood.

    .. math::

        \log Z(\delta) = -\tfrac{\delta}{2} |\hat U|^2 + \tfrac{k}{2} \log \delta
        - \tfrac12 \sum_i \log(\lambda_i + \delta) + \text{const},

    whose slope has the sign of :math:`\gamma - \delta |\hat U|^2`, :math:`\gamma = \sum_i \lambda_i
    / (\lambda_i + \delta)`. That falls with :math:`\delta`, so bisection of the logarithm finds
    the one root (MacKay's fixed point :math:`\delta = \gamma / |\hat U|^2` may go in circles),
    between 1e-6 and 1e6.

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
