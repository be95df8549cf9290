"""How many examples there are, and which of them are held out."""

import datasets
import pytest
import tiny
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)
from transformers import TrainingArguments

from pyro_blora.data import load_task
from pyro_blora.data.batches import size_of
from pyro_blora.data.splits import chosen, hold_out, keys_of
from pyro_blora.inference.trainer import BayesianLoRATrainer
from pyro_blora.likelihoods import LabelTokens

ROWS = tiny.examples(20)
PART = random_split(ROWS, [6, 14], torch.Generator().manual_seed(0))[0]


class Stream(IterableDataset):
    def __iter__(self):
        yield from ROWS


SIZES = {
    "a list": (ROWS, 20),
    "random_split": (PART, 6),
    "a subset of a subset": (Subset(PART, [0, 2]), 2),
    "two sets": (ConcatDataset([ROWS, PART]), 26),
    "datasets": (datasets.Dataset.from_list([{"a": 1}] * 7), 7),
    "a part of datasets": (Subset(datasets.Dataset.from_list([{"a": 1}] * 7), [1, 2]), 2),
    "a loader": (DataLoader(ROWS, 4, shuffle=True), 20),
    "a loader of a part": (DataLoader(PART, 4), 6),
    "a loader of some places": (DataLoader(ROWS, 4, sampler=SubsetRandomSampler(range(5))), 5),
    # of the whole set in the course of the epochs
    "a loader of some at a time": (
        DataLoader(ROWS, 4, sampler=RandomSampler(ROWS, num_samples=5)),
        20,
    ),
    "a loader of weighted rows": (
        DataLoader(ROWS, 4, sampler=WeightedRandomSampler([1.0] * 20, 50)),
        20,
    ),
    "a loader of batches of places": (
        DataLoader(
            ROWS,
            batch_sampler=torch.utils.data.BatchSampler(SubsetRandomSampler(range(8)), 4, False),
        ),
        8,
    ),
    "a loader of ready batches": (DataLoader([tiny.sequences()], batch_size=None), None),
    "a stream": (DataLoader(Stream(), 4), None),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_is_that_of_the_examples_that_are_read(name):
    data, size = SIZES[name]
    assert size_of(data) == size


@pytest.mark.parametrize(("data", "size"), [(PART, 6), (DataLoader(PART, 3), 6)])
def test_fit_and_the_trainer_weigh_the_kl_by_the_examples_of_a_part(data, size, tmp_path):
    blora = tiny.adapted(num_data=None)
    loader = isinstance(data, DataLoader)
    if loader:
        data = DataLoader(PART, 3, collate_fn=tiny.collate)
    tiny.train(blora, data, **({"collate": None} if loader else {}))
    assert blora.likelihood.num_data == size
    told = tiny.adapted(num_data=6)
    with pytest.WarningsRecorder(_ispytest=True) as seen:
        tiny.train(told, data, **({"collate": None} if loader else {}))
    assert not [w for w in seen if "num_data" in str(w.message)]
    if not loader:
        blora = tiny.adapted(num_data=None)
        trainer = tiny.trainer(tmp_path, blora, data, max_steps=1)
        trainer.train()
        assert blora.likelihood.num_data == size


def rows_of(texts, labels=None):
    return [{"text": t, "label": k % 2} for k, t in enumerate(texts)]


def test_repeated_texts_and_twins_are_on_one_side_and_stay_there_when_rows_are_added():
    texts = [f"film {k}" for k in range(80)]
    encoded = [{"input_ids": torch.tensor([5, k]), "labels": k % 2} for k in range(80)]
    twins = [
        {"question": f"{n} _ {k}", "choices": [f"a{n}", f"b{n}"][:: 1 - 2 * k], "label": k}
        for n in range(40)
        for k in range(2)
    ]
    for rows in (rows_of(texts) * 3, encoded * 2, twins * 2):
        keys = keys_of(rows)
        assert len(set(keys)) == (80 if len(rows) > 160 or "input_ids" in rows[0] else 40)
        train, held = hold_out(rows, 0.25)
        sides = [{str(keys[k]) for k in part.indices} for part in (train, held)]
        assert not sides[0] & sides[1]
        assert len(train) + len(held) == len(rows)
        assert 0 <= len(rows) // 4 - len(held) < len(rows) / len(set(keys))
        assert {keys_of(rows[::-1])[k] for k in hold_out(rows[::-1], 0.25)[1].indices} == sides[1]
        more = rows[::-1] + rows_of([f"more {k}" for k in range(30)])
        test = {keys[k] for k in chosen(rows, 0.25, "test")}
        again = {keys_of(more)[k] for k in chosen(more, 0.25, "test")}
        assert again - {f"more {k}" for k in range(30)} == test
    pairs = [{**row, "choices": sorted(row["choices"])} for row in twins]
    for k, row in enumerate(pairs[:4]):  # four questions about the same two names
        row["choices"] = ["a0", "b0"]
        row["question"] = f"{k} _"
    assert len(set(keys_of(pairs)[:4])) == 1
    same = [{"question": "?", "choices": ["no", "yes"], "label": 0}] * 9
    assert len(hold_out(same, 0.5)[1]) == 0  # of one text nothing can be held out
    classes = [{"question": f"{k}?", "choices": ["no", "yes"], "label": 0} for k in range(9)]
    assert len(set(keys_of(classes))) == 9
    assert len(set(keys_of([(1, 2), (1, 2)]))) == 2  # rows that cannot be compared
    kept = datasets.Dataset.from_list(rows_of(texts))
    assert hold_out(kept, 0.25)[1].features == kept.features


def test_rows_of_other_columns_part_by_their_texts_and_tensors():
    def content(row):
        return str(next(iter(row.values())) if isinstance(row, dict) else row[0])

    kinds = (
        lambda k: {"sentence": f"text {k}", "label": k % 2, "idx": k},
        lambda k: {"ctx": f"text {k}", "endings": [f"end {k}", "b"], "label": k % 2},
        lambda k: (f"text {k}", k % 2),
        lambda k: (torch.tensor([k, 1]), torch.tensor(k % 2)),
    )
    for kind in kinds:
        rows = [kind(k % 30) for k in range(45)]
        train, held = ([content(row) for row in part] for part in hold_out(rows, 0.25))
        assert held
        assert not {*train} & {*held}
        moved = hold_out(rows[::-1], 0.25)[1]
        assert sorted(held) == sorted(map(content, moved))


def test_classes_and_constants_do_not_tell_which_rows_belong_together():
    """A key that most rows share would hold out a class, or nothing."""
    kinds = (
        lambda k: (("no", "yes")[k % 2], f"text {k}"),
        lambda k: {"vector": float(k), "language": ("en", "fr")[k % 2], "label": k % 3},
        lambda k: {"image": object(), "source": "web", "label": k % 2},
        lambda k: (("no", "yes")[k % 2], object()),
    )
    for kind in kinds:
        rows = [kind(k) for k in range(40)]
        assert len(set(keys_of(rows))) == 40
        train, held = hold_out(rows, 0.25)
        assert len(held) == 10
        for part in (train, held):
            assert {k % 2 for k in part.indices} == {0, 1}
    repeated = [(("no", "yes")[k % 2], f"text {k % 30}") for k in range(60)]
    assert len(set(keys_of(repeated))) == 30


def test_a_temperature_is_not_fitted_to_texts_that_were_trained_on():
    """Of coin flips, each of them four times, nothing can be known: the temperature rises."""
    generator = torch.Generator().manual_seed(1)
    flips = torch.randint(2, (24,), generator=generator).tolist()
    rows = [
        {"input_ids": torch.tensor([8 + k, 9, 10]), "label": flips[k], "index": k}
        for k in range(24)
    ] * 4
    blora = tiny.adapted(
        num_data=None,
        likelihood=LabelTokens(token_ids=tiny.ANSWERS[:2]),
        target_modules="all-linear",
    )
    tiny.train(blora, rows, num_steps=150, held_out=0.25, learning_rates={"mean": 0.2})
    assert blora.model.temperature > 1


def test_a_validation_split_has_no_text_of_the_training(tmp_path):
    rows = [{"text": f"film {k % 50}", "label": ("bad", "good")[k % 2]} for k in range(200)]
    task = load_task(rows, max_validation=40)
    texts = [{item.question for item in part} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, texts)) == len(set.union(*texts))
    assert min(map(len, texts)) > 0


def test_a_few_texts_are_no_twins():
    rows = [{"text": f"film {k % 10}", "label": "ab"[k % 2]} for k in range(200)]
    task = load_task(rows)
    assert min(map(len, (task.train, task.validation, task.test))) > 0


def test_the_trainer_s_size_is_that_of_its_part_from_the_start(tmp_path):
    blora = tiny.adapted(num_data=None)
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    BayesianLoRATrainer(blora, arguments, train_dataset=PART, data_collator=tiny.collate)
    assert blora.likelihood.num_data == 6
