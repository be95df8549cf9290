"""Logits at the positions that are read, and at no others.

The output head of a language model is a large part of its cost, and a likelihood reads few of its
rows. The network's own forward is run, so scalings and soft-caps after the head stay in place;
only what enters the head is narrowed.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods.left_padding import positions_of
from pyro_blora.network import fast_path
from pyro_blora.network.adapter import adapter_of
from pyro_blora.network.targets import head_of, is_classifier

__all__ = ["check_causal", "logits_at", "output_head"]


def output_head(net: nn.Module) -> nn.Module:
    """The head of a causal language model; an error where the network is none."""
    head = head_of(net)
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


def check_causal(net: nn.Module) -> None:
    """Raises ConfigurationError where a network with a head is no causal language model."""
    if head_of(net) is not None or is_classifier(net):
        output_head(net)


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
            no ``position_ids``, see :func:`~pyro_blora.likelihoods.left_padding.positions_of`.
        positions: positions to read in each row, ``(R, S)``.
        mask: which of them are real, ``(R, S)``, boolean.
        token_ids: the vocabulary entries to return, ``(C,)``; default all.

    Returns:
        ``(mask.sum(), C)`` in at least single precision: the real positions in row-major order.

    Raises:
        ConfigurationError: the network has no output head, or is an encoder-decoder.
        BatchError: rows are padded on the left, and the network gives other logits then.
    """
    head = output_head(net)
    adapter = adapter_of(head)
    per_row = adapter is not None and adapter.update is not None  # particles share out the rows
    if "position_ids" not in inputs:
        inputs = {**inputs, **positions_of(net, inputs.get("attention_mask"))}
    narrow: list[bool] = []  # whether the head, and not its weight alone, was used

    def gathered(values: Tensor) -> Tensor:
        """``(R, S, d)`` of ``(R, T, d)``, or the flat list of real positions, ``(1, N, d)``."""
        rows = torch.arange(len(values), device=values.device).unsqueeze(-1)
        columns, real = positions.to(values.device), mask.to(values.device)
        if per_row:
            return values[rows, columns]
        return values[rows.expand_as(real)[real], columns[real]].unsqueeze(0)

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        narrow.append(True)
        return (gathered(args[0]),)

    narrows = fast_path.is_on(net) and not fast_path.is_observed(net, (net, head))
    with head.register_forward_pre_hook(gather) if narrows else nullcontext():
        logits: Tensor = net(**inputs, use_cache=False).logits
    logits = logits if narrow else gathered(logits)
    logits = logits[mask] if per_row else logits.squeeze(0)
    logits = logits if token_ids is None else logits[..., token_ids]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
