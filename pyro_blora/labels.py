"""Labels of rows: class names, and the numbers that stand for them."""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from pyro_blora.errors import DataError

_LETTERS = (*"ABCDEFGH", *"abcdefgh")  # of options
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

    def __repr__(self) -> str:
        return f"{super().__repr__()}{self.features or ''}"


def has_places(data: Any) -> bool:
    """Whether data have a length, and rows by their places, as streams have not."""
    from torch.utils.data import IterableDataset  # not at the top, as the commands' help waits

    return hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def is_subset(rows: Any) -> bool:
    """Whether ``rows`` are a ``torch.utils.data.Subset``, as ``random_split`` makes them."""
    own = _gives_rows_as_they_are(rows)
    return own and hasattr(rows, "indices") and hasattr(rows, "dataset")


def _gives_rows_as_they_are(rows: Any) -> bool:
    """Whether they are of a class of torch; a subclass may make other labels of those within."""
    methods = (getattr(type(rows), name, None) for name in ("__getitem__", "__iter__"))
    homes = {getattr(method, "__module__", "") for method in methods if method is not None}
    return homes == {"torch.utils.data.dataset"}


def parts_of(rows: Any) -> list[Any]:
    """The data sets of which ``rows`` are subsets or concatenations, or rows as they are."""
    while is_subset(rows):
        rows = rows.dataset
    parts = getattr(rows, "datasets", None) if _gives_rows_as_they_are(rows) else None
    return [each for part in parts for each in parts_of(part)] if parts else [rows]


def classes_of(rows: Any, column: str = "label") -> list[str]:
    """The names that numbers have in the column of labels of a ``datasets.Dataset``, or none."""
    parts = parts_of(rows)
    kinds = [features_of(part).get(column) for part in parts]
    every = [getattr(getattr(kind, "feature", kind), "names", None) for kind in kinds]  # or lists
    if any(every) and any(_is_renumbered(part, column) for part in parts):
        return []
    if any(names != every[0] for names in every):
        raise DataError(
            f"The parts of a data set must number their classes alike, got {every[0]} and others."
        )
    return list(every[0] or ())


