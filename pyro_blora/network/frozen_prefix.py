"""The blocks below the lowest adapted layer, run once for all draws of a prediction.

They are frozen, so every draw finds the same hidden states in them: the first pass records what the
last of them puts out, and later passes give the record back, once for each draw that shares them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.network import fast_path
from pyro_blora.network.adapter import layer_input, put_forward_back
from pyro_blora.network.targets import head_of

__all__ = ["FrozenPrefix", "frozen_blocks", "skippable_blocks"]

_SHORTCUT = "its frozen blocks skipped"
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")


def frozen_blocks(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks that come before every adapted layer (named in full), in order.

    None of them where they cannot be told: layers in two lists (an encoder and a decoder), a layer
    outside of them that is not the network's head, or a block that stands there twice.
    """
    found = {name: _BLOCK.match(name) for name in names}
    head = head_of(net)
    if any(match is None and net.get_submodule(name) is not head for name, match in found.items()):
        return []
    inside = [match for match in found.values() if match is not None]
    if not inside:  # the head alone is adapted
        lists = [m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        return list(lists[0]) if len(lists) == 1 else []
    blocks = net.get_submodule(inside[0][1])
    if not isinstance(blocks, nn.ModuleList) or len({match[1] for match in inside}) > 1:
        return []
    below = list(blocks)[: min(int(match[2]) for match in inside)]
    return below if len(set(below)) == len(below) else []


def skippable_blocks(
    net: nn.Module, names: Sequence[str], trained: Sequence[str] = ()
) -> list[nn.Module]:
    """The frozen blocks, where the network gives the same logits without running them again.

    None of them where the network is to run plainly: they, or what runs them, are compiled or
    sharded, a hook or the configuration looks at what they put out, a module that is ``trained``
    whole stands before them, or ``fast=False``; or where it, asked, gives other logits (see
    :func:`~pyro_blora.network.fast_path.holds`).
    """
    blocks = frozen_blocks(net, names)
    if not blocks:
        return []
    inside = [module for block in blocks for module in block.modules()]
    before = set(takewhile(lambda module: module is not blocks[0], net.modules()))
    usable = (
        fast_path.is_on(net)
        and not any(net.get_submodule(name) in before for name in trained)
        and fast_path.runs_eagerly([*_ancestors(net, blocks[0]), *inside])
        and not fast_path.is_sharded(net)
        and not fast_path.is_observed(net, inside)
        and fast_path.holds(net, _SHORTCUT, partial(_ask, net, blocks), *blocks)
    )
    return blocks if usable else []


class FrozenPrefix:
    """What the frozen blocks of a network put out for one batch; within :meth:`copies` it is used.

    Args:
        net: the network, in evaluation mode.
        blocks: its frozen blocks, see :func:`skippable_blocks`; none of them changes nothing.
    """

    def __init__(self, net: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.net, self.blocks = net, blocks
        self.kept: Tensor | None = None
        self._tuples: dict[int, tuple[type, int]] = {}  # of blocks that put out several things
        self._copies, self._passes = 1, 0
        self._asked = self._skips = False

    @contextmanager
    def copies(self, number: int) -> Iterator[None]:
        """Within, a pass of the network is the batch that many times over; first of all once."""
        self._copies, self._passes = number, 0
        self._asked = fast_path.is_asked(self.net)  # other questions see all blocks run
        before = [vars(block).get("forward") for block in self.blocks]  # another library's
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._forward, index, block.forward)
        try:
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                put_forward_back(block, own)

    def _forward(self, index: int, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if fast_path.is_asked(self.net) != self._asked:
            return own(*args, **kwargs)
        hidden, last = layer_input(args, kwargs), index == len(self.blocks) - 1
        if index == 0:
            self._passes += 1
            self._skips = self.kept is not None and len(hidden) == len(self.kept) * self._copies
        if self._passes > 1:  # another input of the same rows, or row by row
            return own(*args, **kwargs)
        if self._skips and self.kept is not None:
            hidden = self.kept.repeat(self._copies, 1, 1) if last else hidden
            if index not in self._tuples:
                return hidden
            kind, count = self._tuples[index]
            return kind((hidden, *[None] * (count - 1)))
        output = value = own(*args, **kwargs)
        if isinstance(output, tuple | list):
            self._tuples[index], value = (type(output), len(output)), output[0]
        if last and self.kept is None:
            self.kept = value.detach()
        return output


def _ask(net: nn.Module, blocks: list[nn.Module]) -> bool:
    """Whether rows that come again, twice over, skip the blocks."""
    ids = fast_path.tokens_for(net, 3)
    if ids is None:
        return False
    mask = (torch.arange(8, device=ids.device) < ids.new_tensor([[8], [5], [4]])).long()
    ids = ids.where(mask.bool(), fast_path.padding_of(net))
    prefix = FrozenPrefix(net, blocks)
    for copies in (1, 2):
        rows = {"input_ids": ids.repeat(copies, 1), "attention_mask": mask.repeat(copies, 1)}
        expected = fast_path.logits_of(net, **rows)
        with prefix.copies(copies):
            if not fast_path.agree(fast_path.logits_of(net, **rows), expected):
                return False
    return prefix.kept is not None


def _ancestors(net: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The modules that hold a block, from the network down."""
    words = next(name for name, module in net.named_modules() if module is block).split(".")
    return [net, *(net.get_submodule(".".join(words[:i])) for i in range(1, len(words)))]
