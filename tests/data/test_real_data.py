"""The data sets in the folder beside the repository, where there is one."""

from pathlib import Path

import pytest

from pyro_blora.data import load_task

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "commonsense"
SIZES = {
    "arc_challenge": 820,
    "arc_easy": 1663,
    "openbookqa": 350,
    "boolq": 2289,
    "winogrande_xs": 887,
    "piqa": 1287,
    "social_iqa": 1368,
    "mmlu_chemistry": 212,
    "mmlu_physics": 177,
    "sst2": 610,
    "ag_news": 2100,
}


@pytest.mark.real
@pytest.mark.skipif(not FOLDER.is_dir(), reason="the folder shared/data/commonsense is missing")
@pytest.mark.parametrize("name", SIZES)
def test_every_item_is_read_and_answers_with_the_label_words(name):
    task = load_task(name, data_dir=FOLDER)
    assert len(task.test) == SIZES[name]
    if words := task.template.label_words:
        assert all(len(item.choices) == len(words) for item in task.test)
        assert {item.choices for item in task.test} == {task.test[0].choices}
