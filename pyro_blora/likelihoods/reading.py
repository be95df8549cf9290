"""Logits at selected positions only.

The network runs its own forward, so that scalings and soft-caps after the head still apply; a hook
narrows only the input of the head, which is a large part of the cost.
"""

import inspect
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.network.adapter import layer_hook_of
from pyro_blora.network.probes import is_observed
from pyro_blora.network.targets import head_of, is_classifier, without_peft


def output_head(net: nn.Module) -> nn.Module:
    """The head of a causal language model; raises ConfigurationError for another network."""
    head = head_of(net)
    if head is None or getattr(getattr(net, "config", None), "is_encoder_decoder", False):
        what = "has no language-model head" if head is None else "is an encoder-decoder"
        raise ConfigurationError(
            f"{type(net).__name__} {what}; load it as a causal language model, or use "
            "SequenceClassification."
        )
    return head


def check_causal(net: nn.Module) -> None:
    """Raises ConfigurationError if a network has a head that is not a causal language model's."""
    if head_of(net) is not None or is_classifier(net):
        output_head(net)
    config = getattr(net, "config", None)
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and head_of(net) is not None
    if masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        raise ConfigurationError(
            f"{type(net).__name__} reads the tokens that it would be scored on; load it as a "
            "causal language model with is_decoder=True, or use SequenceClassification."
        )


def in_single_precision(logits: Tensor) -> Tensor:
    """Logits in float32 at least, because probabilities in half precision do not sum to one."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_logits(net: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The output of a network's head for all arguments of the network in a batch."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    ids: Any = inputs.get("input_ids")
    mask: Any = inputs.get("attention_mask")
    pad = getattr(getattr(net, "config", None), "pad_token_id", None)
    # by which a decoder finds the last token of a row, whose logits it returns
    known = ids is not None and mask is not None and pad is not None and ids.is_cpu
    if known and hasattr(net, "score") and bool(((ids != pad) & (mask == 0)).any()):
        raise BatchError(
            f"Rows must be padded with net.config.pad_token_id, {pad}, got another token; set "
            "net.config.pad_token_id = tokenizer.pad_token_id."
        )
    if "position_ids" not in inputs:
        inputs.update(positions_of(net, mask))
    return in_single_precision(net(**inputs).logits)


def true_entries(mask: Tensor, count: int | None = None) -> Tensor:
    """Flat indices of a mask's true entries; with ``count`` the device is not synchronized."""
    count = int(mask.sum()) if count is None else count
    return torch.argsort((~mask.flatten()).to(torch.uint8), stable=True)[:count]


def compact(keep: Tensor, length: int, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Moves the kept entries of each row to its front, in order, and cuts the rows to a length."""
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)[:, :length]
    return keep.gather(-1, order), [t.gather(-1, order) for t in tensors]


def logits_at(
    net: nn.Module,
    inputs: Mapping[str, Any],
    positions: Tensor,
    mask: Tensor | None = None,
    token_ids: Tensor | None = None,
    count: int | None = None,
    narrow: bool = True,
) -> Tensor:
    """The logits of a language model at some positions of each row, ``(count, C)``.

    ``inputs`` are the network's arguments for ``R`` rows and ``positions`` is ``(R, S)``. ``mask``
    selects those to return, in row-major order; give their number as ``count`` to avoid
    synchronizing the device. ``token_ids`` are the ``C`` vocabulary entries to return, by default
    all. Without ``narrow`` the head runs at all positions.
    """
    head = output_head(net)
    hook = layer_hook_of(head)
    per_row = hook is not None and hook.update is not None  # each particle has its rows
    if "position_ids" not in inputs:
        inputs = {**inputs, **positions_of(net, inputs.get("attention_mask"))}
    columns, width = positions.flatten(), positions.shape[-1]
    real = None if mask is None else true_entries(mask, count)
    narrowed: list[bool] = []  # stays empty if the network uses the head's weight without the head

    def gathered(values: Tensor) -> Tensor:
        """From ``(R, T, d)`` the positions as ``(R, S, d)``, or as a flat list, ``(1, N, d)``."""
        if per_row:
            rows = torch.arange(len(values), device=values.device).unsqueeze(-1)
            return values[rows, positions.to(values.device)]
        at = torch.arange(len(columns), device=columns.device) if real is None else real
        rows, chosen = (at // width).to(values.device), columns[at].to(values.device)
        return values[rows, chosen].unsqueeze(0)

    thread = threading.get_ident()

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # Other threads of a server may run the same network; a compiler traces only one thread
        if not torch.compiler.is_compiling() and threading.get_ident() != thread:
            return None
        narrowed.append(True)
        return (gathered(args[0]),)

    narrow = narrow and not is_observed(net, (net, head))
    with head.register_forward_pre_hook(gather) if narrow else nullcontext():
        logits: Tensor = net(**inputs, use_cache=False).logits
    logits = (logits if narrowed else gathered(logits)).flatten(0, 1)
    if per_row and real is not None:
        logits = logits[real.to(logits.device)]
    return in_single_precision(logits if token_ids is None else logits[..., token_ids])


def positions_of(net: nn.Module, mask: Tensor | None) -> dict[str, Tensor]:
    """``position_ids`` counted from the mask if rows are padded on the left, else nothing."""
    config: Any = getattr(net, "config", None)
    if getattr(config, "model_type", None) == "xlnet" and mask is not None and mask.dim() == 2:
        reads_last = hasattr(without_peft(net), "sequence_summary")
        if reads_last and config.summary_type == "last" and not bool(mask[:, -1].all()):
            raise BatchError(
                f"The head of {type(net).__name__} reads a row's last token, got rows padded on "
                "the right; set tokenizer.padding_side = 'left'."
            )
        return {}  # its positions are relative
    if mask is None or mask.dim() != 2 or bool(mask[:, 0].all()):  # the network's are right
        return {}
    takes = "position_ids" in inspect.signature(without_peft(net).forward).parameters
    if takes and type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    raise BatchError(
        f"Rows are padded on the left, and {type(net).__name__} takes no position_ids counted from "
        "the first real token; set tokenizer.padding_side = 'right'."
    )
