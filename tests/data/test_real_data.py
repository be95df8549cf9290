"""The data sets in the folder beside the repository, where there is one."""

from pathlib import Path

import pytest

from pyro_blora.data import load_task, read_json_lines

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "commonsense"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the folder shared/data/commonsense is missing"),
]

SIZES = {
    ("arc_challenge", "train"): 1119,
    ("arc_challenge", "test"): 820,
    ("arc_easy", "test"): 1663,
    ("openbookqa", "validation"): 500,
    ("openbookqa", "test"): 350,
    ("boolq", "test"): 2289,
    ("winogrande_xs", "train"): 160,
    ("winogrande_xs", "test"): 887,
    ("piqa", "test"): 1287,
    ("social_iqa", "test"): 1368,
    ("mmlu_chemistry", "test"): 212,
    ("mmlu_physics", "test"): 177,
    ("sst2", "test"): 610,
    ("ag_news", "test"): 2100,
}


@pytest.mark.parametrize(("task", "split"), SIZES)
def test_every_item_is_read(task, split):
    assert len(read_json_lines(FOLDER / task / f"{split}.jsonl")) == SIZES[task, split]


@pytest.mark.parametrize("task", ["sst2", "ag_news", "boolq"])
def test_classes_are_those_of_the_label_words(task):
    loaded = load_task(task, data_dir=FOLDER, max_train=50, max_validation=50, max_test=50)
    words = loaded.template.label_words
    for item in (*loaded.train, *loaded.validation, *loaded.test):
        assert len(item.choices) == len(words)
        assert item.choices == loaded.test[0].choices
