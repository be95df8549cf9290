"""What collators share: the token ids of prompts and answers, and the check of their rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pyro_blora.errors import DataError
from pyro_blora.labels import QUESTION, Item, Template, item_of


def items_in(rows: Any, labeled: bool = False) -> tuple[list[Item], bool]:
    """The items of rows, and whether they have labels; otherwise they have one of no meaning."""
    labeled = labeled or isinstance(rows[0], Item) or "label" in rows[0]
    some: dict[str, Any] = {} if labeled else {"label": 0}
    every = [rows[k] for k in range(len(rows))]
    if not labeled and any(isinstance(row, Item) or "label" in row for row in every):
        raise DataError("All rows must have a label, or none, got none in row 0; add it.")
    return [item_of(row, {"id": f"row {k}", **some}) for k, row in enumerate(every)], labeled


class PromptCollator:
    """Turns texts into token ids, and rows of ids into padded tensors."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = QUESTION,
        max_length: int = 512,
    ) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self._before = self._ids(":")  # stands for the text before an answer

    def __call__(self, rows: Sequence[Item | dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of a list of items, or of dictionaries with their fields except the id."""
        items, labeled = items_in(rows)
        batch = self._batch(items)
        return batch if labeled else {key: batch[key] for key in batch if key != "labels"}

    def check(self, rows: Any, labeled: bool) -> None:
        """Checks that all rows are items, and that all have labels or none has."""
        if isinstance(rows[0], Mapping | Item):
            self.check_items(items_in(rows, labeled)[0])

    def check_items(self, items: Sequence[Item]) -> Any:
        """Checks items, before a batch of any is made; by default does nothing."""

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _ids(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; a chat template has written BOS already, and none is added to it."""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not special or (ids and ids[0] == self.tokenizer.bos_token_id):
            return ids
        return list(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])

    def _answer(self, text: str) -> list[int]:
        """Token ids of a continuation, which may differ from those at a text's start."""
        both, count = self._ids(":" + text), len(self._before)
        return both[count:] if both[:count] == self._before else self._ids(text)

    def _prompt(self, item: Item, answer: int = 0) -> list[int]:
        """The ids of a prompt with BOS but no EOS, cut on the left to leave room for an answer."""
        text = self.template.format(item)
        plain, full = self._ids(text), self._ids(text, special=True)
        starts = range(len(full) - len(plain) + 1) if plain else ()
        begin = next((k for k in starts if full[k : k + len(plain)] == plain), None)
        if begin is None:
            raise DataError(f"item {item.id!r}: the tokenizer makes no tokens of the prompt")
        start = full[:begin]
        if plain[0] == self.tokenizer.bos_token_id:  # of a chat template
            start, plain = plain[:1], plain[1:]
        room = self.max_length - len(start) - answer
        if room < 1:
            raise DataError(
                f"item {item.id!r}: {len(start)} special tokens and an option of {answer} leave no "
                f"room for the question at max_length={self.max_length}: raise max_length"
            )
        return start + plain[-room:]

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, ``(rows, T)``, padded on the right."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        value = next(token for token in known if isinstance(token, int))
        tensors = [torch.tensor(row) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=value)
        return ids, pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)


class NumberCollator:
    """Makes a row of token ids from every text, for a network with a head.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token.
        max_length: the longest row T, cut at its end, at most the tokenizer's. Default: 512.

    Called on B dictionaries with ``text``, ``text_pair`` where there is one, and ``label``, it
    returns the tokenizer's tensors, ``(B, T)``, and unless the first row has no label ``labels``,
    float, ``(B,)``, or what a subclass makes of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> None:
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        # BOS, which the tokenizer adds, also where a chat template has written it already
        added = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
        self._start: str = tokenizer.bos_token if added else ""

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The batch of a list of rows."""
        plain = [(row["text"].removeprefix(self._start), row.get("text_pair")) for row in rows]
        # a data frame has NaN where a row has no second text
        given = [both if isinstance(both[1], str) else both[0] for both in plain]
        options = {"padding": True, "truncation": True, "max_length": self.max_length}
        batch = dict(self.tokenizer(given, **options, return_tensors="pt"))
        if "label" in rows[0]:
            batch["labels"] = self.labels(rows)
        return batch

    def labels(self, rows: Sequence[Any]) -> Tensor:
        """The labels as numbers, ``(B, ...)``; called only if the first row has a ``label``."""
        return torch.tensor([float(row["label"]) for row in rows])


def is_from(collate: Any, *packages: str) -> bool:
    """Whether a function, or the class of an object, is defined in one of these packages."""
    home = getattr(collate, "__module__", None) or type(collate).__module__
    return home.startswith(packages)
