"""How many examples there are, and which of them are held out."""

import math
from itertools import permutations

import datasets
import pandas as pd
import pytest
import tiny
import torch
from torch.utils import data

from pyro_blora.data import load_task
from pyro_blora.data.batches import size_of
from pyro_blora.data.splits import chosen, hold_out, keys_of

ROWS = tiny.examples(20)
PART = data.random_split(ROWS, [6, 14], torch.Generator().manual_seed(0))[0]


def sampled(sampler):
    return data.DataLoader(ROWS, 4, sampler=sampler)


class Places(data.Sampler):
    def __iter__(self):
        yield from ([0, 1], [1, 2])


TABLE = datasets.Dataset.from_list([{"a": 1}] * 7)
PLACES = data.BatchSampler(data.SubsetRandomSampler(range(8)), 4, False)
SIZES = {
    "a list": (ROWS, 20),
    "random_split": (PART, 6),
    "a subset of a subset": (data.Subset(PART, [0, 2]), 2),
    "two sets": (data.ConcatDataset([ROWS, PART]), 26),
    "datasets": (TABLE, 7),
    "a part of datasets": (data.Subset(TABLE, [1, 2]), 2),
    "a loader": (data.DataLoader(ROWS, 4, shuffle=True), 20),
    "a loader of a part": (data.DataLoader(PART, 4), 6),
    "a loader of some places": (sampled(data.SubsetRandomSampler(range(5))), 5),
    # of the whole set in the course of the epochs
    "some at a time": (sampled(data.RandomSampler(ROWS, num_samples=5)), 20),
    "weighted rows": (sampled(data.WeightedRandomSampler([1.0] * 20, 50)), 20),
    "unknown batches": (data.DataLoader(ROWS, batch_sampler=Places()), None),
    "unknown places": (sampled(Places()), None),
    "batches of places": (data.DataLoader(ROWS, batch_sampler=PLACES), 8),
    "a loader of ready batches": (data.DataLoader([tiny.sequences()], batch_size=None), None),
    "a stream": (data.DataLoader(tiny.Stream(ROWS), 4), None),
}


@pytest.mark.parametrize(("rows", "size"), SIZES.values(), ids=SIZES)
def test_the_size_is_that_of_the_examples_that_are_read(rows, size):
    assert size_of(rows) == size


@pytest.mark.filterwarnings("error:The likelihood has num_data")
@pytest.mark.parametrize("num_data", [None, 6])
def test_the_kl_is_weighed_by_the_examples_of_a_part(num_data, tmp_path):
    loader = data.DataLoader(PART, 3, collate_fn=tiny.collate)
    for train in (
        lambda blora: tiny.train(blora, PART),
        lambda blora: tiny.train(blora, loader, collate=None),
        lambda blora: tiny.trainer(tmp_path, blora, PART),  # from the start
        lambda blora: tiny.trainer(tmp_path, blora, PART, max_steps=1).train(),
    ):
        blora = tiny.adapted(num_data=num_data)
        train(blora)
        assert blora.likelihood.num_data == 6


def reviews(texts):
    return [{"text": text, "label": k % 2} for k, text in enumerate(texts)]


