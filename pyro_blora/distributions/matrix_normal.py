"""The matrix normal distribution; its Kullback-Leibler divergences are in ``kl.py``."""

import math
from collections.abc import Sequence

import torch
from linear_operator.operators import (
    CholLinearOperator,
    KroneckerProductLinearOperator,
    TriangularLinearOperator,
)
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_blora.distributions.factors import log_det, multiply, row_squares, solve

__all__ = ["MatrixNormal", "entry_variance", "half_log_det", "mahalanobis"]


class MatrixNormal(TorchDistribution):
    r"""Matrix normal distribution, parametrised by Cholesky factors.

    .. math::
        X = M + L_r E L_c^\top, \quad E_{ij} \sim N(0, 1), \qquad
        \mathrm{vec}(X) \sim N\bigl(\mathrm{vec}(M),\, L_r L_r^\top \otimes L_c L_c^\top\bigr)

    with the row-major ``vec`` that :meth:`torch.Tensor.flatten` makes. Scaling
    :math:`L_r` by :math:`a` and :math:`L_c` by :math:`1/a` leaves the distribution unchanged: only
    the product of the two scales is identified.

    Every method works with the triangular factors alone: no Cholesky factorisation, no ``mn x mn``
    matrix (but for :attr:`covariance_matrix`). Factors keep the batch shape they were given:
    :meth:`expand` neither copies nor repeats them, and a factor shared by several samples or batch
    elements enters one wide product or solve.

    Args:
        loc: the mean :math:`M`, of shape ``(..., m, n)``.
        row_scale_tril: lower Cholesky factor :math:`L_r` of the covariance between rows, of shape
            ``(..., m, m)``, with a positive diagonal.
        col_scale_tril: lower Cholesky factor :math:`L_c` of the covariance between columns, of
            shape ``(..., n, n)``, with a positive diagonal.
        validate_args: whether to check the values of the arguments here and of the values in
            :meth:`log_prob`. Default: torch's global setting.

    Raises:
        ValueError: the shapes do not fit, dtypes or devices differ, or, when validating, ``loc`` is
            NaN somewhere or a factor is not a lower Cholesky factor.

    Reference:
        A. K. Gupta, D. K. Nagar (1999), "Matrix Variate Distributions", chapter 2.

    Example::

        >>> d = MatrixNormal(torch.zeros(5, 3, 2), torch.eye(3), torch.eye(2))
        >>> d.batch_shape, d.event_shape
        (torch.Size([5]), torch.Size([3, 2]))
        >>> d.rsample((4,)).shape
        torch.Size([4, 5, 3, 2])
        >>> d.log_prob(torch.zeros(3, 2)).shape
        torch.Size([5])
    """

    arg_constraints = {  # noqa: RUF012 (torch's own protocol)
        "loc": constraints.independent(constraints.real, 2),
        "row_scale_tril": constraints.lower_cholesky,
        "col_scale_tril": constraints.lower_cholesky,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        row_scale_tril: Tensor,
        col_scale_tril: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        _check_arguments(loc, row_scale_tril, col_scale_tril)
        self._unbroadcasted_loc = loc
        self._unbroadcasted_row = row_scale_tril
        self._unbroadcasted_col = col_scale_tril
        batch_shape, event_shape = self.infer_shapes(
            loc.shape, row_scale_tril.shape, col_scale_tril.shape
        )
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @staticmethod
    def infer_shapes(
        loc: Sequence[int], row_scale_tril: Sequence[int], col_scale_tril: Sequence[int]
    ) -> tuple[torch.Size, torch.Size]:
        """Infer ``(batch_shape, event_shape)`` from the shapes of the arguments.

        Raises:
            RuntimeError: the batch shapes do not broadcast.
        """
        batch_shape = torch.broadcast_shapes(loc[:-2], row_scale_tril[:-2], col_scale_tril[:-2])
        return batch_shape, torch.Size(loc[-2:])

    def expand(
        self, batch_shape: Sequence[int], _instance: "MatrixNormal | None" = None
    ) -> "MatrixNormal":
        """Expand to ``batch_shape``; the result shares the storage of the arguments.

        Raises:
            ValueError: :attr:`batch_shape` does not expand to ``batch_shape``.
        """
        new = self._get_checked_instance(MatrixNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        if not _expands_to(self.batch_shape, batch_shape):
            raise ValueError(
                f"Cannot expand a MatrixNormal of batch_shape {tuple(self.batch_shape)} to "
                f"{tuple(batch_shape)}: only sizes of 1 expand, and new dimensions go to the left."
            )
        new._unbroadcasted_loc = self._unbroadcasted_loc
        new._unbroadcasted_row = self._unbroadcasted_row
        new._unbroadcasted_col = self._unbroadcasted_col
        super(MatrixNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        batch, event = tuple(self.batch_shape), tuple(self.event_shape)
        return f"{type(self).__name__}(batch_shape={batch}, event_shape={event})"

    @property
    def loc(self) -> Tensor:
        """The mean, a view of shape ``batch_shape + (m, n)``."""
        return self._unbroadcasted_loc.expand(self.batch_shape + self.event_shape)

    @property
    def row_scale_tril(self) -> Tensor:
        """The rows' Cholesky factor, a view of shape ``batch_shape + (m, m)``."""
        return self._unbroadcasted_row.expand(*self.batch_shape, -1, -1)

    @property
    def col_scale_tril(self) -> Tensor:
        """The columns' Cholesky factor, a view of shape ``batch_shape + (n, n)``."""
        return self._unbroadcasted_col.expand(*self.batch_shape, -1, -1)

    @property
    def row_covariance(self) -> Tensor:
        """``L_r L_r^T``, of shape ``batch_shape + (m, m)``."""
        return _gram(self._unbroadcasted_row).expand(*self.batch_shape, -1, -1)

    @property
    def col_covariance(self) -> Tensor:
        """``L_c L_c^T``, of shape ``batch_shape + (n, n)``."""
        return _gram(self._unbroadcasted_col).expand(*self.batch_shape, -1, -1)

    @property
    def mean(self) -> Tensor:
        """The mean, of shape ``batch_shape + (m, n)``."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """The mode, which is the mean."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variance of each entry, of shape ``batch_shape + (m, n)``."""
        return entry_variance(self).expand(self.batch_shape + self.event_shape)

    @property
    def covariance_matrix(self) -> Tensor:
        """The dense covariance of ``X.flatten(-2)``, of shape ``batch_shape + (mn, mn)``."""
        row, col = _gram(self._unbroadcasted_row), _gram(self._unbroadcasted_col)
        dense = row[..., :, None, :, None] * col[..., None, :, None, :]
        return dense.flatten(-4, -3).flatten(-2, -1).expand(*self.batch_shape, -1, -1)

    @property
    def lazy_covariance_matrix(self) -> KroneckerProductLinearOperator:
        """The covariance of ``X.flatten(-2)`` that is never formed: a Kronecker product."""
        factors = (self.row_scale_tril, self.col_scale_tril)
        return KroneckerProductLinearOperator(
            *(CholLinearOperator(TriangularLinearOperator(factor)) for factor in factors)
        )

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw with gradients, of shape ``sample_shape + batch_shape + (m, n)``."""
        loc, row, col = self._unbroadcasted_loc, self._unbroadcasted_row, self._unbroadcasted_col
        shape = self._extended_shape(torch.Size(sample_shape))
        given, (m, n) = loc.shape[:-2], self.event_shape
        if len(given) != 1 or not given == row.shape[:-2] == col.shape[:-2] == shape[-3:-2]:
            noise = multiply(row, torch.randn(shape, dtype=loc.dtype, device=loc.device))
            return loc + multiply(col, noise.mT).mT
        # every draw beside the others: one product for a factor, and no dimension to move about
        (b,), draws = given, shape[:-3].numel()
        noise = torch.bmm(row, torch.randn(b, m, draws * n, dtype=loc.dtype, device=loc.device))
        noise = torch.bmm(noise.view(b, m * draws, n), col.mT).view(b, m, draws, n)
        return (loc + noise.permute(2, 0, 1, 3)).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Evaluate the log density, in nats.

        Args:
            value: of shape ``(..., m, n)``, broadcastable with :attr:`batch_shape`.

        Returns:
            Of the broadcast shape of :attr:`batch_shape` and ``value.shape[:-2]``.

        Raises:
            ValueError: when validating, ``value`` has another shape or is NaN somewhere.
        """
        if self._validate_args:
            self._validate_sample(value)
        log_prob = (
            -0.5 * mahalanobis(self, value - self._unbroadcasted_loc)
            - half_log_det(self)
            - 0.5 * self.event_shape.numel() * math.log(2 * math.pi)
        )
        if log_prob.shape == self.batch_shape:
            return log_prob
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, value.shape[:-2]))

    def entropy(self) -> Tensor:
        """Compute the differential entropy, in nats, of shape :attr:`batch_shape`."""
        entropy = half_log_det(self) + 0.5 * self.event_shape.numel() * (1 + math.log(2 * math.pi))
        return entropy.expand(self.batch_shape)


def _check_arguments(loc: Tensor, row: Tensor, col: Tensor) -> None:
    given = (
        f"loc {tuple(loc.shape)}, row_scale_tril {tuple(row.shape)}, "
        f"col_scale_tril {tuple(col.shape)}"
    )
    if min(loc.dim(), row.dim(), col.dim()) < 2:
        raise ValueError(
            f"MatrixNormal needs at least two dimensions in each argument, got {given}."
        )
    m, n = loc.shape[-2:]
    if row.shape[-2:] != (m, m) or col.shape[-2:] != (n, n):
        raise ValueError(
            f"For a loc of {m} x {n}, row_scale_tril must be (..., {m}, {m}) and col_scale_tril "
            f"(..., {n}, {n}); got {given}."
        )
    try:
        MatrixNormal.infer_shapes(loc.shape, row.shape, col.shape)
    except RuntimeError as error:
        raise ValueError(
            f"The dimensions left of the last two must broadcast; got {given}."
        ) from error
    if len({(x.dtype, x.device) for x in (loc, row, col)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (loc, row, col))
        raise ValueError(
            "loc, row_scale_tril and col_scale_tril must agree in dtype and device; got "
            f"{kinds}. Convert them with .to()."
        )


def _expands_to(shape: torch.Size, target: torch.Size) -> bool:
    new = len(target) - len(shape)  # dimensions
    return new >= 0 and all(s in (1, t) for s, t in zip(shape, target[new:], strict=True))


def _gram(factor: Tensor) -> Tensor:
    return factor @ factor.mT


def half_log_det(d: MatrixNormal) -> Tensor:
    """Return ``log det(L_r (x) L_c)``, at the factors' own batch shape."""
    m, n = d.event_shape
    return n * log_det(d._unbroadcasted_row) + m * log_det(d._unbroadcasted_col)


def mahalanobis(d: MatrixNormal, difference: Tensor) -> Tensor:
    """Return ``|L_r^-1 difference L_c^-T|^2``, batched as difference and factors are."""
    whitened = solve(d._unbroadcasted_row, difference)
    whitened = solve(d._unbroadcasted_col, whitened.mT)
    return whitened.square().sum((-2, -1))


def entry_variance(d: MatrixNormal) -> Tensor:
    """Return the variance of each entry, at the factors' own batch shape."""
    row, col = row_squares(d._unbroadcasted_row), row_squares(d._unbroadcasted_col)
    return row.unsqueeze(-1) * col.unsqueeze(-2)
