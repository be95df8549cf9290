"""A task, which is a data set ready for training: three splits and a template."""

import random
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_blora.data.hub import hub_splits, read_hub
from pyro_blora.data.items import Item, Template, read_json_lines, splits_in, template_for
from pyro_blora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyro_blora.data.collators import LabelTokensCollator, MultipleChoiceCollator
    from pyro_blora.likelihoods import Likelihood


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
        self, tokenizer: "PreTrainedTokenizerBase", max_length: int = 512
    ) -> "MultipleChoiceCollator | LabelTokensCollator":
        """The collator of this task's items, whose rows have at most ``max_length`` tokens."""
        from pyro_blora.data.collators import LabelTokensCollator, MultipleChoiceCollator

        labels = self.template.scoring == "labels"
        kind = LabelTokensCollator if labels else MultipleChoiceCollator
        return kind(tokenizer, self.template, max_length)

    def likelihood(self, collate: Any) -> "Likelihood":
        """``LabelTokens`` or ``MultipleChoice``, by the template; ``collate`` is its collator."""
        from pyro_blora.likelihoods import LabelTokens, MultipleChoice

        count = len(self.train) or None
        if self.template.scoring == "labels":
            return LabelTokens(token_ids=collate.token_ids, num_data=count)
        return MultipleChoice(num_data=count)


def load_task(
    name: str,
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
        name: ``"facts"``, which is always the built-in data set, a folder in ``data_dir``, or one
            of :func:`~pyro_blora.data.hub_tasks`.
        data_dir: a folder with ``name/{train,validation,test}.jsonl``. Default: the hub.
        max_train: maximum number of training items. Default: all.
        max_validation: maximum number of validation items.
        max_test: maximum number of test items. Default: all.
        seed: seed of the shuffle.

    Raises:
        DataError: there is no task of this name, it has no test split, or a file is malformed.

    Example::

        >>> task = load_task("facts", max_train=100, max_validation=50)
        >>> len(task.train), len(task.validation)
        (100, 50)
    """
    limits = (max_train or 0, max_validation, max_test or 0)
    if min(limits) < 0:
        raise DataError(f"limits must be 0 or more, got {min(limits)}: leave one out for all items")
    splits, template = _splits(name, data_dir), template_for(name)
    train = splits.get("train", [])
    random.Random(seed).shuffle(train)
    if "validation" in splits or not train:
        validation = splits.get("validation", [])[:max_validation]
        train = train[:max_train]
    else:
        train, validation = _hold_out(train, max_train, max_validation, template.twins)
    test = splits["test"][:max_test]
    return Task(name, tuple(train), tuple(validation), tuple(test), template)


def _splits(name: str, data_dir: str | PathLike[str] | None) -> dict[str, list[Item]]:
    """The items of each split that exists, and always of ``"test"``."""
    if name == "facts":
        data_dir = Path(__file__).parent
    if data_dir is None:
        return {split: read_hub(name, split) for split in hub_splits(name)}
    folder = Path(data_dir) / name
    names = [s for s in ("train", "validation", "test") if s in ("test", *splits_in(folder))]
    return {split: read_json_lines(folder / f"{split}.jsonl") for split in names}


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
