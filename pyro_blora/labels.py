"""Rows: their labels, the names of classes, and questions with candidate answers.

A text is its own name, and a number has the name that the ``ClassLabel`` of a data set gives it.
Names are looked up among those of the network's outputs; a number without a name is the place of an
output. Numbers that nobody maps, as those of a loader, must number the classes as the outputs do.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from pyro_blora.errors import DataError

Kind = tuple[str, Callable[[Any], bool]]  # of the values in a column: in words, and their check


def _is_class(value: Any) -> bool:
    value = _plain(value)
    return isinstance(value, str) or (isinstance(value, Integral) and int(value) >= 0)


def _is_finite(value: Any) -> bool:
    value = listed(value)
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_list(value: Any) -> bool:
    """Whether a value is a list, or a tensor or an array of several values."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def list_of(kind: Kind) -> Kind:
    """Lists, not empty, of values of a kind."""
    words, is_right = kind
    return (
        f"a list of which each is {words}",
        lambda value: is_list(value) and len(value) > 0 and all(map(is_right, value)),
    )


A_TEXT: Kind = ("a text", lambda value: isinstance(value, str))
A_CLASS: Kind = ("a text or a whole number from 0", _is_class)
FINITE: Kind = ("a finite number", _is_finite)


def check_rows(
    rows: Any, *columns: str, optional: Sequence[str] = (), kinds: Mapping[str, Kind] | None = None
) -> None:
    """Raises DataError unless each row has values of the right kinds in these columns.

    Usually they are texts, and classes in a column of labels. An ``optional`` column may be
    missing, or hold None or a NaN, as a data frame does.
    """
    kinds = {"label": A_CLASS, "labels": A_CLASS, "tokens": list_of(A_TEXT), **(kinds or {})}
    for k in range(len(rows)):
        row = rows[k]
        if missing := [name for name in columns if name not in row]:
            remedy = f"rename those that hold the {' and the '.join(missing)}"
            raise DataError(
                f"Rows must have the columns {' and '.join(columns)}, got {', '.join(row)} in row "
                f"{k}; {'pass likelihood=Preference()' if 'chosen' in row else remedy}."
            )
        given = [name for name in optional if (v := row.get(name)) is not None and v == v]
        for name in (*columns, *given):
            (words, is_right), value = kinds.get(name, A_TEXT), listed(row[name])
            if not is_right(value):
                raise DataError(
                    f"The column {name!r} must hold {words}, got {value!r:.80} in row {k}; leave "
                    "the row out, or convert it."
                )


def checked_labels(
    rows: Any, labeled: bool, kind: Kind, *columns: str, column: str | None = None
) -> list[Any]:
    """The labels of rows, of this kind, or none; the rows have texts in ``columns``, too.

    If they are ``labeled``, each row must have a label, otherwise all or none.
    """
    first = rows[0]
    if not isinstance(first, Mapping):
        raise DataError(
            f"Rows must be dictionaries, got {type(first).__name__}; load_task(data, as_rows=True) "
            "keeps them."
        )
    column = column or ("label" if {"label", "text"} & {*first} else "labels")
    has_label = labeled or column in first
    if not has_label and any(column in rows[k] for k in range(len(rows))):
        raise DataError(f"All rows must have {column!r}, or none, got none in row 0; add it.")
    named = (*columns, *([column] if has_label else ()))
    check_rows(rows, *named, optional=("text_pair",), kinds={column: kind})
    return [rows[k][column] for k in range(len(rows))] if has_label else []


def first_rows(labels: Sequence[Any]) -> dict[str | int, int]:
    """The different labels of rows, which may be lists of them, each with its first row."""
    first: dict[str | int, int] = {}
    for k, label in enumerate(labels):
        for each in label if is_list(label) else [label]:
            first.setdefault(name_of(each), k)
    return first


def first_tags(rows: Any, labeled: bool) -> dict[str | int, int]:
    """The tags in rows, which it checks: there are as many ``tags`` as ``tokens``."""
    every = checked_labels(rows, labeled, list_of(A_CLASS), "tokens", column="tags")
    for k, tags in enumerate(every):
        if len(tags) != (count := len(rows[k]["tokens"])):
            raise DataError(
                f"The column 'tags' must hold a tag for each of {count} tokens, got {len(tags)} in "
                f"row {k}; correct it, or leave the row out."
            )
    return first_rows(every)


def _plain(value: Any) -> Any:
    value = listed(value)
    return str(value) if isinstance(value, bool) else value


