"""Products and solves with triangular factors that are shared along batch dimensions.

Left to themselves, matmul and solve_triangular repeat a factor along every batch dimension that
only the other operand has. Here those dimensions are moved into the columns: one wide matrix per
given factor.
"""

import torch
from torch import Tensor

__all__ = ["log_det", "multiply", "row_squares", "solve"]


def log_det(factor: Tensor) -> Tensor:
    """``log det factor`` of a triangle with a positive diagonal, ``(..., m, m)`` to ``(...)``."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def row_squares(factor: Tensor) -> Tensor:
    """``diag(factor factor^T)``, the squared norms of the rows, ``(..., m, k)`` to ``(..., m)``."""
    return factor.square().sum(-1)


def multiply(factor: Tensor, x: Tensor) -> Tensor:
    """``factor x``, ``(..., m, m)`` and ``(..., m, k)``, whose batches broadcast."""
    return torch.einsum("...ij,...jk->...ik", factor, x)


def solve(factor: Tensor, x: Tensor) -> Tensor:
    """``factor^-1 x`` for a lower triangle, ``(..., m, m)`` and ``(..., m, k)``."""
    given, batch = factor.shape[:-2], x.shape[:-2]
    if given != batch:
        batch = torch.broadcast_shapes(given, batch)
        x = x.expand(batch + x.shape[-2:])
    own = (1,) * (len(batch) - len(given)) + tuple(given)
    moved = [i for i in range(len(batch)) if own[i] != batch[i]]
    if not moved:
        return torch.linalg.solve_triangular(factor, x, upper=False)
    kept = [i for i in range(len(batch)) if own[i] == batch[i]]
    order = [*kept, len(batch), *moved, len(batch) + 1]
    x = x.permute(order)
    shape, kept_shape = x.shape, x.shape[: len(kept)]
    x = x.reshape((*kept_shape, shape[len(kept)], shape[len(kept) + 1 :].numel()))
    factor = factor.reshape(kept_shape + factor.shape[-2:])
    result = torch.linalg.solve_triangular(factor, x, upper=False).reshape(shape)
    return result.permute([order.index(i) for i in range(len(order))])
