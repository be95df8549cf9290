"""Draws from a list of points, each point in its turn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_blora.distributions._real_law import RealLaw

__all__ = ["Members"]


class Members(RealLaw):
    r"""``K`` points for each batch element, of which each draw takes the next, over and over.

    Draws are stratified, not independent: any ``K`` in a row have every point once, and all
    batch elements (the layers of a group) take the same point, so that a draw is one member of an
    ensemble through and through. New dimensions on the left are further draws. :meth:`log_prob` is
    zero, as that of :class:`pyro.distributions.Delta`: point masses have no density, and the
    entropy is left out of the ELBO.

    Args:
        points: ``(K, *batch_shape, *event_shape)``.
        event_dim: number of dimensions of an event.
        turn: the number of the point that is next, a whole number; drawing moves it on in place, so
            that the distributions which share it take turns together.

    Example::

        >>> Members(torch.arange(3.0).expand(2, 3).mT, event_dim=0).expand((4, 2)).sample()
        tensor([[0., 0.],
                [1., 1.],
                [2., 2.],
                [0., 0.]])
    """

    def __init__(self, points: Tensor, event_dim: int, turn: Tensor | None = None) -> None:
        self.points = points
        self.turn = points.new_zeros((), dtype=torch.long) if turn is None else turn
        cut = points.dim() - event_dim
        super().__init__(points.shape[1:cut], points.shape[cut:])

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """The points that are next in turn, ``sample_shape + batch_shape + event_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        draws = shape[: len(shape) - self.points.dim() + 1].numel()
        index = (self.turn + torch.arange(draws, device=self.points.device)) % len(self.points)
        # Were the members to go round whole times, each would see the same places of every batch.
        self.turn.add_(draws + (draws % len(self.points) == 0)).remainder_(len(self.points))
        return self.points[index].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, of the broadcast batch shape."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.new_zeros(torch.broadcast_shapes(batch, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """The mean of the points, ``batch_shape + event_shape``."""
        return self.points.mean(0).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """The variance among the points, ``batch_shape + event_shape``."""
        return self.points.var(0, unbiased=False).expand(self.batch_shape + self.event_shape)
