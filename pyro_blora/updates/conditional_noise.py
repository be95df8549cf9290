r"""The noise of the conditional :math:`p(W \mid U)` of a Kronecker inducing prior.

Given ``U``, ``vec W`` has covariance ``s^2 (I - R (x) Q_c^T Q_c)`` with ``s = sigma lambda``,
``R = Q_r^T Q_r`` and the whitened directions ``Q`` of ``kronecker.py``. No ``d_out x d_in`` sample
is needed: a layer only shows the noise through its outputs.

* :class:`MarginalNoise` draws every output at every position by itself, with the exact variance
  ``s^2 (|x|^2 - q_i |Q_c x|^2)``, ``q_i = R_ii``. The correlations between outputs (``R`` off its
  diagonal, of order ``m / d_out``) and between positions are left out.
* :class:`JointNoise` draws what one weight gives to all outputs at all positions of a particle:
  a shared draw in the span of ``Q_c`` plus the rest through the Gram matrix of the inputs.
* :func:`weight_noise` draws the weight itself, to test the two others against.
"""

from dataclasses import dataclass
from typing import Any

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["JointNoise", "MarginalNoise", "conditional_kl", "factor_noise", "weight_noise"]


def conditional_kl(lam: Tensor, d_out: int, d_in: int) -> Tensor:
    r"""``KL[q(W|U) || p(W|U)] = d_out d_in (lambda^2 / 2 - log lambda - 1/2)``, in nats.

    The two conditionals share their mean and differ by the factor ``lambda^2`` in covariance, so
    the KL does not depend on ``U``.

    Args:
        lam: lambda, any shape, positive.
        d_out: number of output features.
        d_in: number of input features.

    Returns:
        The KL, shaped as ``lam``; zero at lambda = 1.

    Example::

        >>> conditional_kl(torch.tensor(1.0), 5, 6)
        tensor(0.)
    """
    return d_out * d_in * (0.5 * lam.square() - lam.log() - 0.5)


