"""Kronecker algebra of inducing variables.

With inducing directions ``Z`` (m x d) and noise ``D``, the covariance of one side is
``Psi = Z Z^T + D^2`` and the map from inducing variables to weights is ``T = Psi^-1 Z`` (columns)
or its transpose (rows). With ``L L^T = Psi`` and the whitened core ``V``, ``U = L_r V L_c^T``::

    E[dW | U] = sigma T_r U T_c = sigma Q_r^T V Q_c,   Q = L^-1 Z   (m x d)

so only the *whitened directions* ``Q`` are ever needed on the hot path.
"""

import torch
from linear_operator import settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError, NotPSDError
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_blora.errors import NonFiniteLossError


def inducing_covariance(Z: Tensor, D: Tensor) -> Tensor:
    """``Psi = Z Z^T + D^2``, of ``Z``, ``(..., m, d)``, and ``D``, ``(..., m)``."""
    return Z @ Z.mT + torch.diag_embed(D.square())


def cholesky(Psi: Tensor) -> Tensor:
    """The lower factor of ``Psi``, with jitter where rounding has left it indefinite.

    ``psd_safe_cholesky`` looks whether a try was good, and on a graphics card the host waits for
    that. So with Pyro's checks off, as ``fit`` has them, all its tries are made unseen, and where
    none is good the factor is NaN, as the loss then is.
    """
    if is_validation_enabled():
        return psd_safe_cholesky(Psi)
    jitter = Psi.new_zeros(Psi.shape[:-1])
    with torch.no_grad():
        for step in range(settings.cholesky_max_tries.value()):
            failed = torch.linalg.cholesky_ex(Psi + torch.diag_embed(jitter)).info > 0
            size = settings.cholesky_jitter.value(Psi.dtype) * 10**step
            jitter = jitter.masked_fill(failed.unsqueeze(-1), size)
    L, info = torch.linalg.cholesky_ex(Psi + torch.diag_embed(jitter))
    return L.masked_fill((info > 0)[..., None, None], torch.nan)


def whiten(Z: Tensor, Psi: Tensor) -> tuple[Tensor, Tensor]:
    """The factor ``L``, ``L L^T = Psi``, and the whitened directions ``Q = L^-1 Z``."""
    L = cholesky(Psi)
    return L, torch.linalg.solve_triangular(L, Z, upper=False)


def whiten_or_explain(Z: Tensor, Psi: Tensor, side: str, where: str) -> tuple[Tensor, Tensor]:
    """As :func:`whiten`, with the remedy where ``Psi_{side}`` of ``where`` has no factor."""
    try:
        return whiten(Z, Psi)
    except (NanError, NotPSDError) as error:
        raise NonFiniteLossError(
            f"Psi_{side} of {where} has no Cholesky factor ({error}); lower the learning rate of "
            f"the directions Z_{side}, or raise noise_init."
        ) from error


def between_orthonormal(B: Tensor, A: Tensor, m_r: int, m_c: int) -> tuple[Tensor, Tensor, Tensor]:
    """``Q_r``, ``C``, ``Q_c`` with ``B A = Q_r^T C Q_c`` and orthonormal rows in both ``Q``.

    ``Q_r`` is ``(..., m_r, d_out)`` with ``m_r`` at least ``r``; rows that ``B`` does not need are
    random. The same for ``Q_c``.
    """
    wide = B.double(), A.double()
    Q_r, Q_c = _basis(wide[0], m_r), _basis(wide[1].mT, m_c)
    core = (Q_r.mT @ wide[0]) @ (wide[1] @ Q_c)
    return Q_r.mT.to(B.dtype), core.to(B.dtype), Q_c.mT.to(B.dtype)


def _basis(X: Tensor, m: int) -> Tensor:
    X = torch.nn.functional.pad(X, (0, m - X.shape[-1]))
    return torch.linalg.qr(torch.where(X.any(-2, keepdim=True), X, torch.randn_like(X))).Q
