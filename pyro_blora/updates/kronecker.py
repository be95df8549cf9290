"""Kronecker algebra of inducing variables.

With inducing directions ``Z`` (m x d) and noise ``D``, the covariance of one side is
``Psi = Z Z^T + D^2`` and the map from inducing variables to weights is ``T = Psi^-1 Z`` (columns)
or its transpose (rows). With ``L L^T = Psi`` and the whitened core ``V``, ``U = L_r V L_c^T``::

    E[dW | U] = sigma T_r U T_c = sigma Q_r^T V Q_c,   Q = L^-1 Z   (m x d)

so only the *whitened directions* ``Q`` are ever needed on the hot path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from linear_operator.operators import (
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    RootLinearOperator,
)
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_blora.errors import NonFiniteLossError

__all__ = [
    "inducing_covariance",
    "kronecker_covariance",
    "lazy_covariance",
    "whiten",
    "whiten_or_explain",
    "whitened_directions",
]


def inducing_covariance(Z: Tensor, D: Tensor) -> Tensor:
    """``Psi = Z Z^T + D^2``.

    Args:
        Z: inducing directions, ``(..., m, d)``.
        D: their noise, ``(..., m)``, positive.

    Returns:
        ``(..., m, m)``, positive definite.

    Example::

        >>> inducing_covariance(torch.ones(2, 3), torch.ones(2)).diagonal()
        tensor([4., 4.])
    """
    return Z @ Z.mT + torch.diag_embed(D.square())


def whiten(Z: Tensor, Psi: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of ``Psi`` and the whitened directions.

    Args:
        Z: ``(..., m, d)``.
        Psi: ``(..., m, m)``, positive definite.

    Returns:
        ``L`` with ``L L^T = Psi``, ``(..., m, m)``, and ``Q = L^-1 Z``, ``(..., m, d)``.

    Raises:
        linear_operator.utils.errors.NotPSDError: ``Psi`` is not positive definite even with jitter.
        linear_operator.utils.errors.NanError: ``Psi`` has NaN entries.

    Example::

        >>> L, Q = whiten(torch.ones(1, 2), torch.full((1, 1), 4.0))
        >>> Q
        tensor([[0.5000, 0.5000]])
    """
    L = psd_safe_cholesky(Psi)
    return L, torch.linalg.solve_triangular(L, Z, upper=False)


def whiten_or_explain(Z: Tensor, Psi: Tensor, side: str, where: str) -> tuple[Tensor, Tensor]:
    """As :func:`whiten`, with the remedy where ``Psi_{side}`` of ``where`` has no factor.

    Raises:
        NonFiniteLossError: it has none.
    """
    with _explained(side, where):
        return whiten(Z, Psi)


@contextmanager
def _explained(side: str, where: str) -> Iterator[None]:
    try:
        yield
    except (NanError, NotPSDError) as error:
        raise NonFiniteLossError(
            f"Psi_{side} of {where} has no Cholesky factor ({error}); lower the learning rate of "
            f"the directions Z_{side}, or raise noise_init."
        ) from error


class _WhitenedDirections(torch.autograd.Function):
    """``Q = L^-1 Z`` with its gradient in closed form: the factorisation is not differentiated.

    With ``G`` the gradient of ``Q`` and ``R`` the symmetric matrix whose lower triangle is that of
    ``G Q^T``, the gradient of ``Z`` is ``L^-T (G - R Q)`` and that of ``Psi`` is
    ``-L^-T R L^-1 / 2``.
    """

    @staticmethod
    def forward(ctx: Any, Z: Tensor, D: Tensor) -> Tensor:
        # products of exactly three dimensions: torch.matmul first makes views of its operands
        L, Q = whiten(Z, torch.baddbmm(torch.diag_embed(D.square()), Z, Z.mT))
        ctx.save_for_backward(L, Q, D)
        return Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, Tensor]:
        L, Q, D = ctx.saved_tensors
        R = torch.bmm(G, Q.mT).tril()
        R = R + R.tril(-1).mT
        eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        d_Z = torch.bmm(inverse.mT, torch.baddbmm(G, R, Q, alpha=-1))
        return d_Z, -D * (inverse * torch.bmm(R, inverse)).sum(-2)


def whitened_directions(Z: Tensor, D: Tensor, side: str, where: str) -> Tensor:
    """``Q = L^-1 Z`` with ``L L^T = Z Z^T + D^2``; as :func:`whiten`, with a cheaper gradient.

    Args:
        Z: inducing directions, ``(..., m, d)``.
        D: their noise, ``(..., m)``, positive.
        side: ``"r"`` or ``"c"``, for the error.
        where: whose directions they are, for the error.

    Returns:
        ``(..., m, d)``; differentiable once.

    Raises:
        NonFiniteLossError: ``Psi`` has no Cholesky factor.

    Example::

        >>> whitened_directions(torch.ones(1, 3), torch.ones(1), "r", "an example")
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    if Z.dim() != 3:
        D = D.expand(Z.shape[:-1])
        flat = Z.reshape(-1, *Z.shape[-2:]), D.reshape(-1, D.shape[-1])
        return whitened_directions(*flat, side, where).reshape(Z.shape)
    with _explained(side, where):
        Q: Tensor = _WhitenedDirections.apply(Z, D)
    return Q


def lazy_covariance(Z: Tensor, D: Tensor) -> LinearOperator:
    """``Psi = Z Z^T + D^2`` as a linear operator, ``(..., m, m)``; never dense unless asked."""
    return RootLinearOperator(Z) + DiagLinearOperator(D.square())


def kronecker_covariance(Psi_r: LinearOperator, Psi_c: LinearOperator) -> LinearOperator:
    """The covariance ``Psi_r (x) Psi_c`` of ``vec U`` (row-major), ``(..., m_r m_c, m_r m_c)``."""
    return KroneckerProductLinearOperator(Psi_r, Psi_c)
