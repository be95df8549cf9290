"""A data set ready for training: three splits and a template."""

from __future__ import annotations

import random
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_blora.data.collators import LabelTokensCollator, MultipleChoiceCollator
from pyro_blora.data.facts import facts_items
from pyro_blora.data.hub import hub_splits, hub_tasks, read_hub
from pyro_blora.data.items import DataError, Item
from pyro_blora.data.json_lines import read_json_lines, splits_in
from pyro_blora.data.templates import Template, template_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Task", "load_task", "task_names"]


@dataclass(frozen=True)
class Task:
    """The items of a data set, split, and how they become prompts.

    Attributes:
        name: the name of the task.
        train: the training items; empty where a task has none.
        validation: the items on which settings are chosen; empty where ``train`` is.
        test: the items that are only ever evaluated on.
        template: the prompt and the way of scoring.

    Example::

        task = load_task("facts", max_train=400, seed=1)
        loader = DataLoader(task.train, batch_size=8, collate_fn=task.collator(tokenizer))
    """

    name: str
    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    template: Template

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        return f"Task({self.name!r}: {sizes}, scored by {self.template.scoring})"

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int = 512
    ) -> MultipleChoiceCollator | LabelTokensCollator:
        """Return what turns a list of this task's items into a batch.

        Raises:
            DataError: a label word of the template is not one token.
        """
        if self.template.scoring == "labels":
            return LabelTokensCollator(tokenizer, self.template, max_length)
        return MultipleChoiceCollator(tokenizer, self.template, max_length)


def load_task(
    name: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    max_train: int | None = None,
    max_validation: int = 200,
    max_test: int | None = None,
    seed: int = 0,
) -> Task:
    """Load the splits of a task.

    The items come from ``data_dir/name/{train,validation,test}.jsonl``, or from the Hugging Face
    hub where no ``data_dir`` is given. The name ``"facts"`` is always the embedded set.

    The train items are shuffled by ``seed``, and the first ``max_train`` are taken. Where there
    is no validation split, the next ``max_validation`` train items become it. If the train items
    are too few for both, or ``max_train`` is ``None``, the last fifth (at most
    ``max_validation``) is held out for validation and the rest is for training. Validation and
    test splits keep their order, and test items serve no other purpose.

    Args:
        name: the name of a task, see :func:`~pyro_blora.data.task_names`.
        data_dir: a folder of JSON lines. Default: the hub.
        max_train: the most training items. Default: all.
        max_validation: the most validation items.
        max_test: the most test items. Default: all.
        seed: of the shuffle.

    Raises:
        DataError: the task has no such name or no test split, a file is malformed, or a limit is
            negative.

    Example::

        >>> task = load_task("facts", max_train=100, max_validation=50)
        >>> len(task.train), len(task.validation)
        (100, 50)
    """
    limits = {"max_train": max_train, "max_validation": max_validation, "max_test": max_test}
    for limit, value in limits.items():
        if value is not None and value < 0:
            raise DataError(f"{limit} is {value}, expected at least 0: leave it out for all items")
    splits = {
        split: _read(name, split, data_dir)
        for split in _splits(name, data_dir)
        if split in ("train", "validation", "test")
    }
    train = splits.get("train", [])
    random.Random(seed).shuffle(train)
    if "validation" in splits or not train:
        validation = splits.get("validation", [])[:max_validation]
        train = train[:max_train]
    else:
        train, validation = _hold_out(train, max_train, max_validation)
    test = splits["test"][:max_test]
    return Task(name, tuple(train), tuple(validation), tuple(test), template_for(name))


def task_names(data_dir: str | PathLike[str] | None = None) -> tuple[str, ...]:
    """Return the names that :func:`load_task` knows, sorted.

    Args:
        data_dir: a folder of JSON lines. Default: the tasks on the hub.

    Example::

        >>> "facts" in task_names()
        True
    """
    if data_dir is None:
        return tuple(sorted({"facts", *hub_tasks()}))
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: give the folder that holds TASK/SPLIT.jsonl")
    return tuple(sorted({"facts", *(task.name for task in folder.iterdir() if splits_in(task))}))


def _hold_out(
    items: list[Item], max_train: int | None, max_validation: int
) -> tuple[list[Item], list[Item]]:
    """Return train and validation items out of shuffled train items."""
    if max_train is not None and max_train + max_validation <= len(items):
        return items[:max_train], items[max_train : max_train + max_validation]
    cut = len(items) - min(max_validation, len(items) // 5)
    return items[:cut][:max_train], items[cut:]


def _splits(name: str, data_dir: str | PathLike[str] | None) -> tuple[str, ...]:
    """Return the splits of a task, which include ``"test"``."""
    if name == "facts":
        return ("train", "validation", "test")
    if data_dir is None:
        if name not in hub_tasks():
            near = get_close_matches(name, task_names(), n=3) or task_names()
            raise DataError(
                f"no task {name!r}: choose one of {', '.join(near)}, or pass a data_dir that has it"
            )
        return hub_splits(name)
    folder = Path(data_dir) / name
    splits = splits_in(folder)
    if "test" not in splits:
        read_json_lines(folder / "test.jsonl")  # raises, naming what is there
    return tuple(splits)


def _read(name: str, split: str, data_dir: str | PathLike[str] | None) -> list[Item]:
    """Return the items of one split."""
    if name == "facts":
        return facts_items(split)
    if data_dir is None:
        return read_hub(name, split)
    return read_json_lines(Path(data_dir) / name / f"{split}.jsonl")