class Rows(tuple[Any, ...]):
    """Rows whose numbers keep the names that they have in a ``datasets.Dataset``."""

    features: Mapping[str, Any]

    def __new__(cls, rows: Iterable[Any], table: Any = None) -> "Rows":
        """``rows`` of a table."""
        made, named = super().__new__(cls, rows), ("label", "labels", "tags")
        made.features = {n: features_of(table)[n] for n in named if classes_of(table, n)}
        return made

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return Rows(found, self) if isinstance(place, slice) else found

    def __add__(self, other: Any) -> Any:
        alike = features_of(other) == self.features
        return Rows([*self, *other], self) if alike else NotImplemented


def has_places(data: Any) -> bool:
    """Whether data have a length, and rows by their places, as streams have not."""
    from torch.utils.data import IterableDataset  # not at the top, as the commands' help waits

    return hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def parts_of(rows: Any) -> list[Any]:
    """The data sets of which ``rows`` are torch's subsets or concatenations, or they themselves."""
    from torch.utils.data import ConcatDataset, Subset

    if type(rows) is Subset:  # a subclass may make other labels
        return parts_of(rows.dataset)
    if type(rows) is ConcatDataset:
        return [each for part in rows.datasets for each in parts_of(part)]
    return [rows]


def classes_of(rows: Any, *columns: str) -> list[str]:
    """The names of numbers in the first column of a ``datasets.Dataset`` that has any, or none.

    By default the columns are ``label`` and ``labels``.
    """
    parts = parts_of(rows)
    for column in columns or ("label", "labels"):
        kinds = [features_of(part).get(column) for part in parts]
        every = [getattr(getattr(kind, "feature", kind), "names", None) for kind in kinds]
        if any(names != every[0] for names in every):
            raise DataError(
                "The parts of a data set must number their classes alike, got "
                f"{every[0]} and others."
            )
        if every[0]:
            return list(every[0])
    return []


def is_transformed(rows: Any) -> bool:
    """Whether a transform makes the rows of a ``datasets.Dataset``, and perhaps other numbers."""
    return any(getattr(part, "format", {}).get("type") == "custom" for part in parts_of(rows))


def listed(value: Any) -> Any:
    """A list or a number in place of a tensor or an array."""
    return value.tolist() if hasattr(value, "tolist") else value


def features_of(rows: Any) -> Mapping[str, Any]:
    """The columns of a ``datasets.Dataset``; a data set of the user's may call others so."""
    features = getattr(parts_of(rows)[0], "features", None)
    return features if isinstance(features, Mapping) else {}


def are_numbers(names: Iterable[Any]) -> bool:
    """Whether all names of classes are whole numbers, as such or as texts."""
    return all(n.isdecimal() if isinstance(n, str) else isinstance(n, Integral) for n in names)


def names_of(*tables: Any) -> list[str | int]:
    """The classes in the column ``label`` of all tables; those of a data set keep its order."""
    every = [classes_of(rows) for rows in tables]
    if every[0] and all(names and set(names) <= set(every[0]) for names in every):
        return list(every[0])
    both = [*zip(tables, every, strict=True)]
    return in_order(name_of(t[k]["label"], names) for t, names in both for k in range(len(t)))


def in_order(labels: Iterable[Any]) -> list[str | int]:
    """Different labels, sorted: all are texts, or whole numbers."""
    names: set[Any] = {name_of(label) for label in labels}
    kinds = {type(name): name for name in names}
    if len(kinds) > 1:
        raise DataError(
            f"The labels must all be texts or numbers, got {kinds[str]!r} and {kinds[int]!r}."
        )
    return sorted(names, key=int if are_numbers(names) else None)


def name_of(label: Any, table_names: Sequence[str] = ()) -> str | int:
    """A row's label as it is, or the name that its number has in the row's table."""
    label = _plain(label)
    if isinstance(label, str) or not table_names:
        return label if isinstance(label, str) else int(label)
    if not 0 <= int(label) < len(table_names):
        raise DataError(
            f"A label must number the classes {list(table_names)}, got {label}; correct it."
        )
    return table_names[int(label)]


def place_of(name: str, classes: Sequence[str]) -> int | None:
    """The place of a class, whatever its case unless that tells it from another."""
    if name in classes:
        return classes.index(name)
    places = {each.casefold(): k for k, each in enumerate(classes)}
    return places.get(name.casefold())


def check_places(names: Sequence[str], classes: Sequence[str], *, unknown: bool = False) -> None:
    """Refuses names in other places than in ``classes``; with ``unknown``, also other names."""
    places = [place_of(name, classes) for name in names]
    if any(p != k and (unknown or p is not None) for k, p in enumerate(places)):
        raise DataError(
            "A collator, or a data set whose numbers are read as they are, must number the classes "
            f"as {list(classes)}, got {list(names)}; leave them out of the collator, pass the data "
            "set itself in place of a loader, or cast its column to int if its numbers are right."
        )


