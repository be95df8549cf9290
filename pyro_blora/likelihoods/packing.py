"""The network's rows for multiple choice: one per option, or one packed row per item.

The K options of an item repeat its question. A packed row has the shared prefix once, followed by
the rest of every option. Its position ids and attention mask let each option see only the prefix
and itself, which gives the same scores with about half the tokens.
"""

import re
import warnings
import weakref
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_blora.debts import attention_of, is_compiled
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods.reading import compact
from pyro_blora.network.adapter import in_mode, layer_hook_of, updates_in_place
from pyro_blora.network.targets import device_of
from pyro_blora.updates import MarginalNoise

_WINDOW = re.compile(r"((window|chunk)(_size)?|index_topk)$")
#: whether a network packs with an implementation of attention
_ANSWERS: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Scored:
    """Rows for the network, and the scored tokens of each option."""

    inputs: dict[str, Tensor]  # keyword arguments of the network, R rows
    positions: Tensor  # where each scored token is predicted, R x S: its predecessor
    targets: Tensor  # the scored tokens, R x S
    options: Tensor  # the option of each scored token, R x S
    mask: Tensor  # which of these entries are real, R x S
    count: int  # number of real entries


def _sizes(batch: Mapping[str, Tensor], keep: Tensor, scored: Tensor) -> tuple[int, int, int]:
    """Checks the masks and counts their tokens together, to synchronize the device only once."""
    real = batch["attention_mask"].bool()
    unpredicted = batch["option_mask"][..., 0].any()
    padded_left = (real[..., 1:] & ~real[..., :-1]).any()
    counts = scored.sum(-1)
    values = (unpredicted, padded_left, keep.sum(-1).max(), counts.max(), counts.sum())
    first, left, length, most, count = torch.stack([value.long() for value in values]).tolist()
    if first or left:
        raise BatchError(
            "Rows must be padded on the right, with option_mask false at their first token, which "
            "nothing predicts; set tokenizer.padding_side = 'right', and begin each row with a "
            "question or the tokenizer's beginning-of-text token."
        )
    return max(length, 1), max(most, 1), count


def unpacked(batch: Mapping[str, Tensor]) -> Scored:
    """One row per option: ``R = B K``."""
    items, options, length = batch["input_ids"].shape
    ids = batch["input_ids"].reshape(-1, length)
    scored = batch["option_mask"].reshape(-1, length).bool()
    before = (torch.arange(length, device=ids.device) - 1).expand_as(ids)
    option = torch.arange(options, device=ids.device).repeat(items).unsqueeze(-1).expand_as(ids)
    _, most, count = _sizes(batch, scored, scored)
    mask, (positions, targets, option) = compact(scored, most, before, ids, option)
    real = batch["attention_mask"].reshape(-1, length)
    # The empty row of an absent option attends to its first token, because eager attention gives
    # NaN for a softmax over nothing
    real = torch.where(real.any(-1, keepdim=True), real, (before < 0).to(real.dtype))
    inputs = {"input_ids": ids, "attention_mask": real}
    return Scored(inputs, positions, targets, option, mask, count)


def pack(batch: Mapping[str, Tensor], *, additive: bool = False) -> Scored:
    """One row per item: ``R = B``, with position ids and a ``B x 1 x L x L`` attention mask."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    scored = batch["option_mask"].bool()
    items, options, length = ids.shape
    index = torch.arange(length, device=ids.device)
    used = scored.any(-1, keepdim=True)
    # The prefix ends where the options first differ or the first token is scored
    differs = ((ids != ids[:, :1]) | (real != real[:, :1])) & used
    prefix = ((scored | differs).any(1).cumsum(-1) == 0) & real[:, 0]
    rest = real & used & ~prefix.unsqueeze(1)

    def row(first: Tensor, others: Tensor) -> Tensor:
        """The question of each item, followed by its options, one after the other."""
        shape = (items, options, length)
        return torch.cat([first.expand(items, -1), others.expand(shape).reshape(items, -1)], -1)

    segments = torch.arange(options, device=ids.device)[:, None]
    kept, kept_scored = row(prefix, rest), row(torch.zeros_like(prefix), scored & rest)
    longest, most, count = _sizes(batch, kept, kept_scored)
    keep, (tokens, where, segment, score) = compact(
        kept,
        longest,
        row(ids[:, 0], ids),
        row(index, index),
        row(torch.full_like(index, -1), segments),
        kept_scored,
    )
    same = (segment.unsqueeze(-1) == segment.unsqueeze(-2)) | (segment == -1).unsqueeze(-2)
    seen = same & keep.unsqueeze(-2) & (where.unsqueeze(-2) <= where.unsqueeze(-1))
    seen[..., 0] |= ~keep  # padding attends to a real token, to avoid a softmax over nothing
    attention = seen.unsqueeze(1)
    if additive:  # to the attention scores, as in eager attention
        attention = torch.where(attention, 0.0, torch.finfo(torch.float32).min)
    # The predecessor of an option's first token is the prefix's last
    place = torch.arange(tokens.shape[-1], device=ids.device).expand_as(tokens)
    last = prefix.sum(-1, keepdim=True) - 1
    first = torch.cat([torch.ones_like(keep[:, :1]), segment[:, 1:] != segment[:, :-1]], -1)
    before = torch.where(first, last, place - 1)
    mask, (positions, targets, option) = compact(score & keep, most, before, tokens, segment)
    inputs = {
        "input_ids": tokens,
        "position_ids": where.masked_fill(~keep, 0),
        "attention_mask": attention,
    }
    return Scored(inputs, positions, targets, option.clamp_min(0), mask, count)


def in_rows(net: nn.Module, batch: Mapping[str, Tensor], packing: bool | None = None) -> Scored:
    """The batch's rows, packed if that leaves the logits the same."""
    if supports_packing(net) if packing is None else packing:
        rows, window = pack(batch, additive=_adds_its_mask(net)), _window_of(net)
        # The packed mask replaces that of an attention window
        if window is None or rows.inputs["input_ids"].shape[-1] <= window:
            return rows
    check_noise(net, "unpacked ones (pack=False, or the network does not support packing)")
    return unpacked(batch)


