"""A distribution over vectors, shown as one over matrices or arrays of any shape."""

from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_blora.distributions._real_law import RealLaw

__all__ = ["Reshaped"]


class Reshaped(RealLaw):
    r"""``base`` over vectors of ``k`` numbers, its event given the shape ``event_shape``.

    Unlike ``TransformedDistribution(base, ReshapeTransform(...))`` it keeps the mean, the variance
    and the entropy of its base, and with them the closed form of the KL from a product of normals.

    Args:
        base: of event shape ``(k,)``, with reparametrised draws.
        event_shape: of ``k`` numbers in all; ``()`` for ``k = 1``.

    Example::

        >>> base = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))
        >>> q = Reshaped(base, (2, 3))
        >>> q.rsample((4,)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, base: TorchDistribution, event_shape: Sequence[int]) -> None:
        self.base_dist = base
        super().__init__(base.batch_shape, torch.Size(event_shape))

    @property
    def _base(self) -> TorchDistribution:
        return self.base_dist.expand(self.batch_shape)

    def _shown(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[:-1] + self.event_shape)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        return self._shown(self._base.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats, of the broadcast batch shape."""
        if (own := self.of_own_draw(value)) is not None:
            return own
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return self._base.log_prob(value.reshape(*batch, self.event_shape.numel()))

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self._shown(self._base.mean)

    @property
    def variance(self) -> Tensor:
        """Of each entry, ``batch_shape + event_shape``."""
        return self._shown(self._base.variance)

    def entropy(self) -> Tensor:
        """In nats, ``batch_shape``."""
        return self._base.entropy()
