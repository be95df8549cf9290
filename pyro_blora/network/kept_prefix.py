"""What the frozen blocks put out, kept from pass to pass of one prediction.

All passes are of one batch, and the blocks below the lowest adapted layer are the same in each. The
first pass runs them; the others start where the last of them ends.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_blora.network.adapter import entering, put_forward_back
from pyro_blora.network.fast_path import (
    agree,
    asked,
    in_plain_sight,
    logits_for,
    remembered,
    shared_out,
    tokens_for,
    way_to,
)

__all__ = ["KeptPrefix", "can_keep", "can_skip", "forwards_replaced", "in_place_of"]

_CALLS = 8  # of the network in a pass; more are run again


@contextmanager
def forwards_replaced(blocks: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Within, ``forward(index, own, *args, **kwargs)`` stands in for each block's own forward.

    The first two by position alone: a block may be given anything else by any name.
    """
    before = [vars(block).get("forward") for block in blocks]  # another library's
    for index, block in enumerate(blocks):
        block.forward = partial(forward, index, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            put_forward_back(block, own)


class KeptPrefix:
    """The outputs of frozen blocks; within :meth:`in_place` equal inputs get them again.

    Every tensor that enters the first block is compared, whole, so that nothing else can be taken
    for what was seen before. It holds as much as enters the first block and leaves the last.

    Args:
        blocks: the frozen blocks, in order; see :func:`can_skip`.

    Attributes:
        hits: how often they were skipped.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.hits = 0
        self._kept: deque[tuple[list[Any], Any]] = deque(maxlen=_CALLS)
        self._entering: list[Any] = []
        self._found: Any = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the blocks are skipped where their inputs were seen before."""
        with forwards_replaced(self.blocks, self._forward):
            yield

    def _forward(self, index: int, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if index == 0:
            leaves = tree_leaves((args, kwargs))
            self._found = next((out for seen, out in self._kept if _equal(seen, leaves)), None)
            if self._found is None:
                self._entering = _copied(leaves)
            else:
                self.hits += 1
        last = index == len(self.blocks) - 1
        if self._found is not None and last:
            return _copied(self._found)
        if self._found is not None:
            return in_place_of(self._found, entering(args, kwargs))
        output = own(*args, **kwargs)
        if last:
            self._kept.append((self._entering, _copied(output)))
        return output


def _copied(values: Any) -> Any:
    """The same with tensors of its own, which hooks that write in place do not reach."""
    return tree_map_only(Tensor, Tensor.clone, values)


def in_place_of(output: Any, hidden: Tensor | None) -> Any:
    """Hidden states as blocks put them out, alone or first of several."""
    if isinstance(output, tuple | list):
        return type(output)((hidden, *(None for _ in output[1:])))
    return hidden


def _equal(seen: list[Any], given: list[Any]) -> bool:
    return len(seen) == len(given) and all(map(_same, seen, given))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b)


def can_keep(net: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether a :class:`KeptPrefix` may stand in for frozen blocks, nobody having asked for one.

    Not where they are compiled, where their inputs may have gradients, where attention's mask is no
    tensor, and where weights are shared out among processes, which would have to skip together.
    """
    attention = getattr(getattr(net, "config", None), "_attn_implementation", None)
    if not blocks:
        return False
    name = next(name for name, module in net.named_modules() if module is blocks[0])
    return (
        not torch.is_grad_enabled()
        and attention != "flex_attention"
        and in_plain_sight([net, *way_to(net, name), *blocks])
        and not shared_out(net)
        and can_skip(net, blocks) is True
    )


@remembered
def can_skip(net: nn.Module, blocks: Sequence[nn.Module]) -> bool | None:
    """Whether all that others read of these blocks is the output of the last.

    Asked of the network itself, on three rows of a few tokens: it must give the same logits where
    the blocks are skipped. ``None`` where it does not say: it takes no tokens, or more than these.
    """
    ids = tokens_for(net, 3)
    if ids is None:
        return None
    kept = KeptPrefix(blocks)
    with asked(net):
        expected = logits_for(net, ids)
        if expected is None:
            return None
        with kept.in_place():
            logits_for(net, ids)
            return agree(logits_for(net, ids), expected) and kept.hits == 1
