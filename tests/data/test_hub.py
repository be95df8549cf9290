import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest

from pyro_blora.data import DataError, Item, hub_tasks, load_task, read_hub

LETTERED = {"choices": {"text": ["a leaf", "a stone"], "label": ["1", "2"]}, "answerKey": "2"}
TEXTS = ("a leaf", "a stone")
CUP = {"sentence": "The _ is big.", "option1": "cup", "option2": "box", "answer": "2"}
SOUP = {"goal": "Cool it.", "sol1": "Blow.", "sol2": "Heat.", "label": 0}
KIM = {"context": "Kim fell.", "question": "How?", "label": "1"}
KIM |= {"answerA": "sad", "answerB": "glad", "answerC": "proud"}
FORCE = {"question": "Unit of force?", "choices": ["N", "J", "W", "V"], "answer": 0}
FILM = {"idx": 0, "sentence": "a fine film ", "label": 1}
NEWS = ("World", "Sports", "Business", "Sci/Tech")
BOTH = ["college_chemistry", "high_school_chemistry"]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for ``datasets.load_dataset``, whose ``return_value`` are the records."""
    load_dataset = Mock(return_value=[])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return load_dataset


@pytest.mark.parametrize(
    ("task", "record", "parts"),
    [
        ("arc_easy", {"question": "Heavy?", **LETTERED}, ("Heavy?", TEXTS, 1)),
        ("openbookqa", {"question_stem": "Heavy is", **LETTERED}, ("Heavy is", TEXTS, 1)),
        ("boolq", {"question": "cold??", "answer": True}, ("cold?", ("false", "true"), 1)),
        ("winogrande_s", CUP, ("The _ is big.", ("cup", "box"), 1)),
        ("piqa", SOUP, ("Cool it.", ("Blow.", "Heat."), 0)),
        ("social_iqa", KIM, ("Kim fell. How?", ("sad", "glad", "proud"), 0)),
        ("mmlu_physics", FORCE, ("Unit of force?", ("N", "J", "W", "V"), 0)),
        ("sst2", FILM, ("a fine film", ("negative", "positive"), 1)),
        ("ag_news", {"text": "Stocks rise.", "label": 2}, ("Stocks rise.", NEWS, 2)),
    ],
)
def test_a_record_is_an_item(hub, task, record, parts):
    hub.return_value = [record]
    assert read_hub(task, "test")[0] == Item(f"{task}-test-0", *parts)


@pytest.mark.parametrize(
    ("task", "split", "path", "configs", "theirs"),
    [
        ("arc_challenge", "train", "allenai/ai2_arc", ["ARC-Challenge"], "train"),
        ("piqa", "test", "ybisk/piqa", [None], "validation"),
        ("mmlu_chemistry", "test", "cais/mmlu", BOTH, "test"),
    ],
)
def test_where_a_task_is_on_the_hub(hub, task, split, path, configs, theirs):
    assert read_hub(task, split) == []
    revision = "refs/convert/parquet" if task == "piqa" else None
    asked = [call(path, config, split=theirs, revision=revision) for config in configs]
    assert hub.call_args_list == asked


def test_configurations_are_joined_and_a_task_has_all_splits(hub):
    hub.return_value = [FORCE] * 2
    task = load_task("mmlu_physics")
    assert [item.id for item in task.test] == [f"mmlu_physics-test-{k}" for k in range(4)]
    hub.return_value = [FILM | {"sentence": f"film {k}"} for k in range(9)]
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
    with pytest.raises(DataError, match=r"from the hub.*no route.*--data-dir") as error:
        read_hub("sst2", "test")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets, or .*--data-dir"):
        read_hub("sst2", "test")
