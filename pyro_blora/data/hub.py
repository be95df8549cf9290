"""Items from the Hugging Face hub, by the name of a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_blora.data.items import Item
from pyro_blora.errors import DataError, first_line, near_miss

_Record = Mapping[str, Any]
_Parts = tuple[str, tuple[str, ...], int]  # question, choices and label, as Item has them

_PARQUET = "refs/convert/parquet"  # the hub's own copy of a set that has a loading script
_ALL = {"train": "train", "validation": "validation", "test": "test"}
_TEST_IS_VALIDATION = {"train": "train", "test": "validation"}  # the hub's test has no labels


@dataclass(frozen=True)
class _Source:
    """Where a task is on the hub, how to read a record, and the hub's names for our splits."""

    path: str
    convert: Callable[[_Record], _Parts]
    splits: Mapping[str, str]
    configs: tuple[str | None, ...] = (None,)
    revision: str | None = None


def _lettered(question: str) -> Callable[[_Record], _Parts]:
    """The answer key is a letter or a digit among the labels of the choices."""

    def convert(record: _Record) -> _Parts:
        texts, labels = record["choices"]["text"], list(record["choices"]["label"])
        return record[question], tuple(texts), labels.index(record["answerKey"])

    return convert


def _winogrande(size: str) -> _Source:
    """``_`` in the sentence is the blank; the answer is ``"1"`` or ``"2"``."""
    return _Source(
        "allenai/winogrande",
        lambda r: (r["sentence"], (r["option1"], r["option2"]), int(r["answer"]) - 1),
        _TEST_IS_VALIDATION,
        configs=(f"winogrande_{size}",),
    )


def _mmlu(subject: str) -> _Source:
    return _Source(
        "cais/mmlu",
        lambda r: (r["question"], tuple(r["choices"]), int(r["answer"])),
        {"test": "test"},
        configs=(f"college_{subject}", f"high_school_{subject}"),
    )


_SOURCES = {
    "arc_easy": _Source("allenai/ai2_arc", _lettered("question"), _ALL, ("ARC-Easy",)),
    "arc_challenge": _Source("allenai/ai2_arc", _lettered("question"), _ALL, ("ARC-Challenge",)),
    "openbookqa": _Source("allenai/openbookqa", _lettered("question_stem"), _ALL, ("main",)),
    "boolq": _Source(  # the question alone, with one question mark; the passage is left out
        "google/boolq",
        lambda r: (f"{r['question'].strip().rstrip('?')}?", ("false", "true"), int(r["answer"])),
        _TEST_IS_VALIDATION,
    ),
    "winogrande_xs": _winogrande("xs"),
    "winogrande_s": _winogrande("s"),
    "winogrande_m": _winogrande("m"),
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
    "mmlu_chemistry": _mmlu("chemistry"),
    "mmlu_physics": _mmlu("physics"),
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
    """The names that :func:`read_hub` knows, sorted."""
    return tuple(sorted(_SOURCES))


def hub_splits(task: str) -> Mapping[str, str]:
    """The splits that a task has on the hub, with the hub's names."""
    if task not in _SOURCES:
        raise DataError(
            f"no task {task!r} on the hub; {near_miss(task, [*_SOURCES, 'facts'])} ('facts' is "
            "built in, and data_dir (--data-dir) names a folder of your own JSON lines)"
        )
    return _SOURCES[task].splits


def read_hub(task: str, split: str) -> list[Item]:
    """Read one split of a public data set from the Hugging Face hub.

    Needs the ``datasets`` package and, at the first call, a network. Where the hub's test split
    has no labels (BoolQ, WinoGrande, PIQA, Social IQa, SST-2), ``"test"`` is the validation split
    and there is no ``"validation"``.
    """
    theirs = hub_splits(task)[split]
    source, fix = _SOURCES[task], "pass data_dir (--data-dir) with JSON lines"
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{source.path} is on the hub: pip install datasets, or {fix}") from None
    records: list[_Record] = []
    try:
        for config in source.configs:
            records += load_dataset(source.path, config, split=theirs, revision=source.revision)
    except Exception as error:  # datasets and its transport raise many kinds
        reason = first_line(error)[:160]
        raise DataError(f"{source.path} is out of reach on the hub ({reason}): {fix}") from error
    return [Item(f"{task}-{split}-{k}", *source.convert(r)) for k, r in enumerate(records)]
