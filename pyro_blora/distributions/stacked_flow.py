"""A chain of Pyro's transforms with parameters of its own for each layer, run for all at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions.transforms as transforms
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.func import functional_call, stack_module_state, vmap

from pyro_blora.errors import ConfigurationError

__all__ = ["FLOWS", "Chain", "Factory", "Stack", "StackedFlow", "make_chain"]

# Makes a transform of vectors of the given number of entries
Factory = Callable[[int], Any]

FLOWS: dict[str, Factory] = {
    "affine-autoregressive": transforms.affine_autoregressive,
    # Pyro's own hidden layer, ten times the input, would be millions of numbers in every layer.
    "affine-coupling": lambda size: transforms.affine_coupling(size, hidden_dims=[32]),
    "block-autoregressive": transforms.block_autoregressive,
    "householder": transforms.householder,
    "planar": transforms.planar,
    "radial": transforms.radial,
    "spline": transforms.spline,
}


class Chain(nn.Module):
    """Pyro's transforms one after the other, with the log-determinant of the whole."""

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.modules_ = nn.ModuleList([p for p in parts if isinstance(p, nn.Module)])

    def __str__(self) -> str:
        return ", ".join(type(part).__name__ for part in self.parts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x``, ``(..., k)``, to ``y``, ``(..., k)``, and ``log |dy/dx|``, ``(...)``."""
        total = x.new_zeros(x.shape[:-1])
        try:
            for part in self.parts:
                y = part(x)
                log_det = part.log_abs_det_jacobian(x, y)
                # a transform of single numbers gives a term for each of them
                total = total + (log_det.sum(-1) if log_det.dim() == x.dim() else log_det)
                x = y
            return x, total
        finally:
            self._forget()

    def _forget(self) -> None:
        """Empties the parts' caches, which may hold what must not leave ``vmap``."""
        for part in self.parts:
            for name in [n for n in vars(part) if n.startswith("_cache") and n != "_cache_size"]:
                setattr(part, name, (None, None) if name == "_cached_x_y" else None)


def make_chain(flows: Sequence[str | Factory], size: int) -> Chain:
    """The chain of the named or given transforms over vectors of ``size`` numbers."""
    return Chain([(FLOWS[flow] if isinstance(flow, str) else flow)(size) for flow in flows])


@dataclass(frozen=True)
class Stack:
    """``n`` chains of one kind as one.

    Attributes:
        chain: any of them; its parameters and buffers are replaced when it runs.
        state: for each name among these, the ``n`` tensors stacked.
        vectorized: whether all run in one call; splines, which index by masks, run in turn.
    """

    chain: Chain
    state: dict[str, Tensor]
    vectorized: bool = True

    @classmethod
    @torch.no_grad()
    def of(cls, chains: Sequence[Chain], size: int) -> "Stack":
        """Stacks the chains, and checks that the stack gives what each of them gives alone.

        Raises:
            ConfigurationError: it does not, for a transform keeps numbers outside of its parameters
                and buffers; or a transform is wrong about its own Jacobian.
        """
        parameters, buffers = stack_module_state(list(chains))
        stack = cls(chains[0], {k: v.detach() for k, v in {**parameters, **buffers}.items()})
        probe = torch.linspace(-1, 1, 2 * len(chains) * size).reshape(2, len(chains), size)
        try:
            found = stack(stack.state, probe)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            stack = replace(stack, vectorized=False)
            found = stack(stack.state, probe)
        _check_log_det(chains[0], probe[0, 0])
        for layer, chain in enumerate(chains):
            for one, alone in zip(found, chain(probe[:, layer]), strict=True):
                if not torch.allclose(one[:, layer], alone, atol=1e-4):
                    raise ConfigurationError(
                        f"A flow of {chain!s} keeps numbers outside of its parameters and buffers, "
                        "so it cannot have parameters for each layer; leave that transform out."
                    )
        return stack

    def __call__(self, state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the chains of another ``state`` on ``x``, ``(S, n, k)``; as :class:`Chain` does."""

        def run(one: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = functional_call(self.chain, one, (x,))
            return found

        if self.vectorized:
            found: tuple[Tensor, Tensor] = vmap(run, in_dims=(0, 1), out_dims=1)(dict(state), x)
            return found
        layers = [run({k: v[i] for k, v in state.items()}, x[:, i]) for i in range(x.shape[1])]
        y, log_det = zip(*layers, strict=True)
        return torch.stack(y, 1), torch.stack(log_det, 1)


@torch.enable_grad()
def _check_log_det(chain: Chain, x: Tensor) -> None:
    """Raises ConfigurationError where a transform is wrong about its own Jacobian at ``x``."""
    J = torch.autograd.functional.jacobian(lambda x: chain(x)[0], x)
    exact, claimed = torch.linalg.slogdet(J).logabsdet, chain(x)[1].detach()
    if not torch.allclose(exact, claimed, atol=1e-2):
        raise ConfigurationError(
            f"A flow of {chain!s} gives log |dy/dx| = {claimed:.4f} where it is {exact:.4f}; its "
            "density would be wrong, so leave that transform out."
        )


class StackedFlow(Transform):
    """A chain for each layer, with another ``state``, ``(..., n, k)`` to ``(..., n, k)``.

    It scores the values it has just made; inverting others is left out, as not every transform has
    an inverse.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, stack: Stack, state: Mapping[str, Tensor]) -> None:
        super().__init__(cache_size=1)
        self.stack, self.state = stack, state
        self._log_det: Tensor | None = None

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.stack(self.state, x.reshape(-1, *x.shape[-2:]))
        self._log_det = log_det.reshape(x.shape[:-1])
        return y.reshape(x.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |dy/dx|``, of the shape of ``x`` without its last dimension."""
        x_old, y_old = self._cached_x_y
        if self._log_det is None or x is not x_old or y is not y_old:
            self(x)
        assert self._log_det is not None
        return self._log_det
