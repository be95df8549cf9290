"""Tables of rows: files, data frames, and data sets of ``datasets``."""

import glob
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from pyro_blora.errors import DataError, first_line, near_miss
from pyro_blora.labels import (
    FORMAT,
    Item,
    check_choices,
    check_rows,
    classes_of,
    has_places,
    is_list,
    item_of,
    name_of,
    names_of,
)

FILES = (".csv", ".json", ".jsonl", ".parquet")
#: The names that a split may have in files and tables, and what they mean.
SPLITS = {name: name for name in ("train", "validation", "test")}
SPLITS |= dict.fromkeys(("dev", "val", "valid"), "validation")


def read_table(data: Any) -> Any:
    """The rows of a file or a data frame, as a sequence of dictionaries; other data as they are.

    CSV, JSON and Parquet files are read by the package ``datasets``, JSON lines without it.
    """
    if isinstance(data, str | PathLike):
        return _read_file(Path(data))
    if type(data).__module__.partition(".")[0] == "pandas":
        return data.to_dict("records")
    from torch.utils.data import Subset  # not at the top, as the commands' help waits

    if type(data) is Subset:  # as random_split makes them
        return Subset(read_table(data.dataset), data.indices)
    tensors = getattr(data, "format", {}).get("type") if hasattr(data, "with_format") else None
    if tensors not in (None, "custom") and "input_ids" not in data.column_names:
        shown = {name: data.format[name] for name in ("columns", "output_all_columns")}
        return data.with_format(None, **shown)  # texts and numbers as they are; a transform is kept
    if isinstance(data, Mapping):
        raise DataError(
            f"Examples must be of one split, got {list(data)}; pass data[split], or use load_task."
        )
    return data


def check_sized(rows: Any) -> None:
    """Refuses a stream of examples."""
    if not has_places(rows):
        raise DataError(
            f"Examples must have a length, got a {type(rows).__name__}; pass a DataLoader of them."
        )


def _read_file(path: Path) -> Any:
    if path.suffix not in FILES:
        raise DataError(f"A file of examples must be one of {', '.join(FILES)}, got {path}.")
    if path.suffix == ".jsonl":
        return _records(path)
    if not path.is_file():
        raise DataError(f"{path} must be a file, got none; check the name and the current folder.")
    try:
        from datasets import load_dataset

        options: dict[str, Any] = {"data_files": glob.escape(str(path)), "split": "train"}
        if path.suffix == ".csv":  # None and NA are words, such as a text or a class
            options |= {"keep_default_na": False, "na_values": [""]}
        table = load_dataset(path.suffix[1:], **options)
    except Exception as error:  # datasets and the libraries that it uses raise many kinds
        raise DataError(
            f"{path} cannot be read by datasets ({first_line(error)[:200]}): pip install datasets, "
            "or correct the file."
        ) from error
    index = "__index_level_0__"  # which pandas makes of the values of a column too many
    if path.suffix == ".csv" and index in table.column_names:
        with path.open(encoding="utf-8", errors="replace") as file:
            if index not in file.readline():
                raise DataError(
                    f"{path} must have a name for each column, got a value more in its rows than "
                    "in its first line; put texts with a comma in quotes."
                )
    return table


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines."""
    if not path.is_file():
        raise DataError(_missing(path))
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"a line must be a JSON object, got {record!r:.80}")
                records.append(record)
        except ValueError as error:  # invalid JSON or UTF-8, or no object
            raise DataError(f"{path}, line {number}: {error}") from None
    if not records:
        raise DataError(f"{path} has no items: write one object per line, {FORMAT}")
    return records


def splits_in(folder: Path) -> dict[str, Path]:
    """The files of the splits in a task's folder, such as ``train.jsonl``, by name."""
    files: dict[str, Path] = {}
    for file in sorted(file for file in folder.glob("*") if file.suffix in FILES):
        if (other := files.setdefault(file.stem, file)) != file and file.stem in SPLITS:
            raise DataError(
                f"{folder} must have one file for each split, got {other.name} and {file.name}."
            )
    return files


def _missing(path: Path) -> str:
    """Says that a file is missing, and names the splits or tasks that exist instead."""
    folder, data_dir = path.parent, path.parent.parent
    if splits := splits_in(folder):
        return f"{path} is missing: no split {path.stem!r}; {near_miss(path.stem, splits)}"
    if tasks := [task.name for task in data_dir.glob("*") if splits_in(task)]:
        return f"no task {folder.name!r} in {data_dir}; {near_miss(folder.name, tasks)}"
    return f"{path} is missing, and {data_dir} has no TASK/SPLIT.jsonl: name another folder"


def are_items(tables: Mapping[str, Any]) -> bool:
    """Whether rows are questions with choices, or have at most one class; others stay rows."""
    row: Any = next((table[0] for table in tables.values() if len(table)), {})
    if isinstance(row, Item) or "question" in row:
        return True
    if is_list(row.get("label")) or {"tokens", "chosen"} & set(row):
        return False
    labels = (table[k].get("label") for table in tables.values() for k in range(len(table)))
    return not any(isinstance(label, float) and label % 1 for label in labels)


def items_of(tables: Mapping[str, Any]) -> dict[str, list[Item]]:
    """The items of each split, in which the classes of ``text`` and ``label`` are the choices."""
    some: Any = next((table[0] for table in tables.values() if len(table)), {})
    texts = isinstance(some, Mapping) and "question" not in some
    names: list[str] = []
    if texts:
        for table in tables.values():
            columns = {name for k in range(len(table)) for name in table[k]}
            if unread := {"prompt", "completion", "text_pair"} & columns:
                raise DataError(
                    f"A task must have texts with classes, or options, got {sorted(unread)}; use "
                    "fit and blora.predict_dataset, or evaluate_text for completions."
                )
            check_rows(table, "text", "label")
        names = [str(name) for name in names_of(*tables.values())]
    items: dict[str, list[Item]] = {}
    for split, table in tables.items():
        items[split], table_names = [], classes_of(table) if texts else []
        if not texts:
            check_choices(table)
        for k in range(len(table)):
            row = table[k]
            if texts:
                label = names.index(str(name_of(row["label"], table_names)))
                row = {"question": row["text"], "choices": names, "label": label}
            items[split].append(item_of(row, {"id": f"{split}-{k}"}))
    return items
