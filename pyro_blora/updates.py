r"""The low-rank update that a prior returns and the layers apply, and what it is made of.

*The rows of the network's batch are divided evenly among the P particles, in order.* A factor with
a leading particle dimension acts on each particle's share of the rows, a factor without one on all
rows. An adapted layer must therefore keep the rows of the batch, in order, in its first dimension;
:func:`pyro_blora.network.probes.keeps_rows` finds the networks that do not, where P is 1.

With inducing directions ``Z`` (m x d) and noise ``D``, the covariance of one side is
``Psi = Z Z^T + D^2`` and the map from inducing variables to weights is ``T = Psi^-1 Z`` (columns)
or its transpose (rows). With ``L L^T = Psi`` and the whitened core ``V``, ``U = L_r V L_c^T``::

    E[dW | U] = sigma T_r U T_c = sigma Q_r^T V Q_c,   Q = L^-1 Z   (m x d)

so only the *whitened directions* ``Q`` are needed on the hot path. Given ``U``, ``vec W`` has the
covariance ``s^2 (I - Q_r^T Q_r (x) Q_c^T Q_c)`` with ``s = sigma lambda``. :class:`MarginalNoise`
draws only its effect on a layer's outputs, so that no ``d_out x d_in`` sample is needed;
:func:`weight_noise` draws a small weight itself.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from linear_operator import settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError, NotPSDError
from pyro.distributions.util import is_validation_enabled
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pyro_blora.errors import NonFiniteLossError, ParticleError

# Takes x (P x N x d_in), h = A x and B; returns the noise of the layer's output, P x N x d_out
Noise = Callable[[Tensor, Tensor, Tensor], Tensor]


def _particle_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``, with each particle's weight applied to its own share of the rows."""
    if weight.dim() == 2:
        return functional.linear(x, weight)
    shares = torch.bmm(_shares(x, weight.shape[0]), weight.mT)
    return shares.reshape(*x.shape[:-1], weight.shape[-2])


