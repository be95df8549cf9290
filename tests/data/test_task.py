import json

import pytest

from pyro_blora import likelihoods
from pyro_blora.data import (
    DataError,
    LabelTokensCollator,
    MultipleChoiceCollator,
    load_task,
    template_for,
)


@pytest.fixture
def load(tmp_path):
    """Loads a task, of which it first writes splits whose ids are ``SPLIT-0``, ``SPLIT-1``, ..."""

    def load(sizes, task="own", **options):
        (tmp_path / task).mkdir(exist_ok=True)
        for split, size in sizes.items():
            records = [
                {"id": f"{split}-{n}", "question": "?", "choices": ["a", "b"], "label": n % 2}
                for n in range(size)
            ]
            text = "\n".join(json.dumps(record) for record in records)
            (tmp_path / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return load_task(task, data_dir=tmp_path, **options)

    return load


def ids(items):
    return [item.id for item in items]


ALL = {"train": 50, "validation": 30, "test": 20}


def test_all_splits(load):
    task = load(ALL, max_train=10, max_validation=5, max_test=7)
    assert (task.name, task.template) == ("own", template_for("own"))
    assert len(task.train) == 10
    assert all(name.startswith("train-") for name in ids(task.train))
    assert ids(task.validation) == [f"validation-{n}" for n in range(5)]
    assert ids(task.test) == [f"test-{n}" for n in range(7)]


def test_the_seed_shuffles_train_alone_and_a_smaller_set_is_the_start_of_a_larger_one(load):
    first, again, other = (load(ALL, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.train != other.train
    assert sorted(ids(first.train)) == sorted(ids(other.train))
    assert (first.validation, first.test) == (other.validation, other.test)
    assert (len(first.train), len(first.validation), len(first.test)) == (50, 30, 20)
    assert load(ALL, seed=1, max_train=5).train == first.train[:5]


@pytest.mark.parametrize(
    ("max_train", "max_validation", "sizes"),
    [
        (None, 200, (128, 32)),
        (100, 200, (100, 32)),
        (150, 20, (140, 20)),
        (120, 40, (120, 40)),
        (None, 0, (160, 0)),
    ],
)
def test_validation_is_held_out_of_the_train_items(load, max_train, max_validation, sizes):
    files = {"train": 160, "test": 5}
    task = load(files, max_train=max_train, max_validation=max_validation)
    assert (len(task.train), len(task.validation)) == sizes
    assert not set(task.train) & set(task.validation)
    if sum(sizes) == 160:  # in the order of the shuffle
        assert task.train + task.validation == load(files, max_validation=0).train


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("max_train", "max_validation"), [(None, 200), (160, 33), (100, 31)])
def test_no_split_comes_between_the_sentences_of_a_winogrande_pair(
    tmp_path, seed, max_train, max_validation
):
    (tmp_path / "winogrande_s").mkdir()
    records = [
        {"id": f"{n}-{k}", "question": f"{n} _ {k}", "choices": [f"a{n}", f"b{n}"], "label": k}
        for n in range(80)
        for k in range(2)
    ]
    for record in records[::4]:  # in some sets the two of a pair have their options in either order
        record["choices"] = record["choices"][::-1]
    for split in ("train", "test"):
        text = "\n".join(map(json.dumps, records))
        (tmp_path / "winogrande_s" / f"{split}.jsonl").write_text(text)
    limits = {"max_train": max_train, "max_validation": max_validation}
    task = load_task("winogrande_s", data_dir=tmp_path, seed=seed, **limits)
    pairs = [{name.split("-")[0] for name in ids(part)} for part in (task.train, task.validation)]
    assert not pairs[0] & pairs[1]
    assert len(pairs[0]) == -(-len(task.train) // 2)  # each whole, but where the limit falls
    assert 31 <= len(task.validation) <= 34


def test_no_train_split_no_test_split_and_no_such_task(load, tmp_path):
    task = load({"dev": 10, "test": 20}, max_train=10)
    assert (task.train, task.validation) == ((), ())
    assert len(task.test) == 20
    with pytest.raises(DataError, match=r"no split 'test'.* Known: train"):
        load({"train": 20}, "another")
    with pytest.raises(DataError, match="did you mean 'own'"):
        load_task("won", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"did you mean 'arc_easy'.*'facts' is built in"):
        load_task("arc_esy")
    with pytest.raises(DataError, match="negative"):
        load_task("facts", max_train=-1)


def test_facts_need_no_data_dir(tmp_path):
    task = load_task("facts", max_train=20, max_validation=10, max_test=5)
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 10, 5)
    assert load_task("facts", data_dir=tmp_path, max_test=5).test == task.test


def test_the_collator_and_the_likelihood_are_the_template_s(plain, load):
    facts = load_task("facts", max_train=30, max_test=3)
    collate = facts.collator(plain, max_length=64)
    assert isinstance(collate, MultipleChoiceCollator)
    assert collate.max_length == 64
    assert collate(facts.test)["input_ids"].shape[:2] == (3, 4)
    likelihood = facts.likelihood(collate, "fixed")
    assert repr(likelihood) == repr(likelihoods.MultipleChoice(num_data=30, scale="fixed"))
    task = load({"test": 4}, "sst2")
    collate = task.collator(plain)
    assert isinstance(collate, LabelTokensCollator)
    assert collate(task.test)["labels"].tolist() == [0, 1, 0, 1]
    assert task.likelihood(collate).token_ids == collate.token_ids
