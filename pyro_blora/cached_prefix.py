"""What the frozen blocks below the lowest adapted layer put out, kept for each row.

They give a row the same hidden states at every visit, so that a training step starts at the lowest
adapted block from the second epoch on, and a prediction's pass from its second on. A row is known
by what enters the first block, its mask and its positions, without its padding: it may come in
another batch, padded to another length.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.last_block import in_plain_sight
from pyro_blora.layers import Adapter
from pyro_blora.shared_prefix import frozen_blocks, whole_if_frozen

__all__ = ["PrefixCache", "can_keep"]


def can_keep(net: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether a :class:`PrefixCache` can stand in for frozen blocks, nobody having asked for one.

    Not where they are compiled, where their input may have a gradient, and where the attention's
    mask is no tensor.
    """
    attention = getattr(getattr(net, "config", None), "_attn_implementation", None)
    return (
        not torch.is_grad_enabled()
        and in_plain_sight([net, *blocks])
        and attention != "flex_attention"
    )


class PrefixCache:
    """A store of hidden states; within :meth:`in_place` the frozen blocks read it.

    It holds ``sum_i t_i d`` numbers for rows of ``t_i`` tokens, in the network's precision and on
    its device: 59 MB for 400 rows of 64 tokens at ``d = 576`` in single precision.

    Args:
        net: the network.
        adapters: those on its layers.

    Raises:
        ConfigurationError: no block lies below the lowest adapted layer.

    Example::

        cache = PrefixCache(blora.net, blora.model.adapters)
        with cache.in_place():
            loss = elbo(batch)
    """

    def __init__(self, net: nn.Module, adapters: Sequence[Adapter]) -> None:
        self.net = net
        self._names = [adapter.name for adapter in adapters]
        self.blocks = frozen_blocks(net, self._names)
        if not self.blocks:
            raise ConfigurationError(
                "cache_frozen_prefix: no block of the network lies below its lowest adapted layer, "
                "so there is nothing to keep. Adapt the upper layers alone, as with "
                "BayesianLoRA(net, layers_to_transform=[22, 23, ...])."
            )
        self._kept: dict[bytes, Tensor] = {}
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._rest: tuple[Any, ...] | None = None  # what blocks return beside the hidden states

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, rows that were seen before skip the frozen blocks.

        All that runs before the lowest adapted block is in evaluation mode: dropout would make
        a row another one at each visit.
        """
        prefix = [module for module in self._before_blocks() if module.training]
        prefix += [m for block in self.blocks for m in block.modules() if m.training]
        for module in prefix:
            module.training = False
        replaced = [vars(block).get("forward") for block in self.blocks]  # another library's
        for index, block in enumerate(self.blocks):
            block.forward = partial(self._forward, index, block.forward)
        try:
            with whole_if_frozen(self.net, self._names):
                yield
        finally:
            for block, forward in zip(self.blocks, replaced, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward
            for module in prefix:
                module.training = True

    def _before_blocks(self) -> Iterator[nn.Module]:
        """Leaves registered ahead of the blocks: embeddings and their dropout."""
        for module in self.net.modules():
            if module is self.blocks[0]:
                return
            if not list(module.children()):
                yield module

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            self._keys, self._lengths = _keys(hidden, kwargs)
        known = all(key in self._kept for key in self._keys)
        last = index == len(self.blocks) - 1
        if known:
            value = self._assembled(hidden) if last else hidden
            return value if self._rest is None else (value, *self._rest)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        value = output[0] if isinstance(output, tuple) else output
        self._rest = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        if last:
            for key, length, row in zip(self._keys, self._lengths, value, strict=True):
                self._kept[key] = row[:length].clone()
        return output

    def _assembled(self, like: Tensor) -> Tensor:
        kept = [self._kept[key] for key in self._keys]
        whole = kept[0].new_zeros(*like.shape[:2], kept[0].shape[-1])
        for row, values in zip(whole, kept, strict=True):
            row[: len(values)] = values
        return whole


def _keys(hidden: Tensor, kwargs: Mapping[str, Any]) -> tuple[list[bytes], list[int]]:
    """A digest of each row without its padding, and its length without it."""
    rows, length = hidden.shape[:2]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not isinstance(mask, Tensor):
        raise ConfigurationError(
            f"cache_frozen_prefix reads attention masks that are tensors, not a "
            f"{type(mask).__name__}; load the network with attn_implementation='sdpa'."
        )
    lengths = [length] * rows
    seen = _seen(mask, rows, length)
    if seen is not None:
        columns = seen.any(-2) * torch.arange(1, length + 1, device=seen.device)
        lengths = columns.amax(-1).tolist()
    keys = []
    for row, t in enumerate(lengths):
        parts = [hidden[row, :t]]
        parts += [] if seen is None else [seen[row, :t, :t]]
        parts += [] if positions is None else [positions.expand(rows, -1)[row, :t]]
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(part.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
        keys.append(digest.digest())
    return keys, lengths


def _seen(mask: Tensor | None, rows: int, length: int) -> Tensor | None:
    """Which position each one attends to, ``(R, T, T)``; ``None`` where none is masked."""
    if mask is None:
        return None
    if mask.is_floating_point():  # added to the scores: zero where a position is seen
        mask = mask == 0
    seen = mask.bool()
    seen = seen[:, 0] if seen.dim() == 4 else seen.unsqueeze(-2)
    return seen.expand(rows, length, -1)
