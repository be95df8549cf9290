"""The data sets in the folder beside the repository, where there is one."""

from pathlib import Path

import pytest

from pyro_blora.data import load_task, read_json_lines

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "commonsense"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the folder shared/data/commonsense is missing"),
]

SIZES = {"arc_easy": 1663, "openbookqa": 350, "winogrande_xs": 887, "piqa": 1287, "ag_news": 2100}


@pytest.mark.parametrize("task", SIZES)
def test_every_item_is_read(task):
    assert len(read_json_lines(FOLDER / task / "test.jsonl")) == SIZES[task]


@pytest.mark.parametrize("task", ["sst2", "ag_news", "boolq"])
def test_classes_are_those_of_the_label_words(task):
    loaded = load_task(task, data_dir=FOLDER, max_train=50, max_validation=50, max_test=50)
    words = loaded.template.label_words
    for item in (*loaded.train, *loaded.validation, *loaded.test):
        assert len(item.choices) == len(words)
        assert item.choices == loaded.test[0].choices
