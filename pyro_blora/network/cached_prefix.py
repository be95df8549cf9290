"""What the frozen blocks below the lowest adapted layer put out, kept for each row across epochs.

They give a row the same hidden states at every visit, so that from the second epoch on a training
step starts at the lowest adapted block. A row is known by all that enters the first block, without
its padding: it may come in another batch, padded to another length.
"""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.adapter import Adapter, entering
from pyro_blora.network.fast_path import (
    agree,
    asked,
    is_asked,
    logits_for,
    padding_of,
    remembered,
    rows_come_first,
    tokens_for,
)
from pyro_blora.network.kept_prefix import can_skip, forwards_replaced, in_place_of
from pyro_blora.network.modes import modes_kept
from pyro_blora.network.quantised import is_quantised
from pyro_blora.network.shared_prefix import frozen_blocks, whole_if_frozen

__all__ = ["PrefixCache"]

# Arguments of a block whose first dimension in a row is that of the positions
_POSITIONS = ("position_ids", "position_embeddings", "cache_position")


class PrefixCache:
    """A store of hidden states; within :meth:`in_place` the frozen blocks read it.

    It holds ``sum_i t_i d`` numbers for rows of ``t_i`` tokens, in the network's precision and on
    its device: 59 MB for 400 rows of 64 tokens at ``d = 576`` in single precision.

    Args:
        net: the network.
        adapters: those on its layers.

    Raises:
        ConfigurationError: no block lies below the lowest adapted layer, others read more of the
            blocks than what the last of them puts out, or blocks read a row's padding.

    Example::

        cache = PrefixCache(blora.net, blora.model.adapters)
        with cache.in_place():
            loss = elbo(batch)
    """

    def __init__(self, net: nn.Module, adapters: Sequence[Adapter]) -> None:
        self.net = net
        self._names = [adapter.name for adapter in adapters]
        blocks = frozen_blocks(net, self._names)
        if not blocks:
            raise ConfigurationError(
                "cache_frozen_prefix: no block of the network lies below its lowest adapted layer, "
                "so there is nothing to keep. Adapt the upper layers alone, as with "
                "BayesianLoRA(net, layers_to_transform=[22, 23, ...])."
            )
        if not can_skip(net, blocks) or rows_come_first(net, blocks[:1]) is False:
            raise ConfigurationError(
                f"cache_frozen_prefix: {type(net).__name__} gives other logits, or none, where its "
                f"lowest {len(blocks)} blocks are skipped and the output of the last of them is "
                f"put in their place, row by row. {_remedy(net)}"
            )
        if not _alike_at_other_padding(net, blocks):
            raise ConfigurationError(
                f"cache_frozen_prefix: what {type(net).__name__} makes of a row depends on its "
                "padding or on the rows beside it, which differ from visit to visit, or it takes "
                f"no padding. {_remedy(net)}"
            )
        self._rows = _Rows(net, blocks)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, rows that were seen before skip the frozen blocks.

        All that runs before the lowest adapted block is in evaluation mode, and so is the module
        that runs the blocks, unless it checkpoints activations: dropout would make a row another
        one at each visit.
        """
        with self._rows.in_place(), whole_if_frozen(self.net, self._names):
            yield

    def warn_if_unused(self) -> None:
        """Warns where hardly a pass, fewer than one in ten by its rows, has skipped the blocks."""
        visits, skipped = self._rows.visits, self._rows.skipped
        if visits and skipped <= 0.1 * visits:
            warnings.warn(
                f"cache_frozen_prefix: of {visits} rows {skipped} have skipped the frozen blocks, "
                f"and {len(self._rows.kept)} are kept for nothing. Either examples came once; or "
                "with other padding on their left at each visit, or with others that did; or "
                f"{type(self.net).__name__} gives its blocks what changes from visit to visit, "
                "such as position biases of a batch's length, or dropout under activation "
                "checkpointing. Train without the cache.",
                stacklevel=3,
            )


@remembered
def _alike_at_other_padding(net: nn.Module, blocks: Sequence[nn.Module]) -> bool | None:
    """Whether rows that come again, padded to another length, give the logits that they give."""
    ids = tokens_for(net, 3)
    if ids is None:
        return None
    mask = (torch.arange(8, device=ids.device) < ids.new_tensor([[5], [4], [4]])).long()
    ids = ids.where(mask.bool(), padding_of(net))
    visits = [(ids[:, :t], mask[:, :t]) for t in (8, 5)]  # in the last a row has no padding
    with asked(net):
        expected = [logits_for(net, *visit) for visit in visits]
        with _Rows(net, blocks).in_place():
            found = [logits_for(net, *visit) for visit in visits]
    return all(map(agree, found, expected))


def _remedy(net: nn.Module) -> str:
    attention = getattr(getattr(net, "config", None), "_attn_implementation", None)
    if attention in (None, "eager", "sdpa"):
        return "Train without the cache."
    return f"Train without the cache, or with attn_implementation='sdpa' instead of {attention!r}."


class _Rows:
    """What the last of ``blocks`` puts out for each row.

    Quantised layers, which drop nothing out, stay in the mode they are in (see ``asked``).

    Attributes:
        kept: it, by what enters the first of them.
        visits: how many rows have come, each time that one did, but for those of questions.
        skipped: how many of them have skipped the blocks.
    """

    def __init__(self, net: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.net = net
        self.blocks = blocks
        self.kept: dict[bytes, Tensor] = {}
        self.visits = self.skipped = 0
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._form: Any = None  # what blocks put out, its tensors left out
        inside = (module for block in blocks for module in block.modules())
        evaluated = (*self._around_blocks(), *self._before_blocks(), *inside)
        self._evaluated = [module for module in evaluated if not is_quantised(module)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the blocks are skipped by rows that were seen, and nothing has dropout."""
        with modes_kept(self._evaluated), forwards_replaced(self.blocks, self._forward):
            for module in self._evaluated:
                module.training = False
            yield

    def _before_blocks(self) -> Iterator[nn.Module]:
        """Leaves registered ahead of the blocks: embeddings and their dropout."""
        for module in self.net.modules():
            if module is self.blocks[0]:
                return
            if not list(module.children()):
                yield module

    def _around_blocks(self) -> Iterator[nn.Module]:
        """What runs the blocks, and may itself drop something, or whole blocks, out; its leaves.

        Not where it checkpoints activations: in evaluation mode GPT-2 would keep keys and values,
        which blocks that run twice append to twice.
        """
        inside = {self.blocks[0]}
        for module in reversed(list(self.net.modules())):
            if inside.isdisjoint(module.children()):
                continue
            if type(module).forward is nn.Module.forward:  # a list or a dictionary
                inside.add(module)
            elif not getattr(module, "gradient_checkpointing", False):
                yield module
                yield from (leaf for leaf in module.children() if not list(leaf.children()))

    def _forward(self, index: int, own: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        hidden = entering(args, kwargs)
        if index == 0:
            self._keys, self._lengths = _keys(hidden, _beside(hidden, self.blocks[0], args, kwargs))
        elif not self._keys:
            raise ConfigurationError(
                f"cache_frozen_prefix: a pass came to block {index} without block 0, where rows are"
                " known by what enters. Train without the cache."
            )
        keys, last = self._keys, index == len(self.blocks) - 1
        known = all(key in self.kept for key in keys)
        if last:
            self._keys = []  # the next pass has others
        if last and not is_asked(self.net):
            self.visits += len(keys)
            self.skipped += len(keys) if known else 0
        if known:
            value = self._assembled(keys, hidden) if last else hidden
            return in_place_of(self._form, value)
        with torch.no_grad():
            output = own(*args, **kwargs)
        value = output[0] if isinstance(output, tuple | list) else output
        self._form = in_place_of(output, None)
        if last:
            for key, length, row in zip(keys, self._lengths, value, strict=True):
                self.kept[key] = row[:length].clone()
        return output

    def _assembled(self, keys: Sequence[bytes], like: Tensor) -> Tensor:
        kept = [self.kept[key] for key in keys]
        whole = kept[0].new_zeros(*like.shape[:2], kept[0].shape[-1])
        for row, values in zip(whole, kept, strict=True):
            row[: len(values)] = values
        return whole


def _keys(hidden: Tensor, others: Mapping[str, Any]) -> tuple[list[bytes], list[int]]:
    """A digest of each row without its padding, and its length without it."""
    rows, length = hidden.shape[:2]
    mask = others.get("attention_mask")
    lengths = [length] * rows
    seen = _seen(mask, rows, length)
    if seen is not None:
        columns = seen.any(-2) * torch.arange(1, length + 1, device=seen.device)
        lengths = columns.amax(-1).tolist()
    rest = [
        (tensor, name in _POSITIONS)
        for name, value in others.items()
        if seen is None or value is not mask
        for tensor in tree_leaves(value)
        if isinstance(tensor, Tensor)
    ]
    keys = []
    for row, t in enumerate(lengths):
        digest = hashlib.blake2b(digest_size=16)
        parts = [hidden[row, :t]] + ([] if seen is None else [seen[row, :t, :t]])
        for tensor, has_positions in rest:
            part = _of_row(tensor, row, rows, 2 if has_positions else 1)
            parts.append(part[:t] if has_positions else part)
        for part in parts:
            raw = part.detach().contiguous().view(-1).view(torch.uint8)
            digest.update(raw.cpu().numpy().tobytes())
        keys.append(digest.digest())
    return keys, lengths


def _beside(
    hidden: Tensor, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What a block is given beside the hidden states, by name."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    names += [f"argument {i}" for i in range(len(names), len(args))]  # of a block of ``*args``
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in named.items() if value is not hidden}


def _of_row(tensor: Tensor, row: int, rows: int, least: int) -> Tensor:
    """What a row has of a tensor of ``least`` dimensions; all of it where it has none of rows."""
    if tensor.dim() >= least and tensor.shape[0] == rows:
        return tensor[row]
    return tensor[0] if tensor.dim() > 1 and tensor.shape[0] == 1 else tensor


def _seen(mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Which position each one attends to, ``(R, T, T)``; ``None`` where no mask tells."""
    if mask is None:
        return None
    if mask.is_floating_point():  # added to the scores: zero where a position is seen
        if not bool(((mask == 0) | (mask < -1e4)).all()):
            return None  # and a bias besides (ALiBi), which tells rows apart as it stands
        mask = mask == 0
    seen = mask.bool()
    if seen.dim() == 4:
        seen = seen[:, 0]
    elif seen.dim() == 2:
        seen = seen.unsqueeze(-2)
    return seen.expand(rows, length, -1)
