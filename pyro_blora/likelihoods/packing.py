"""The network's rows for multiple choice: one per option, or one packed row per item.

The K options of an item repeat its question. A packed row has the shared prefix once, followed by
the rest of every option. Its position ids and attention mask let each option see only the prefix
and itself, which gives the same scores with about half the tokens.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyro_blora.debts import attention_of
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods.reading import compact
from pyro_blora.network.adapter import layer_hook_of
from pyro_blora.network.probes import agree, few_tokens, logits_of, plainly, window_of
from pyro_blora.updates import MarginalNoise

# Whether a network supports packing, by its implementation of attention
_SUPPORTS: WeakKeyDictionary[nn.Module, dict[str | None, bool]] = WeakKeyDictionary()


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


def in_rows(net: nn.Module, batch: Mapping[str, Tensor], packing: bool) -> Scored:
    """The batch's rows, packed unless the network sees only a part of such a row."""
    if packing:
        rows, window = pack(batch, additive=_adds_its_mask(net)), window_of(net)
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
    """Whether packed and unpacked rows give this network the same logits; tried only once."""
    known, attention = _SUPPORTS.setdefault(net, {}), attention_of(net)
    if attention not in known:
        with plainly(net):
            known[attention] = _packs(net)
        if not known[attention]:
            warnings.warn(
                f"{type(net).__name__} does not give the same logits with options packed "
                "behind one question; each has a row of its own, which is correct but slower.",
                stacklevel=2,
            )
    return known[attention]


def _packs(net: nn.Module) -> bool:
    """Whether packing leaves the logits of a four-token question with two options the same."""
    ids = few_tokens(net, 1)
    ids = torch.stack([ids[:, :6], torch.cat([ids[:, :4], ids[:, 5:7]], -1)], 1)
    scored = (torch.arange(6, device=ids.device) >= 4).expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "option_mask": scored}
    scores = []
    for rows in (pack(batch, additive=_adds_its_mask(net)), unpacked(batch)):
        logits = logits_of(net, **rows.inputs)
        index = torch.arange(len(rows.positions), device=ids.device).unsqueeze(-1)
        if logits is None or logits.dim() != 3:
            return False
        scores.append(logits[index, rows.positions].flatten(0, 1))
    return agree(*scores)


def _adds_its_mask(net: nn.Module) -> bool:
    """Whether the network's attention adds the mask to its scores, as eager attention does."""
    return attention_of(net) in ("eager", None)
