"""Distributions that neither torch nor Pyro has, and their KL to normals in closed form.

The KL is registered with torch, because :class:`pyro.infer.TraceMeanField_ELBO` silently falls back
on a Monte Carlo estimate without it, and computed before any expansion of the parameters.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints
from torch.distributions.kl import register_kl
from typing_extensions import Self

__all__ = ["MatrixNormal", "Members", "Reshaped"]


class RealDistribution(TorchDistribution):
    """A distribution over real arrays, whose parameters keep their shapes when it is expanded."""

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

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """The same distribution at ``batch_shape``, with the same storage of its parameters."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _flat(self, x: Tensor) -> Tensor:
        """``x`` with one event dimension in place of however many there are."""
        return x.reshape(*x.shape[: x.dim() - len(self.event_shape)], self.event_shape.numel())


class RealNormal(RealDistribution):
    """Normals, drawn as their mean plus a linear function ``_error`` of standard normal noise.

    :meth:`log_prob` scores the very tensor that was drawn last by its noise ``e``, as ``(k -
    |e|^2) / 2 - H[q]``, because recovering the noise by a triangular solve loses all precision for
    ill-conditioned factors. Any other value is scored by ``_log_density``, and so is a detached
    draw, since the noise formula gives the pathwise gradient.
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


class MatrixNormal(RealNormal):
    r"""Matrix normal distribution, parametrized by Cholesky factors.

    .. math::
        X = M + L_r E L_c^\top, \quad E_{ij} \sim N(0, 1), \qquad
        \mathrm{vec}(X) \sim N\bigl(\mathrm{vec}(M),\, L_r L_r^\top \otimes L_c L_c^\top\bigr)

    with the row-major ``vec`` of :meth:`torch.Tensor.flatten` (Gupta, Nagar 1999). Only
    :attr:`covariance_matrix` makes an ``mn x mn`` matrix.
    """

    arg_constraints = {  # noqa: RUF012 (torch's own protocol)
        "loc": constraints.independent(constraints.real, 2),
        "row_scale_tril": constraints.lower_cholesky,
        "col_scale_tril": constraints.lower_cholesky,
    }

    def __init__(
        self,
        loc: Tensor,
        row_scale_tril: Tensor,
        col_scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.row_scale_tril, self.col_scale_tril = loc, row_scale_tril, col_scale_tril
        factors = loc, row_scale_tril, col_scale_tril
        batch_shape = torch.broadcast_shapes(*(x.shape[:-2] for x in factors))
        super().__init__(batch_shape, loc.shape[-2:], validate_args)

    @property
    def mean(self) -> Tensor:
        """The mean, a view of shape ``batch_shape + (m, n)``."""
        return self.loc.expand(self.shape())

    @property
    def variance(self) -> Tensor:
        """The variance of each entry, of shape ``batch_shape + (m, n)``."""
        row, col = (x.square().sum(-1) for x in (self.row_scale_tril, self.col_scale_tril))
        return (row.unsqueeze(-1) * col.unsqueeze(-2)).expand(self.shape())

    @property
    def covariance_matrix(self) -> Tensor:
        """The dense covariance of ``X.flatten(-2)``, of shape ``batch_shape + (mn, mn)``."""
        row, col = (L @ L.mT for L in (self.row_scale_tril, self.col_scale_tril))
        dense = torch.einsum("...ij,...kl->...ikjl", row, col).flatten(-4, -3).flatten(-2)
        return dense.expand(*self.batch_shape, -1, -1)

    def _error(self, noise: Tensor) -> Tensor:
        return multiply(self.row_scale_tril, noise, self.col_scale_tril)

    def _log_density(self, value: Tensor) -> Tensor:
        row, col = inverse(self.row_scale_tril), inverse(self.col_scale_tril)
        log_prob = (
            -0.5 * multiply(row, value - self.loc, col).square().sum((-2, -1))
            - half_log_det(self)
            - 0.5 * self.event_shape.numel() * math.log(2 * math.pi)
        )
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, value.shape[:-2]))

    def entropy(self) -> Tensor:
        """In nats, of shape :attr:`batch_shape`."""
        entropy = half_log_det(self) + 0.5 * self.event_shape.numel() * (1 + math.log(2 * math.pi))
        return entropy.expand(self.batch_shape)


def multiply(row: Tensor, x: Tensor, col: Tensor) -> Tensor:
    """``row x col^T`` by einsum, because matmul copies a factor along each missing dimension."""
    return torch.einsum("...ij,...kj->...ik", torch.einsum("...ij,...jk->...ik", row, x), col)


def inverse(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular factor, at its own batch shape."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False)


def half_log_det(d: MatrixNormal) -> Tensor:
    """``log det(L_r (x) L_c)``, at the factors' own batch shape."""
    (m, n), row, col = d.event_shape, d.row_scale_tril, d.col_scale_tril
    row, col = (x.diagonal(dim1=-2, dim2=-1).log().sum(-1) for x in (row, col))
    return n * row + m * col


