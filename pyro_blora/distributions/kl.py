"""Kullback-Leibler divergences of the matrix normal distribution, in closed form.

Registered with torch: :func:`torch.distributions.kl_divergence` finds them, and so does
:class:`pyro.infer.TraceMeanField_ELBO`, which would otherwise fall back, silently, on a Monte Carlo
estimate. A result is in nats and has the broadcast batch shape of its two arguments; the work is
done at the batch shape that the factors were given.
"""

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.kl import register_kl

from pyro_blora.distributions.factors import solve
from pyro_blora.distributions.matrix_normal import (
    MatrixNormal,
    entry_variance,
    half_log_det,
    mahalanobis,
)
from pyro_blora.shapes import broadcast_shapes

__all__: list[str] = []


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal of ``(L L^T)^-1``."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return solve(factor, eye.expand_as(factor)).square().sum(-2)


def _check_events(p: Distribution, q: Distribution) -> None:
    if p.event_shape != q.event_shape:
        raise ValueError(
            "The Kullback-Leibler divergence needs equal event shapes, got "
            f"{tuple(p.event_shape)} and {tuple(q.event_shape)}."
        )


def _normal_base(d: Independent[Normal]) -> tuple[Tensor, Tensor]:
    """Return ``loc`` and ``scale`` of a normal over matrices, without expanded dimensions.

    ``Normal.expand`` makes strides of zero, which are undone here so that a prior expanded by a
    plate costs no more than the one that was written.
    """
    if not isinstance(d.base_dist, Normal) or d.reinterpreted_batch_ndims != 2:
        # Pyro answers this with a Monte Carlo estimate, as for every pair without a closed form
        raise NotImplementedError(
            "A closed form needs Normal(...).to_event(2), got "
            f"{type(d.base_dist).__name__}(...).to_event({d.reinterpreted_batch_ndims})."
        )
    return _collapse(d.base_dist.loc), _collapse(d.base_dist.scale)


def _collapse(x: Tensor) -> Tensor:
    for dim in range(x.dim() - 2):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _kl_matrix_normal_matrix_normal(p: MatrixNormal, q: MatrixNormal) -> Tensor:
    _check_events(p, q)
    row = solve(q._unbroadcasted_row, p._unbroadcasted_row).square().sum((-2, -1))
    col = solve(q._unbroadcasted_col, p._unbroadcasted_col).square().sum((-2, -1))
    distance = mahalanobis(q, p._unbroadcasted_loc - q._unbroadcasted_loc)
    kl = 0.5 * (row * col + distance - p.event_shape.numel()) + half_log_det(q) - half_log_det(p)
    return kl.expand(broadcast_shapes(p.batch_shape, q.batch_shape))


def _kl_matrix_normal_independent(p: MatrixNormal, q: Independent[Normal]) -> Tensor:
    loc, scale = _normal_base(q)
    _check_events(p, q)
    second_moment = entry_variance(p) + (p._unbroadcasted_loc - loc).square()
    kl = (
        0.5 * ((second_moment / scale.square()).sum((-2, -1)) - p.event_shape.numel())
        + scale.log().sum((-2, -1))
        - half_log_det(p)
    )
    return kl.expand(broadcast_shapes(p.batch_shape, q.batch_shape))


def _kl_independent_matrix_normal(p: Independent[Normal], q: MatrixNormal) -> Tensor:
    loc, scale = _normal_base(p)
    _check_events(p, q)
    row = _inverse_diagonal(q._unbroadcasted_row).unsqueeze(-1)
    col = _inverse_diagonal(q._unbroadcasted_col).unsqueeze(-2)
    kl = (
        0.5 * ((scale.square() * row * col).sum((-2, -1)) - p.event_shape.numel())
        + 0.5 * mahalanobis(q, loc - q._unbroadcasted_loc)
        + half_log_det(q)
        - scale.log().sum((-2, -1))
    )
    return kl.expand(broadcast_shapes(p.batch_shape, q.batch_shape))


register_kl(MatrixNormal, MatrixNormal)(_kl_matrix_normal_matrix_normal)
register_kl(MatrixNormal, Independent)(_kl_matrix_normal_independent)
register_kl(Independent, MatrixNormal)(_kl_independent_matrix_normal)
