import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from pyro_blora.data import facts, read_json_lines

SPLITS = ("train", "validation", "test")
FOLDER = Path(facts.__file__).parent
DIGEST = "4de3771ee8beead67435f4fd4e9816be9fe6f9358421fb8e98fc945693ab08f1"

ITEMS = {split: read_json_lines(FOLDER / f"{split}.jsonl") for split in SPLITS}
EVERY = [item for items in ITEMS.values() for item in items]


def template_of(item):
    return item.id.split("-", 3)[3]


def test_sizes():
    assert len(ITEMS["train"]) >= 800
    assert len(ITEMS["validation"]) >= 200
    assert len(ITEMS["test"]) >= 500


def test_the_set_is_always_the_same():
    text = json.dumps([[i.id, i.question, i.choices, i.label] for i in EVERY])
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == DIGEST


def test_four_different_choices():
    assert all(len(item.choices) == len(set(item.choices)) == 4 for item in EVERY)


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(split):
    counts = Counter(item.label for item in ITEMS[split])
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == {0, 1, 2, 3}


@pytest.mark.parametrize("split", SPLITS)
def test_ids(split):
    for index, item in enumerate(ITEMS[split]):
        assert item.id.startswith(f"facts-{split}-{index:04d}-")
        assert template_of(item).rsplit(".", 1)[1].isdigit()


def test_no_question_is_asked_twice():
    assert max(Counter(item.question for item in EVERY).values()) == 1


def test_questions_read_well():
    for item in EVERY:
        assert item.question[0] == item.question[0].upper()
        assert "{" not in item.question
        assert "  " not in item.question
        assert item.question.isascii()


def test_a_third_of_the_test_items_has_wordings_of_their_own():
    known = {template_of(item) for split in ("train", "validation") for item in ITEMS[split]}
    new = [item for item in ITEMS["test"] if template_of(item) not in known]
    assert len(new) >= len(ITEMS["test"]) / 3
    relations = {template_of(item).split(".")[0] for item in EVERY}
    assert {template_of(item).split(".")[0] for item in new} == relations


def test_no_answer_can_be_told_by_its_length():
    longest = sum(
        len(item.answer) == max(map(len, item.choices))
        and sum(len(choice) == len(item.answer) for choice in item.choices) == 1
        for item in EVERY
    )
    assert longest / len(EVERY) < 0.4
