"""Items in JSON-lines files, ``DIR/TASK/SPLIT.jsonl``."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from pyro_blora.data.items import FORMAT, Item, item_of
from pyro_blora.errors import DataError, near_miss

__all__ = ["read_json_lines", "splits_in"]


def read_json_lines(path: str | PathLike[str], *, labelled: bool = True) -> list[Item]:
    r"""Read the items of one split.

    A file is UTF-8 with one JSON object a line::

        {"id": "arc_easy-test-17", "question": "...", "choices": ["...", "..."], "label": 2}

    Further keys are ignored, as are blank lines.

    Args:
        path: the file, by convention ``DIR/TASK/SPLIT.jsonl``.
        labelled: whether every item must have a label and an id; in a pool to be labelled one
            without a label is given 0, which nobody reads, and one without an id its line.

    Returns:
        The items, in file order; never empty.

    Raises:
        DataError: the file is missing (the message names the tasks or splits that are there), empty
            or not UTF-8, or a line is not an item (the message names the line).

    Example::

        >>> import tempfile
        >>> line = '{"id": "a", "question": "2 + 2?", "choices": ["3", "4"], "label": 1}\n'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "test.jsonl"
        ...     _ = file.write_text(line, encoding="utf-8")
        ...     read_json_lines(file)[0].answer
        '4'
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(_missing(path))
    items = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                items.append(item_of(json.loads(line), {} if labelled else _of_a_pool(number)))
        except json.JSONDecodeError as error:
            where = f"{path}, line {number}, column {error.colno}"
            raise DataError(f"{where}: not JSON ({error.msg}): write {FORMAT}") from None
        except ValueError as error:  # not UTF-8, or no item
            raise DataError(f"{path}, line {number}: {error}") from None
    if not items:
        raise DataError(f"{path} has no items: write one object a line, {FORMAT}")
    return items


def splits_in(folder: Path) -> list[str]:
    """The names of the splits (``SPLIT.jsonl``) in a task's folder."""
    return [file.stem for file in folder.glob("*.jsonl") if file.is_file()]


def _of_a_pool(number: int) -> dict[str, Any]:
    return {"id": f"line {number}", "label": 0}


def _missing(path: Path) -> str:
    """What is there instead of a file."""
    folder, data_dir = path.parent, path.parent.parent
    if splits := splits_in(folder):
        return f"no split {path.stem!r} in {folder}; {near_miss(path.stem, splits)}"
    if tasks := [task.name for task in data_dir.glob("*") if splits_in(task)]:
        return f"no task {folder.name!r} in {data_dir}; {near_miss(folder.name, tasks)}"
    return f"no TASK/SPLIT.jsonl in {data_dir}: name the folder that holds them"
