"""Reads public data sets from the Hugging Face hub, by the name of a task."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyro_blora.errors import DataError, first_line, near_miss
from pyro_blora.labels import Item

_Record = Mapping[str, Any]
_Parts = tuple[str, tuple[str, ...], int]  # the question, choices and label of an Item


class _Source(NamedTuple):
    path: str
    config: str | None
    convert: Callable[[_Record], _Parts]
    splits: Mapping[str, str]  # with their names on the hub


def _lettered(record: _Record) -> _Parts:
    """The answer key is one of the labels of the choices (A, B or 1, 2)."""
    texts, labels = record["choices"]["text"], list(record["choices"]["label"])
    question = record.get("question") or record["question_stem"]
    return question, tuple(texts), labels.index(record["answerKey"])


def _winogrande(record: _Record) -> _Parts:
    """The sentence has a blank, ``_``, and the answer is ``"1"`` or ``"2"``."""
    return record["sentence"], (record["option1"], record["option2"]), int(record["answer"]) - 1


def _boolq(record: _Record) -> _Parts:
    """The question without its passage, and with one question mark."""
    return f"{record['question'].strip().rstrip('?')}?", ("false", "true"), int(record["answer"])


def _classes(column: str, *names: str) -> Callable[[_Record], _Parts]:
    return lambda record: (record[column].strip(), names, int(record["label"]))


_ALL = {"train": "train", "validation": "validation", "test": "test"}
_UNLABELED_TEST = {"train": "train", "test": "validation"}
_NEWS = _classes("text", "World", "Sports", "Business", "Sci/Tech")
_FILMS = _classes("sentence", "negative", "positive")
_SOURCES = {
    "arc_easy": _Source("allenai/ai2_arc", "ARC-Easy", _lettered, _ALL),
    "arc_challenge": _Source("allenai/ai2_arc", "ARC-Challenge", _lettered, _ALL),
    "openbookqa": _Source("allenai/openbookqa", "main", _lettered, _ALL),
    "ag_news": _Source("fancyzhx/ag_news", None, _NEWS, {"train": "train", "test": "test"}),
    "sst2": _Source("stanfordnlp/sst2", None, _FILMS, _UNLABELED_TEST),
    "boolq": _Source("google/boolq", None, _boolq, _UNLABELED_TEST),
}
for _name in ("winogrande_s", "winogrande_m"):
    _SOURCES[_name] = _Source("allenai/winogrande", _name, _winogrande, _UNLABELED_TEST)


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

    Needs the ``datasets`` package, and internet at the first call. The hub's test splits of SST-2,
    BoolQ and WinoGrande have no labels, so that ``"test"`` is the validation split and there is no
    ``"validation"``.
    """
    name, source = hub_splits(task)[split], _SOURCES[task]
    try:
        from datasets import load_dataset

        records = load_dataset(source.path, source.config, split=name)
    except Exception as error:  # datasets and its HTTP library raise many kinds
        raise DataError(
            f"{source.path} cannot be read from the hub ({first_line(error)[:160]}): pip install "
            "datasets, or pass data_dir (--data-dir) with JSON lines"
        ) from error
    return [Item(f"{task}-{split}-{k}", *source.convert(r)) for k, r in enumerate(records)]
