"""One question with its candidate answers, the unit every part of this package works on."""

import reprlib
from dataclasses import dataclass
from typing import Any

from pyro_blora.errors import DataError

__all__ = ["FORMAT", "Item", "item_of"]

FORMAT = '{"id": "a-1", "question": "...", "choices": ["...", "..."], "label": 0}'


@dataclass(frozen=True)
class Item:
    """A question, its candidate answers and the index of the right one.

    Attributes:
        id: a name of the item, unique in its set, such as ``"arc_easy-test-17"``.
        question: the plain text, without letters and without a prompt template.
        choices: the K >= 2 candidate answers, in a fixed order.
        label: the index of the right answer, ``0 <= label < K``.

    Raises:
        DataError: a field has the wrong type, is empty, or the label is out of range.

    Example::

        >>> item = Item("sky", "What colour is a clear sky?", ("green", "blue"), 1)
        >>> item.answer
        'blue'
    """

    id: str
    question: str
    choices: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        if not isinstance(self.choices, tuple) or len(self.choices) < 2:
            given = reprlib.repr(self.choices)
            raise DataError(f"choices is {given}: give a tuple of at least 2 answers")
        texts = {f"choices[{k}]": choice for k, choice in enumerate(self.choices)}
        for name, text in {"id": self.id, "question": self.question, **texts}.items():
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{name} is {reprlib.repr(text)}: give a text that is not empty")
        last = len(self.choices) - 1
        if type(self.label) is not int or not 0 <= self.label <= last:
            raise DataError(
                f"label is {reprlib.repr(self.label)}: give the right answer's index, an integer "
                f"from 0 to {last}"
            )

    @property
    def answer(self) -> str:
        """The text of the right answer."""
        return self.choices[self.label]


def item_of(record: Any, usual: dict[str, Any]) -> Item:
    """A record, a dictionary, as an item; the keys that it lacks are those of ``usual``."""
    if isinstance(record, Item):
        return record
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__}, no object: write {FORMAT}")
    for key in ("id", "question", "choices", "label"):
        if key not in usual | record:
            raise DataError(f"the key {key!r} is missing among {list(record)}: write {FORMAT}")
    record = usual | record
    choices = record["choices"]
    choices = tuple(choices) if isinstance(choices, list) else choices
    return Item(record["id"], record["question"], choices, record["label"])
