"""Reads public data sets from the Hugging Face hub, by the name of a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_blora.errors import DataError, first_line, near_miss
from pyro_blora.items import Item

_Record = Mapping[str, Any]
_Parts = tuple[str, tuple[str, ...], int]  # the question, choices and label of an Item

_PARQUET = "refs/convert/parquet"  # the hub's own copy of a data set that has a loading script
_ALL = {"train": "train", "validation": "validation", "test": "test"}
_TEST_IS_VALIDATION = {"train": "train", "test": "validation"}  # the test split has no labels


@dataclass(frozen=True)
class _Source:
    """Where a task is on the hub, how a record is read, and the hub's names of the splits."""

    path: str
    convert: Callable[[_Record], _Parts]
    splits: Mapping[str, str]
    configs: tuple[str | None, ...] = (None,)
    revision: str | None = None


def _lettered(record: _Record) -> _Parts:
    """The answer key is one of the labels of the choices (A, B or 1, 2)."""
    texts, labels = record["choices"]["text"], list(record["choices"]["label"])
    question = record.get("question") or record["question_stem"]
    return question, tuple(texts), labels.index(record["answerKey"])


def _winogrande(record: _Record) -> _Parts:
    """The sentence has a blank, ``_``, and the answer is ``"1"`` or ``"2"``."""
    return record["sentence"], (record["option1"], record["option2"]), int(record["answer"]) - 1


_SOURCES = {
    "arc_easy": _Source("allenai/ai2_arc", _lettered, _ALL, ("ARC-Easy",)),
    "arc_challenge": _Source("allenai/ai2_arc", _lettered, _ALL, ("ARC-Challenge",)),
    "openbookqa": _Source("allenai/openbookqa", _lettered, _ALL, ("main",)),
    "boolq": _Source(  # without the passage, and with one question mark
        "google/boolq",
        lambda r: (f"{r['question'].strip().rstrip('?')}?", ("false", "true"), int(r["answer"])),
        _TEST_IS_VALIDATION,
    ),
    **{
        name: _Source("allenai/winogrande", _winogrande, _TEST_IS_VALIDATION, (name,))
        for name in ("winogrande_xs", "winogrande_s", "winogrande_m")
    },
    "piqa": _Source(
        "ybisk/piqa",
        lambda r: (r["goal"], (r["sol1"], r["sol2"]), int(r["label"])),
        _TEST_IS_VALIDATION,
        revision=_PARQUET,
    ),
    "social_iqa": _Source(  # the label is "1" to "3"
        "allenai/social_i_qa",
        lambda r: (
            f"{r['context'].strip()} {r['question'].strip()}",
            (r["answerA"], r["answerB"], r["answerC"]),
            int(r["label"]) - 1,
        ),
        _TEST_IS_VALIDATION,
        revision=_PARQUET,
    ),
    **{
        f"mmlu_{subject}": _Source(
            "cais/mmlu",
            lambda r: (r["question"], tuple(r["choices"]), int(r["answer"])),
            {"test": "test"},
            (f"college_{subject}", f"high_school_{subject}"),
        )
        for subject in ("chemistry", "physics")
    },
    "sst2": _Source(
        "stanfordnlp/sst2",
        lambda r: (r["sentence"].strip(), ("negative", "positive"), int(r["label"])),
        _TEST_IS_VALIDATION,
    ),
    "ag_news": _Source(
        "fancyzhx/ag_news",
        lambda r: (r["text"].strip(), ("World", "Sports", "Business", "Sci/Tech"), int(r["label"])),
        {"train": "train", "test": "test"},
    ),
}


def hub_tasks() -> tuple[str, ...]:
    """The names of the tasks that :func:`read_hub` can read, sorted."""
    return tuple(sorted(_SOURCES))


def hub_splits(task: str) -> Mapping[str, str]:
    """The splits of a task, each with its name on the hub."""
    if task not in _SOURCES:
        raise DataError(
            f"no task {task!r} on the hub; {near_miss(task, [*_SOURCES, 'facts'])} ('facts' is "
            "built in; for JSON lines of your own, pass data_dir or --data-dir)"
        )
    return _SOURCES[task].splits


def read_hub(task: str, split: str) -> list[Item]:
    """Reads one split of a public data set from the Hugging Face hub.

    Needs the ``datasets`` package, and internet at the first call. If the hub's test split has no
    labels (BoolQ, WinoGrande, PIQA, Social IQa, SST-2), ``"test"`` is the validation split and
    there is no ``"validation"``.
    """
    name = hub_splits(task)[split]
    source, fix = _SOURCES[task], "pass data_dir (--data-dir) with JSON lines"
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{source.path} is on the hub: pip install datasets, or {fix}") from None
    records: list[_Record] = []
    try:
        for config in source.configs:
            records += load_dataset(source.path, config, split=name, revision=source.revision)
    except Exception as error:  # datasets and its HTTP library raise many kinds
        reason = first_line(error)[:160]
        raise DataError(f"{source.path} cannot be read from the hub ({reason}): {fix}") from error
    return [Item(f"{task}-{split}-{k}", *source.convert(r)) for k, r in enumerate(records)]
