"""One function for each record schema on the hub: a record to question, choices and label.

Each takes one record (a mapping) and returns ``(question, choices, label)`` in the form of
:class:`~pyro_blora.data.items.Item`. A record of another form raises ``KeyError``, ``TypeError``
or ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "Parts",
    "Record",
    "ag_news",
    "arc",
    "boolq",
    "mmlu",
    "openbookqa",
    "piqa",
    "social_iqa",
    "sst2",
    "winogrande",
]

Parts = tuple[str, tuple[str, ...], int]
Record = Mapping[str, Any]


def arc(record: Record) -> Parts:
    """ARC: the answer key is a letter or a digit among the labels of the choices."""
    return _keyed(record, record["question"])


def openbookqa(record: Record) -> Parts:
    """OpenBookQA: as ARC, with the question under ``question_stem``."""
    return _keyed(record, record["question_stem"])


def boolq(record: Record) -> Parts:
    """BoolQ: the question alone, with a question mark; the passage is left out."""
    question = record["question"].strip().rstrip("?") + "?"
    return question, ("false", "true"), int(record["answer"])


def winogrande(record: Record) -> Parts:
    """WinoGrande: ``_`` in the sentence is the blank; the answer is ``"1"`` or ``"2"``."""
    return record["sentence"], (record["option1"], record["option2"]), int(record["answer"]) - 1


def piqa(record: Record) -> Parts:
    """PIQA: a goal with two solutions."""
    return record["goal"], (record["sol1"], record["sol2"]), int(record["label"])


def social_iqa(record: Record) -> Parts:
    """Social IQa: context and question in one text; the label is ``"1"`` to ``"3"``."""
    question = f"{record['context'].strip()} {record['question'].strip()}"
    choices = (record["answerA"], record["answerB"], record["answerC"])
    return question, choices, int(record["label"]) - 1


def mmlu(record: Record) -> Parts:
    """MMLU: four choices and the index of the right one."""
    return record["question"], tuple(record["choices"]), int(record["answer"])


def sst2(record: Record) -> Parts:
    """SST-2: a sentence, 0 for negative and 1 for positive."""
    return record["sentence"].strip(), ("negative", "positive"), int(record["label"])


def ag_news(record: Record) -> Parts:
    """AG News: a text and one of four topics."""
    choices = ("World", "Sports", "Business", "Sci/Tech")
    return record["text"].strip(), choices, int(record["label"])


def _keyed(record: Record, question: str) -> Parts:
    """Take choices of the form ``{"text": [...], "label": ["A", ...]}`` and an ``answerKey``."""
    choices = record["choices"]
    return question, tuple(choices["text"]), list(choices["label"]).index(record["answerKey"])
