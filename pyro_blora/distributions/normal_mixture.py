"""Mixtures of equally likely normals with independent entries."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["NormalMixture", "normal_mixture"]


class NormalMixture(dist.MixtureSameFamily):
    """A mixture with reparametrised draws, whose die no parameter may load.

    The gradient through the component that was chosen is then unbiased by itself.
    """

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        each = self.component_distribution.rsample(torch.Size(sample_shape))
        die = self.mixture_distribution.sample(torch.Size(sample_shape))
        chosen = functional.one_hot(die, self._num_component).to(each.dtype)
        chosen = chosen.reshape(chosen.shape + (1,) * self._event_ndims)
        return (chosen * each).sum(-1 - self._event_ndims)


def normal_mixture(locs: Tensor, scales: Tensor, event_dim: int) -> NormalMixture:
    r""":math:`q(x) = \frac1K \sum_k \prod_i \mathcal{N}(x_i; \mu_{ki}, s_{ki}^2)`.

    Args:
        locs: :math:`\mu`, ``(K, *batch_shape, *event_shape)``.
        scales: :math:`s`, the same shape, positive.
        event_dim: number of dimensions of an event.

    Example::

        >>> q = normal_mixture(torch.zeros(3, 5, 2, 2), torch.ones(3, 5, 2, 2), event_dim=2)
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2, 2]))
    """
    last = -1 - event_dim
    normals = dist.Normal(locs.movedim(0, last), scales.movedim(0, last)).to_event(event_dim)
    return NormalMixture(dist.Categorical(logits=locs.new_zeros(normals.batch_shape)), normals)
