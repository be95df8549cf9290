"""Batches of token ids, made from lists of items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_blora.data.encoding import cut_left, pad, pad_id, prompt_ids, text_ids
from pyro_blora.data.items import DataError, Item
from pyro_blora.data.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LabelTokensCollator", "MultipleChoiceCollator"]


class MultipleChoiceCollator:
    """Lay out every option of every item as a row of its own, question first.

    A row is the ids of the prompt followed by the ids of ``" " + choice``, padded on the right.
    The prompt is tokenised once, so the options of an item share its ids exactly. Items with
    fewer than K options are filled up with rows that hold the prompt alone.

    Args:
        tokenizer: a Hugging Face tokenizer; one without a pad token is fine.
        template: a template with ``scoring="options"``.
        max_length: the longest row T. Longer rows lose the start of the question (leading special
            tokens are kept), by the same amount for all options of an item.

    Called on B items, it returns a dict with

    - ``input_ids``, long, shape (B, K, T);
    - ``attention_mask``, long, shape (B, K, T), 1 at tokens and 0 at padding;
    - ``option_mask``, bool, shape (B, K, T), true at the tokens of the option, and false
      throughout a row that fills up K;
    - ``labels``, long, shape (B,).

    Raises:
        DataError: the template scores labels, ``max_length < 2``, or (when called) the list of
            items is empty or an option alone is too long.

    Example::

        collate = MultipleChoiceCollator(tokenizer, template_for("arc_easy"))
        batch = collate(items[:8])          # input_ids: (8, 4, T)
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int = 512
    ) -> None:
        if template.scoring != "options":
            raise DataError(
                f"the template scores {template.scoring!r}: "
                "use LabelTokensCollator, or a template with scoring='options'"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = _checked_length(max_length)

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return the batch of a list of items."""
        _check_not_empty(items)
        num_options = max(len(item.choices) for item in items)
        rows: list[list[int]] = []
        starts: list[int] = []  # where a row's option begins
        for item in items:
            prompt, options = self._encode(item)
            fillers: list[list[int]] = [[]] * (num_options - len(options))
            for option in options + fillers:
                rows.append(prompt + option)
                starts.append(len(prompt))
        input_ids, attention_mask = pad(rows, pad_id(self.tokenizer))
        positions = torch.arange(input_ids.shape[-1])
        option_mask = (positions >= torch.tensor(starts)[:, None]) & attention_mask.bool()
        shape = (len(items), num_options, -1)
        return {
            "input_ids": input_ids.reshape(shape),
            "attention_mask": attention_mask.reshape(shape),
            "option_mask": option_mask.reshape(shape),
            "labels": torch.tensor([item.label for item in items]),
        }

    def _encode(self, item: Item) -> tuple[list[int], list[list[int]]]:
        """Return the ids of an item's prompt, cut to fit, and those of its options."""
        prompt, num_special = prompt_ids(self.tokenizer, self.template.format(item))
        options = [text_ids(self.tokenizer, " " + choice) for choice in item.choices]
        for choice, option in zip(item.choices, options, strict=True):
            room = self.max_length - num_special - 1  # an option follows at least one token
            if not 1 <= len(option) <= room:
                raise DataError(
                    f"item {item.id!r}: the option {choice[:40]!r} has {len(option)} tokens, "
                    f"expected 1 to {room} at max_length={self.max_length}: "
                    + ("raise max_length, or shorten the option" if option else "write it as text")
                )
        budget = self.max_length - max(len(option) for option in options)
        return cut_left(prompt, num_special, budget), options


class LabelTokensCollator:
    """Lay out every item as its prompt; the answer is read off at the last token.

    Args:
        tokenizer: a Hugging Face tokenizer; one without a pad token is fine.
        template: a template with ``scoring="labels"``.
        max_length: the longest row T; longer prompts lose the start of the question (leading
            special tokens are kept).

    Attributes:
        token_ids: the token id of each label word, in the order of the classes.

    Called on B items, it returns a dict with

    - ``input_ids``, long, shape (B, T), padded on the right;
    - ``attention_mask``, long, shape (B, T), 1 at tokens and 0 at padding;
    - ``labels``, long, shape (B,).

    Raises:
        DataError: the template scores options, ``max_length < 2``, a label word is not exactly one
            token or two share one, or (when called) the list of items is empty or an item has
            another number of choices than the template has label words.

    Example::

        collate = LabelTokensCollator(tokenizer, template_for("sst2"))
        batch = collate(items[:8])          # input_ids: (8, T)
        collate.token_ids                   # (id of " negative", id of " positive")
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int = 512
    ) -> None:
        if template.scoring != "labels":
            raise DataError(
                f"the template scores {template.scoring!r}: "
                "use MultipleChoiceCollator, or a template with scoring='labels'"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = _checked_length(max_length)
        self.token_ids: tuple[int, ...] = tuple(
            self._single_token(word) for word in template.label_words
        )
        if len(set(self.token_ids)) < len(self.token_ids):
            raise DataError(
                f"the label words {template.label_words!r} have the tokens {self.token_ids}, "
                "expected one of its own each: choose other label words"
            )

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Return the batch of a list of items."""
        _check_not_empty(items)
        rows = []
        for item in items:
            if len(item.choices) != len(self.token_ids):
                raise DataError(
                    f"item {item.id!r} has {len(item.choices)} choices, expected one for each of "
                    f"the label words {self.template.label_words!r}: use another template"
                )
            prompt, num_special = prompt_ids(self.tokenizer, self.template.format(item))
            rows.append(cut_left(prompt, num_special, self.max_length))
        input_ids, attention_mask = pad(rows, pad_id(self.tokenizer))
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.tensor([item.label for item in items]),
        }

    def _single_token(self, word: str) -> int:
        """Return the one token of a label word."""
        ids = text_ids(self.tokenizer, word)
        if len(ids) != 1:
            tokens = self.tokenizer.convert_ids_to_tokens(ids)
            raise DataError(
                f"the label word {word!r} is {len(ids)} tokens, {tokens}, expected exactly one: "
                "choose another label word, or scoring='options'"
            )
        return ids[0]


def _checked_length(max_length: int) -> int:
    """Return a row length that has room for one token of prompt and one of answer."""
    if max_length < 2:
        raise DataError(f"max_length is {max_length}, expected at least 2: the default is 512")
    return max_length


def _check_not_empty(items: Sequence[Item]) -> None:
    """Refuse an empty batch."""
    if not items:
        raise DataError("the batch has no items, expected at least one: pass a list of Item")
