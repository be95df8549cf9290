"""Questions with candidate answers: one item, the prompt that is made of it, and files of many."""

import json
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pyro_blora.errors import DataError, near_miss

FORMAT = '{"id": "a-1", "question": "...", "choices": ["...", "..."], "label": 0}'


@dataclass(frozen=True)
class Item:
    """A question, its candidate answers and the index of the right one.

    The question is plain text without a prompt, of 2 choices or more; ``id`` names the item in its
    set.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        if not isinstance(self.choices, tuple) or len(self.choices) < 2:
            raise DataError(
                f"choices must be two answers or more, got {self.choices!r} in {self!r:.300}"
            )
        for text in (self.id, self.question, *self.choices):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    f"id, question and choices must be texts, got {text!r} in {self!r:.300}"
                )
        last = len(self.choices) - 1
        if type(self.label) is not int or not 0 <= self.label <= last:
            raise DataError(
                f"label must be an integer from 0 to {last}, got {self.label!r} in {self!r:.300}"
            )


def item_length(item: Item) -> int:
    """Characters of an item, by which batches of like lengths are made."""
    return len(item.question) + sum(map(len, item.choices))


def item_of(record: Any, usual: dict[str, Any]) -> Item:
    """A record, a dictionary, as an item; the keys that it lacks are those of ``usual``."""
    if isinstance(record, Item):
        return record
    try:
        record = {**usual, **record}
        choices = record["choices"]
        choices = tuple(choices) if isinstance(choices, list) else choices
        return Item(record["id"], record["question"], choices, record["label"])
    except (KeyError, TypeError) as error:
        raise DataError(f"an item must be {FORMAT}, got {record!r:.300} ({error!r})") from None


def read_json_lines(path: str | PathLike[str]) -> list[Item]:
    """Read the items of one split.

    A line of it is a JSON object with the fields of an :class:`Item`, and ``choices`` a list.
    Further keys are ignored, as are blank lines.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(_missing(path))
    items = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                items.append(item_of(json.loads(line), {}))
        except ValueError as error:  # no JSON, not UTF-8, or no item
            raise DataError(f"{path}, line {number}: {error}") from None
    if not items:
        raise DataError(f"{path} has no items: write one object a line, {FORMAT}")
    return items


def splits_in(folder: Path) -> list[str]:
    """The names of the splits (``SPLIT.jsonl``) in a task's folder."""
    return [file.stem for file in folder.glob("*.jsonl") if file.is_file()]


def _missing(path: Path) -> str:
    """What is there instead of a file."""
    folder, data_dir = path.parent, path.parent.parent
    if splits := splits_in(folder):
        return f"{path} is missing: no split {path.stem!r}; {near_miss(path.stem, splits)}"
    if tasks := [task.name for task in data_dir.glob("*") if splits_in(task)]:
        return f"no task {folder.name!r} in {data_dir}; {near_miss(folder.name, tasks)}"
    return f"{path} is missing, and {data_dir} has no TASK/SPLIT.jsonl: name another folder"


Scoring = Literal["options", "labels"]


@dataclass(frozen=True)
class Template:
    r"""A prompt with a way of scoring.

    With ``scoring="options"`` each choice is scored by its log-likelihood as the text
    ``" " + choice`` after the prompt. With ``scoring="labels"`` the answer is a softmax over the
    tokens of ``label_words`` at the prompt's last position, in the order of the item's choices.

    In ``prompt`` ``{q}`` stands for the question; each of ``label_words`` has its leading space.
    With ``twins`` items of the same choices are nearly one question, whose answers tell each other,
    as in WinoGrande: no split comes between them.
    """

    prompt: str
    scoring: Scoring
    label_words: tuple[str, ...] = ()
    twins: bool = False

    def __post_init__(self) -> None:
        if "{q}" not in self.prompt:
            raise DataError(f"the prompt {self.prompt!r} has no {{q}}: say where the question goes")

    def format(self, item: Item | dict[str, Any]) -> str:
        """The prompt of one item, or of a dictionary with its keys, without an answer."""
        question = item.question if isinstance(item, Item) else item["question"]
        return self.prompt.replace("{q}", question)


QUESTION = Template("Question: {q}\nAnswer:", "options")
_PAIRED = replace(QUESTION, twins=True)

_TEMPLATES = {
    "sst2": Template(
        "Review: {q}\nSentiment (negative or positive):", "labels", (" negative", " positive")
    ),
    "ag_news": Template(
        "Article: {q}\nTopic (world, sports, business or technology):",
        "labels",
        (" world", " sports", " business", " technology"),
    ),
    # the question of the data ends with its own question mark; choices are ("false", "true")
    "boolq": Template("Question: {q}\nAnswer (yes or no):", "labels", (" no", " yes")),
    "winogrande_xs": _PAIRED,
    "winogrande_s": _PAIRED,
    "winogrande_m": _PAIRED,
}


def template_for(task: str) -> Template:
    """The template of a task: label words for ``sst2``, ``ag_news`` and ``boolq``, else options."""
    return _TEMPLATES.get(task, QUESTION)
