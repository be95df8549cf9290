"""The low-rank update that a prior returns and the layers apply.

*The rows of the network's batch are divided evenly among the P particles, in order.* A factor with
a leading particle dimension acts on each particle's share of the rows, a factor without one on all
rows. An adapted layer must therefore keep the rows of the batch, in order, in its first dimension.
Sequence-first layers and routed experts do not, which is an error only if P does not divide them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pyro_blora.errors import ParticleError

# Takes x (P x N x d_in), h = A x and B; returns the noise of the layer's output, P x N x d_out
Noise = Callable[[Tensor, Tensor, Tensor], Tensor]


def _particle_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``, with each particle's weight applied to its own share of the rows."""
    if weight.dim() == 2:
        return functional.linear(x, weight)
    shares = torch.bmm(_shares(x, weight.shape[0]), weight.mT)
    return shares.reshape(*x.shape[:-1], weight.shape[-2])


def _add_particle_linear(output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``output + x @ weight^T`` by one kernel; not in place, for other hooks may hold it."""
    if weight.dim() == 2:
        added = output.flatten(0, -2).addmm(x.flatten(0, -2), weight.mT)
    else:
        particles = weight.shape[0]
        added = _shares(output, particles).baddbmm(_shares(x, particles), weight.mT)
    return added.view(output.shape)


def _shares(x: Tensor, particles: int) -> Tensor:
    if x.shape[0] % particles:
        raise ParticleError(
            f"{x.shape[0]} rows cannot be shared out evenly among {particles} particles; choose a "
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
            shares = (self.particles, -1)
            x, h = x.reshape(*shares, x.shape[-1]), h.reshape(*shares, h.shape[-1])
            noise = self.noise(x, h, B).reshape(output.shape)
            output = output + noise.to(output.dtype)  # noise has the dtype of x, not autocast's
        return output

    @property
    def particles(self) -> int:
        """``P``, or 1 if no factor has a particle dimension."""
        factors = (self.A, self.B) if self.core is None else (self.A, self.B, self.core)
        return max(f.shape[0] if f.dim() == 3 else 1 for f in factors)

    def weight(self) -> Tensor:
        """``dW = B C A`` without its noise, ``([P,] d_out, d_in)``."""
        return (self.B if self.core is None else self.B @ self.core) @ self.A


@dataclass(frozen=True)
class LowRankUpdate:
    """The updates ``dW_l = B_l C_l A_l`` of a group of ``n`` layers.

    Any dimensions before the last three are particles; each factor may have them or not.

    Attributes:
        A: ``(..., n, r_c, d_in)``.
        B: ``(..., n, d_out, r_r)``.
        core: ``C``, ``(..., n, r_r, r_c)``, or ``None`` for the identity.
        noise: one function for each layer, a ``Noise``, or ``None``.
        mean: the same updates without noise, if the factors themselves contain noise.

    Example::

        >>> update = LowRankUpdate(torch.ones(2, 1, 4), torch.ones(2, 3, 1))
        >>> update.layers()[0].weight().shape
        torch.Size([3, 4])
    """

    A: Tensor
    B: Tensor
    core: Tensor | None = None
    noise: tuple[Noise, ...] | None = None
    mean: "LowRankUpdate | None" = None

    @property
    def is_noisy(self) -> bool:
        """Whether the updates have noise of their own, beyond the randomness of the sites."""
        return self.noise is not None or self.mean is not None

    @property
    def particle_shape(self) -> torch.Size:
        """The particle dimensions, broadcast over the factors."""
        factors = (self.A, self.B) if self.core is None else (self.A, self.B, self.core)
        return torch.broadcast_shapes(*(factor.shape[:-3] for factor in factors))

    def without_noise(self) -> "LowRankUpdate":
        """The mean of the updates given the sites."""
        return LowRankUpdate(self.A, self.B, self.core) if self.mean is None else self.mean

    def detached(self) -> "LowRankUpdate":
        """The same factors without gradients and without noise."""
        core = None if self.core is None else self.core.detach()
        return LowRankUpdate(self.A.detach(), self.B.detach(), core)

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
