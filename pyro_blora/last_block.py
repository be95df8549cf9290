"""The last block of a network at the positions that are read, and at no others.

What the last block puts out at a position that no likelihood reads, nobody reads: only its keys
and values, which the other positions attend to, are needed everywhere. Its MLP and its projections
of queries and of attention's output see the positions that are read, and elsewhere put out zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyro_blora.probing import agree, answer, asked
from pyro_blora.targets import device_of

__all__ = ["last_block_at", "whole_last_block"]


# What each network answered, by name: modules on the way to its last block, parts of the block
_Found = tuple[dict[str, nn.Module], dict[str, nn.Module]]
_FOUND: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()
_WHOLE: WeakSet[nn.Module] = WeakSet()


@contextmanager
def whole_last_block(net: nn.Module) -> Iterator[None]:
    """Within, :func:`last_block_at` does nothing: the last block's output is kept for later."""
    _WHOLE.add(net)
    try:
        yield
    finally:
        _WHOLE.discard(net)


@contextmanager
def last_block_at(
    net: nn.Module, positions: Tensor, mask: Tensor, *, length: int
) -> Iterator[None]:
    """Within, the last block's parts that work position by position do the read ones alone.

    Which parts do, the network is asked once, on a few tokens. Nothing happens where more than half
    of the positions are read, or where the block is compiled or checkpointed: neither could follow.

    Args:
        net: a language model.
        positions: the positions whose logits are read, ``(R, S)``, in any order and number.
        mask: which of them are real, ``(R, S)``, boolean.
        length: positions in a row, ``T``.
    """
    if 2 * positions.shape[-1] > length or net in _WHOLE:
        yield
        return
    if not _still_there(net):  # another library may have put its layers around the network's
        _FOUND[net] = _ask(net)
    way, parts = _FOUND[net]
    if not parts or not _in_plain_sight([net, *way.values()]):
        yield
        return
    with _narrowed(list(parts.values()), _each_once(positions, mask, length)):
        yield


def _still_there(net: nn.Module) -> bool:
    if net not in _FOUND:
        return False
    way, parts = _FOUND[net]
    try:
        return all(net.get_submodule(name) is m for name, m in (*way.items(), *parts.items()))
    except AttributeError:
        return False


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

    handles: list[RemovableHandle] = []
    try:
        for part in parts:  # after an adapter's own hook, which sees the same positions
            handles.append(part.register_forward_pre_hook(gather))
            handles.append(part.register_forward_hook(scatter))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _in_plain_sight(way: list[nn.Module]) -> bool:
    """Whether the modules run now, as they stand, and not from a graph or a second time."""
    again = torch.is_grad_enabled() and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in way
    )
    compiled = any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in way
    )
    return not again and not compiled


def _ask(net: nn.Module) -> _Found:
    """The way to the last block, and its parts whose output at other positions changes no logit.

    A part passes if the logits read stay the same when it sees two positions alone and puts out NaN
    elsewhere; if it does not, its children are asked.
    """
    lists: list[str] = []
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            lists += [] if lists and name.startswith(lists[-1] + ".") else [name]
    vocabulary = int(getattr(getattr(net, "config", None), "vocab_size", 0))
    if len(lists) != 1 or vocabulary < 8:
        return {}, {}
    words = f"{lists[0]}.{len(net.get_submodule(lists[0])) - 1}".split(".")  # type: ignore[arg-type]
    names = [".".join(words[:i]) for i in range(1, len(words) + 1)]
    device = device_of(net.modules())
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 2], [7, 5, 3, 1, 2, 4, 6, 3]], device=device)
    columns = torch.tensor([[2, 6], [5, 3]], device=device)
    rows = torch.arange(2, device=device).unsqueeze(-1)

    def logits() -> Tensor:
        mask = torch.ones_like(ids)
        found: Tensor = net(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found[rows, columns]

    def passes(parts: list[nn.Module]) -> bool:
        with _narrowed(parts, columns, torch.nan) as seen:
            return agree(answer(logits), expected) and len(seen) == len(parts)

    def parts_of(name: str) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for child, module in net.get_submodule(name).named_children():
            if any(p.dim() > 1 for p in module.parameters()):  # a norm alone is not worth it
                full = f"{name}.{child}"
                found |= {full: module} if passes([module]) else parts_of(full)
        return found

    with asked(net):
        expected = answer(logits)
        if type(expected) is not Tensor:  # no answer, or one without numbers or in shares
            return {}, {}
        parts = parts_of(names[-1])
        way = {name: net.get_submodule(name) for name in names}
        return way, parts if passes(list(parts.values())) else {}