@dataclass(frozen=True)
class MarginalNoise:
    """Noise with the exact variance of each output at each position, drawn independently.

    Attributes:
        scale: ``s = sigma lambda``, a scalar or ``(P,)``.
    """

    scale: Tensor

    def __call__(self, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """Draws the noise.

        Args:
            x: inputs, ``(P, N, d_in)``.
            h: ``Q_c x``, ``(P, N, m_c)``.
            B: ``Q_r^T``, ``(d_out, m_r)``.

        Returns:
            ``(P, N, d_out)``.
        """
        noise: Tensor = _RootTimesNormal.apply(*self._terms(x, h, B))
        return noise.to(x.dtype)

    def variance(self, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """``s^2 (|x|^2 - q_i |h|^2)``, ``(P, N, d_out)``, in at least single precision."""
        a, b, q = self._terms(x, h, B)
        return (a - b * q).clamp_min(0)

    def _terms(self, x: Tensor, h: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = self.scale.reshape(-1, 1, 1)
        a = (scale * _norm(x.to(dtype))).square()
        b = (scale * _norm(h.to(dtype))).square()
        return a, b, B.to(dtype).square().sum(-1)


class _RootTimesNormal(torch.autograd.Function):
    """``(a - b q)^1/2 e`` with ``e`` standard normal: one tensor kept for backward, not four.

    ``a`` and ``b`` are (P, N, 1), ``q`` is (d_out); where rounding makes the variance zero or less
    there is neither noise nor gradient.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, q: Tensor) -> Tensor:
        root = torch.addcmul(a, b, q, value=-1).clamp_min_(0).sqrt_()
        e = torch.randn(root.shape, dtype=root.dtype, device=root.device)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(torch.where(root > 0, e / root, 0), b, q)
        return e.mul_(root)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ratio, b, q = ctx.saved_tensors
        slope = grad * ratio  # twice the gradient of the variance
        da, db = (slope @ torch.stack((q.new_full(q.shape, 0.5), -0.5 * q), -1)).split(1, -1)
        dq = -0.5 * (b.reshape(1, -1) @ slope.reshape(-1, slope.shape[-1])).squeeze(0)
        return da, db, dq


@dataclass(frozen=True)
class JointNoise:
    """Noise as one weight gives it to all outputs at all positions of a particle.

    With ``F = L^-1 D``, ``G = Q Q^T = I - F F^T`` and ``C C^T = G`` on either side, the extended
    Matheron rule for ``W`` needs only what ``E`` (d_out x d_in, standard normal) does in the span
    of ``Q_c`` (``e = E Q_c^T``) and to the inputs outside of that span.

    Attributes:
        scale: ``s = sigma lambda``, a scalar or ``(P,)``.
        Q_r: ``(m_r, d_out)``.
        F_r: ``(m_r, m_r)``.
        C_r: ``(m_r, m_r)``.
        Q_c: ``(m_c, d_in)``.
        F_c: ``(m_c, m_c)``.
        C_c: ``(m_c, m_c)``.

    Reference:
        Ritter et al. 2021, arXiv:2105.14594, section 3.3.
    """

    scale: Tensor
    Q_r: Tensor
    F_r: Tensor
    C_r: Tensor
    Q_c: Tensor
    F_c: Tensor
    C_c: Tensor

    def __call__(self, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """Draws the noise; arguments and result as in :meth:`MarginalNoise.__call__`."""
        with torch.autocast(x.device.type, enabled=False):
            return self._draw(x, h)

    def _draw(self, x: Tensor, h: Tensor) -> Tensor:
        dtype = self.Q_r.dtype
        x, h, out = x.to(dtype), h.to(dtype), x.dtype
        particles, d_out = x.shape[0], self.Q_r.shape[-1]
        e = _randn(x, particles, d_out, self.C_c.shape[-1]) @ self.C_c.mT  # E Q_c^T
        U = self._matheron(e)
        g = torch.cholesky_solve(h.mT, self.C_c)  # G_c^-1 h, P x m_c x N
        inside = g.mT @ e.mT
        # More positions than free directions leave the Gram matrix singular, hence the double
        # precision and the jitter.
        outer = x.double() - g.mT.double() @ self.Q_c.double()
        gram = outer @ outer.mT
        jitter = 1e-12 + 1e-10 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=x.device)
        root = torch.linalg.cholesky(gram + jitter[:, None, None] * eye).to(dtype)
        outside = root @ _randn(x, particles, x.shape[1], d_out)
        noise = inside + outside - (h @ U.mT) @ self.Q_r
        return (self.scale.reshape(-1, 1, 1) * noise).to(out)

    def _matheron(self, e: Tensor) -> Tensor:
        """A draw of the whitened ``U`` that belongs to ``E``, ``(P, m_r, m_c)``."""
        shape = (e.shape[0], self.F_r.shape[-1], self.F_c.shape[-1])
        E2, E3, E4 = (_randn(e, *shape) for _ in range(3))
        return (
            self.Q_r @ e
            + self.C_r @ E2 @ self.F_c.mT
            + self.F_r @ E3 @ self.C_c.mT
            + self.F_r @ E4 @ self.F_c.mT
        )


def weight_noise(noise: JointNoise) -> Tensor:
    """One draw of ``W - E[W | U]`` as a dense weight, ``(d_out, d_in)``; for tests only."""
    E = _randn(noise.Q_c, noise.Q_r.shape[-1], noise.Q_c.shape[-1])
    U = noise._matheron((E @ noise.Q_c.mT).unsqueeze(0))[0]
    return noise.scale * (E - noise.Q_r.mT @ U @ noise.Q_c)


def factor_noise(
    batch: torch.Size,
    L_r: Tensor,
    Q_r: Tensor,
    D_r: Tensor,
    L_c: Tensor,
    Q_c: Tensor,
    D_c: Tensor,
) -> Tensor:
    """Draws of ``E - T_r U T_c``, the noise of a weight small enough to be drawn itself.

    Args:
        batch: shape of the draws, ending in the layers, ``(..., n)``.
        L_r: Cholesky factors of ``Psi_r``, ``(n, m_r, m_r)``.
        Q_r: ``L_r^-1 Z_r``, ``(n, m_r, d_r)``.
        D_r: ``(n, m_r)``.
        L_c: the same for the columns.
        Q_c: the same for the columns.
        D_c: the same for the columns.

    Returns:
        ``(*batch, d_r, d_c)``, of covariance ``I - Q_r^T Q_r (x) Q_c^T Q_c``.
    """
    F_r = torch.linalg.solve_triangular(L_r, torch.diag_embed(D_r), upper=False)
    F_c = torch.linalg.solve_triangular(L_c, torch.diag_embed(D_c), upper=False)
    C_r, C_c = psd_safe_cholesky(Q_r @ Q_r.mT), psd_safe_cholesky(Q_c @ Q_c.mT)
    E = _randn(Q_r, *batch, Q_r.shape[-1], Q_c.shape[-1])
    E2, E3, E4 = (_randn(Q_r, *batch, Q_r.shape[-2], Q_c.shape[-2]) for _ in range(3))
    U = Q_r @ E @ Q_c.mT + C_r @ E2 @ F_c.mT + F_r @ E3 @ C_c.mT + F_r @ E4 @ F_c.mT
    return E - Q_r.mT @ U @ Q_c


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _randn(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=like.dtype, device=like.device)
