import sys
from types import SimpleNamespace

import pytest

from pyro_blora.data import Item, read_hub

LETTERED = {"choices": {"text": ["a leaf", "a stone"], "label": ["1", "2"]}, "answerKey": "2"}
TEXTS = ("a leaf", "a stone")
FORCE = {"question": "Unit of force?", "choices": ["N", "J", "W", "V"], "answer": 0}
FILM = {"idx": 0, "sentence": "a fine film ", "label": 1}
CUP = {"sentence": "The _ broke.", "option1": "cup", "option2": "nut", "answer": "2"}
NEWS = ("World", "Sports", "Business", "Sci/Tech")


@pytest.mark.parametrize(
    ("task", "record", "parts"),
    [
        ("arc_easy", {"question": "Heavy?", **LETTERED}, ("Heavy?", TEXTS, 1)),
        ("openbookqa", {"question_stem": "Heavy is", **LETTERED}, ("Heavy is", TEXTS, 1)),
        ("mmlu_physics", FORCE, ("Unit of force?", ("N", "J", "W", "V"), 0)),
        ("boolq", {"question": "is it so??", "answer": True}, ("is it so?", ("false", "true"), 1)),
        ("winogrande_xs", CUP, ("The _ broke.", ("cup", "nut"), 1)),
        ("sst2", FILM, ("a fine film", ("negative", "positive"), 1)),
        ("ag_news", {"text": "Stocks rise.", "label": 2}, ("Stocks rise.", NEWS, 2)),
    ],
)
def test_a_record_of_the_hub_is_an_item(monkeypatch, task, record, parts):
    hub = SimpleNamespace(load_dataset=lambda *args, **options: [record])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    configurations = 2 if task == "mmlu_physics" else 1  # which are joined
    expected = [Item(f"{task}-test-{k}", *parts) for k in range(configurations)]
    assert read_hub(task, "test") == expected