def _add_particle_linear(output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``output + x @ weight^T`` by one kernel; not in place, because other hooks may hold it."""
    if weight.dim() == 2:
        added = output.flatten(0, -2).addmm(x.flatten(0, -2), weight.mT)
    else:
        particles = weight.shape[0]
        added = _shares(output, particles).baddbmm(_shares(x, particles), weight.mT)
    return added.view(output.shape)


def _shares(x: Tensor, particles: int) -> Tensor:
    if x.shape[0] % particles:
        raise ParticleError(
            f"{x.shape[0]} rows cannot be divided evenly among {particles} particles; choose a "
            "num_particles that divides the batch size."
        )
    return x.reshape(particles, -1, x.shape[-1])


@dataclass(frozen=True)
class LayerUpdate:
    """The update ``dW = B C A`` of one layer; each factor may have a particle dimension ``P``."""

    A: Tensor  # ([P,] r_c, d_in)
    B: Tensor  # ([P,] d_out, r_r)
    core: Tensor | None = None  # C, ([P,] r_r, r_c), or the identity
    noise: Noise | None = None

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        """``output + B C A x`` plus noise, for the layer's input ``x``, (R, ..., d_in)."""
        B = self.B.to(output.dtype)
        h = _particle_linear(x, self.A.to(x.dtype))
        g = h if self.core is None else _particle_linear(h, self.core.to(h.dtype))
        output = _add_particle_linear(output, g.to(output.dtype), B)
        if self.noise is not None:
            factors = (self.A, self.B) if self.core is None else (self.A, self.B, self.core)
            particles = max(f.shape[0] if f.dim() == 3 else 1 for f in factors)
            x, h = (v.reshape(particles, -1, v.shape[-1]) for v in (x, h))
            noise = self.noise(x, h, B).reshape(output.shape)
            output = output + noise.to(output.dtype)  # noise has the dtype of x, not autocast's
        return output

    def weight(self) -> Tensor:
        """``dW = B C A`` without its noise, ``([P,] d_out, d_in)``."""
        return (self.B if self.core is None else self.B @ self.core) @ self.A


@dataclass(frozen=True)
class LowRankUpdate:
    """The updates ``dW_l = B_l C_l A_l`` of a group of ``n`` layers.

    Any dimensions before the last three are particles; each factor may have them or not.

    Example::

        >>> update = LowRankUpdate(torch.ones(2, 1, 4), torch.ones(2, 3, 1))
        >>> update.layers()[0].weight().shape
        torch.Size([3, 4])
    """

    A: Tensor  #: ``(..., n, r_c, d_in)``
    B: Tensor  #: ``(..., n, d_out, r_r)``
    core: Tensor | None = None  #: ``C``, ``(..., n, r_r, r_c)``, or the identity
    _: KW_ONLY
    noise: tuple[Noise, ...] | None = None  #: one function for each layer
    mean: "LowRankUpdate | None" = None  #: without noise, if the factors contain noise

    @property
    def is_noisy(self) -> bool:
        """Whether the updates are random even if all sites are fixed."""
        return self.noise is not None or self.mean is not None

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """``A`` and ``B``, and the core if there is one."""
        return (self.A, self.B) if self.core is None else (self.A, self.B, self.core)

    @property
    def particle_shape(self) -> torch.Size:
        """The particle dimensions, broadcast over the factors."""
        return torch.broadcast_shapes(*(factor.shape[:-3] for factor in self.factors))

    def without_noise(self) -> "LowRankUpdate":
        """The mean of the updates given the sites."""
        return LowRankUpdate(*self.factors) if self.mean is None else self.mean

    def detached(self) -> "LowRankUpdate":
        """The same factors without gradients and without noise."""
        return LowRankUpdate(*(factor.detach() for factor in self.factors))

    def layers(self) -> list[LayerUpdate]:
        """The update of each layer, with all particle dimensions flattened to one."""
        A, B = _unstack(self.A), _unstack(self.B)
        core = [None] * len(A) if self.core is None else _unstack(self.core)
        noise = self.noise or (None,) * len(A)
        return [LayerUpdate(*factors) for factors in zip(A, B, core, noise, strict=True)]


def _unstack(factor: Tensor) -> tuple[Tensor, ...]:
    if math.prod(factor.shape[:-3]) == 1:  # a single draw needs no batched product
        return factor.reshape(factor.shape[-3:]).unbind(0)
    return factor.reshape(-1, *factor.shape[-3:]).unbind(1)


def inducing_covariance(Z: Tensor, D: Tensor) -> Tensor:
    """``Psi = Z Z^T + D^2`` from ``Z``, ``(..., m, d)``, and ``D``, ``(..., m)``."""
    return Z @ Z.mT + torch.diag_embed(D.square())


def cholesky(Psi: Tensor) -> Tensor:
    """The lower Cholesky factor of ``Psi``, with jitter where rounding has made it indefinite."""
    if is_validation_enabled():
        return psd_safe_cholesky(Psi)
    # The same tries without reading their results, which would synchronize a CUDA device; where
    # all of them fail the factor is NaN, and so is the loss
    jitter = Psi.new_zeros(Psi.shape[:-1])
    with torch.no_grad():
        for step in range(settings.cholesky_max_tries.value()):
            failed = torch.linalg.cholesky_ex(Psi + torch.diag_embed(jitter)).info > 0
            size = settings.cholesky_jitter.value(Psi.dtype) * 10**step
            jitter = jitter.masked_fill(failed.unsqueeze(-1), size)
    L, info = torch.linalg.cholesky_ex(Psi + torch.diag_embed(jitter))
    return L.masked_fill((info > 0)[..., None, None], torch.nan)


def whiten(Z: Tensor, Psi: Tensor, name: str = "Psi") -> tuple[Tensor, Tensor]:
    """The factor ``L``, ``L L^T = Psi``, and the whitened directions ``Q = L^-1 Z``."""
    try:
        L = cholesky(Psi)
    except (NanError, NotPSDError) as error:
        raise NonFiniteLossError(
            f"{name} has no Cholesky factor ({error}); lower the learning rate of the directions, "
            "or raise noise_init."
        ) from error
    return L, torch.linalg.solve_triangular(L, Z, upper=False)


def between_orthonormal(
    B: Tensor, A: Tensor, D_r: Tensor, D_c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``Z_r``, ``V``, ``Z_c`` with ``B A = Q_r^T V Q_c``, and both ``Z`` orthonormal by rows."""
    dtype, B, A = B.dtype, B.double(), A.double()
    Z_r, Z_c = _basis(B, D_r.shape[-1]), _basis(A.mT, D_c.shape[-1])
    core = ((Z_r.mT @ B) @ (A @ Z_c)).to(dtype)
    # Z Z^T is the identity, so that Psi = 1 + D^2 is diagonal
    rows, cols = (1 + D.square() for D in (D_r, D_c))
    V = core * (rows.unsqueeze(-1) * cols.unsqueeze(-2)).sqrt()
    return Z_r.mT.to(dtype), V, Z_c.mT.to(dtype)


def _basis(X: Tensor, m: int) -> Tensor:
    X = functional.pad(X, (0, m - X.shape[-1]))
    return torch.linalg.qr(torch.where(X.any(-2, keepdim=True), X, torch.randn_like(X))).Q


def conditional_kl(lam: Tensor, d_out: int, d_in: int) -> Tensor:
    """``KL[q(W|U) || p(W|U)] = d_out d_in (lambda^2 / 2 - log lambda - 1/2)``, for every ``U``."""
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
    """``(a - b q)^1/2 e`` with standard normal ``e``, which saves one large tensor, not four."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, q: Tensor) -> Tensor:
        root = torch.addcmul(a, b, q, value=-1).clamp_min_(0).sqrt_()
        e = torch.randn(root.shape, dtype=root.dtype, device=root.device)
        if any(ctx.needs_input_grad):
            # rounding may leave the variance at zero or below: then the gradient is zero, too
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
        return cls(Q, F, cholesky(Q @ Q.mT))  # with jitter: equal directions make it singular


def weight_noise(batch: torch.Size, rows: Side, cols: Side) -> Tensor:
    """Draws ``(*batch, d_r, d_c)`` of the noise of a small weight, with ``s = 1``.

    This is the extended Matheron rule (Ritter et al. 2021, arXiv:2105.14594, section 3.3).
    """
    E = _randn(rows.Q, *batch, rows.Q.shape[-1], cols.Q.shape[-1])
    shape = (*batch, rows.F.shape[-1], cols.F.shape[-1])
    E2, E3, E4 = (_randn(E, *shape) for _ in range(3))
    noise = rows.C @ E2 @ cols.F.mT + rows.F @ E3 @ cols.C.mT + rows.F @ E4 @ cols.F.mT
    V = rows.Q @ (E @ cols.Q.mT) + noise  # the whitened U of a prior weight E
    return E - rows.Q.mT @ V @ cols.Q


def _randn(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=like.dtype, device=like.device)
