"""The matrix normal distribution; its Kullback-Leibler divergences are in ``kl.py``."""

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_blora.distributions.real_law import RealNormal


class MatrixNormal(RealNormal):
    r"""Matrix normal distribution, parametrized by Cholesky factors.

    .. math::
        X = M + L_r E L_c^\top, \quad E_{ij} \sim N(0, 1), \qquad
        \mathrm{vec}(X) \sim N\bigl(\mathrm{vec}(M),\, L_r L_r^\top \otimes L_c L_c^\top\bigr)

    with the row-major ``vec`` of :meth:`torch.Tensor.flatten` (Gupta, Nagar 1999). Every method
    works with the triangular factors alone: there is no Cholesky factorization, and only
    :attr:`covariance_matrix` makes an ``mn x mn`` matrix. :meth:`expand` does not copy the factors.
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
        given = loc, row_scale_tril, col_scale_tril
        self._unbroadcasted_loc, self._unbroadcasted_row, self._unbroadcasted_col = given
        batch_shape = torch.broadcast_shapes(*(x.shape[:-2] for x in given))
        super().__init__(batch_shape, loc.shape[-2:], validate_args)

    @property
    def loc(self) -> Tensor:
        """The mean, a view of shape ``batch_shape + (m, n)``."""
        return self._unbroadcasted_loc.expand(self.shape())

    mean = loc

    @property
    def row_scale_tril(self) -> Tensor:
        """The rows' Cholesky factor, a view of shape ``batch_shape + (m, m)``."""
        return self._unbroadcasted_row.expand(*self.batch_shape, -1, -1)

    @property
    def col_scale_tril(self) -> Tensor:
        """The columns' Cholesky factor, a view of shape ``batch_shape + (n, n)``."""
        return self._unbroadcasted_col.expand(*self.batch_shape, -1, -1)

    @property
    def variance(self) -> Tensor:
        """The variance of each entry, of shape ``batch_shape + (m, n)``."""
        row, col = (x.square().sum(-1) for x in (self._unbroadcasted_row, self._unbroadcasted_col))
        return (row.unsqueeze(-1) * col.unsqueeze(-2)).expand(self.shape())

    @property
    def covariance_matrix(self) -> Tensor:
        """The dense covariance of ``X.flatten(-2)``, of shape ``batch_shape + (mn, mn)``."""
        row, col = (L @ L.mT for L in (self.row_scale_tril, self.col_scale_tril))
        size = self.event_shape.numel()
        return torch.einsum("...ij,...kl->...ikjl", row, col).reshape(*row.shape[:-2], size, size)

    def _error(self, noise: Tensor) -> Tensor:
        return multiply(self._unbroadcasted_row, noise, self._unbroadcasted_col)

    def _log_density(self, value: Tensor) -> Tensor:
        log_prob = (
            -0.5 * mahalanobis(self, value - self._unbroadcasted_loc)
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
    (m, n), row, col = d.event_shape, d._unbroadcasted_row, d._unbroadcasted_col
    row, col = (x.diagonal(dim1=-2, dim2=-1).log().sum(-1) for x in (row, col))
    return n * row + m * col


def mahalanobis(d: MatrixNormal, difference: Tensor) -> Tensor:
    """``|L_r^-1 difference L_c^-T|^2``, at the broadcast batch shape of its arguments."""
    row, col = inverse(d._unbroadcasted_row), inverse(d._unbroadcasted_col)
    return multiply(row, difference, col).square().sum((-2, -1))
