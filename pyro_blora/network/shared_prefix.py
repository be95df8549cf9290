"""The layers below the lowest adapted one, run once for all posterior draws.

They are frozen, so every draw's copy of the batch is the same in them. The lower blocks see the
first copy alone; what the last of them puts out is repeated for the blocks above.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.network.adapter import Adapter, entering
from pyro_blora.network.fast_path import agree, asked, logits_for, remembered, tokens_for
from pyro_blora.network.last_block import whole_last_block

__all__ = ["can_share", "frozen_blocks", "shared_prefix", "whole_if_frozen"]

_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")


def frozen_blocks(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks that come before every adapted layer, in order.

    Args:
        net: the network, whose blocks stand in one ``ModuleList``.
        names: full names of the adapted layers.

    Returns:
        None of them where they cannot be told: layers in two lists (an encoder and a decoder), a
        layer outside of them that is not the network's head, or a block that stands there twice.
    """
    found = [_BLOCK.match(name) for name in names]
    heads = {id(getattr(net, "get_output_embeddings", lambda: None)())}
    for name, match in zip(names, found, strict=True):
        if match is None and id(net.get_submodule(name)) not in heads:
            return []
    paths = {match.group(1) for match in found if match is not None}
    if not paths:
        lists = [m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        return list(lists[0]) if len(lists) == 1 else []
    if len(paths) > 1:
        return []
    blocks = net.get_submodule(paths.pop())
    lowest = min(int(match.group(2)) for match in found if match is not None)
    found_blocks = list(blocks)[:lowest] if isinstance(blocks, nn.ModuleList) else []
    return found_blocks if len(set(found_blocks)) == len(found_blocks) else []


def whole_if_frozen(net: nn.Module, names: Sequence[str]) -> AbstractContextManager[None]:
    """Within, the last block is run at all positions if no layer of ``names`` is in a block.

    It is frozen then, too, and its output is read again, by other draws or at other visits.
    """
    adapted = any(_BLOCK.match(name) for name in names)
    return nullcontext() if adapted else whole_last_block(net)


@contextmanager
def shared_prefix(net: nn.Module, adapters: Sequence[Adapter], copies: int) -> Iterator[None]:
    """Within, the network's batch is ``copies`` repetitions, which the frozen blocks see once.

    Args:
        net: the network.
        adapters: those on its layers; without an update in place (while a network is asked what it
            can do) nothing is shared.
        copies: how often the whole batch is repeated, one repetition after the other.
    """
    names = [adapter.name for adapter in adapters]
    frozen = frozen_blocks(net, names)
    # Asked whatever this batch is: where processes run one network, all of them ask at once
    if not frozen or not can_share(net, frozen) or copies == 1:
        yield
        return
    with (
        _first_copy_alone(frozen, copies, lambda: adapters[0].update is not None),
        whole_if_frozen(net, names),
    ):
        yield


@remembered
def can_share(net: nn.Module, frozen: Sequence[nn.Module]) -> bool | None:
    """Whether the network, asked for the logits of two copies of a few rows, gives the same.

    The copies are made to differ above the frozen blocks, as draws do: a network that runs its
    blocks in a loop comes back to the frozen ones with other hidden states for each.
    """
    ids = tokens_for(net, 3)
    if ids is None:
        return None
    twice = ids.repeat(2, 1)
    with asked(net), _second_copy_apart(net, frozen):
        expected = logits_for(net, twice)
        if expected is None:
            return None
        with _first_copy_alone(frozen, 2, lambda: True):
            return agree(logits_for(net, twice), expected)


@contextmanager
def _second_copy_apart(net: nn.Module, frozen: Sequence[nn.Module]) -> Iterator[None]:
    """Within, what the block above the frozen ones puts out is another in the second copy."""
    lists = [m for m in net.modules() if isinstance(m, nn.ModuleList) and frozen[0] in m]
    above = list(lists[0])[len(frozen) :]

    def other(hidden: Tensor) -> Tensor:
        first, second = hidden.chunk(2)
        return torch.cat([first, second.roll(1, -1)])

    def after(block: nn.Module, args: Any, output: Any) -> Any:
        return _changed(output, other)

    with above[0].register_forward_hook(after) if above else nullcontext():
        yield


@contextmanager
def _first_copy_alone(
    frozen: Sequence[nn.Module], copies: int, active: Callable[[], bool]
) -> Iterator[None]:
    rows = 0
    cut: dict[int, tuple[Tensor, Tensor]] = {}  # a block is mostly given what the last one was

    def first_copy(value: Any, name: str | int) -> Any:
        if isinstance(value, tuple):
            return tuple(first_copy(v, name) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        # In some ALiBi has rows and heads in one dimension
        if value.shape[0] % rows if name == "alibi" else value.shape[0] != rows:
            return value
        part = value[: value.shape[0] // copies]
        if name in (0, "hidden_states"):
            return part
        if id(value) not in cut:  # with as many heads as rows, these may be heads
            cut[id(value)] = value, part if _all_alike(value, copies) else value
        return cut[id(value)][1]

    def repeat(hidden: Tensor) -> Tensor:
        return hidden.repeat(copies, *(1,) * (hidden.dim() - 1))

    def before(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        nonlocal rows
        if not active():
            return None
        if block is frozen[0]:
            rows = entering(args, kwargs).shape[0]
        named = {name: first_copy(value, name) for name, value in kwargs.items()}
        return tuple(first_copy(value, i) for i, value in enumerate(args)), named

    def after(block: nn.Module, args: Any, output: Any) -> Any:
        return _changed(output, repeat) if active() else None

    with ExitStack() as hooks:
        hooks.callback(cut.clear)  # a pass may fail half-way, and only a collector would free it
        for block in frozen:
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
        hooks.enter_context(frozen[-1].register_forward_hook(after))
        yield


def _all_alike(value: Tensor, copies: int) -> bool:
    first, *others = value.chunk(copies)
    half = value.dtype in (torch.float16, torch.bfloat16)
    rtol, atol = (0.05, 0.02) if half else (1e-3, 1e-5)
    return all(torch.allclose(first, other, rtol, atol, equal_nan=True) for other in others)


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a block puts out, its hidden states changed; what comes after them, nothing reads."""
    if isinstance(output, tuple | list):
        return type(output)((change(output[0]), *output[1:]))
    return change(output)