def check_choices(rows: Any) -> None:
    """Refuses labels whose names are the first row's choices in another order."""
    names = classes_of(rows)
    if names and len(rows) and isinstance(rows[0], Mapping):
        check_places(names, rows[0].get("choices") or names)


def check_numbers(names: Sequence[str]) -> None:
    """Refuses names that are other numbers than the labels; warns of words in an alphabet."""
    for k, name in enumerate(names):
        if name.isdecimal() and int(name) != k:
            raise DataError(
                f"The labels must be numbers as they are, got a ClassLabel that has {k} for "
                f"{name!r}; keep a column of the numbers, and encode a copy of it."
            )
    if len(names) > 2 and [*names] == sorted(names) and not are_numbers(names):
        warnings.warn(
            "The labels are quantities, and their names are in alphabetical order, "
            f"{list(names)}; if that is not theirs, make a column of numbers from the names.",
            stacklevel=2,
        )


def label_of(
    label: Any, classes: Sequence[str] = (), table_names: Sequence[str] = (), where: str = ""
) -> int:
    """The place of a row's label among the classes, or its number if there are none."""
    label = name_of(label, table_names if classes or are_numbers(table_names) else ())
    named = any(re.fullmatch(r"-?[\d.]+", name) for name in classes)
    if are_numbers([label]) and not named:  # otherwise 1 is the name "1", wherever that stands
        return int(label)
    if (place := place_of(str(label), classes)) is None:
        expected = f"one of the classes {list(classes)}" if classes else "the number of a logit"
        raise DataError(
            f"A label must be {expected}, got {label!r}{where}; spell it as in training, or leave "
            "it out."
        )
    return place


FORMAT = '{"id": "a-1", "question": "...", "choices": ["...", "..."], "label": 0}'


@dataclass(frozen=True)
class Item:
    """A question, its candidate answers (two or more) and the index of the right one.

    The question is plain text without a prompt; ``id`` names the item in its data set.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        where = f" in {self!r:.300}"
        if not isinstance(self.choices, tuple) or len(self.choices) < 2:
            raise DataError(f"choices must be two answers or more, got {self.choices!r}{where}")
        for text in (self.id, self.question, *self.choices):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"id, question and choices must be texts, got {text!r}{where}")
        last = len(self.choices) - 1
        if type(self.label) is not int or not 0 <= self.label <= last:
            raise DataError(f"label must be an integer from 0 to {last}, got {self.label!r}{where}")


def item_of(record: Any, defaults: dict[str, Any]) -> Item:
    """The item of a dictionary, whose missing keys are taken from ``defaults``."""
    if isinstance(record, Item):
        return record
    try:
        record = {**defaults, **record}
        choices, label = listed(record["choices"]), listed(record["label"])
        choices = tuple(choices) if isinstance(choices, list) else choices
        return Item(str(record["id"]), record["question"], choices, label)
    except (KeyError, TypeError) as error:
        raise DataError(f"an item must be {FORMAT}, got {record!r:.300} ({error!r})") from None


@dataclass(frozen=True)
class Template:
    r"""A prompt and a way of scoring the answers.

    With ``scoring="options"`` each choice is scored by its log-likelihood as the text
    ``" " + choice`` after the prompt. With ``scoring="labels"`` the answer is a softmax over the
    tokens of ``label_words`` at the prompt's last position, in the order of the item's choices.

    In ``prompt``, ``{q}`` stands for the question. Each of ``label_words`` has its leading space.
    """

    prompt: str
    scoring: Literal["options", "labels"]
    label_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "{q}" not in self.prompt:
            raise DataError(f"the prompt {self.prompt!r} has no {{q}}: say where the question goes")

    def format(self, item: Item) -> str:
        """The prompt of one item, without an answer."""
        return self.prompt.replace("{q}", item.question)


QUESTION = Template("Question: {q}\nAnswer:", "options")

_TEMPLATES = {
    "sst2": Template(
        "Review: {q}\nSentiment (negative or positive):", "labels", (" negative", " positive")
    ),
    "ag_news": Template(
        "Article: {q}\nTopic (world, sports, business or technology):",
        "labels",
        (" world", " sports", " business", " technology"),
    ),
    # the questions end with a question mark, and the choices are ("false", "true")
    "boolq": Template("Question: {q}\nAnswer (yes or no):", "labels", (" no", " yes")),
}


def template_for(task: str) -> Template:
    """The template of a task, with label words for ``sst2``, ``ag_news`` and ``boolq``."""
    return _TEMPLATES.get(task, QUESTION)
