"""The blocks below the lowest adapted layer, run once for all that is asked of an example.

They are frozen: every posterior draw, and every epoch, finds the same hidden states in them. The
first pass records what the last of them puts out for each example; later passes skip them, and the
last one gives the record back, repeated for as many draws as share the pass.
"""

import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_blora.network import fast_path
from pyro_blora.network.adapter import layer_input, put_forward_back
from pyro_blora.network.freezing import evaluated
from pyro_blora.network.quantised import is_quantised
from pyro_blora.network.targets import head_of

__all__ = ["FrozenPrefix", "frozen_blocks", "kept", "skippable_blocks"]

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
    """What the frozen blocks put out for each example; within :meth:`examples` it is used.

    It holds ``r T d`` numbers for an example of ``r`` rows, in the network's precision and on its
    device: 59 MB for 400 rows of 64 tokens at ``d = 576`` in single precision.

    Args:
        net: the network.
        blocks: its frozen blocks, see :func:`skippable_blocks`.

    Example::

        prefix = FrozenPrefix(net, blora.model.skippable_blocks())
        for indices, batch in loader:
            with prefix.examples(indices):  # from the second epoch on the blocks are skipped
                loss = elbo(batch)
    """

    def __init__(self, net: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.net, self.blocks = net, blocks
        self._kept: dict[Hashable, Tensor] = {}
        self._tuples: dict[int, tuple[type, int]] = {}  # of blocks that put out several things
        self._keys: list[Hashable] = []
        self._copies, self._passes = 1, 0
        self._asked = self._plain = False
        below = self._below() if blocks else ()
        self._evaluated = [module for module in below if not is_quantised(module)]

    @contextmanager
    def examples(self, keys: Sequence[Hashable], copies: int = 1) -> Iterator[None]:
        """Within, the network's batch is the examples ``keys``, in order, ``copies`` times over.

        Rows are padded on the right, to any length. All that is registered before the lowest
        adapted block is in evaluation mode: dropout would make an example another one each time.
        """
        self._keys, self._copies, self._passes = list(keys), copies, 0
        self._asked = fast_path.is_asked(self.net)  # other questions see all blocks run
        before = [vars(block).get("forward") for block in self.blocks]  # another library's
        with evaluated(self._evaluated):
            for index, block in enumerate(self.blocks):
                block.forward = partial(self._forward, index, block.forward)
            try:
                yield
            finally:
                for block, own in zip(self.blocks, before, strict=True):
                    put_forward_back(block, own)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is kept, by example as JSON names it, and, for JSON, which blocks gave tuples."""
        kinds = {str(i): [kind is tuple, count] for i, (kind, count) in self._tuples.items()}
        return {json.dumps(key): rows for key, rows in self._kept.items()}, kinds

    def load(self, kept: Mapping[str, Tensor], kinds: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state` gave: those blocks are not run again."""
        device = next(self.net.parameters()).device
        for name, rows in kept.items():
            key, count = json.loads(name)
            self._kept[tuple(key) if isinstance(key, list) else key, count] = rows.to(device)
        for index, (is_tuple, count) in kinds.items():
            self._tuples[int(index)] = (tuple if is_tuple else list, count)

    def _below(self) -> set[nn.Module]:
        """What may run before the first block that is not frozen, ancestors included.

        By where it is registered: ahead of that block, or beside the blocks. An ancestor that
        checkpoints activations stays in its mode, or it would keep keys and values, too.
        """
        ancestors = _ancestors(self.net, self.blocks[0])
        runner = next(m for m in reversed(ancestors) if not isinstance(m, nn.ModuleList))
        others = (block for block in ancestors[-1].children() if block not in self.blocks)
        below = set(runner.modules()) - {m for block in others for m in block.modules()}
        below.update(takewhile(lambda module: module is not self.blocks[0], self.net.modules()))
        keep = {m for m in ancestors if getattr(m, "gradient_checkpointing", False)}
        return below - keep

    def _forward(self, index: int, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if fast_path.is_asked(self.net) != self._asked:
            return own(*args, **kwargs)
        hidden = layer_input(args, kwargs)
        last = index == len(self.blocks) - 1
        count = self._copies * len(self._keys)
        if index == 0:  # what comes second, or row by row, is another input of the same examples
            self._passes += 1
            self._plain = self._passes > 1 or hidden.shape[0] % count > 0
        if self._plain:
            return own(*args, **kwargs)
        rows = hidden.shape[0] // count
        keys = [(key, rows) for key in self._keys]  # options may be packed, or rows each
        if all(key in self._kept for key in keys):
            hidden = self._assembled(keys, hidden.shape[1]) if last else hidden
            if index not in self._tuples:
                return hidden
            kind, count = self._tuples[index]
            return kind((hidden, *[None] * (count - 1)))
        with torch.no_grad():
            output = value = own(*args, **kwargs)
        if isinstance(output, tuple | list):
            self._tuples[index], value = (type(output), len(output)), output[0]
        if last:
            for key, own_rows in zip(keys, value.detach().split(rows), strict=False):
                self._kept[key] = own_rows.clone()  # the first copy's
        return output

    def _assembled(self, keys: Sequence[Hashable], length: int) -> Tensor:
        kept = (self._kept[key] for key in keys)
        cut_or_padded = [functional.pad(rows, (0, 0, 0, length - rows.shape[1])) for rows in kept]
        return torch.cat(cut_or_padded).repeat(self._copies, 1, 1)


def kept(
    prefix: FrozenPrefix | None, keys: Sequence[Hashable], batch: Mapping[str, Any], copies: int = 1
) -> AbstractContextManager[None]:
    """``prefix.examples(keys, copies)``, or nothing where no prefix or no keys are known.

    Rows padded on the left, which stand elsewhere, run plainly, too.
    """
    if prefix is None or not prefix.blocks or not keys:
        return nullcontext()
    mask = batch.get("attention_mask")
    left = mask is not None and mask.dim() == 2 and not bool(mask[:, 0].all())
    return nullcontext() if left else prefix.examples(keys, copies)


def _ask(net: nn.Module, blocks: list[nn.Module]) -> bool:
    """Whether rows that come again, twice over or padded to another length, skip the blocks."""
    ids = fast_path.tokens_for(net, 3)
    if ids is None:
        return False
    mask = (torch.arange(8, device=ids.device) < ids.new_tensor([[5], [4], [4]])).long()
    ids = ids.where(mask.bool(), fast_path.padding_of(net))
    visits = [(ids[:, :5], mask[:, :5], 1), (ids[:, :5], mask[:, :5], 2), (ids, mask, 1)]
    prefix = FrozenPrefix(net, blocks)
    for ids, mask, copies in visits:
        rows = {"input_ids": ids.repeat(copies, 1), "attention_mask": mask.repeat(copies, 1)}
        expected = fast_path.logits_of(net, **rows)
        with prefix.examples(range(3), copies):
            if not fast_path.agree(fast_path.logits_of(net, **rows), expected):
                return False
    return bool(prefix._kept)


def _ancestors(net: nn.Module, block: nn.Module) -> list[nn.Module]:
    """The modules that hold a block, from the network down."""
    words = next(name for name, module in net.named_modules() if module is block).split(".")
    return [net, *(net.get_submodule(".".join(words[:i])) for i in range(1, len(words)))]
