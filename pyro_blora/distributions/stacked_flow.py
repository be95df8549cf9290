"""A chain of Pyro's transforms with parameters of its own for each layer, run for all at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions.transforms as transforms
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.func import functional_call, stack_module_state, vmap

from pyro_blora.errors import ConfigurationError, near_miss

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
    """Transforms one after the other, with the log-determinant of the whole.

    Args:
        parts: what :mod:`pyro.distributions.transforms` makes.
    """

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.modules_ = nn.ModuleList([p for p in parts if isinstance(p, nn.Module)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x``, ``(..., k)``, to ``y``, ``(..., k)``, and ``log |dy/dx|``, ``(...)``."""
        try:
            return self._run(x)
        finally:
            self._forget()

    def _forget(self) -> None:
        """Empties the parts' caches, which may hold what must not leave ``vmap``."""
        for part in self.parts:
            for name in [n for n in vars(part) if n.startswith("_cache") and n != "_cache_size"]:
                setattr(part, name, (None, None) if name == "_cached_x_y" else None)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[:-1])
        for part in self.parts:
            y = part(x)
            log_det = part.log_abs_det_jacobian(x, y)
            # a transform of single numbers gives a term for each of them
            total = total + (log_det.sum(-1) if log_det.dim() == x.dim() else log_det)
            x = y
        return x, total


def make_chain(flows: Sequence[str | Factory], size: int) -> Chain:
    """The chain of the named or given transforms over vectors of ``size`` numbers.

    Raises:
        ConfigurationError: a name is unknown; the message lists near misses.
    """
    parts: list[Transform] = []
    for flow in flows:
        if isinstance(flow, str) and flow not in FLOWS:
            raise ConfigurationError(f"flow {flow!r} is unknown; {near_miss(flow, FLOWS)}.")
        parts.append((FLOWS[flow] if isinstance(flow, str) else flow)(size))
    return Chain(parts)


@dataclass(frozen=True)
class Stack:
    """``n`` chains of one kind as one.

    Attributes:
        chain: any of them; its parameters are replaced when it runs.
        parameters: for each name in ``chain``, the ``n`` tensors stacked.
        buffers: the same for its buffers.
        vectorized: whether all run in one call; splines, which index by masks, run in turn.
    """

    chain: Chain
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    vectorized: bool

    @classmethod
    @torch.no_grad()
    def of(cls, chains: Sequence[Chain], size: int) -> "Stack":
        """Stacks the chains, and checks that the stack gives what each of them gives alone.

        Raises:
            ConfigurationError: it does not; a transform keeps numbers outside of its parameters
                and buffers.
        """
        parameters, buffers = stack_module_state(list(chains))
        state = ({k: v.detach() for k, v in parameters.items()}, buffers)
        probe = torch.linspace(-1, 1, 2 * len(chains) * size).reshape(2, len(chains), size)
        try:
            found, vectorized = _run_stacked(chains[0], *state, probe), True
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            found, vectorized = _run_in_turn(chains[0], *state, probe), False
        _check_log_det(chains[0], probe[0, 0])
        for layer, chain in enumerate(chains):
            for one, alone in zip(found, chain(probe[:, layer]), strict=True):
                if not torch.allclose(one[:, layer], alone, atol=1e-4):
                    kinds = ", ".join(type(part).__name__ for part in chain.parts)
                    raise ConfigurationError(
                        f"A flow of {kinds} keeps numbers outside of its parameters and buffers, "
                        "so it cannot have parameters for each layer; leave that transform out."
                    )
        return cls(chains[0], *state, vectorized)


@torch.enable_grad()
def _check_log_det(chain: Chain, x: Tensor) -> None:
    """Raises ConfigurationError where a transform is wrong about its own Jacobian at ``x``."""
    J = torch.autograd.functional.jacobian(lambda x: chain(x)[0], x)
    exact, claimed = torch.linalg.slogdet(J).logabsdet, chain(x)[1].detach()
    if not torch.allclose(exact, claimed, atol=1e-2):
        kinds = ", ".join(type(part).__name__ for part in chain.parts)
        raise ConfigurationError(
            f"A flow of {kinds} gives log |dy/dx| = {claimed:.4f} where it is {exact:.4f}; its "
            "density would be wrong, so leave that transform out."
        )


def _run_stacked(
    chain: Chain, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    def run(state: tuple[dict[str, Tensor], dict[str, Tensor]], x: Tensor) -> Any:
        return functional_call(chain, state, (x,))

    state = (dict(parameters), dict(buffers))
    result: tuple[Tensor, Tensor] = vmap(run, in_dims=(0, 1), out_dims=1)(state, x)
    return result


def _run_in_turn(
    chain: Chain, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    results = []
    for layer in range(x.shape[1]):
        state = tuple({k: v[layer] for k, v in d.items()} for d in (parameters, buffers))
        results.append(functional_call(chain, state, (x[:, layer],)))
    y, log_det = zip(*results, strict=True)
    return torch.stack(y, 1), torch.stack(log_det, 1)


class StackedFlow(Transform):
    r"""``y = loc + scale f(x)`` with a chain ``f`` for each layer.

    Takes ``(..., n, k)`` to ``(..., n, *event_shape)``. One transform and not three, so that its
    cache of the last ``(x, y)`` is found again. Scores the values it has just made; inverting
    others is left out, as not every transform has an inverse.

    Args:
        stack: the chains.
        parameters: stand for those of ``stack``.
        buffers: stand for those of ``stack``.
        loc: added to the result, ``(n, k)``.
        scale: multiplies it before, ``(n, k)``, positive.
        event_shape: of ``k`` numbers, the shape of the result of each layer.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        stack: Stack,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        loc: Tensor,
        scale: Tensor,
        event_shape: Sequence[int],
    ) -> None:
        super().__init__(cache_size=1)
        self.stack, self.parameters, self.buffers = stack, parameters, buffers
        self.loc, self.scale, self.event_shape = loc, scale, torch.Size(event_shape)
        self._log_det: Tensor | None = None

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Real arrays of the event shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of the result for an input of ``shape``."""
        return torch.Size(shape)[:-1] + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of the input for a result of ``shape``."""
        shape = torch.Size(shape)
        return torch.Size((*shape[: len(shape) - len(self.event_shape)], self.event_shape.numel()))

    def _call(self, x: Tensor) -> Tensor:
        run = _run_stacked if self.stack.vectorized else _run_in_turn
        flat = x.reshape(-1, *x.shape[-2:])
        y, log_det = run(self.stack.chain, self.parameters, self.buffers, flat)
        self._log_det = (log_det + self.scale.log().sum(-1)).reshape(x.shape[:-1])
        return (self.loc + self.scale * y).reshape(self.forward_shape(x.shape))

    def _inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError("A StackedFlow only scores the values that it has just made.")

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |dy/dx|``, of the shape of ``x`` without its last dimension."""
        x_old, y_old = self._cached_x_y
        if self._log_det is None or x is not x_old or y is not y_old:
            self(x)
        assert self._log_det is not None
        return self._log_det
