r"""The noise of the conditional :math:`p(W \mid U)` of a Kronecker inducing prior.

Given ``U``, ``vec W`` has the covariance ``s^2 (I - Q_r^T Q_r (x) Q_c^T Q_c)``, with ``s = sigma
lambda`` and the whitened directions ``Q`` of ``kronecker.py``. :class:`MarginalNoise` and
:class:`JointNoise` draw only its effect on a layer's outputs, so that no ``d_out x d_in``
sample is needed; :func:`weight_noise` draws the weight itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_blora.updates.kronecker import cholesky


def conditional_kl(lam: Tensor, d_out: int, d_in: int) -> Tensor:
    """``KL[q(W|U) || p(W|U)] = d_out d_in (lambda^2 / 2 - log lambda - 1/2)``, in nats.

    It does not depend on ``U``, because the two covariances differ only by the factor ``lambda^2``.
    """
    return d_out * d_in * (0.5 * lam.square() - lam.log() - 0.5)


@dataclass(frozen=True)
class MarginalNoise:
    """Noise with the exact variance of each output at each position, drawn independently.

    It lacks the correlations between outputs, of order ``m / d_out``, and between positions.
    """

    scale: Tensor  # s = sigma lambda, a scalar or (P,)

    def __call__(self, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """P x N x d_out, for ``x`` P x N x d_in, ``h = Q_c x`` P x N x m_c, ``B`` d_out x m_r."""
        noise: Tensor = _RootTimesNormal.apply(*self._terms(x, h, B))
        return noise.to(x.dtype)

    def variance(self, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """``s^2 (|x|^2 - q_i |h|^2)``, P x N x d_out, with ``q`` the diagonal of ``Q_r^T Q_r``."""
        a, b, q = self._terms(x, h, B)
        return (a - b * q).clamp_min(0)

    def _terms(self, x: Tensor, h: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        lengths = (torch.linalg.vector_norm(v.to(dtype), dim=-1, keepdim=True) for v in (x, h))
        a, b = ((self.scale.reshape(-1, 1, 1) * length).square() for length in lengths)
        return a, b, B.to(dtype).square().sum(-1)


class _RootTimesNormal(torch.autograd.Function):
    """``(a - b q)^1/2 e`` with standard normal ``e``, which saves one large tensor instead of four.

    ``a`` and ``b`` are (P, N, 1), ``q`` is (d_out). Noise and gradient are zero where rounding
    leaves the variance at zero or below.
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
class Side:
    """One side of the prior, for any batch of layers."""

    Q: Tensor  # L^-1 Z, (..., m, d)
    F: Tensor  # L^-1 D, (..., m, m); Q Q^T = I - F F^T
    C: Tensor  # C C^T = Q Q^T, (..., m, m)

    @classmethod
    def of(cls, L: Tensor, Q: Tensor, D: Tensor) -> "Side":
        """From the Cholesky factor of ``Psi``, the whitened directions and the noise."""
        F = torch.linalg.solve_triangular(L, torch.diag_embed(D), upper=False)
        return cls(Q, F, cholesky(Q @ Q.mT))  # with jitter, for equal directions are singular

    def unbind(self) -> list["Side"]:
        """One side for each layer of the first dimension."""
        return [Side(*each) for each in zip(self.Q, self.F, self.C, strict=True)]


@dataclass(frozen=True)
class JointNoise:
    """The noise of one weight for each particle, shared by all outputs and positions.

    By the extended Matheron rule (Ritter et al. 2021, arXiv:2105.14594, section 3.3) a weight is
    drawn from ``E``, d_out x d_in and standard normal. Its outputs need only ``e = E Q_c^T`` and
    the products of ``E`` with the components of the inputs outside the span of ``Q_c``.
    """

    scale: Tensor  # s = sigma lambda, a scalar or (P,)
    rows: Side
    cols: Side

    def __call__(self, x: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """Takes and returns the tensors of :class:`MarginalNoise`."""
        Q_r, Q_c, C_c = self.rows.Q, self.cols.Q, self.cols.C
        dtype, out = Q_r.dtype, x.dtype
        x, h = x.to(dtype), h.to(dtype)
        particles, d_out = x.shape[0], Q_r.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            e = _randn(x, particles, d_out, C_c.shape[-1]) @ C_c.mT  # E Q_c^T
            U = _matheron(e, self.rows, self.cols)
            g = torch.cholesky_solve(h.mT, C_c)  # G_c^-1 h, P x m_c x N, with G_c = Q_c Q_c^T
            inside = g.mT @ e.mT
            # Double precision and jitter, because the Gram matrix is singular if there are more
            # positions than directions outside the span of Q_c.
            outer = x.double() - g.mT.double() @ Q_c.double()
            gram = outer @ outer.mT
            jitter = 1e-12 + 1e-10 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=x.device)
            root, failed = torch.linalg.cholesky_ex(gram + jitter[:, None, None] * eye)
            root = root.masked_fill((failed > 0)[:, None, None], torch.nan).to(dtype)
            outside = root @ _randn(x, particles, x.shape[1], d_out)
            noise = inside + outside - (h @ U.mT) @ Q_r
            return (self.scale.reshape(-1, 1, 1) * noise).to(out)


def weight_noise(batch: torch.Size, rows: Side, cols: Side) -> Tensor:
    """Draws ``(*batch, d_r, d_c)`` of the noise of a small weight, with ``s = 1``."""
    E = _randn(rows.Q, *batch, rows.Q.shape[-1], cols.Q.shape[-1])
    return E - rows.Q.mT @ _matheron(E @ cols.Q.mT, rows, cols) @ cols.Q


def _matheron(e: Tensor, rows: Side, cols: Side) -> Tensor:
    """A draw of the whitened ``U`` given ``e = E Q_c^T``, ``(..., m_r, m_c)``."""
    shape = (*e.shape[:-2], rows.F.shape[-1], cols.F.shape[-1])
    E2, E3, E4 = (_randn(e, *shape) for _ in range(3))
    noise = rows.C @ E2 @ cols.F.mT + rows.F @ E3 @ cols.C.mT + rows.F @ E4 @ cols.F.mT
    return rows.Q @ e + noise


def _randn(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=like.dtype, device=like.device)
