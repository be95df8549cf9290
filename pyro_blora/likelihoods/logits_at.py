"""Logits at the positions and tokens that are read, and at no others.

The output head of a language model is a large part of its cost, and a likelihood reads few of its
rows. The network's own forward is run, so scalings and soft-caps after the head stay in place;
only what enters the head, and which of its rows are computed, is narrowed, and the last block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.adapter import Adapter, adapter_of, put_forward_back
from pyro_blora.network.last_block import last_block_at
from pyro_blora.network.quantised import is_quantised_tensor

__all__ = ["logits_at", "output_head"]


def output_head(net: nn.Module) -> nn.Module:
    """The head of a causal language model.

    Raises:
        ConfigurationError: the network has no output head, or reads the text by an encoder.
    """
    getter = getattr(net, "get_output_embeddings", None)
    head: nn.Module | None = getter() if callable(getter) else None
    if head is None:
        raise ConfigurationError(
            f"{type(net).__name__} has no language-model head; load it as a causal language model, "
            "or use SequenceClassification."
        )
    if getattr(getattr(net, "config", None), "is_encoder_decoder", False):
        raise ConfigurationError(
            f"{type(net).__name__} is an encoder-decoder, which predicts no token from those "
            "before it alone; take a causal language model, or its sequence classifier."
        )
    return head


def logits_at(
    net: nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor,
    mask: Tensor,
    token_ids: Tensor | None = None,
) -> Tensor:
    """The network's logits at some positions of each row.

    Args:
        net: a language model with an output head (``get_output_embeddings``).
        inputs: its keyword arguments, ``R`` rows. Where some are padded on the left and there are
            no ``position_ids``, they are counted from the first real token of each row, which
            transformers leaves to the caller.
        positions: positions to read in each row, ``(R, S)``.
        mask: which of them are real, ``(R, S)``, boolean.
        token_ids: the vocabulary entries to compute, ``(C,)``; default all.

    Returns:
        ``(mask.sum(), C)`` in at least single precision: the real positions in row-major order.

    Raises:
        ConfigurationError: the network has no output head, or is an encoder-decoder.
    """
    head = output_head(net)
    adapter = adapter_of(head)
    per_row = adapter is not None and adapter.update is not None
    ids = inputs.get("input_ids")
    if "position_ids" not in inputs:
        inputs = {**inputs, **_positions(inputs.get("attention_mask"))}
    with (
        last_block_at(net, positions, mask, length=0 if ids is None else ids.shape[-1]),
        _narrowed(head, adapter, positions, None if per_row else mask, token_ids) as narrow,
    ):
        logits: Tensor = net(**inputs, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if token_ids is not None and not narrow:
        logits = logits[..., token_ids]
    return logits[mask] if per_row else logits.squeeze(0)


def _positions(mask: Tensor | None) -> dict[str, Tensor]:
    """``position_ids`` for rows of which some are padded on the left."""
    if mask is None or mask.dim() != 2 or not bool((mask[:, 0] == 0).any()):
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


@contextmanager
def _narrowed(
    head: nn.Module,
    adapter: Adapter | None,
    positions: Tensor,
    mask: Tensor | None,
    token_ids: Tensor | None,
) -> Iterator[bool]:
    """Within, ``head`` sees only ``positions`` and computes only ``token_ids``.

    Yields whether it picks the tokens; a quantised head, or one whose ``forward`` another library
    has replaced, computes them all.

    Without a mask the head's input keeps its rows, ``(R, S, d)``, as the particles' shares need;
    with one it is the flat list of real positions, ``(1, mask.sum(), d)``.
    """

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(-1)
        columns = positions.to(hidden.device)
        if mask is None:
            return (hidden[rows, columns],)
        real = mask.to(hidden.device)
        return (hidden[rows.expand_as(real)[real], columns[real]].unsqueeze(0),)

    before, narrow = vars(head).get("forward"), False
    with head.register_forward_pre_hook(gather):
        try:
            if token_ids is not None and type(head) is nn.Linear and _is_plain(head):
                narrow = True
                head.forward = partial(_some_rows, head, token_ids)  # type: ignore[method-assign]
                if adapter is not None:
                    adapter.rows = token_ids
            yield narrow
        finally:
            if narrow:
                put_forward_back(head, before)
                if adapter is not None:
                    adapter.rows = None


def _is_plain(head: nn.Linear) -> bool:
    own = MethodType(nn.Linear.forward, head)  # and no other library's in its place
    return head.forward == own and not is_quantised_tensor(head.weight)


def _some_rows(head: nn.Linear, rows: Tensor, hidden: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias[rows]
    return functional.linear(hidden, head.weight[rows], bias)
