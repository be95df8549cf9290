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
        raise DataError(f"{path} must be read by datasets: pip install datasets.") from None
    try:
        return load_dataset(path.suffix[1:], data_files=str(path), split="train")
    except Exception as error:  # datasets, and what it reads by, raise many kinds
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
            kinds = (str, Integral) if name == "label" else (str,)
            if not isinstance(row[name], kinds):
                remedy = "; leave the row out, or make it one"
                if isinstance(row[name], float) and name == "label":
                    remedy = "; cast the column to int, after rows without a label are left out"
                kind = "a text or a whole number" if name == "label" else "a text"
                raise DataError(
                    f"The column {name!r} must hold {kind}, got {row[name]!r:.80} in row "
                    f"{k}{remedy}."
                )


def names_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The classes in the column ``label``: texts in their order, or whole numbers from 0."""
    feature = (getattr(rows, "features", None) or {}).get("label")
    if names := getattr(feature, "names", None):
        return list(names)
    found = {label_of(row) for row in rows if "label" in row}
    if any(isinstance(label, str) for label in found):
        return sorted(map(str, found))
    return [str(k) for k in range(max(map(int, found), default=-1) + 1)]


def label_of(row: Mapping[str, Any], names: Sequence[str] = ()) -> str | int:
    """The label of a row: a whole number, or a text, which becomes its place in ``names``."""
    label = row["label"]
    if not isinstance(label, str):
        return int(label)
    if names and label not in names:
        raise DataError(
            f"The column 'label' must have one of the classes {list(names)}, got {label!r}; spell "
            "it as in the training data."
        )
    return list(names).index(label) if names else label


def items_of(splits: Mapping[str, Any]) -> dict[str, list[Item]]:
    """The items of each split, in which the classes of ``text`` and ``label`` are the choices."""
    tables = {split: read_table(data) for split, data in splits.items()}
    rows = [row for table in tables.values() for row in table]
    some = rows[0] if rows else {}
    texts = isinstance(some, Mapping) and "question" not in some
    if texts and {"prompt", "completion"} & set(some):
        raise DataError(
            "A task must have classes or options, got prompts and completions; train on them by "
            "fit, and measure them by evaluate_text."
        )
    if texts:
        for table in tables.values():
            check_rows(table, "text", "label")
    first = next(iter(tables.values()))
    names = names_of(first if hasattr(first, "features") else rows) if texts else []
    found: dict[str, list[Item]] = {}
    for split, table in tables.items():
        found[split] = []
        for k, row in enumerate(table):
            if texts:
                row = {"question": row["text"], "choices": names, "label": label_of(row, names)}
            found[split].append(item_of(row, {"id": f"{split}-{k}"}))
    return found
