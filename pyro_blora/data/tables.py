"""Tables of text and label: files, data frames, and data sets of ``datasets``."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from pyro_blora.data.items import FILES, Item, item_of, read_json_lines
from pyro_blora.errors import DataError, first_line


def read_table(data: Any) -> Any:
    """The rows of a file or a data frame, as a sequence of dictionaries; other data as they are.

    CSV, JSON and Parquet files are read by the package ``datasets``, JSON lines without it.
    """
    if isinstance(data, str | PathLike):
        return _read_file(Path(data))
    if type(data).__module__.partition(".")[0] == "pandas":
        return data.to_dict("records")
    if hasattr(data, "with_format") and "input_ids" not in (data.column_names or ()):
        return data.with_format(None)  # texts and numbers as they are, not tensors
    if isinstance(data, Mapping):
        raise DataError(
            f"Examples must be of one split, got {list(data)}; pass data[split], or all of them to "
            "load_task."
        )
    return data


def _read_file(path: Path) -> Any:
    if path.suffix not in FILES:
        raise DataError(f"A file of examples must be one of {', '.join(FILES)}, got {path}.")
    if path.suffix == ".jsonl":
        return read_json_lines(path, only_items=False)
    if not path.is_file():
        raise DataError(f"{path} must be a file, got none; check the name and the current folder.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{path} needs the package datasets: pip install datasets.") from None
    try:
        return load_dataset(path.suffix[1:], data_files=str(path), split="train")
    except Exception as error:  # datasets and the libraries that it uses raise many kinds
        raise DataError(f"{path} cannot be read: {first_line(error)[:200]}") from error


def check_rows(rows: Iterable[Mapping[str, Any]], *columns: str) -> None:
    """Raises DataError unless each row has these columns, and a text or a number in each."""
    for k, row in enumerate(rows):
        if missing := [name for name in columns if name not in row]:
            raise DataError(
                f"Rows must have the columns {' and '.join(columns)}, got {', '.join(row)} in row "
                f"{k}; rename those that hold the {' and the '.join(missing)}."
            )
        for name in columns:
            value = _plain(row[name])
            number = name == "label" and isinstance(value, Integral) and int(value) >= 0
            if not (number or isinstance(value, str)):
                remedy = "; leave the row out, or convert it"
                if isinstance(value, float) and name == "label":
                    remedy = "; cast the column to int, after leaving out rows without a label"
                kind = "a text or a whole number from 0" if name == "label" else "a text"
                raise DataError(
                    f"The column {name!r} must hold {kind}, got {value!r:.80} in row {k}{remedy}."
                )


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def without_subsets(rows: Any) -> Any:
    """The data set of which ``rows`` are a ``torch.utils.data.Subset``, or rows as they are."""
    while hasattr(rows, "indices") and hasattr(rows, "dataset"):
        rows = rows.dataset
    return rows


def classes_of(rows: Any) -> list[str]:
    """The names that numbers have in the column ``label`` of a ``datasets.Dataset``, or none."""
    feature = (getattr(without_subsets(rows), "features", None) or {}).get("label")
    return list(getattr(feature, "names", None) or ())


def names_of(*tables: Any) -> list[Any]:
    """The classes in the column ``label`` of all tables: texts, sorted, or numbers from 0.

    Those of a ``datasets.Dataset`` keep its order.
    """
    own = [classes_of(rows) for rows in tables]
    if own[0] and all(names and set(names) <= set(own[0]) for names in own):
        return own[0]
    found = {
        label_of(row, own=names) for rows, names in zip(tables, own, strict=True) for row in rows
    }
    texts = [label for label in found if isinstance(label, str)]
    if texts and len(texts) < len(found):
        raise DataError(
            f"The column 'label' must hold texts or numbers, got both, such as {texts[0]!r} and "
            f"{next(label for label in found if not isinstance(label, str))}; make them alike."
        )
    return sorted(texts) if texts else list(range(max(map(int, found), default=-1) + 1))


def label_of(
    row: Mapping[str, Any], names: Sequence[str] = (), own: Sequence[str] = ()
) -> str | int:
    """The label of a row: a text's place in ``names``, or a number.

    ``own`` are the names that numbers have in the row's table; if ``names`` has them all, a number
    stands for its name.
    """
    label = _plain(row["label"])
    if not isinstance(label, str) and own and (not names or set(own) <= set(names)):
        label = own[label]
    if not isinstance(label, str):
        return int(label)
    if not names:
        return label
    if label not in names:
        raise DataError(
            f"The column 'label' must have one of the classes {list(names)}, got {label!r}; spell "
            "it as in the training data."
        )
    return list(names).index(label)


def items_of(splits: Mapping[str, Any]) -> dict[str, list[Item]]:
    """The items of each split, in which the classes of ``text`` and ``label`` are the choices."""
    tables = {split: read_table(data) for split, data in splits.items()}
    some: Any = next((row for table in tables.values() for row in table), {})
    texts = isinstance(some, Mapping) and "question" not in some
    names: list[Any] = []
    if texts:
        if unread := {"prompt", "completion", "text_pair"} & set(some):
            raise DataError(
                f"A task must have texts with classes, or options, got {', '.join(sorted(unread))}"
                "; use fit and blora.predict_dataset, or evaluate_text for completions."
            )
        for table in tables.values():
            check_rows(table, "text", "label")
        names = names_of(*tables.values())
    found: dict[str, list[Item]] = {}
    for split, table in tables.items():
        found[split], own = [], classes_of(table) if texts else []
        for k, row in enumerate(table):
            if texts:
                label = label_of(row, names if isinstance(names[0], str) else (), own)
                row = {"question": row["text"], "choices": [*map(str, names)], "label": label}
            found[split].append(item_of(row, {"id": f"{split}-{k}"}))
    return found
