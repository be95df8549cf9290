"""Laws over real arrays that neither torch nor Pyro has; their divergences are in ``kl.py``."""

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

Self = TypeVar("Self", bound="RealLaw")


class RealLaw(TorchDistribution):
    """A law over real arrays whose parameters stay as they were given when it is expanded."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's own protocol)
    has_rsample = True
    _drawn: tuple[Tensor, Tensor] | None = None

    def __init__(
        self, batch_shape: torch.Size, event_shape: torch.Size, validate_args: bool | None = False
    ) -> None:
        self._given_shape = batch_shape
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self: Self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """The same law at ``batch_shape``; it shares the storage of the parameters."""
        torch.empty(self.batch_shape, device="meta").expand(batch_shape)  # raises if it does not
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def as_given(self: Self) -> Self:
        """The law before it was expanded."""
        new = copy.copy(self)
        new._batch_shape = self._given_shape
        return new

    def made_of(self, noise: Tensor, value: Tensor) -> Tensor:
        """``value``, a draw of a normal law, which :meth:`of_own_draw` is to know."""
        self._drawn = noise, value
        return value

    def of_own_draw(self, value: Tensor) -> Tensor | None:
        """The log density of the last draw by its noise ``e``, ``(k - |e|^2) / 2 - H[q]``.

        Recovering the noise by a triangular solve would lose all precision for ill-conditioned
        factors. ``None`` of any other value, and of a draw held fixed, whose density has another
        gradient.
        """
        noise, drawn = self._drawn or (value, None)
        if value is not drawn or (torch.is_grad_enabled() and value.grad_fn is None):
            return None
        batch = noise.shape[: noise.dim() - len(self.event_shape)]
        squares = noise.square().reshape(*batch, -1).sum(-1)
        return (self.event_shape.numel() - squares) / 2 - self.entropy()


class CoupledNormal(RealLaw):
    r"""``n`` arrays with a joint normal law, correlated through an ``n x n`` factor.

    .. math::

        X_{l} = M_{l} + S \odot \sum_{k \le l} L_{lk} E_k, \quad E \sim N(0, 1), \qquad
        \mathrm{Cov}[X_{li}, X_{kj}] = (L L^\top)_{lk}\, S_i^2\, \delta_{ij}.

    The last batch dimension is that of the ``n`` arrays. By the chain rule the ``l``-th entry of
    :meth:`log_prob` is :math:`\log q(X_l \mid X_{<l})`, and that of :meth:`entropy` is alike. So
    *sums* over the dimension are those of the joint law, and it may stand under a plate that is
    never subsampled. Dimensions that :meth:`expand` adds have independent copies.
    """

    def __init__(self, loc: Tensor, scale: Tensor, layer_scale_tril: Tensor) -> None:
        self.loc, self.scale, self.layer_scale_tril = loc, scale, layer_scale_tril
        super().__init__(loc.shape[:1], scale.shape)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        error = self.scale * (self.layer_scale_tril @ self._flat(noise)).reshape(shape)
        return self.made_of(noise, self.loc + error)

    def log_prob(self, value: Tensor) -> Tensor:
        """``log q(X_l | X_<l)`` in nats, of the broadcast batch shape."""
        if (own := self.of_own_draw(value)) is not None:
            return own
        error = self._flat((value - self.loc) / self.scale)
        white = torch.linalg.solve_triangular(self.layer_scale_tril, error, upper=False)
        return -0.5 * (white.square() + math.log(2 * math.pi)).sum(-1) - self._log_scale()

    def entropy(self) -> Tensor:
        """The entropy of ``X_l`` given ``X_<l``, ``batch_shape``."""
        size = self.event_shape.numel()
        entropy = 0.5 * size * (1 + math.log(2 * math.pi)) + self._log_scale()
        return entropy.expand(self.batch_shape)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: x.dim() - len(self.event_shape)], self.event_shape.numel())

    def _log_scale(self) -> Tensor:
        diagonal = self.layer_scale_tril.diagonal().log()
        return self.event_shape.numel() * diagonal + self.scale.log().sum()

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each entry, ``batch_shape + event_shape``."""
        layers = self.layer_scale_tril.square().sum(-1)
        layers = layers.reshape(layers.shape + (1,) * len(self.event_shape))
        return (layers * self.scale.square()).expand(self.batch_shape + self.event_shape)


class Reshaped(RealLaw):
    """``base`` over vectors of ``k`` numbers, its event given the shape ``event_shape``.

    Unlike ``TransformedDistribution(base, ReshapeTransform(...))`` it keeps the mean, the variance
    and the entropy of its base, so the KL from a product of normals has its closed form.
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


class Members(RealLaw):
    """``K`` points, ``(K, *batch_shape, *event_shape)``, of which each draw takes the next.

    Draws are stratified, not independent: any ``K`` in a row have every point once. All batch
    elements (the layers of a group) take the same point, so a draw is one member of an ensemble
    through and through. Drawing moves ``turn`` on in place, for all that share it.
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


class NormalMixture(dist.MixtureSameFamily):
    """A mixture with reparametrized draws, unbiased because its mixture weights are fixed."""

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, ``sample_shape + batch_shape + event_shape``."""
        each = self.component_distribution.rsample(torch.Size(sample_shape))
        die = self.mixture_distribution.sample(torch.Size(sample_shape))
        # not by one_hot, which looks at the die, and the host waits for it
        each_one = torch.arange(self._num_component, device=die.device)
        chosen = (die.unsqueeze(-1) == each_one).to(each.dtype)
        chosen = chosen.reshape(chosen.shape + (1,) * self._event_ndims)
        return (chosen * each).sum(-1 - self._event_ndims)
