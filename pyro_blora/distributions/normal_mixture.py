"""Mixtures of equally likely normals with independent entries."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["NormalMixture"]


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
