"""A task, which is a data set ready for training: three splits and a template."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_blora.data.hub import hub_splits, read_hub
from pyro_blora.data.items import FILES, Item, Template, splits_in, template_for
from pyro_blora.data.tables import items_of
from pyro_blora.errors import DataError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from pyro_blora.likelihoods import Likelihood


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """The items of a data set by split, and the template that makes prompts of them.

    ``train`` and ``validation`` are empty if the task has no training items.

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
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int = 512,
        net: "nn.Module | None" = None,
    ) -> Any:
        """The collator of this task's items, whose rows have at most ``max_length`` tokens.

        It is for a language model, unless ``net`` is a classifier.
        """
        from pyro_blora.data import collators
        from pyro_blora.network.targets import is_classifier

        if net is not None and is_classifier(net):
            names = collators.class_names(net, self.test[0].choices)
            return collators.ClassificationCollator(tokenizer, names, max_length)
        words = self.template.scoring == "labels"
        kind = collators.LabelTokensCollator if words else collators.MultipleChoiceCollator
        return kind(tokenizer, self.template, max_length)

    def likelihood(self, collate: Any) -> "Likelihood":
        """The likelihood for these items, given their collator ``collate``."""
        from pyro_blora import likelihoods
        from pyro_blora.data import collators

        count = len(self.train) or None
        if isinstance(collate, collators.ClassificationCollator):
            return likelihoods.SequenceClassification(
                num_data=count, classes=collate.classes or None
            )
        if isinstance(collate, collators.LabelTokensCollator):
            return likelihoods.LabelTokens(token_ids=collate.token_ids, num_data=count)
        return likelihoods.MultipleChoice(num_data=count)


def load_task(
    data: Any,
    *,
    data_dir: str | PathLike[str] | None = None,
    max_train: int | None = None,
    max_validation: int = 200,
    max_test: int | None = None,
    seed: int = 0,
) -> Task:
    """Loads the splits of a task.

    The training items are shuffled by ``seed``, and the first ``max_train`` are taken. If there is
    no validation split, the next ``max_validation`` training items become it. If they are too few
    for both, or ``max_train`` is ``None``, the last fifth (at most ``max_validation``) is held out.
    Twins, such as the two sentences of a WinoGrande pair, are held out together, so there may be a
    few more. Validation and test splits keep their order, and test items are used for nothing else.

    Args:
        data: ``"facts"``, which is always the built-in data set; a folder in ``data_dir``; one of
            :func:`~pyro_blora.data.hub_tasks`; or data of your own: a CSV, JSON-lines, JSON or
            Parquet file, a folder with ``train`` and ``test`` files, a data frame, a
            ``datasets.Dataset`` or ``DatasetDict``, or a list of dictionaries. Rows have the
            columns ``text`` and ``label``, whose classes are then the choices, or ``question``,
            ``choices`` and ``label``. Without a test split a fifth of the texts are test items, the
            same for every seed.
        data_dir: the folder that holds the folder ``data``. Default: the hub.
        max_train: maximum number of training items. Default: all.
        max_validation: maximum number of validation items.
        max_test: maximum number of test items. Default: all.
        seed: seed of the shuffle.

    Raises:
        DataError: there is no task of this name, it has no test split, or a row or a column cannot
            be used.

    Example::

        >>> task = load_task("facts", max_train=100, max_validation=50)
        >>> len(task.train), len(task.validation)
        (100, 50)
        >>> rows = [{"text": f"{k} degrees", "label": "cold"[: 4 - k % 2]} for k in range(50)]
        >>> load_task(rows)
        Task('data': 32 train, 8 validation, 10 test, scored by options)
    """
    limits = (max_train or 0, max_validation, max_test or 0)
    if min(limits) < 0:
        raise DataError(f"limits must be 0 or more, got {min(limits)}: leave one out for all items")
    name, splits = _splits(data, data_dir)
    template = template_for(name)
    train = splits.get("train", [])
    random.Random(seed).shuffle(train)
    if "validation" in splits or not train:
        validation = splits.get("validation", [])[:max_validation]
        train = train[:max_train]
    else:
        train, validation = _hold_out(train, max_train, max_validation, template.twins)
    test = splits["test"][:max_test]
    return Task(name, tuple(train), tuple(validation), tuple(test), template)


def _splits(data: Any, data_dir: str | PathLike[str] | None) -> tuple[str, dict[str, list[Item]]]:
    """The name of a task, and the items of each split that exists, and always of ``"test"``."""
    if not isinstance(data, str | PathLike):
        name, given = "data", dict(data) if isinstance(data, Mapping) else {"train": data}
    elif data_dir is None and Path(data).suffix in FILES:
        name, given = Path(data).stem, {"train": data}
    elif data_dir is None and data != "facts" and not splits_in(Path(data)):
        name = str(data)
        return name, {split: read_hub(name, split) for split in hub_splits(name)}
    else:
        folder = Path(__file__).parent if data == "facts" else Path(data_dir or "")
        name, folder = Path(data).name, folder / data
        given = {"test": folder / "test.jsonl"} | splits_in(folder)
    if not {"train", "test"} & set(given):
        raise DataError(f"A task must have a split train or test, got {list(given)}; rename one.")
    splits = items_of({split: given[split] for split in SPLITS if split in given})
    if "test" not in splits:
        every = splits["train"]
        texts = list(dict.fromkeys(item.question for item in every))  # a repeated text is only
        chosen = set(random.Random(0).sample(texts, len(texts) // 5))  # on one side of the split
        splits["train"] = [item for item in every if item.question not in chosen]
        splits["test"] = [item for item in every if item.question in chosen]
    return name, splits


def _hold_out(
    items: list[Item], max_train: int | None, max_validation: int, twins: bool
) -> tuple[list[Item], list[Item]]:
    """Splits shuffled training items into training and validation items."""
    if twins:  # move each item behind the first one with the same choices
        places = {frozenset(item.choices): k for k, item in reversed(list(enumerate(items)))}
        items = sorted(items, key=lambda item: places[frozenset(item.choices)])
    if max_train is not None and max_train + max_validation <= len(items):
        cut, end = max_train, max_train + max_validation
    else:
        cut, end = len(items) - min(max_validation, len(items) // 5), len(items)
    while twins and 0 < cut < end and set(items[cut - 1].choices) == set(items[cut].choices):
        cut -= 1
    return items[:cut][:max_train], items[cut:end]