FILMS = reviews(f"film {k}" for k in range(80))
ENCODED = [{"input_ids": torch.tensor([5, k]), "labels": k % 2} for k in range(80)]
PADDED = [
    {"input_ids": [5, 3 + k // 3, *[0] * (k % 3)], "attention_mask": [1, 1, *[0] * (k % 3)]}
    for k in range(240)
]
TWINS = [
    {"question": f"{n} _ {k}", "choices": [f"a{n}", f"b{n}"][:: 1 - 2 * k], "label": k}
    for n in range(40)
    for k in range(2)
]
RANKED = [  # every pair of an answer and another one, in both orders
    {"prompt": f"{n}?", "chosen": f"answer {a}", "rejected": f"answer {b}"}
    for n in range(20)
    for a, b in permutations(range(4), 2)
]
ASKED_AGAIN = [  # a question with other distractors; each has a twin with the same choices
    {"question": f"{n // 3}{sign}", "choices": [f"answer {n // 3}", f"wrong {n}"], "label": 0}
    for n in range(90)
    for sign in "?!"
]
PAIRS = [{"chosen": f"film {a}", "rejected": f"film {b}"} for a, b in permutations(range(9), 2)]
KEYS = {
    "films": (FILMS * 3, 80),
    "encoded": (ENCODED * 2, 80),
    "padded": (PADDED, 80),
    "twins": (TWINS * 2, 40),
    "ranked": (RANKED, 20),
    "asked again": (ASKED_AGAIN, 30),
    "pairs": (PAIRS, 36),
    "no prompt of a data frame": ([{"prompt": math.nan, **row} for row in PAIRS], 36),
}


@pytest.mark.parametrize(("rows", "count"), KEYS.values(), ids=KEYS)
def test_rows_of_a_key_stay_on_one_side_also_when_rows_are_added(rows, count):
    keys = keys_of(rows)
    assert len(set(keys)) == count
    train, held = hold_out(rows, 0.25)
    assert not {keys[k] for k in train.indices} & {keys[k] for k in held.indices}
    assert len(train) + len(held) == len(rows)
    assert 0 <= len(rows) // 4 - len(held) < len(rows) / count
    backwards = hold_out(rows[::-1], 0.25)[1].indices
    assert {keys[::-1][k] for k in backwards} == {keys[k] for k in held.indices}
    more = rows[::-1] + reviews(f"more {k}" for k in range(30))
    again = {keys_of(more)[k] for k in chosen(more, 0.25, "test")}
    test = {keys[k] for k in chosen(rows, 0.25, "test")}
    assert {key for key in again if not key.startswith("more")} == test


def test_a_new_class_moves_no_row_of_a_file_to_the_other_side():
    rows = [{"text": f"film {k}", "label": "ab"[k % 2]} for k in range(200)]
    test = {item.question for item in load_task(rows).test}
    more = load_task([*rows, *({"text": f"new {k}", "label": "c"} for k in range(3))])
    assert test == {item.question for item in more.test if "film" in item.question}


def test_prompts_of_many_pairs_do_not_decide_what_is_held_out():
    for prompts in (["film", "book"], ["book", "film"], "abc"):
        pairs = [{**row, "prompt": prompts[k % 10 % len(prompts)]} for k, row in enumerate(PAIRS)]
        assert len(hold_out(pairs, 0.25)[1]) == 18
    same = {"chosen": "yes", "rejected": "no"}
    asked = [{**same, "prompt": "Is it?"}] * 9 + [{**same, "prompt": f"{k}?"} for k in range(31)]
    assert len(set(keys_of(asked))) == 32
    assert keys_of(asked)[9:] == keys_of(asked[9:])


def test_choices_or_a_prompt_that_many_rows_share_do_not_tie_them():
    few = [{"question": f"{k} _", "choices": ["a0", "b0"], "label": 0} for k in range(4)]
    assert len(set(keys_of([*few, *TWINS[4:]])[:4])) == 1
    classes = [{"question": f"{k}?", "choices": ["no", "yes"], "label": 0} for k in range(9)]
    assert len(set(keys_of(classes))) == 9
    constant = [{**row, "question": "Which?"} for row in TWINS]
    assert len(set(keys_of(constant))) == 40
    assert len(set(keys_of([{"prompt": "Which?", **row} for row in PAIRS]))) == 36
    same = [classes[0]] * 9
    assert len(hold_out(same, 0.5)[1]) == 0  # of one text nothing can be held out
    assert len(set(keys_of([(1, 2), (1, 2)]))) == 2  # rows that cannot be compared
    assert keys_of(datasets.Dataset.from_list(RANKED)) == keys_of(RANKED)
    table = datasets.Dataset.from_list(FILMS)
    assert hold_out(table, 0.25)[1].features == table.features


OTHERS = [
    lambda k: {"sentence": f"text {k}", "label": k % 2, "idx": k},
    lambda k: {"ctx": f"text {k}", "endings": [f"end {k}", "b"], "label": k % 2},
    lambda k: (f"text {k}", k % 2),
    lambda k: (torch.tensor([k, 1]), torch.tensor(k % 2)),
]
CONSTANTS = [
    lambda k: (("no", "yes")[k % 2], f"text {k}"),
    lambda k: {"vector": float(k), "language": ("en", "fr")[k % 2], "label": k % 3},
    lambda k: {"image": object(), "source": "web", "label": k % 2},
    lambda k: (("no", "yes")[k % 2], object()),
]


def test_a_second_text_that_is_missing_is_so_in_every_container():
    rows = [{"text": f"film {k}", "text_pair": "x" if k % 2 else None} for k in range(80)]
    frame = pd.DataFrame(rows).to_dict("records")  # of NaNs
    bare = [{n: v for n, v in row.items() if v is not None} for row in rows]
    held = [[row["text"] for row in hold_out(each, 1 / 8)[1]] for each in (rows, frame, bare)]
    assert held[0] == held[1] == held[2]


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_of_other_columns_part_by_their_texts_and_tensors(kind):
    def contents(part):
        return sorted(str([*row.values()] if isinstance(row, dict) else row) for row in part)

    rows = [kind(k % 30) for k in range(45)]
    train, held = map(contents, hold_out(rows, 0.25))
    assert held
    assert not {*train} & {*held}
    assert held == contents(hold_out(rows[::-1], 0.25)[1])


@pytest.mark.parametrize("kind", CONSTANTS)
def test_classes_and_constants_do_not_say_which_rows_belong_together(kind):
    """A key that most rows share would hold out a class, or nothing."""
    rows = [kind(k) for k in range(40)]
    assert len(set(keys_of(rows))) == 40
    train, held = hold_out(rows, 0.25)
    assert len(held) == 10
    for part in (train, held):
        assert {k % 2 for k in part.indices} == {0, 1}
    assert len(set(keys_of([CONSTANTS[0](k % 30) for k in range(60)]))) == 30


REPEATED = [{"text": f"film {k % 50}", "label": ("bad", "good")[k % 2]} for k in range(200)]
LIMITS = [{}, {"max_validation": 40}, {"max_train": 100, "max_validation": 31}]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("rows", [REPEATED, [*REPEATED[:10]] * 20, TWINS * 2], ids=["R", "F", "T"])
def test_the_splits_of_a_task_share_no_text_and_no_twins(rows, limits):
    task = load_task(rows, **limits)
    parts = [
        {min(item.choices) if rows[0].get("choices") else item.question for item in part}
        for part in (task.train, task.validation, task.test)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert min(map(len, parts)) > 0
    if limits == {}:
        assert len(task.train) + len(task.validation) + len(task.test) == len(rows)