def _is_renumbered(part: Any, column: str) -> bool:
    """Whether a transform of a ``datasets.Dataset`` makes other numbers of those in a column."""
    if column not in features_of(part) or getattr(part, "format", {}).get("type") != "custom":
        return False
    stored, few = part.with_format(None), range(0, len(part), len(part) // 64 + 1)
    made = ((part[k].get(column), stored[k][column]) for k in few)
    return any(label is not None and listed(label) != was for label, was in made)


def listed(value: Any) -> Any:
    """A list or a number in place of a tensor or an array."""
    return value.tolist() if hasattr(value, "tolist") else value


def features_of(rows: Any) -> Mapping[str, Any]:
    """The columns of a ``datasets.Dataset``; a data set of the user's may call others so."""
    features = getattr(parts_of(rows)[0], "features", None)
    return features if isinstance(features, Mapping) else {}


def warn_of_lost_names(rows: Any, known: Sequence[str]) -> None:
    """Warns if a stream of ``datasets`` no longer knows what numbers mean, though ``known`` do."""
    if known and any(getattr(part, "features", {}) is None for part in parts_of(rows)):
        warnings.warn(
            "The data set is a stream whose columns have no types, so that numbers among its "
            f"labels are read as places in {list(known)}. Pass features= to its map, so that a "
            "ClassLabel keeps the names by which they are checked.",
            stacklevel=7,
        )


def are_numbers(names: Iterable[Any]) -> bool:
    """Whether all names of classes are whole numbers, as such or as texts."""
    plain = map(_plain, names)
    return all(n.isdecimal() if isinstance(n, str) else isinstance(n, Integral) for n in plain)


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
    if are_numbers(names):  # a file may have read some as texts
        return sorted({*map(int, names)} if len(kinds) > 1 else names, key=int)
    if len(kinds) > 1:
        raise DataError(
            f"The labels must all be texts or numbers, got {kinds[str]!r} and {kinds[int]!r}."
        )
    return sorted(names)


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


@functools.lru_cache
def _places(classes: tuple[str, ...]) -> dict[str, int]:
    places = {name.casefold(): k for k, name in enumerate(classes)}
    if len(places) < len(classes):  # which differ in their case alone
        return {name: k for k, name in enumerate(classes)}
    return places


def place_of(name: str, classes: tuple[str, ...]) -> int | None:
    """The place of a class, whatever its case unless that tells it from another."""
    places = _places(classes)
    return places.get(name, places.get(name.casefold()))


def check_places(names: Sequence[str], classes: Sequence[str], *, unknown: bool = False) -> None:
    """Refuses names in other places than in ``classes``; with ``unknown``, also other names."""
    places = [place_of(name, tuple(classes)) for name in names]
    if any(p != k and (unknown or p is not None) for k, p in enumerate(places)):
        raise DataError(
            "A collator, or a data set whose numbers are read as they are, must number the classes "
            f"as {list(classes)}, got {list(names)}; leave them out of the collator, pass the data "
            "set itself in place of a loader, or cast its column to int if its numbers are right."
        )


def check_choices(rows: Any) -> None:
    """Refuses labels whose names are the first row's choices in another order, or other places."""
    names = classes_of(rows)
    if not names or not len(rows) or not isinstance(rows[0], Mapping):
        return
    choices = rows[0].get("choices", ())
    if set(names) == set(choices):
        check_places(names, choices)
    elif choices and all(n.isdecimal() or n in _LETTERS for n in names):  # of places
        starts = [0, 1] if len(names) == len(choices) else [0]  # from 1 unless some are missing
        known = [[str(start + k) for k in range(len(names))] for start in starts]
        known += [[chr(ord(letter) + k) for k in range(len(names))] for letter in "Aa"]
        if names not in known:
            check_places(names, known[0 if names[0].isdecimal() else -2], unknown=True)


def check_numbers(names: Sequence[str]) -> None:
    """Refuses names that are other numbers than the labels, or numbers in alphabetical order."""
    for k, name in enumerate(names):
        try:
            is_other = float(name) != k
        except ValueError:  # a word
            continue
        if is_other:
            raise DataError(
                f"The labels must be numbers as they are, got a ClassLabel that has {k} for "
                f"{name!r}; keep a column of the numbers, and encode a copy of it."
            )
    if len(names) < 3 or [*names] != sorted(names):  # as an encoding of texts makes them
        return
    heads = [float(m[0]) for name in names if (m := re.match(r"-?\d+(\.\d+)?", name))]
    if len(heads) == len(names) and heads != sorted(heads):
        raise DataError(
            f"The labels must be quantities in their order, got a ClassLabel of {list(names)}; "
            "keep a column of the numbers, and encode a copy of it."
        )
    if len(heads) < len(names):
        warnings.warn(
            "The labels are quantities, and their names are in alphabetical order, "
            f"{list(names)}; if that is not theirs, make a column of numbers from the names.",
            stacklevel=2,
        )


def label_of(
    label: Any, classes: Sequence[str] = (), table_names: Sequence[str] = (), where: str = ""
) -> int:
    """The place of a row's label among the classes, or its number if there are none."""
    classes = tuple(classes)
    if classes and None in (place_of(name, classes) for name in table_names):
        raise DataError(
            f"The column 'label' must number some of the classes {list(classes)}, got "
            f"{list(table_names)}; spell them alike, or cast the column to int to number logits."
        )
    label = name_of(label, table_names if classes or are_numbers(table_names) else ())
    if any(re.fullmatch(r"-?[\d.]+", name) for name in classes):
        label = str(label)  # 1 is then the name "1", wherever that stands
    if isinstance(label, int) or (label.isdecimal() and not classes):
        return int(label)
    if (place := place_of(label, classes)) is None:
        expected = f"one of the classes {list(classes)}" if classes else "the number of a logit"
        raise DataError(
            f"A label must be {expected}, got {label!r}{where}; spell it as in training, or leave "
            "it out."
        )
    return place
