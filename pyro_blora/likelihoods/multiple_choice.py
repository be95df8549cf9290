"""Multiple choice by the log-likelihood of each option after the question.

The K options of an item repeat its question. A packed row holds the shared prefix once and then
the rest of every option, with position ids and an attention mask that let each option see the
prefix and itself: the same numbers for about half the tokens.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.nn import functional

from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods.reading import check_causal, compact, logits_at, true_entries
from pyro_blora.network.adapter import adapter_of
from pyro_blora.network.shortcuts import Shortcuts, agree, few_tokens, logits_of, window_of
from pyro_blora.updates.conditional_noise import MarginalNoise


class MultipleChoice(Likelihood):
    r"""A softmax over the options' scores under a causal language model.

    The score of option :math:`k` with tokens :math:`t_1 \dots t_n` after question :math:`q` is

    .. math::

        s_k = c\, \frac{1}{n} \sum_j \log p(t_j \mid q, t_{<j}),

    with ``score="sum"`` without the :math:`\frac1n`. A mean log-probability need not be the
    log-odds of an answer, so its scale :math:`c` is learned. It is ``|score_slope|``: steps of one
    size take it to zero, even odds; a logarithm would creep.

    In training one item in eight, chosen by its tokens, trains ``c`` alone, and the others all
    else. Scores of items that the adapter has memorized would seem worth more than they are.

    Args:
        num_data: number of training examples.
        score: ``"mean"`` over the option's tokens or their ``"sum"``. Default: mean.
        scale: ``"learned"``: ``c`` is a parameter, which starts at 1, or ``"fixed"``. Default:
            learned.
        pack: whether to encode an item's question once for all of its options, which gives the
            same scores for fewer tokens. Default: if the network supports it (it is tried once).
            Rows longer than a window or a chunk of attention that it declares are never packed.

    A batch has ``input_ids``, ``attention_mask`` and ``option_mask`` (true at the tokens to
    score), each ``B x K x T`` and right padded, and ``labels`` (``B``). An option with nothing to
    score counts as absent: its probability is zero.

    Raises:
        BatchError: the tensors' shapes disagree, a row's first token is to be scored, or a row is
            padded on the left.
        ConfigurationError: the updates have marginal noise, and the rows cannot be packed (see
            :class:`~pyro_blora.models.KroneckerInducing`).

    Example::

        likelihood = MultipleChoice(num_data=len(train))
        likelihood.logits(net, batch).shape  # B x K
    """

    keys = ("input_ids", "attention_mask", "option_mask")
    roles: ClassVar[dict[str, str]] = {"score_slope": "likelihood"}
    row_dims = 3

    def __init__(
        self,
        *,
        num_data: int | None = None,
        score: Literal["mean", "sum"] = "mean",
        scale: Literal["learned", "fixed"] = "learned",
        pack: bool | None = None,
    ) -> None:
        super().__init__(num_data=num_data)
        if scale == "learned":
            self.score_slope = PyroParam(torch.ones(()))

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError if ``net`` is a classifier or an encoder-decoder."""
        check_causal(net)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The options' scores, ``(B, K)``; minus infinity for an absent option."""
        apart = None  # told before the network runs, for the device is waited for
        if self.holds_out and any(p.requires_grad for p in self.parameters()):
            apart = torch.tensor(_apart(batch)).unsqueeze(-1)
            apart = apart.to(batch["input_ids"].device, non_blocking=True)
        rows = in_rows(net, {key: batch[key] for key in self.keys}, self.shortcuts, self.pack)
        how: dict[str, Any] = {"count": rows.count, "narrow": self.shortcuts.on}
        logits = logits_at(net, rows.inputs, rows.positions, rows.mask, **how)
        real = true_entries(rows.mask, rows.count)
        targets = rows.targets.flatten()[real]
        logp = -functional.cross_entropy(logits, targets, reduction="none")
        items, options, _ = batch["input_ids"].shape
        item = torch.arange(items, device=logp.device).unsqueeze(-1)
        item = item.repeat_interleave(len(rows.mask) // items, 0)  # of each row
        index = (item * options + rows.options).flatten()[real]
        total = logp.new_zeros(items * options).index_add(0, index, logp).reshape(items, options)
        count = batch["option_mask"].sum(-1)
        if self.score == "mean":
            total = total / count.clamp_min(1)
        slope = self.score_slope.abs() if self.scale == "learned" else total.new_ones(())
        if apart is not None:
            total = torch.where(apart, total.detach(), total)
            slope = torch.where(apart, slope, slope.detach())
        return scale_scores(total, count, slope)

    def examples(self, batch: Batch) -> int:
        """As everywhere, of tensors of one shape."""
        count = super().examples(batch)
        if "position_ids" in batch:
            raise BatchError(
                "position_ids must be left out for MultipleChoice, which counts them by itself, "
                "since it packs options; got some."
            )
        shapes = {key: tuple(batch[key].shape) for key in self.keys}
        if len(set(shapes.values())) > 1:
            raise BatchError(
                f"MultipleChoice must have equal B x K x T shapes, got {shapes}; pad them alike."
            )
        there = batch["option_mask"].any(-1)
        if there.is_cpu and (~there.any(-1)).any():
            raise BatchError(
                "Each item must have an option with a token to score, got one without; see that "
                "option_mask is true at the options' tokens."
            )
        return count

    def labels(self, batch: Batch) -> Tensor | None:
        """The right options, ``(B,)``, each of which the item has; ``None`` without labels."""
        labels, there = batch.get("labels"), batch["option_mask"].any(-1)
        if labels is not None and there.is_cpu and labels.shape == there.shape[:1]:
            chosen = labels.long().clamp(0, there.shape[1] - 1)  # others are told by check_labels
            if (~there.gather(1, chosen.unsqueeze(-1))).any():
                raise BatchError(
                    "labels must name an option that the item has, got one with nothing to score; "
                    "check the order of the options."
                )
        return labels


def scale_scores(
    scores: Tensor, lengths: Tensor, slope: Tensor | float, exponent: Tensor | float = 0.0
) -> Tensor:
    r"""The logits of options: :math:`c\, (n / \bar n)^b\, s`, ``(B, K)``.

    ``scores`` are ``s``, and ``lengths`` the numbers ``n`` of their tokens. A length of 0 marks an
    absent option, whose logit is minus infinity; :math:`\bar n` is the mean of the others.
    ``slope`` is ``c`` and ``exponent`` ``b``, which is 0 in :class:`MultipleChoice`.
    """
    absent = lengths == 0  # whose score would make the gradients NaN, if it is infinite
    scaled = scores.masked_fill(absent, 0) * slope
    if isinstance(exponent, Tensor) or exponent:  # a power of 0 costs, and changes nothing
        there = (lengths > 0).sum(-1, keepdim=True)
        ratio = lengths.clamp_min(1) * there / lengths.sum(-1, keepdim=True).clamp_min(1)
        scaled = scaled * ratio**exponent
    return scaled.masked_fill(absent, -torch.inf)


def _apart(batch: Batch) -> list[bool]:
    """Whether each example teaches the scale alone: one in eight.

    That does not depend on what it is batched with, nor on the order of its options.
    """
    there = batch["attention_mask"].bool() & batch["option_mask"].any(-1, keepdim=True)
    items = batch["input_ids"].masked_fill(~there, -1).cpu().numpy()
    options = (sorted(ids[ids >= 0].tobytes() for ids in rows) for rows in items)
    digests = [hashlib.sha256(b"".join(rows)).digest() for rows in options]
    return [digest[0] % 8 == 0 for digest in digests]


@dataclass(frozen=True)
class Scored:
    """Rows for the network, and which tokens of them are scored for which option."""

    inputs: dict[str, Tensor]  # keyword arguments of the network, R rows
    positions: Tensor  # where each scored token is predicted, R x S: its predecessor
    targets: Tensor  # the scored tokens, R x S
    options: Tensor  # the option each belongs to, R x S
    mask: Tensor  # which of these entries are real, R x S
    count: int  # how many are


def _sizes(batch: Mapping[str, Tensor], keep: Tensor, scored: Tensor) -> tuple[int, int, int]:
    """Most kept and most scored tokens of a row, and how many are scored in all.

    A device is waited for once in a step, here; so this also checks what no later line would see.
    """
    real = batch["attention_mask"].bool()
    unpredicted = batch["option_mask"][..., 0].any()
    padded_left = (real[..., 1:] & ~real[..., :-1]).any()
    counts = scored.sum(-1)
    facts = (unpredicted, padded_left, keep.sum(-1).max(), counts.max(), counts.sum())
    first, left, length, most, count = torch.stack([fact.long() for fact in facts]).tolist()
    if first:
        raise BatchError(
            "option_mask must be false at the first token of a row, which nothing predicts; begin "
            "each row with a question or the tokenizer's beginning-of-text token."
        )
    if left:
        raise BatchError(
            "Rows must be padded on the right for MultipleChoice, got padding before a real token; "
            "set tokenizer.padding_side = 'right'."
        )
    return max(length, 1), max(most, 1), count


def unpacked(batch: Mapping[str, Tensor]) -> Scored:
    """One row for each option: ``R = B K``."""
    items, options, length = batch["input_ids"].shape
    ids = batch["input_ids"].reshape(-1, length)
    scored = batch["option_mask"].reshape(-1, length).bool()
    before = (torch.arange(length, device=ids.device) - 1).expand_as(ids)
    option = torch.arange(options, device=ids.device).repeat(items).unsqueeze(-1).expand_as(ids)
    _, most, count = _sizes(batch, scored, scored)
    mask, (positions, targets, option) = compact(scored, most, before, ids, option)
    real = batch["attention_mask"].reshape(-1, length)
    # An absent option is an empty row, and a softmax over nothing is NaN in eager attention.
    real = torch.where(real.any(-1, keepdim=True), real, (before < 0).to(real.dtype))
    inputs = {"input_ids": ids, "attention_mask": real}
    return Scored(inputs, positions, targets, option, mask, count)


def pack(batch: Mapping[str, Tensor], *, additive: bool = False) -> Scored:
    """One row for each item: ``R = B``, with position ids and a ``B x 1 x L x L`` attention mask.

    ``additive``: the mask is numbers to add to the attention scores, as eager attention wants it.
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    scored = batch["option_mask"].bool()
    items, options, length = ids.shape
    index = torch.arange(length, device=ids.device)
    used = scored.any(-1, keepdim=True)
    # The prefix ends where the options first differ, or where one of them is first scored.
    differs = ((ids != ids[:, :1]) | (real != real[:, :1])) & used
    prefix = ((scored | differs).any(1).cumsum(-1) == 0) & real[:, 0]
    rest = real & used & ~prefix.unsqueeze(1)

    def row(first: Tensor, others: Tensor) -> Tensor:
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
    own = (segment.unsqueeze(-1) == segment.unsqueeze(-2)) | (segment == -1).unsqueeze(-2)
    seen = own & keep.unsqueeze(-2) & (where.unsqueeze(-2) <= where.unsqueeze(-1))
    seen[..., 0] |= ~keep  # a softmax over nothing is NaN, and padding that is seen is no padding
    attention = seen.unsqueeze(1)
    if additive:
        attention = torch.where(attention, 0.0, torch.finfo(torch.float32).min)
    # The predecessor is the token before, or the prefix's last for an option's first token.
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


def in_rows(
    net: nn.Module,
    batch: Mapping[str, Tensor],
    shortcuts: Shortcuts,
    packing: bool | None = None,
) -> Scored:
    """The batch's rows, packed where it changes nothing.

    The packed mask takes the place of a window's, so rows longer than a window are not packed.
    """
    if supports_packing(net, shortcuts) if packing is None else packing:
        rows, window = pack(batch, additive=_adds_its_mask(net)), window_of(net)
        if window is None or rows.inputs["input_ids"].shape[-1] <= window:
            return rows
    updates = [getattr(adapter_of(module), "update", None) for module in net.modules()]
    if any(isinstance(getattr(update, "noise", None), MarginalNoise) for update in updates):
        raise ConfigurationError(
            "noise='marginal' needs packed rows, in which options share their question's noise; "
            "these are not packed (pack=False, or the network cannot). Use a prior with "
            "noise='joint' or conditional='deterministic'."
        )
    return unpacked(batch)


def supports_packing(net: nn.Module, shortcuts: Shortcuts | None = None) -> bool:
    """Whether packed and unpacked rows give this network the same logits."""
    packs = partial(_packs, net)
    shortcuts = shortcuts or Shortcuts()
    return shortcuts.verified(net, "options packed behind one question", packs)


def _packs(net: nn.Module) -> bool:
    """Whether a question of four tokens with two options packs."""
    ids = few_tokens(net, 1)
    ids = torch.stack([ids[:, :6], torch.cat([ids[:, :4], ids[:, 5:7]], -1)], 1)
    scored = (torch.arange(6, device=ids.device) >= 4).expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "option_mask": scored}
    found = []
    for rows in (pack(batch, additive=_adds_its_mask(net)), unpacked(batch)):
        logits = logits_of(net, **rows.inputs)
        index = torch.arange(len(rows.positions), device=ids.device).unsqueeze(-1)
        if logits is None or logits.dim() != 3:
            return False
        found.append(logits[index, rows.positions].flatten(0, 1))
    return agree(*found)


def _adds_its_mask(net: nn.Module) -> bool:
    """Whether the network's attention adds its mask (eager) rather than selecting by it."""
    return getattr(getattr(net, "config", None), "_attn_implementation", "eager") == "eager"
