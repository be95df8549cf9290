"""Kullback-Leibler divergences in closed form, registered with torch.

Without them :class:`pyro.infer.TraceMeanField_ELBO` silently falls back on a Monte Carlo estimate.
They are computed at the batch shape of the parameters, before any expansion.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.kl import register_kl

from pyro_blora.distributions.matrix_normal import MatrixNormal, half_log_det, inverse, mahalanobis
from pyro_blora.distributions.real_law import CoupledNormal, RealLaw, Reshaped


def _to_normals(q: RealLaw, p: Any) -> Tensor:
    """To a product of normals, for which the moments and the entropy of ``q`` are enough."""
    loc, scale = _normals(p)
    given = q.expand(q.given_shape)
    error = (given.variance + (given.mean - loc).square()) / scale.square()
    cross = scale.log() + 0.5 * (error + math.log(2 * math.pi))
    cross = cross.sum(tuple(range(-len(q.event_shape), 0))) if q.event_shape else cross
    return _expanded(cross - given.entropy(), q, p)


def _between_matrix_normals(p: MatrixNormal, q: MatrixNormal) -> Tensor:
    row = (inverse(q._unbroadcasted_row) @ p._unbroadcasted_row).square().sum((-2, -1))
    col = (inverse(q._unbroadcasted_col) @ p._unbroadcasted_col).square().sum((-2, -1))
    distance = mahalanobis(q, p._unbroadcasted_loc - q._unbroadcasted_loc)
    kl = 0.5 * (row * col + distance - p.event_shape.numel()) + half_log_det(q) - half_log_det(p)
    return _expanded(kl, p, q)


def _from_normals(p: Any, q: MatrixNormal) -> Tensor:
    loc, scale = _normals(p)
    row = inverse(q._unbroadcasted_row).square().sum(-2).unsqueeze(-1)
    col = inverse(q._unbroadcasted_col).square().sum(-2).unsqueeze(-2)
    terms = 0.5 * (scale.square() * row * col - 1) - scale.log()
    kl = terms.sum((-2, -1)) + 0.5 * mahalanobis(q, loc - q._unbroadcasted_loc) + half_log_det(q)
    return _expanded(kl, p, q)


def _expanded(kl: Tensor, p: Distribution, q: Distribution) -> Tensor:
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


def _normals(p: Any) -> tuple[Tensor, Tensor]:
    """``loc`` and ``scale`` of a product of normals, of length 1 where a plate expanded them."""
    normal = p.base_dist if isinstance(p, Independent) else p
    if not isinstance(normal, Normal):
        # Pyro then takes a Monte Carlo estimate
        raise NotImplementedError(f"The KL with {p} has no closed form.")
    cut = len(p.batch_shape)
    return _collapse(normal.loc, cut), _collapse(normal.scale, cut)


def _collapse(x: Tensor, cut: int) -> Tensor:
    return x[tuple(slice(None if stride else 1) for stride in x.stride()[:cut])]


for law in (CoupledNormal, MatrixNormal, Reshaped):
    for normals in (Independent, Normal):
        register_kl(law, normals)(_to_normals)
register_kl(MatrixNormal, MatrixNormal)(_between_matrix_normals)
register_kl(Independent, MatrixNormal)(_from_normals)