class Reshaped(RealNormal):
    """A multivariate normal with its event reshaped, and the moments that its closed KL reads."""

    def __init__(self, base: MultivariateNormal, event_shape: Sequence[int]) -> None:
        self.base_dist = base
        super().__init__(base.batch_shape, torch.Size(event_shape))

    @property
    def _base(self) -> TorchDistribution:
        return self.base_dist.expand(self.batch_shape)

    def _shaped(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[:-1] + self.event_shape)

    def _error(self, noise: Tensor) -> Tensor:
        factor = self.base_dist._unbroadcasted_scale_tril
        return self._shaped(torch.einsum("...ij,...j->...i", factor, self._flat(noise)))

    def _log_density(self, value: Tensor) -> Tensor:
        return self._base.log_prob(self._flat(value))

    @property
    def mean(self) -> Tensor:
        """Of shape ``batch_shape + event_shape``."""
        return self._shaped(self._base.mean)

    @property
    def variance(self) -> Tensor:
        """The variance of each entry, ``batch_shape + event_shape``."""
        return self._shaped(self._base.variance)

    def entropy(self) -> Tensor:
        """In nats, ``batch_shape``."""
        return self._base.entropy()


class Members(RealDistribution):
    """``K`` points, ``(K, *batch_shape, *event_shape)``, which successive draws take in turn.

    Any ``K`` draws in a row contain every point once. All batch elements, the layers of a group,
    take the same point. Drawing advances ``turn`` in place wherever it is shared.
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


def _to_normals(q: RealDistribution, p: Any) -> Tensor:
    """The KL to a product of normals, which needs only the moments and the entropy of ``q``."""
    loc, scale = _normals(p)
    unexpanded = q.expand(q.given_shape)
    error = (unexpanded.variance + (unexpanded.mean - loc).square()) / scale.square()
    cross = scale.log() + 0.5 * (error + math.log(2 * math.pi))
    cross = cross.sum(tuple(range(-len(q.event_shape), 0))) if q.event_shape else cross
    kl = cross - unexpanded.entropy()
    return kl.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))


def _normals(p: Any) -> tuple[Tensor, Tensor]:
    """``loc`` and ``scale`` of a product of normals, of length 1 where a plate expanded them."""
    normal = p.base_dist if isinstance(p, Independent) else p
    if not isinstance(normal, Normal):
        # Pyro then takes a Monte Carlo estimate
        raise NotImplementedError(f"The KL with {p} has no closed form.")

    def collapsed(x: Tensor) -> Tensor:
        strides = x.stride()[: len(p.batch_shape)]
        return x[tuple(slice(None if stride else 1) for stride in strides)]

    return collapsed(normal.loc), collapsed(normal.scale)


for family in (MatrixNormal, Reshaped):
    for normals in (Independent, Normal):
        register_kl(family, normals)(_to_normals)
