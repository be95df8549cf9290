"""Laws over real arrays that neither torch nor Pyro has; their divergences are in ``kl.py``."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

Self = TypeVar("Self", bound="RealLaw")


class RealLaw(TorchDistribution):
    """A law over real arrays, whose parameters keep their own shapes when it is expanded."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's own protocol)
    has_rsample = True

    def __init__(
        self, batch_shape: torch.Size, event_shape: torch.Size, validate_args: bool | None = False
    ) -> None:
        self.given_shape = batch_shape  # the batch shape before any expansion
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self: Self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """The same law at ``batch_shape``; it shares the storage of the parameters."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _flat(self, x: Tensor) -> Tensor:
        """``x`` with one event dimension in place of however many there are."""
        return x.reshape(*x.shape[: x.dim() - len(self.event_shape)], self.event_shape.numel())


class RealNormal(RealLaw):
    """A normal law, drawn as its mean plus a linear function ``_error`` of standard normal noise.

    :meth:`log_prob` depends on the identity of its argument: it scores the very tensor that was
    drawn last by its noise ``e`` as ``(k - |e|^2) / 2 - H[q]``, because recovering the noise by a
    triangular solve loses all precision for ill-conditioned factors. Any other value is scored by
    ``_log_density``. So is a draw that is held fixed, because the gradient of the first formula is
    that of a draw that moves with the parameters.
    """

    _error: Callable[[Tensor], Tensor]
    _log_density: Callable[[Tensor], Tensor]
    _drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        mean, shape = self.mean, self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=mean.dtype, device=mean.device)
        value = mean + self._error(noise)
        self._drawn = noise, value
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats, of the broadcast batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        noise, drawn = self._drawn or (value, None)
        if value is not drawn or (torch.is_grad_enabled() and value.grad_fn is None):
            return self._log_density(value)
        squares = self._flat(noise.square()).sum(-1)
        return (self.event_shape.numel() - squares) / 2 - self.entropy()


class CoupledNormal(RealNormal):
    r"""``n`` arrays with a joint normal law, correlated through an ``n x n`` factor.

    .. math::

        X_{l} = M_{l} + S \odot \sum_{k \le l} L_{lk} E_k, \quad E \sim N(0, 1), \qquad
        \mathrm{Cov}[X_{li}, X_{kj}] = (L L^\top)_{lk}\, S_i^2\, \delta_{ij}.

    The ``n`` arrays lie along the last batch dimension. By the chain rule the ``l``-th entries of
    :meth:`log_prob` and :meth:`entropy` are the log density and the entropy of :math:`X_l` given
    :math:`X_{<l}`. Their *sums* over the dimension belong to the joint law, so a plate over it must
    never be subsampled. Dimensions that :meth:`expand` adds have independent copies.
    """

    def __init__(self, loc: Tensor, scale: Tensor, layer_scale_tril: Tensor) -> None:
        self.loc, self.scale, self.layer_scale_tril = loc, scale, layer_scale_tril
        super().__init__(loc.shape[:1], scale.shape)

    def _error(self, noise: Tensor) -> Tensor:
        return self.scale * (self.layer_scale_tril @ self._flat(noise)).reshape(noise.shape)

    def _log_density(self, value: Tensor) -> Tensor:
        error = self._flat((value - self.loc) / self.scale)
        white = torch.linalg.solve_triangular(self.layer_scale_tril, error, upper=False)
        return -0.5 * (white.square() + math.log(2 * math.pi)).sum(-1) - self._log_scale()

    def entropy(self) -> Tensor:
        """The entropy of ``X_l`` given ``X_<l``, ``batch_shape``."""
        size = self.event_shape.numel()
        entropy = 0.5 * size * (1 + math.log(2 * math.pi)) + self._log_scale()
        return entropy.expand(self.batch_shape)

    def _log_scale(self) -> Tensor:
        diagonal = self.layer_scale_tril.diagonal().log()
        return self.event_shape.numel() * diagonal + self.scale.log().sum()

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self.loc.expand(self.shape())

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each entry, ``batch_shape + event_shape``."""
        layers = self.layer_scale_tril.square().sum(-1)
        layers = layers.reshape(layers.shape + (1,) * len(self.event_shape))
        return (layers * self.scale.square()).expand(self.shape())


class Reshaped(RealLaw):
    """``base`` over vectors of ``k`` numbers, its event reshaped to ``event_shape``.

    Unlike ``TransformedDistribution(base, ReshapeTransform(...))`` it keeps the mean, the variance
    and the entropy of its base, so the KL from a product of normals has its closed form.
    """

    def __init__(self, base: TorchDistribution, event_shape: Sequence[int]) -> None:
        self.base_dist = base
        super().__init__(base.batch_shape, torch.Size(event_shape))

    @property
    def _base(self) -> TorchDistribution:
        return self.base_dist.expand(self.batch_shape)

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[:-1] + self.event_shape)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        return self._shaped(self._base.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats, of the broadcast batch shape."""
        return self._base.log_prob(self._flat(value))

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self._shaped(self._base.mean)

    @property
    def variance(self) -> Tensor:
        """Of each entry, ``batch_shape + event_shape``."""
        return self._shaped(self._base.variance)

    def entropy(self) -> Tensor:
        """In nats, ``batch_shape``."""
        return self._base.entropy()


class Members(RealLaw):
    """``K`` points, ``(K, *batch_shape, *event_shape)``, which successive draws take in turn.

    Draws are stratified, not independent: any ``K`` in a row contain every point once. All batch
    elements (the layers of a group) take the same point, so that a draw is one member of an
    ensemble in every layer. Drawing advances ``turn`` in place for every law that shares it.
    """

    def __init__(self, points: Tensor, event_dim: int, turn: Tensor) -> None:
        self.points, self.turn = points, turn
        cut = points.dim() - event_dim
        super().__init__(points.shape[1:cut], points.shape[cut:])

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """The points that are next in turn, ``sample_shape + batch_shape + event_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        draws = shape[: len(shape) - self.points.dim() + 1].numel()
        index = (self.turn + torch.arange(draws, device=self.points.device)) % len(self.points)
        # After a multiple of K draws the turn moves on by one more, because otherwise each member
        # would see the same places of every batch.
        self.turn.add_(draws + (draws % len(self.points) == 0)).remainder_(len(self.points))
        return self.points[index].reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, of the broadcast batch shape."""
        batch = self._flat(value).shape[:-1]
        return value.new_zeros(torch.broadcast_shapes(batch, self.batch_shape))

    @property
    def mean(self) -> Tensor:
        """The mean of the points, ``batch_shape + event_shape``."""
        return self.points.mean(0).expand(self.shape())


class NormalMixture(dist.MixtureSameFamily):
    """A mixture with reparametrized draws, unbiased because its mixture weights are fixed."""

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        each = self.component_distribution.rsample(torch.Size(sample_shape))
        chosen = self.mixture_distribution.sample(torch.Size(sample_shape))
        # not one_hot, which reads the largest class and so synchronizes the device
        mask = chosen.unsqueeze(-1) == torch.arange(self._num_component, device=chosen.device)
        mask = mask.to(each.dtype).reshape(mask.shape + (1,) * self._event_ndims)
        return (mask * each).sum(-1 - self._event_ndims)
