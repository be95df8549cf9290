import json

import pytest

from pyro_blora.data import (
    DataError,
    LabelTokensCollator,
    MultipleChoiceCollator,
    load_task,
    task_names,
    template_for,
)


def write(folder, task, **sizes):
    """Write splits whose ids are 0, 1, 2, ... and start with the split's name."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        records = [
            {"id": f"{split}-{n}", "question": "?", "choices": ["a", "b"], "label": n % 2}
            for n in range(size)
        ]
        text = "\n".join(json.dumps(record) for record in records)
        (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def ids(items):
    return [item.id for item in items]


def test_all_splits(tmp_path):
    write(tmp_path, "own", train=50, validation=30, test=20)
    task = load_task("own", data_dir=tmp_path, max_train=10, max_validation=5, max_test=7)
    assert (task.name, task.template) == ("own", template_for("own"))
    assert len(task.train) == 10
    assert all(name.startswith("train-") for name in ids(task.train))
    assert ids(task.validation) == [f"validation-{n}" for n in range(5)]
    assert ids(task.test) == [f"test-{n}" for n in range(7)]


def test_no_limits(tmp_path):
    write(tmp_path, "own", train=50, validation=30, test=20)
    task = load_task("own", data_dir=str(tmp_path))
    assert sorted(ids(task.train)) == sorted(f"train-{n}" for n in range(50))
    assert (len(task.validation), len(task.test)) == (30, 20)


def test_the_seed_shuffles_train_alone(tmp_path):
    write(tmp_path, "own", train=50, validation=30, test=20)
    first, again, other = (load_task("own", data_dir=tmp_path, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.train != other.train
    assert set(first.train) == set(other.train)
    assert (first.validation, first.test) == (other.validation, other.test)
    assert ids(first.train) != [f"train-{n}" for n in range(50)]


def test_a_smaller_train_set_is_the_start_of_a_larger_one(tmp_path):
    write(tmp_path, "own", train=50, validation=30, test=20)
    small = load_task("own", data_dir=tmp_path, max_train=5)
    large = load_task("own", data_dir=tmp_path, max_train=20)
    assert large.train[:5] == small.train


def test_validation_is_what_follows_in_the_shuffled_train_file(tmp_path):
    write(tmp_path, "own", train=50, test=20)
    task = load_task("own", data_dir=tmp_path, max_train=30, max_validation=20)
    longer = load_task("own", data_dir=tmp_path, max_train=50, max_validation=0)
    assert task.train + task.validation == longer.train
    assert (len(task.train), len(task.validation)) == (30, 20)


@pytest.mark.parametrize(
    ("max_train", "max_validation", "sizes"),
    [
        (None, 200, (128, 32)),
        (160, 200, (128, 32)),
        (100, 200, (100, 32)),
        (None, 20, (140, 20)),
        (150, 20, (140, 20)),
        (120, 40, (120, 40)),
        (None, 0, (160, 0)),
        (0, 200, (0, 32)),
    ],
)
def test_too_few_train_items_for_both(tmp_path, max_train, max_validation, sizes):
    write(tmp_path, "own", train=160, test=5)
    task = load_task("own", data_dir=tmp_path, max_train=max_train, max_validation=max_validation)
    assert (len(task.train), len(task.validation)) == sizes
    assert not set(task.train) & set(task.validation)


def test_no_train_split(tmp_path):
    write(tmp_path, "own", test=20)
    task = load_task("own", data_dir=tmp_path, max_train=10)
    assert (task.train, task.validation) == ((), ())
    assert len(task.test) == 20


def test_a_split_of_another_name_is_left_alone(tmp_path):
    write(tmp_path, "own", dev=10, test=20)
    assert load_task("own", data_dir=tmp_path).train == ()


def test_no_test_split(tmp_path):
    write(tmp_path, "own", train=20)
    with pytest.raises(DataError, match=r"no split 'test' .* it has train"):
        load_task("own", data_dir=tmp_path)


def test_no_such_task(tmp_path):
    write(tmp_path, "own", test=20)
    with pytest.raises(DataError, match="did you mean own"):
        load_task("won", data_dir=tmp_path)
    with pytest.raises(DataError, match="choose one of facts"):
        load_task("fact")
    with pytest.raises(DataError, match=r"choose one of ag_news, .*, winogrande_xs"):
        load_task("qqqq")


@pytest.mark.parametrize("limit", ["max_train", "max_validation", "max_test"])
def test_a_negative_limit(limit):
    with pytest.raises(DataError, match=f"{limit} is -1"):
        load_task("facts", **{limit: -1})


def test_facts_need_no_data_dir(tmp_path):
    task = load_task("facts", max_train=20, max_validation=10, max_test=5)
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 10, 5)
    assert load_task("facts", data_dir=tmp_path, max_test=5).test == task.test


def test_the_hub_is_read_without_a_data_dir(monkeypatch, tmp_path):
    from pyro_blora.data import task as module

    items = load_task("facts").test[:10]
    monkeypatch.setattr(module, "read_hub", lambda name, split: list(items))
    task = load_task("sst2", max_train=6, max_validation=2)
    assert sorted(ids((*task.train, *task.validation))) == sorted(
        {*ids(task.train), *ids(task.validation)}
    )
    assert (len(task.train), len(task.validation), task.test) == (6, 2, items)


def test_collators(plain):
    facts = load_task("facts", max_test=3)
    collate = facts.collator(plain, max_length=64)
    assert isinstance(collate, MultipleChoiceCollator)
    assert collate.max_length == 64
    assert collate(facts.test)["input_ids"].shape[:2] == (3, 4)


def test_collator_of_a_labels_task(plain, tmp_path):
    write(tmp_path, "sst2", test=4)
    task = load_task("sst2", data_dir=tmp_path)
    collate = task.collator(plain)
    assert isinstance(collate, LabelTokensCollator)
    assert collate(task.test)["labels"].tolist() == [0, 1, 0, 1]


def test_names(tmp_path):
    assert {"facts", "arc_easy", "sst2"} < set(task_names())
    write(tmp_path, "own", test=1)
    (tmp_path / "empty").mkdir()
    assert task_names(tmp_path) == ("facts", "own")
    with pytest.raises(DataError, match="no folder"):
        task_names(tmp_path / "nowhere")
