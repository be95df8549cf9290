import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest

from pyro_blora.data import DataError, Item, hub_tasks, load_task, read_hub

CHOICES = {"text": ["a feather", "a stone", "a leaf"], "label": ["1", "2", "3"]}
CUP = "The cup fits in the box as _ is big."
KIM = {"context": "Kim lost a key.", "question": "How does Kim feel?", "label": "1"}
BOTH = ["college_chemistry", "high_school_chemistry"]
RECORDS = {
    "arc_easy": {"question": "Heaviest?", "choices": CHOICES, "answerKey": "2"},
    "openbookqa": {"question_stem": "Ice is", "choices": CHOICES, "answerKey": "3"},
    "boolq": {"question": "is ice cold??", "answer": True, "passage": "Ice ..."},
    "winogrande_s": {"sentence": CUP, "option1": "the cup", "option2": "the box", "answer": "2"},
    "piqa": {"goal": "Cool soup.", "sol1": "Blow on it.", "sol2": "Heat it.", "label": 0},
    "social_iqa": {**KIM, "answerA": "worried", "answerB": "glad", "answerC": "proud"},
    "mmlu_physics": {"question": "Unit of force?", "choices": ["N", "J", "W", "V"], "answer": 0},
    "sst2": {"idx": 0, "sentence": "a fine film ", "label": 1},
    "ag_news": {"text": "Stocks rise.", "label": 2},
}
ITEMS = {
    "arc_easy": ("Heaviest?", ("a feather", "a stone", "a leaf"), 1),
    "openbookqa": ("Ice is", ("a feather", "a stone", "a leaf"), 2),
    "boolq": ("is ice cold?", ("false", "true"), 1),
    "winogrande_s": (CUP, ("the cup", "the box"), 1),
    "piqa": ("Cool soup.", ("Blow on it.", "Heat it."), 0),
    "social_iqa": ("Kim lost a key. How does Kim feel?", ("worried", "glad", "proud"), 0),
    "mmlu_physics": ("Unit of force?", ("N", "J", "W", "V"), 0),
    "sst2": ("a fine film", ("negative", "positive"), 1),
    "ag_news": ("Stocks rise.", ("World", "Sports", "Business", "Sci/Tech"), 2),
}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for ``datasets.load_dataset``, whose ``return_value`` are the records."""
    load_dataset = Mock(return_value=[])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return load_dataset


@pytest.mark.parametrize("task", ITEMS)
def test_converters(hub, task):
    hub.return_value = [RECORDS[task]]
    assert read_hub(task, "test")[0] == Item(f"{task}-test-0", *ITEMS[task])


@pytest.mark.parametrize(
    ("task", "split", "path", "configs", "theirs"),
    [
        ("arc_challenge", "train", "allenai/ai2_arc", ["ARC-Challenge"], "train"),
        ("boolq", "test", "google/boolq", [None], "validation"),
        ("winogrande_xs", "train", "allenai/winogrande", ["winogrande_xs"], "train"),
        ("piqa", "test", "ybisk/piqa", [None], "validation"),
        ("mmlu_chemistry", "test", "cais/mmlu", BOTH, "test"),
    ],
)
def test_sources(hub, task, split, path, configs, theirs):
    assert read_hub(task, split) == []
    revision = "refs/convert/parquet" if task in ("piqa", "social_iqa") else None
    asked = [call(path, config, split=theirs, revision=revision) for config in configs]
    assert hub.call_args_list == asked


def test_configurations_are_joined_and_a_task_has_all_splits(hub):
    hub.return_value = [RECORDS["mmlu_physics"]] * 2
    task = load_task("mmlu_physics")
    assert [item.id for item in task.test] == [f"mmlu_physics-test-{k}" for k in range(4)]
    hub.return_value = [RECORDS["sst2"]] * 9
    task = load_task("sst2", max_train=6, max_validation=2)
    assert [len(items) for items in (task.train, task.validation, task.test)] == [6, 2, 9]


def test_every_task_is_known(hub):
    assert len(hub_tasks()) == 13
    for task in hub_tasks():
        read_hub(task, "test")
    with pytest.raises(DataError, match=r"did you mean 'arc_easy'.* Known: .*, sst2"):
        read_hub("arc_eazy", "test")


def test_without_a_network_or_the_package(hub, monkeypatch):
    hub.side_effect = ConnectionError("no route to host\nsecond line")
    with pytest.raises(DataError, match=r"out of reach.*no route.*--data-dir") as error:
        read_hub("sst2", "test")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets, or .*--data-dir"):
        read_hub("sst2", "test")
