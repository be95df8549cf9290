"""Products and solves with triangular factors that are shared along batch dimensions."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["apply_factor", "solve"]


def solve(factor: Tensor, x: Tensor) -> Tensor:
    """Return ``factor^-1 x``; torch repeats ``factor`` where only ``x`` has a batch dimension."""
    return torch.linalg.solve_triangular(factor, x, upper=False)


def apply_factor(op: Callable[[Tensor, Tensor], Tensor], factor: Tensor, x: Tensor) -> Tensor:
    """Apply ``op(factor, x)``, a product or a solve, column by column of ``x``.

    Left to itself, torch repeats ``factor`` along every batch dimension that only ``x`` has. Those
    dimensions are moved into the columns of ``x`` instead: one wide matrix per given factor.
    """
    batch = torch.broadcast_shapes(factor.shape[:-2], x.shape[:-2])
    x = x.expand(batch + x.shape[-2:])
    own = (1,) * (len(batch) + 2 - factor.dim()) + tuple(factor.shape[:-2])
    moved = [i for i in range(len(batch)) if own[i] != batch[i]]
    if not moved:
        return op(factor, x)
    kept = [i for i in range(len(batch)) if own[i] == batch[i]]
    order = [*kept, len(batch), *moved, len(batch) + 1]
    x = x.permute(order)
    shape, kept_shape = x.shape, x.shape[: len(kept)]
    columns = shape[len(kept) + 1 :].numel()
    x = x.reshape((*kept_shape, shape[len(kept)], columns))
    result = op(factor.reshape(kept_shape + factor.shape[-2:]), x).reshape(shape)
    return result.permute([order.index(i) for i in range(len(order))])
