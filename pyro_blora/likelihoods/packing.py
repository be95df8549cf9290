"""The options of an item behind one encoding of their question.

The K options of an item repeat its question. A packed row holds the shared prefix once and then
the rest of every option, with position ids and an attention mask that let each option see the
prefix and itself: the same numbers for about half the tokens.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.network import fast_path
from pyro_blora.network.adapter import adapter_of
from pyro_blora.network.targets import device_of
from pyro_blora.updates.conditional_noise import MarginalNoise

__all__ = ["Scored", "compact", "in_rows", "pack", "supports_packing", "unpacked"]


@dataclass(frozen=True)
class Scored:
    """Rows for the network, and which tokens of them are scored for which option."""

    inputs: dict[str, Tensor]  # keyword arguments of the network, R rows
    positions: Tensor  # where each scored token is predicted, R x S: its predecessor
    targets: Tensor  # the scored tokens, R x S
    options: Tensor  # the option each belongs to, R x S
    mask: Tensor  # which of these entries are real, R x S


def compact(keep: Tensor, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Moves the kept entries of each row to its front, in order, and cuts the rest off."""
    length = max(int(keep.sum(-1).max()), 1)
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)[:, :length]
    return keep.gather(-1, order), [t.gather(-1, order) for t in tensors]


def unpacked(batch: Mapping[str, Tensor]) -> Scored:
    """One row for each option: ``R = B K``."""
    items, options, length = batch["input_ids"].shape
    ids = batch["input_ids"].reshape(-1, length)
    scored = batch["option_mask"].reshape(-1, length).bool()
    before = (torch.arange(length, device=ids.device) - 1).expand_as(ids)
    option = torch.arange(options, device=ids.device).repeat(items).unsqueeze(-1).expand_as(ids)
    mask, (positions, targets, option) = compact(scored, before, ids, option)
    real = batch["attention_mask"].reshape(-1, length)
    # An absent option is an empty row, and a softmax over nothing is NaN in eager attention.
    real = torch.where(real.any(-1, keepdim=True), real, (before < 0).to(real.dtype))
    inputs = {"input_ids": ids, "attention_mask": real}
    return Scored(inputs, positions, targets, option, mask)


def pack(batch: Mapping[str, Tensor], *, additive: bool = False) -> Scored:
    """One row for each item: ``R = B``, with position ids and a ``B x 1 x L x L`` attention mask.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``option_mask`` of shape ``B x K x T``, right
            padded.
        additive: whether the network wants its mask as numbers to add to the attention scores
            (``attn_implementation="eager"``) rather than as booleans.
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
    keep, (tokens, where, segment, score) = compact(
        row(prefix, rest),
        row(ids[:, 0], ids),
        row(index, index),
        row(torch.full_like(index, -1), segments),
        row(torch.zeros_like(prefix), scored & rest),
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
    mask, (positions, targets, option) = compact(score & keep, before, tokens, segment)
    inputs = {
        "input_ids": tokens,
        "position_ids": where.masked_fill(~keep, 0),
        "attention_mask": attention,
    }
    return Scored(inputs, positions, targets, option.clamp_min(0), mask)


def in_rows(net: nn.Module, batch: Mapping[str, Tensor], packing: bool | None = None) -> Scored:
    """The batch's rows, packed where it changes nothing.

    A mask of one's own takes the place of a window's or a chunk's, and some windows count places
    in the row: rows longer than one that the network declares are not packed. The network is asked
    whether it supports ``packing``, unless that is told.

    Raises:
        ConfigurationError: the rows are not packed, and the noise of the updates is drawn at each
            position by itself: options would not share that of their question.
    """
    if supports_packing(net) if packing is None else packing:
        rows, window = pack(batch, additive=_adds_its_mask(net)), fast_path.window_of(net)
        if window is None or rows.inputs["input_ids"].shape[-1] <= window:
            return rows
    updates = [getattr(adapter_of(module), "update", None) for module in net.modules()]
    if any(isinstance(getattr(update, "noise", None), MarginalNoise) for update in updates):
        raise ConfigurationError(
            "noise='marginal' is drawn at each position by itself, so the options of an item share "
            "that of their question only in packed rows, and these are not packed (pack=False, a "
            "network that does not support it, or a window of attention shorter than the rows); "
            "use a prior with noise='joint' or conditional='deterministic'."
        )
    return unpacked(batch)


def supports_packing(net: nn.Module) -> bool:
    """Whether packed and unpacked rows give this network the same logits.

    It is asked by a question of four tokens with two options; so short a one sees no window, for
    which see :func:`in_rows`.
    """
    if not fast_path.is_on(net) or fast_path.tokens_for(net, 1) is None:
        return False
    return fast_path.holds(net, "options packed behind one question", partial(_ask, net))


def _ask(net: nn.Module) -> bool:
    device = device_of(net.modules())
    ids = torch.tensor([[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 7]]], device=device)
    scored = torch.zeros_like(ids).bool()
    scored[..., 4:] = True
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "option_mask": scored}
    rows = (pack(batch, additive=_adds_its_mask(net)), unpacked(batch))
    return fast_path.agree(*(_logits_of(net, each) for each in rows))


def _logits_of(net: nn.Module, rows: Scored) -> Tensor | None:
    with suppress(Exception):  # in whatever way it refuses the input
        logits: Tensor = net(**rows.inputs, use_cache=False).logits
        index = torch.arange(len(logits), device=logits.device).unsqueeze(-1)
        return logits[index, rows.positions].flatten(0, 1)
    return None


def _adds_its_mask(net: nn.Module) -> bool:
    """Whether the network's attention adds its mask (eager) rather than selecting by it."""
    return getattr(getattr(net, "config", None), "_attn_implementation", "eager") == "eager"
