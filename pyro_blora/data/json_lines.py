"""Items in JSON-lines files, ``DIR/TASK/SPLIT.jsonl``."""

from __future__ import annotations

import json
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from pyro_blora.data.items import DataError, Item

__all__ = ["read_json_lines", "splits_in"]

_KEYS = ("id", "question", "choices", "label")
_FORMAT = '{"id": "a-1", "question": "...", "choices": ["...", "..."], "label": 0}'


def read_json_lines(path: str | PathLike[str]) -> list[Item]:
    r"""Read the items of one split.

    A file is UTF-8 with one JSON object a line::

        {"id": "arc_easy-test-17", "question": "...", "choices": ["...", "..."], "label": 2}

    Further keys are ignored, as are blank lines.

    Args:
        path: the file, by convention ``DIR/TASK/SPLIT.jsonl``.

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
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                items.append(_item(text))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 (byte {error.start}): save the file as UTF-8"
            ) from None
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not items:
        raise DataError(f"{path} has no items: write one object a line, {_FORMAT}")
    return items


def splits_in(folder: str | PathLike[str]) -> list[str]:
    """Return the names of the splits (``SPLIT.jsonl``) in a task's folder, sorted."""
    return sorted(file.stem for file in Path(folder).glob("*.jsonl") if file.is_file())


def _item(text: str) -> Item:
    """Make an item of one line."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg} at column {error.colno}): write one object a line, {_FORMAT}"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__}, expected an object: write {_FORMAT}")
    for key in _KEYS:
        if key not in record:
            near = get_close_matches(key, [name for name in record if name not in _KEYS], n=1)
            fix = f"rename {near[0]!r} to {key!r}" if near else f"add it, as in {_FORMAT}"
            raise DataError(f"the key {key!r} is missing: {fix}")
    choices = record["choices"]
    if not isinstance(choices, list):
        raise DataError(
            f"choices is a {type(choices).__name__}, expected a list: "
            "give a list of two or more strings"
        )
    return Item(record["id"], record["question"], tuple(choices), record["label"])


def _missing(path: Path) -> str:
    """Say what is there instead of a file."""
    folder, data_dir = path.parent, path.parent.parent
    if path.is_dir():
        return f"{path} is a folder, expected a file: name one of {splits_in(path) or 'its files'}"
    if folder.is_dir():
        splits = splits_in(folder)
        there = f"it has {', '.join(splits)}: choose one of these" if splits else "it has no .jsonl"
        return f"no split {path.stem!r} in {folder} ({path.name} does not exist); {there}"
    if data_dir.is_dir():
        tasks = sorted(entry.name for entry in data_dir.iterdir() if splits_in(entry))
        near = get_close_matches(folder.name, tasks, n=3) or tasks
        there = f"did you mean {' or '.join(near)}?" if near else "it has no task folders"
        return f"no task {folder.name!r} in {data_dir}; {there}"
    return f"no folder {data_dir}: give the folder that holds TASK/SPLIT.jsonl"
