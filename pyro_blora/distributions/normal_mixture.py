"""Mixtures of equally likely normals with independent entries."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["NormalMixture"]


class NormalMixture(TorchDistribution):
    r""":math:`q(x) = \frac1K \sum_k \prod_i \mathcal{N}(x_i; \mu_{ki}, s_{ki}^2)`.

    The component of a draw is chosen by a fair die that no parameter loads, so the gradient through
    the chosen normal alone is unbiased. (Pyro's ``MixtureOfDiagNormals`` has weights too, and
    densities outside of the log domain, which overflow beyond some thirty entries.)

    Args:
        locs: :math:`\mu`, ``(K, *batch_shape, *event_shape)``.
        scales: :math:`s`, the same shape, positive.
        event_dim: number of dimensions of an event.

    Example::

        >>> q = NormalMixture(torch.zeros(3, 5, 2, 2), torch.ones(3, 5, 2, 2), event_dim=2)
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2, 2]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, locs: Tensor, scales: Tensor, event_dim: int) -> None:
        self.locs, self.scales = locs, scales
        cut = locs.dim() - event_dim
        super().__init__(locs.shape[1:cut], locs.shape[cut:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(
        self, batch_shape: Sequence[int], _instance: "NormalMixture | None" = None
    ) -> "NormalMixture":
        """The components are shared by the new dimensions."""
        new = NormalMixture(self.locs, self.scales, len(self.event_shape))
        new._batch_shape = torch.Size(batch_shape)
        return new

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        batch = shape[: len(shape) - len(self.event_shape)]
        die = torch.randint(len(self.locs), batch, device=self.locs.device)
        chosen = torch.nn.functional.one_hot(die, len(self.locs)).movedim(-1, 0).to(self.locs.dtype)
        chosen = chosen.reshape(chosen.shape + (1,) * len(self.event_shape))
        lead = (1,) * (len(shape) + 1 - self.locs.dim())
        own = (len(self.locs), *lead, *self.locs.shape[1:])
        loc = (chosen * self.locs.reshape(own)).sum(0)
        scale = (chosen * self.scales.reshape(own)).sum(0)
        return loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats, of the broadcast batch shape."""
        lead = (1,) * (value.dim() + 1 - self.locs.dim())
        own = (len(self.locs), *lead, *self.locs.shape[1:])
        locs, scales = self.locs.reshape(own), self.scales.reshape(own)
        each = (
            -0.5 * ((value - locs) / scales).square() - scales.log() - 0.5 * math.log(2 * math.pi)
        )
        dims = tuple(range(-len(self.event_shape), 0))
        total = each.sum(dims) if dims else each
        log_prob = total.logsumexp(0) - math.log(len(self.locs))
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self.locs.mean(0).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Of each entry, ``batch_shape + event_shape``."""
        second = (self.scales.square() + self.locs.square()).mean(0)
        variance = second - self.locs.mean(0).square()
        return variance.expand(self.batch_shape + self.event_shape)
