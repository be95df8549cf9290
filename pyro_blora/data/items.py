"""Questions with candidate answers: the item, its prompt, and files of items."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pyro_blora.errors import DataError, near_miss

FILES = (".csv", ".json", ".jsonl", ".parquet")
#: The names that a split may have in files and tables, and what they mean.
SPLITS = {name: name for name in ("train", "validation", "test")}
SPLITS |= dict.fromkeys(("dev", "val", "valid"), "validation")
ITEM = {"question", "choices"}
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
        choices, label = record["choices"], record["label"]
        choices = choices.tolist() if hasattr(choices, "tolist") else choices
        choices = tuple(choices) if isinstance(choices, list) else choices
        label = label.item() if hasattr(label, "item") else label
        return Item(record["id"], record["question"], choices, label)
    except (KeyError, TypeError) as error:
        raise DataError(f"an item must be {FORMAT}, got {record!r:.300} ({error!r})") from None


def read_json_lines(path: str | PathLike[str], *, only_items: bool = True) -> list[Any]:
    """Reads the items of one split; other rows stay dictionaries unless ``only_items``.

    Each line is a JSON object with the fields of an :class:`Item`, where ``choices`` is a list and
    ``id`` may be missing. Other keys and blank lines are ignored.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(_missing(path))
    items = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                record, known = json.loads(line), {"id": f"{path.stem}-{number}"}
                is_item = only_items or not isinstance(record, dict) or {*record} >= ITEM
                items.append(item_of(record, known) if is_item else record)
        except ValueError as error:  # invalid JSON, UTF-8 or item
            raise DataError(f"{path}, line {number}: {error}") from None
    if not items:
        raise DataError(f"{path} has no items: write one object per line, {FORMAT}")
    return items


def splits_in(folder: Path) -> dict[str, Path]:
    """The files of the splits in a task's folder, such as ``train.jsonl``, by name."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*")):
        if file.suffix not in FILES:
            continue
        if (other := found.setdefault(file.stem, file)) != file and file.stem in SPLITS:
            raise DataError(
                f"{folder} must have one file for each split, got {other.name} and {file.name}; "
                "remove one."
            )
    return found


def _missing(path: Path) -> str:
    """Says that a file is missing, and names the splits or tasks that exist instead."""
    folder, data_dir = path.parent, path.parent.parent
    if splits := splits_in(folder):
        return f"{path} is missing: no split {path.stem!r}; {near_miss(path.stem, splits)}"
    if tasks := [task.name for task in data_dir.glob("*") if splits_in(task)]:
        return f"no task {folder.name!r} in {data_dir}; {near_miss(folder.name, tasks)}"
    return f"{path} is missing, and {data_dir} has no TASK/SPLIT.jsonl: name another folder"


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
