"""Kronecker algebra of inducing variables.

With inducing directions ``Z`` (m x d) and noise ``D``, the covariance of one side is
``Psi = Z Z^T + D^2`` and the map from inducing variables to weights is ``T = Psi^-1 Z`` (columns)
or its transpose (rows). With ``L L^T = Psi`` and the whitened core ``V``, ``U = L_r V L_c^T``::

    E[dW | U] = sigma T_r U T_c = sigma Q_r^T V Q_c,   Q = L^-1 Z   (m x d)

so only the *whitened directions* ``Q`` are needed on the hot path.
"""

import torch
from linear_operator import settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError, NotPSDError
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from pyro_blora.errors import NonFiniteLossError


def inducing_covariance(Z: Tensor, D: Tensor) -> Tensor:
    """``Psi = Z Z^T + D^2`` from ``Z``, ``(..., m, d)``, and ``D``, ``(..., m)``."""
    return Z @ Z.mT + torch.diag_embed(D.square())


def cholesky(Psi: Tensor) -> Tensor:
    """The lower Cholesky factor of ``Psi``, with jitter where rounding has made it indefinite.

    ``psd_safe_cholesky`` synchronizes a CUDA device, because it reads whether each try succeeded.
    With Pyro's validation off, as in ``fit``, this function makes the same tries without reading
    the result, and returns NaN, which the loss then shows, where all of them fail.
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
    """:func:`whiten`, with an error that names ``Psi_{side}`` of ``where`` and the remedy."""
    try:
        return whiten(Z, Psi)
    except (NanError, NotPSDError) as error:
        raise NonFiniteLossError(
            f"Psi_{side} of {where} has no Cholesky factor ({error}); lower the learning rate of "
            f"the directions Z_{side}, or raise noise_init."
        ) from error


def between_orthonormal(
    B: Tensor, A: Tensor, D_r: Tensor, D_c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``Z_r``, ``V``, ``Z_c`` with ``B A = Q_r^T V Q_c`` and orthonormal rows in both ``Z``.

    ``Z_r`` is ``(..., m_r, d_out)`` and ``Z_c`` ``(..., m_c, d_in)``, with ``m`` at least ``r``;
    rows beyond the rank of ``B A`` are random.
    """
    dtype, B, A = B.dtype, B.double(), A.double()
    Z_r, Z_c = _basis(B, D_r.shape[-1]), _basis(A.mT, D_c.shape[-1])
    core = ((Z_r.mT @ B) @ (A @ Z_c)).to(dtype)
    # Z Z^T is the identity, so that Psi = 1 + D^2 is diagonal
    rows, cols = (1 + D.square() for D in (D_r, D_c))
    V = core * (rows.unsqueeze(-1) * cols.unsqueeze(-2)).sqrt()
    return Z_r.mT.to(dtype), V, Z_c.mT.to(dtype)


def _basis(X: Tensor, m: int) -> Tensor:
    X = torch.nn.functional.pad(X, (0, m - X.shape[-1]))
    return torch.linalg.qr(torch.where(X.any(-2, keepdim=True), X, torch.randn_like(X))).Q
