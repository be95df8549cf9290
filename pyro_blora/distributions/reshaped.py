"""A distribution over vectors, shown as one over matrices or arrays of any shape."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints
from torch.distributions.kl import register_kl

__all__ = ["Reshaped"]


class Reshaped(TorchDistribution):
    r"""``base`` over vectors of ``k`` numbers, its event given the shape ``event_shape``.

    Unlike ``TransformedDistribution(base, ReshapeTransform(...))`` it keeps the mean, the variance
    and the entropy of its base, and with them the closed form of

    .. math::

        \mathrm{KL}[q \,\|\, p] = -H[q] + \sum_i \left( \log s_i + \tfrac12 \log 2\pi
        + \frac{\mathrm{Var}_q[x_i] + (\mathrm{E}_q[x_i] - \mu_i)^2}{2 s_i^2} \right)

    from a product of normals :math:`p`, which needs no more of :math:`q` than these.

    Args:
        base: of event shape ``(k,)``.
        event_shape: of ``k`` numbers in all; ``()`` for ``k = 1``.

    Raises:
        ValueError: the numbers of elements differ.

    Example::

        >>> base = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))
        >>> q = Reshaped(base, (2, 3))
        >>> q.rsample((4,)).shape
        torch.Size([4, 2, 3])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base: TorchDistribution, event_shape: Sequence[int]) -> None:
        event_shape = torch.Size(event_shape)
        if len(base.event_shape) != 1 or base.event_shape.numel() != event_shape.numel():
            raise ValueError(
                f"Reshaped needs a base over vectors of {event_shape.numel()} numbers for "
                f"the event shape {tuple(event_shape)}; got one of {tuple(base.event_shape)}."
            )
        self.base_dist = base
        super().__init__(base.batch_shape, event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the base has reparametrised draws."""
        return bool(self.base_dist.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: "Reshaped | None" = None) -> "Reshaped":
        """The base expanded, shown as before."""
        return Reshaped(self.base_dist.expand(torch.Size(batch_shape)), self.event_shape)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        return self._shown(self.base_dist.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw without gradients, ``sample_shape + batch_shape + event_shape``."""
        return self._shown(self.base_dist.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats, of the broadcast batch shape."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return self.base_dist.log_prob(value.reshape(*batch, self.event_shape.numel()))

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self._shown(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """Of each entry, ``batch_shape + event_shape``."""
        return self._shown(self.base_dist.variance)

    def entropy(self) -> Tensor:
        """In nats, ``batch_shape``."""
        return self.base_dist.entropy()

    def _shown(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[:-1] + self.event_shape)


def kl_from_moments(q: TorchDistribution, p: Any) -> Tensor:
    """``KL[q || p]`` from a product of normals, by the entropy, mean and variance of ``q``.

    Raises:
        NotImplementedError: ``p`` is no product of normals over one event; Pyro then falls back on
            a Monte Carlo estimate.
    """
    normal = p.base_dist if isinstance(p, Independent) else p
    if not isinstance(normal, Normal) or p.event_shape != q.event_shape:
        raise NotImplementedError(f"No closed form of KL[{type(q).__name__} || {p}] is known.")
    error = (q.variance + (q.mean - normal.loc).square()) / normal.scale.square()
    cross = 0.5 * (error + (2 * torch.pi * normal.scale.square()).log())
    cross = cross.sum(tuple(range(-len(q.event_shape), 0))) if q.event_shape else cross
    return cross - q.entropy()


register_kl(Reshaped, Independent)(kl_from_moments)
register_kl(Reshaped, Normal)(kl_from_moments)
