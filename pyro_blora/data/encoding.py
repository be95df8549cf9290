"""Texts to token ids, and lists of ids to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_blora.data.items import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["cut_left", "pad", "pad_id", "prompt_ids", "text_ids"]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text alone, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], int]:
    """Return the ids of a text that something is to follow, and how many lead as special.

    The tokenizer's leading special tokens (such as BOS) are kept. Special tokens that it puts
    after the text (such as EOS or SEP) are not: the answer goes there.

    Raises:
        DataError: the tokenizer makes no token of the text.
    """
    plain = text_ids(tokenizer, prompt)
    if not plain:
        raise DataError(
            f"the tokenizer makes no token of the prompt {prompt[:40]!r}: use the model's tokenizer"
        )
    full = list(tokenizer(prompt, add_special_tokens=True, verbose=False)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[: start + len(plain)], start
    raise DataError(
        f"the tokenizer splits the prompt {prompt[:40]!r} differently with special tokens than "
        "without: use a tokenizer that only adds them at the ends"
    )


def cut_left(ids: list[int], num_special: int, budget: int) -> list[int]:
    """Return at most ``budget`` ids: the leading special ones and the last of the others.

    Args:
        ids: the ids of a prompt, of which the first ``num_special`` are special.
        num_special: how many ids lead as special; they are always kept.
        budget: the most ids to return.

    Raises:
        DataError: the budget leaves no room for an id after the special ones.

    Example::

        >>> cut_left([0, 5, 6, 7], num_special=1, budget=3)
        [0, 6, 7]
    """
    if budget <= num_special:
        raise DataError(
            f"{budget} tokens have no room for a question after {num_special} special tokens: "
            "raise max_length"
        )
    excess = max(0, len(ids) - budget)
    return ids[:num_special] + ids[num_special + excess :]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the pad token's id, else the EOS token's, else 0; padding is masked in any case."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad lists of ids on the right.

    Returns:
        The ids and their attention mask, both long, of shape (rows, longest row).

    Example::

        >>> pad([[1, 2], [3]], value=0)[1].tolist()
        [[1, 1], [1, 0]]
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