def check_noise(net: nn.Module, rows: str) -> None:
    """Raises ConfigurationError if rows that are compared would each have noise of their own."""
    updates = [getattr(layer_hook_of(module), "update", None) for module in net.modules()]
    if any(isinstance(getattr(update, "noise", None), MarginalNoise) for update in updates):
        raise ConfigurationError(
            "Conditional noise must have packed rows, in which the options share the noise of "
            f"their question, got {rows}; use a prior with conditional='deterministic'."
        )


def supports_packing(net: nn.Module) -> bool:
    """Whether packed and unpacked rows give this network the same logits, by one trial of it."""
    if getattr(_text_config(net), "vocab_size", 0) < 8:
        return False
    answers, key = _ANSWERS.setdefault(net, {}), attention_of(net)
    if key not in answers:
        hooks = [hook for hook in map(layer_hook_of, net.modules()) if hook is not None]
        compiled = any(map(is_compiled, net.modules()))
        with (
            in_mode(net, training=False),
            torch.no_grad(),
            torch.autocast(device_of(net.modules()).type, enabled=False),
            updates_in_place(hooks, [None] * len(hooks)),
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        ):
            answers[key] = _packs(net)
        if not answers[key]:
            warnings.warn(
                f"{type(net).__name__} does not give the same logits with options packed behind "
                "one question; it runs unpacked, which is correct but slower (fast=False packs "
                "nothing).",
                stacklevel=2,
            )
    return answers[key]


def _packs(net: nn.Module) -> bool:
    """Whether packing leaves the logits of a four-token question with two options the same."""
    options = [[1, 6, 4, 2, 7, 5], [1, 6, 4, 2, 5, 3]]
    ids = torch.tensor([options], device=device_of(net.modules()))
    scored = (torch.arange(6, device=ids.device) >= 4).expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "option_mask": scored}
    scores = []
    for rows in (pack(batch, additive=_adds_its_mask(net)), unpacked(batch)):
        logits = _logits_of(net, **rows.inputs)
        index = torch.arange(len(rows.positions), device=ids.device).unsqueeze(-1)
        if logits is None or logits.dim() != 3:
            return False
        scores.append(logits[index, rows.positions].flatten(0, 1))
    packed, plain = scores
    if packed.shape != plain.shape:
        return False
    half = plain.dtype in (torch.float16, torch.bfloat16)
    scale = (plain - plain.mean()).norm()
    return bool((packed - plain).norm() < (0.03 if half else 1e-4) * scale)


def _logits_of(net: nn.Module, **inputs: Tensor) -> Tensor | None:
    """The network's logits; ``None`` if it raises any exception on this input."""
    for options in ({"use_cache": False}, {}):  # an encoder may not take use_cache
        with suppress(Exception):
            logits: Tensor = net(**inputs, **options).logits
            return logits
    return None


def _adds_its_mask(net: nn.Module) -> bool:
    """Whether the network's attention adds the mask to its scores, as eager attention does."""
    return attention_of(net) in ("eager", None)


def _window_of(net: nn.Module) -> int | None:
    """The shortest attention span that the configuration declares: a window, chunk or top-k."""
    declared = getattr(_text_config(net), "__dict__", {}).items()
    windows = [v for name, v in declared if _WINDOW.search(name) and type(v) is int and v > 0]
    return min(windows, default=None)


def _text_config(net: nn.Module) -> Any:
    """The configuration of a network, of its text part if it is multimodal."""
    config: Any = getattr(net, "config", None)
    with suppress(Exception):  # a user's own configuration class may do anything here
        return config.get_text_config()
    return config
