"""A task, which is a data set ready for training: three splits and a template."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_blora.data.hub import hub_splits, read_hub
from pyro_blora.data.splits import chosen, first, keys_of
from pyro_blora.data.tables import FILES, SPLITS, are_items, items_of, read_table, splits_in
from pyro_blora.errors import DataError
from pyro_blora.labels import QUESTION, Item, Rows, Template, item_of, template_for

if TYPE_CHECKING:
    from torch import nn

    from pyro_blora.likelihoods import Likelihood


@dataclass(frozen=True)
class Task:
    """The items of a data set by split, and the template that makes prompts of them.

    Examples that are neither texts of a class nor questions with choices stay rows, without a
    template. ``train`` and ``validation`` are empty if the task has no training items.

    Example::

        task = load_task("facts", max_train=400, seed=1)
        loader = DataLoader(task.train, batch_size=8, collate_fn=task.collator(tokenizer))
    """

    name: str
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    test: tuple[Any, ...]
    template: Template | None

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        scoring = self.template.scoring if self.template else "their likelihood"
        return f"Task({self.name!r}: {sizes}, scored by {scoring})"

    def collator(
        self, tokenizer: Any, max_length: int = 512, net: "nn.Module | None" = None
    ) -> Any:
        """The collator of this task's items, whose rows have at most ``max_length`` tokens.

        It is for a language model, unless ``net`` is a classifier.
        """
        from pyro_blora import likelihoods
        from pyro_blora.likelihoods.sequence_classification import class_names
        from pyro_blora.network.targets import is_classifier

        if net is not None and is_classifier(net):
            names = class_names(net, self.test[0].choices)
            return likelihoods.ClassificationCollator(tokenizer, names, max_length)
        assert self.template is not None
        words = self.template.scoring == "labels"
        kind = likelihoods.LabelTokensCollator if words else likelihoods.MultipleChoiceCollator
        return kind(tokenizer, self.template, max_length)

    def likelihood(self, collate: Any) -> "Likelihood":
        """The likelihood for these items, given their collator ``collate``.

        That of a classifier names its classes in the order of ``collate``: for a head that somebody
        trained in another order, pass ``SequenceClassification(classes=[...])`` instead.
        """
        likelihood: Likelihood = collate.likelihood(len(self.train) or None)
        return likelihood

    def outside(self, data: Any) -> tuple[Any, ...]:
        """Questions of which no choice is right, as items of this task with a label of no meaning.

        ``data`` are texts, or rows as for :func:`load_task`, which need no label; rows without
        ``choices`` get those of this task.
        """
        if isinstance(data, list):
            data = [{"text": row} if isinstance(row, str) else row for row in data]
        table = read_table(data)
        if self.template is None:
            return tuple(table[k] for k in range(len(table)))
        choices, items = self.test[0].choices, []
        for k in range(len(table)):
            row = table[k]
            if not isinstance(row, Item):
                row = {"question": row.get("text"), "choices": choices, **row, "label": 0}
            items.append(item_of(row, {"id": f"outside-{k}"}))
        return tuple(items)


def load_task(
    data: Any,
    *,
    data_dir: str | PathLike[str] | None = None,
    max_train: int | None = None,
    max_validation: int = 200,
    max_test: int | None = None,
    seed: int = 0,
    as_rows: bool = False,
) -> Task:
    """Loads the splits of a task.

    The training items are shuffled by ``seed``, and the first ``max_train`` are taken. If there is
    no validation split, the next ``max_validation`` training items become it. If they are too few
    for both, or ``max_train`` is ``None``, the last fifth (at most ``max_validation``) is held out.
    Repeated texts and twins, such as the two sentences of a WinoGrande pair, are held out together,
    so there may be a few more. Validation and test splits keep their order; a limit takes a fixed
    choice of their items. Test items are used for nothing else.

    Args:
        data: ``"facts"``, which is always the built-in data set; a folder in ``data_dir``; a data
            set of the hub by a name such as ``"sst2"`` (an unknown name is answered with those
            that are known); or data of your own: a CSV, JSON-lines, JSON or Parquet file, a folder
            with ``train`` and ``test`` files, a data frame, a ``datasets.Dataset`` or
            ``DatasetDict``, or a list of dictionaries. Rows have the columns ``text`` and
            ``label``, whose classes are then the choices, or ``question``, ``choices`` and
            ``label``. Without a test split about a fifth of the texts are test
            items, the same for every seed, also after rows were added. A split ``dev``, ``val`` or
            ``valid`` is the validation split.
        data_dir: the folder that holds the folder ``data``. Default: the hub.
        max_train: maximum number of training items. Default: all.
        max_validation: maximum number of validation items.
        max_test: maximum number of test items. Default: all.
        seed: seed of the shuffle.
        as_rows: whether rows stay dictionaries even if they have a text and a class, or choices.

    Raises:
        DataError: there is no task of this name, it has no test split, or a row or a column cannot
            be used.

    Example::

        >>> task = load_task("facts", max_train=100, max_validation=50)
        >>> len(task.train), len(task.validation)
        (100, 50)
        >>> rows = [{"text": f"{k} degrees", "label": "cold"[: 4 - k % 2]} for k in range(50)]
        >>> load_task(rows)
        Task('data': 33 train, 8 validation, 9 test, scored by options)
    """
    limits = (max_train or 0, max_validation, max_test or 0)
    if min(limits) < 0:
        raise DataError(f"limits must be 0 or more, got {min(limits)}: leave one out for all items")
    name, splits, template, tables = _splits(data, data_dir, as_rows)
    train = splits.get("train", [])
    random.Random(seed).shuffle(train)
    if "validation" in splits or not train:
        validation = first(splits.get("validation", []), max_validation)
        train = train[:max_train]
    else:
        train, validation = _hold_out(train, max_train, max_validation)
    parts = {"train": train, "validation": validation, "test": first(splits["test"], max_test)}
    whole = tables.get("train")  # of which the other splits may be parts
    rows = {split: Rows(part, tables.get(split, whole)) for split, part in parts.items()}
    return Task(name, **rows, template=template)


def _splits(
    data: Any, data_dir: str | PathLike[str] | None, as_rows: bool
) -> tuple[str, dict[str, list[Any]], Template | None, dict[str, Any]]:
    """A task's name, the items of each split, always of ``"test"``, its template, and its tables.

    Only rows have tables, which name their numbers.
    """
    template: Template | None = QUESTION
    if not isinstance(data, str | PathLike):
        name, given = "data", dict(data) if isinstance(data, Mapping) else {"train": data}
    elif data_dir is None and Path(data).suffix in FILES:
        name, given = Path(data).stem, {"train": data}
    elif data_dir is None and data != "facts" and not splits_in(Path(data)):
        name = str(data)
        items = {split: read_hub(name, split) for split in hub_splits(name)}
        return name, items, template_for(name), {}
    else:
        folder = Path(__file__).parent if data == "facts" else Path(data_dir or "")
        name, folder = Path(data).name, folder / data
        given = {"test": folder / "test.jsonl"} | splits_in(folder)
        template = template if data_dir is None else template_for(name)  # a name of the user's own
    tables = {split: read_table(table) for split, table in _named(given).items()}
    if as_rows or not are_items(tables):
        template = None
        splits = {split: [table[k] for k in range(len(table))] for split, table in tables.items()}
    else:
        splits, tables = items_of(tables), {}
    if "test" not in splits:
        every, held = splits["train"], set(chosen(splits["train"], 0.2, "test"))
        splits["train"] = [item for k, item in enumerate(every) if k not in held]
        splits["test"] = [item for k, item in enumerate(every) if k in held]
    return name, splits, template, tables


def _named(given: Mapping[str, Any]) -> dict[str, Any]:
    """The splits in order, by the names that they have in a task."""
    splits = {SPLITS[name]: data for name, data in given.items() if name in SPLITS}
    if not {"train", "test"} & set(splits):
        raise DataError(f"A task must have a split train or test, got {list(given)}; rename one.")
    if len(splits) < len(set(SPLITS) & set(given)):
        raise DataError(f"A task must have one validation split, got {list(given)}; leave one out.")
    return {split: splits[split] for split in dict.fromkeys(SPLITS.values()) if split in splits}


def _hold_out(
    items: list[Any], max_train: int | None, max_validation: int
) -> tuple[list[Any], list[Any]]:
    """Splits shuffled training items into training and validation items that share no key."""
    keys = keys_of(items)
    if max_train is not None and max_train + max_validation <= len(items):
        cut, end = max_train, max_train + max_validation
    else:
        cut, end = len(items) - min(max_validation, len(items) // 5), len(items)
    sizes, held, size = Counter(keys[:end]), set[str](), 0
    for key in reversed(keys[:end]):
        if size < end - cut and key not in held:
            held.add(key)
            size += sizes[key]
    train = [item for item, key in zip(items, keys, strict=True) if key not in held]
    if not train:  # of a single text nothing can be held out
        return items[:max_train], []
    validation = [item for item, key in zip(items[:end], keys, strict=False) if key in held]
    return train[:max_train], validation
