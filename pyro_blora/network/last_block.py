"""The last block of a network at the positions that are read, and at no others.

What the last block puts out at a position that no likelihood reads, nobody reads: only its keys
and values, which the other positions attend to, are needed everywhere. Its MLP and its projections
of queries and of attention's output see the positions that are read, and elsewhere put out zeros.

Which parts of a block work position by position, the network is asked on a few tokens, in
evaluation mode (one with batch normalisation, which mixes them in training, is left whole). A part
that looks further back than those tokens, and no nearer, would be mistaken for one that does:
:func:`whole_last_block` leaves such a network as it is.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_blora.network.fast_path import (
    agree,
    among,
    answer,
    asked,
    in_plain_sight,
    shared_out,
    vocabulary_of,
    way_to,
)
from pyro_blora.network.targets import device_of

__all__ = ["last_block_at", "whole_last_block"]

_TOKENS = 32  # of a question


@dataclass(frozen=True)
class _LastBlock:
    """What a network answered.

    Attributes:
        block: the block's name; empty where it cannot be told.
        parts: names of its parts that work position by position.
        modules: those on the way to the block and in it, as they were.
        setting: what else the answer depends on.
    """

    block: str
    parts: tuple[str, ...]
    modules: tuple[ReferenceType[nn.Module], ...]
    setting: tuple[Any, ...]


_FOUND: WeakKeyDictionary[nn.Module, _LastBlock] = WeakKeyDictionary()
_WHOLE: WeakSet[nn.Module] = WeakSet()


@contextmanager
def whole_last_block(net: nn.Module) -> Iterator[None]:
    """Within, the last block of ``net`` is run at all positions.

    For one whose hidden states are read by others, or kept for later, and where
    :func:`last_block_at` is mistaken about its parts.
    """
    with among(_WHOLE, net):
        yield


@contextmanager
def last_block_at(
    net: nn.Module, positions: Tensor, mask: Tensor, *, length: int
) -> Iterator[None]:
    """Within, the last block's parts that work position by position do the read ones alone.

    The block is left whole where more than half of the positions are read, where it or the network
    is compiled, or checkpointed in this pass, and where the network's weights are shared out among
    processes, which would have to be asked together. As with all hooks on a network, two threads
    cannot run it at once.

    Args:
        net: a language model.
        positions: the positions whose logits are read, ``(R, S)``, in any order and number.
        mask: which of them are real, ``(R, S)``, boolean.
        length: positions in a row, ``T``.
    """
    if net in _WHOLE:
        yield
        return
    # First, whatever this batch reads: where processes run one network, all of them ask at once
    found = _FOUND.get(net)
    if found is None or not _holds(net, found):
        found = _FOUND[net] = _ask(net)
    if (
        not found.parts
        or 2 * positions.shape[-1] > length
        or not in_plain_sight([net, *way_to(net, found.block)])
    ):
        yield
        return
    parts = [net.get_submodule(name) for name in found.parts]
    with _narrowed(parts, _each_once(positions, mask, length)):
        yield


def _modules(net: nn.Module, name: str) -> list[nn.Module]:
    way = way_to(net, name)
    return [*way, *way[-1].modules()] if way else way


def _setting(net: nn.Module) -> tuple[Any, ...]:
    config = getattr(net, "config", None)
    names = ("_attn_implementation", "_experts_implementation", "output_router_logits")
    return tuple(getattr(config, name, None) for name in names)


def _holds(net: nn.Module, found: _LastBlock) -> bool:
    """Whether an answer is still that of this network: others may have put their layers into it."""
    try:
        modules = _modules(net, found.block)
    except AttributeError:
        return False
    return (
        len(modules) == len(found.modules)
        and all(was() is m for was, m in zip(found.modules, modules, strict=True))
        and found.setting == _setting(net)
    )


def _each_once(positions: Tensor, mask: Tensor, length: int) -> Tensor:
    """The real positions without repetitions, which backward would count twice, ``(R, S)``.

    Others fill the shorter rows; they are computed for nothing.
    """
    if positions.shape[-1] == 1:
        return positions.clamp_min(0)
    read = torch.zeros(len(positions), length, dtype=torch.int32, device=positions.device)
    read = read.scatter_add(-1, positions.clamp_min(0), mask.to(torch.int32))
    return torch.argsort((read == 0).to(torch.uint8), dim=-1, stable=True)[:, : positions.shape[-1]]


@contextmanager
def _narrowed(
    parts: list[nn.Module], columns: Tensor, elsewhere: float = 0.0
) -> Iterator[set[nn.Module]]:
    """Within, ``parts`` see positions ``columns``, ``(R, S)``, of their input, ``(R, T, d)``.

    Yields those that did so far.
    """
    length = 0
    seen: set[nn.Module] = set()
    rows = torch.arange(len(columns)).unsqueeze(-1)

    def gather(part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal length, rows, columns
        (hidden,) = args
        seen.add(part)
        length = hidden.shape[1]
        rows, columns = rows.to(hidden.device), columns.to(hidden.device)
        return (hidden[rows, columns],)

    def scatter(part: nn.Module, args: Any, output: Tensor) -> Tensor:
        full = output.new_full((len(output), length, output.shape[-1]), elsewhere)
        full[rows, columns] = output
        return full

    with ExitStack() as hooks:
        for part in parts:  # after an adapter's own hook, which sees the same positions
            hooks.enter_context(part.register_forward_pre_hook(gather))
            hooks.enter_context(part.register_forward_hook(scatter))
        yield seen


def _ask(net: nn.Module) -> _LastBlock:
    """The last block, and its parts whose output at other positions changes no logit.

    A part passes if the logits read stay the same when it sees two positions alone and puts out NaN
    elsewhere; if it does not, its children are asked.
    """
    config = getattr(net, "config", None)
    length = min(_TOKENS, int(getattr(config, "max_position_embeddings", None) or _TOKENS))
    lists: list[str] = []
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            lists += [] if lists and name.startswith(lists[-1] + ".") else [name]
    if len(lists) != 1 or vocabulary_of(net) < 8 or length < 8:
        return _LastBlock("", (), (), _setting(net))
    block = f"{lists[0]}.{len(net.get_submodule(lists[0])) - 1}"  # type: ignore[arg-type]
    device = device_of(net.modules())
    ids = (torch.arange(2 * length, device=device) * 5 % 7 + 1).reshape(2, length)
    columns = torch.tensor([[2, length - 2], [length - 3, 3]], device=device)
    rows = torch.arange(2, device=device).unsqueeze(-1)

    def logits() -> Tensor:
        mask = torch.ones_like(ids)
        found: Tensor = net(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found[rows, columns]

    def passes(parts: list[nn.Module]) -> bool:
        with _narrowed(parts, columns, torch.nan) as seen:
            return agree(answer(logits), expected) and len(seen) == len(parts)

    def parts_of(name: str) -> list[str]:
        found: list[str] = []
        for child, module in net.get_submodule(name).named_children():
            if any(p.dim() > 1 for p in module.parameters()):  # a norm alone is not worth it
                full = f"{name}.{child}"
                found += [full] if passes([module]) else parts_of(full)
        return found

    parts: list[str] = []
    mixed_in_training = any(isinstance(m, _BatchNorm) for m in net.modules())
    if not (shared_out(net) or mixed_in_training):
        with asked(net):
            expected = answer(logits)
            if type(expected) is Tensor:  # an answer, and one of numbers
                parts = parts_of(block)
                parts = parts if passes([net.get_submodule(name) for name in parts]) else []
    modules = tuple(ref(module) for module in _modules(net, block))
    return _LastBlock(block, tuple(parts), modules, _setting(net))
