"""The low-rank update that a prior returns and the layers apply.

*The rows of the network's batch are shared out evenly among the P particles, in order.* A factor
with a leading particle dimension acts on its own share of the rows, one without on all of them. So
an adapted layer must keep the batch's rows, in order, in its first dimension: sequence-first layers
and routed experts do not, and only a count that does not divide is noticed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pyro_blora.errors import ParticleError

# (x: P x N x d_in, h = A x, B) -> noise to add to the layer's output, P x N x d_out
Noise = Callable[[Tensor, Tensor, Tensor], Tensor]


def _particle_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``, each particle's weight applied to its own share of the rows."""
    if weight.dim() == 2:
        return functional.linear(x, weight)
    shares = torch.bmm(_shares(x, weight.shape[0]), weight.mT)
    return shares.reshape(*x.shape[:-1], weight.shape[-2])


def _add_particle_linear(output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``output + x @ weight^T`` likewise, without a pass for the sum.

    Never in place: an earlier hook of somebody else's may have kept ``output``.
    """
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
    """The update ``dW = B C A`` of one layer, with ``P`` or no leading particle dimension."""

    A: Tensor  # ([P,] r_c, d_in)
    B: Tensor  # ([P,] d_out, r_r)
    core: Tensor | None = None  # C, ([P,] r_r, r_c), or the identity
    noise: Noise | None = None

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        """``output + B C A x`` plus noise, of the layer's ``x``, (R, ..., d_in), and ``output``."""
        B = self.B.to(output.dtype)
        h = _particle_linear(x, self.A.to(x.dtype))
        g = h if self.core is None else _particle_linear(h, self.core.to(h.dtype))
        output = _add_particle_linear(output, g.to(output.dtype), B)
        if self.noise is not None:
            shares = (self.particles, -1)
            x, h = x.reshape(*shares, x.shape[-1]), h.reshape(*shares, h.shape[-1])
            noise = self.noise(x, h, B).reshape(output.shape)
            output = output + noise.to(output.dtype)  # x may be wider, under autocast
        return output

    @property
    def particles(self) -> int:
        """``P``; 1 where no factor has a particle dimension."""
        factors = (self.A, self.B) if self.core is None else (self.A, self.B, self.core)
        return max(f.shape[0] if f.dim() == 3 else 1 for f in factors)

    def weight(self) -> Tensor:
        """``dW = B C A`` without its noise, ``([P,] d_out, d_in)``; for tests and for merging."""
        return (self.B if self.core is None else self.B @ self.core) @ self.A


@dataclass(frozen=True)
class LowRankUpdate:
    """The updates ``dW_l = B_l C_l A_l`` of a group of ``n`` layers.

    What stands before the last three dimensions is the particles', each factor its own or none.

    Attributes:
        A: ``(..., n, r_c, d_in)``.
        B: ``(..., n, d_out, r_r)``.
        core: ``C``, ``(..., n, r_r, r_c)``, or ``None`` for the identity.
        noise: one function for each layer (see :class:`LayerUpdate`), or ``None``.
        mean: the same updates without noise, where the factors themselves have it.

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
        """Whether the updates have noise of their own besides that of the sites."""
        return self.noise is not None or self.mean is not None

    @property
    def particle_shape(self) -> torch.Size:
        """The dimensions before those of the layers, broadcast over the factors."""
        factors = (self.A, self.B) if self.core is None else (self.A, self.B, self.core)
        return torch.broadcast_shapes(*(factor.shape[:-3] for factor in factors))

    def without_noise(self) -> "LowRankUpdate":
        """The same updates without the noise of the conditional: their mean given the sites."""
        return LowRankUpdate(self.A, self.B, self.core) if self.mean is None else self.mean

    def detached(self) -> "LowRankUpdate":
        """The same factors without gradient, and without noise."""
        core = None if self.core is None else self.core.detach()
        return LowRankUpdate(self.A.detach(), self.B.detach(), core)

    def layers(self) -> list[LayerUpdate]:
        """The update of each layer; the particles' dimensions are flattened to one."""
        A, B = _unstack(self.A), _unstack(self.B)
        core = [None] * len(A) if self.core is None else _unstack(self.core)
        noise = self.noise or (None,) * len(A)
        return [LayerUpdate(*factors) for factors in zip(A, B, core, noise, strict=True)]


def _unstack(factor: Tensor) -> tuple[Tensor, ...]:
    if math.prod(factor.shape[:-3]) == 1:  # one draw is a shared draw: no batched product
        return factor.reshape(factor.shape[-3:]).unbind(0)
    return factor.reshape(-1, *factor.shape[-3:]).unbind(1)
