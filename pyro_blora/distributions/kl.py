"""Kullback-Leibler divergences of the matrix normal distribution, in closed form.

Registered with torch: :func:`torch.distributions.kl_divergence` finds them, and so does
:class:`pyro.infer.TraceMeanField_ELBO`, which would otherwise fall back, silently, on a Monte Carlo
estimate. A result is in nats and has the broadcast batch shape of its two arguments; the work is
done at the batch shape that the factors were given.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.distributions.kl import register_kl

from pyro_blora.distributions.factors import log_det, row_squares, solve
from pyro_blora.distributions.matrix_normal import (
    MatrixNormal,
    half_log_det,
    mahalanobis,
)

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


class _ToNormal(torch.autograd.Function):
    r"""The divergence from independent normals, with its gradient in closed form.

    With :math:`v_{ij} = |L_{r,i}|^2 |L_{c,j}|^2` the variance of an entry and :math:`\delta` the
    difference of the means it is

    .. math::
        \sum_{ij} \Bigl(\frac{v_{ij} + \delta_{ij}^2 - s_{ij}^2}{2 s_{ij}^2} + \log s_{ij}\Bigr)
        - n \log\det L_r - m \log\det L_c

    Its parts, each a node of the graph with a derivative of its own, would cost twice as much.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(delta: Tensor, row: Tensor, col: Tensor, scale: Tensor) -> Tensor:
        m, n = delta.shape[-2:]
        ratio = _second_moment(delta, row, col) / scale.square()
        terms = torch.add(scale.log(), ratio, alpha=0.5).sum((-2, -1))
        return terms - 0.5 * m * n - n * log_det(row) - m * log_det(col)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        delta, row, col, scale = ctx.saved_tensors
        (m, n), r, c = delta.shape[-2:], row_squares(row), row_squares(col)
        weight = gradient[..., None, None] / scale.square()
        d_delta = weight * delta
        d_row = (weight * c.unsqueeze(-2)).sum(-1, keepdim=True) * row
        d_col = (weight * r.unsqueeze(-1)).sum(-2).unsqueeze(-1) * col
        d_row = d_row - _log_det_gradient(n * gradient, row)
        d_col = d_col - _log_det_gradient(m * gradient, col)
        d_scale = None
        if ctx.needs_input_grad[3]:
            second = _second_moment(delta, row, col)
            d_scale = (gradient[..., None, None] - weight * second) / scale
        found = zip((d_delta, d_row, d_col, d_scale), ctx.saved_tensors, strict=True)
        return tuple(d if d is None else d.sum_to_size(x.shape) for d, x in found)


def _second_moment(delta: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """``v + delta^2`` of each entry."""
    r, c = row_squares(row), row_squares(col)
    return torch.addcmul(delta.square(), r.unsqueeze(-1), c.unsqueeze(-2))


def _log_det_gradient(weight: Tensor, factor: Tensor) -> Tensor:
    return torch.diag_embed(weight.unsqueeze(-1) / factor.diagonal(dim1=-2, dim2=-1))


def _kl_matrix_normal_matrix_normal(p: MatrixNormal, q: MatrixNormal) -> Tensor:
    _check_events(p, q)
    row = solve(q._unbroadcasted_row, p._unbroadcasted_row).square().sum((-2, -1))
    col = solve(q._unbroadcasted_col, p._unbroadcasted_col).square().sum((-2, -1))
    distance = mahalanobis(q, p._unbroadcasted_loc - q._unbroadcasted_loc)
    kl = 0.5 * (row * col + distance - p.event_shape.numel()) + half_log_det(q) - half_log_det(p)
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


def _kl_matrix_normal_independent(p: MatrixNormal, q: Independent[Normal]) -> Tensor:
    loc, scale = _normal_base(q)
    _check_events(p, q)
    factors = p._unbroadcasted_row, p._unbroadcasted_col
    kl: Tensor = _ToNormal.apply(p._unbroadcasted_loc - loc, *factors, scale)
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


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
    return kl.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


register_kl(MatrixNormal, MatrixNormal)(_kl_matrix_normal_matrix_normal)
register_kl(MatrixNormal, Independent)(_kl_matrix_normal_independent)
register_kl(Independent, MatrixNormal)(_kl_independent_matrix_normal)
