"""Shapes that broadcast."""

from collections.abc import Sequence

import torch

__all__ = ["broadcast_shapes"]


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """``torch.broadcast_shapes``, at once where all shapes are alike or empty.

    Torch's own is a reference implementation, too slow for what every training step asks.

    Raises:
        RuntimeError: the shapes do not broadcast.

    Example::

        >>> broadcast_shapes((2, 1), (), (2, 1))
        torch.Size([2, 1])
    """
    distinct = {tuple(shape) for shape in shapes if len(shape)}
    if len(distinct) > 1:
        return torch.Size(torch.broadcast_shapes(*distinct))
    return torch.Size(distinct.pop() if distinct else ())
