import hashlib
import json
from collections import Counter
from pathlib import Path

from pyro_blora.data import facts, read_json_lines

SPLITS = ("train", "validation", "test")
FOLDER = Path(facts.__file__).parent
DIGEST = "4de3771ee8beead67435f4fd4e9816be9fe6f9358421fb8e98fc945693ab08f1"

ITEMS = {split: read_json_lines(FOLDER / f"{split}.jsonl") for split in SPLITS}
EVERY = [item for items in ITEMS.values() for item in items]


def test_the_set_is_always_the_same():
    text = json.dumps([[i.id, i.question, i.choices, i.label] for i in EVERY])
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == DIGEST


def test_each_question_is_asked_once_and_has_four_choices_with_balanced_labels():
    assert max(Counter(item.question for item in EVERY).values()) == 1
    assert all(len(item.choices) == len(set(item.choices)) == 4 for item in EVERY)
    for items in ITEMS.values():
        counts = Counter(item.label for item in items)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_third_of_the_test_items_has_wordings_of_their_own():
    def wording(item):
        return item.id.split("-", 3)[3]

    known = {wording(item) for split in ("train", "validation") for item in ITEMS[split]}
    new = [item for item in ITEMS["test"] if wording(item) not in known]
    assert len(new) >= len(ITEMS["test"]) / 3
    relations = {wording(item).split(".")[0] for item in EVERY}
    assert {wording(item).split(".")[0] for item in new} == relations
