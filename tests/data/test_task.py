import json

import pytest

from pyro_blora import likelihoods
from pyro_blora.data import DataError, load_task


@pytest.fixture
def load(tmp_path):
    """Loads a task, of which it first writes splits: the records of each, or how many to make."""

    def item(split, n, count):
        classes = {"choices": ["a", "b"], "label": int(n >= count // 2)}  # sorted by class
        return {"id": f"{split}-{n}", "question": f"{n}?", **classes}

    def load(splits, task="own", **options):
        (tmp_path / task).mkdir(exist_ok=True)
        for split, records in splits.items():
            if isinstance(records, int):
                records = [item(split, n, records) for n in range(records)]
            text = "\n".join(map(json.dumps, records))
            (tmp_path / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return load_task(task, data_dir=tmp_path, **options)

    return load


def ids(items):
    return [item.id for item in items]


def test_the_seed_shuffles_train_alone_and_fewer_items_are_of_the_same(load):
    sizes = {"train": 50, "validation": 30, "test": 20}
    first, again, other = (load(sizes, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.train != other.train
    for task in (first, other):
        assert sorted(ids(task.train)) == sorted(f"train-{n}" for n in range(50))
        assert ids(task.validation) == [f"validation-{n}" for n in range(30)]
        assert ids(task.test) == [f"test-{n}" for n in range(20)]
    fewer = load(sizes, seed=1, max_train=10, max_validation=5, max_test=7)
    assert fewer.train == first.train[:10]
    for cut, whole in ((fewer.validation, first.validation), (fewer.test, first.test)):
        assert cut == tuple(item for item in whole if item in cut)  # in their order
        assert {item.label for item in cut} == {0, 1}  # of both classes, though the file is sorted
    assert [len(part) for part in (fewer.validation, fewer.test)] == [5, 7]
    assert fewer.test == load(sizes, seed=2, max_test=7).test


@pytest.mark.parametrize(
    ("max_train", "max_validation", "sizes"),
    [(None, 200, (128, 32)), (100, 200, (100, 32)), (150, 20, (140, 20)), (None, 0, (160, 0))],
)
def test_validation_is_held_out_of_the_train_items(load, max_train, max_validation, sizes):
    files = {"train": 160, "test": 5}
    task = load(files, max_train=max_train, max_validation=max_validation)
    assert (len(task.train), len(task.validation)) == sizes
    assert not set(task.train) & set(task.validation)
    if sum(sizes) == 160:  # in the order of the shuffle
        assert task.train + task.validation == load(files, max_validation=0).train


@pytest.mark.parametrize("name", ["dev", "valid", "val"])
def test_a_task_may_have_no_train_split(load, name):
    task = load({name: 10, "test": 20}, max_train=10)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [0, 10, 20]


def test_splits_that_are_there_twice_or_cut_from_the_end(load, tmp_path):
    with pytest.raises(DataError, match="one validation split"):
        load({"val": 10, "valid": 10, "test": 5})
    (tmp_path / "own" / "test.csv").touch()
    with pytest.raises(DataError, match="one file for each split"):
        load({})
    with pytest.raises(DataError, match="0 or more, got -1"):
        load_task("facts", max_train=-1)


def test_the_collator_and_the_likelihood_are_the_template_s(build, load, tmp_path):
    facts = load_task("facts", data_dir=tmp_path, max_train=30, max_test=3)  # which is built in
    collate = facts.collator(build(), max_length=64)
    assert collate.max_length == 64
    assert collate(facts.test)["input_ids"].shape[:2] == (3, 4)
    assert repr(facts.likelihood(collate)) == repr(likelihoods.MultipleChoice(num_data=30))
    task = load({"test": 4}, "sst2")
    collate = task.collator(build())
    assert collate(task.test)["labels"].tolist() == [0, 0, 1, 1]
    assert task.likelihood(collate).token_ids == collate.token_ids


def test_a_file_called_like_a_task_has_its_own_words(tmp_path):
    """SST-2's template would score the token of " negative" for "down"."""
    rows = [{"text": f"goes {k}", "label": ("down", "up")[k % 2]} for k in range(40)]
    path = tmp_path / "sst2.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_task(path).template.scoring == "options"
