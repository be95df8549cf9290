"""One question with its candidate answers, the unit every part of this package works on."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_blora.errors import DataError

__all__ = ["DataError", "Item"]


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
        for name in ("id", "question"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{name} is {text!r}, expected a non-empty string: give the text")
        if not isinstance(self.choices, tuple) or len(self.choices) < 2:
            raise DataError(
                f"choices is {_short(self.choices)}, expected at least 2 answers: "
                "give a list of two or more strings"
            )
        for index, choice in enumerate(self.choices):
            if not isinstance(choice, str) or not choice.strip():
                raise DataError(
                    f"choices[{index}] is {_short(choice)}, expected a non-empty string: "
                    "write every answer as text"
                )
        if not isinstance(self.label, int) or isinstance(self.label, bool):
            raise DataError(
                f"label is {_short(self.label)}, expected an integer: "
                "give the index of the right answer, counted from 0"
            )
        if not 0 <= self.label < len(self.choices):
            raise DataError(
                f"label {self.label} is out of range for {len(self.choices)} choices: "
                f"give an index from 0 to {len(self.choices) - 1}"
            )

    @property
    def answer(self) -> str:
        """The text of the right answer."""
        return self.choices[self.label]


def _short(value: object) -> str:
    """Return the ``repr`` of a value, cut to one readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
