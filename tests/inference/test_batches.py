"""The order of the data: shuffled, by length, complete."""

import itertools

import pytest
import tiny
import torch

from pyro_blora.inference.loop import Batches
from pyro_blora.posterior.prediction import predict_dataset


def length(row):
    return len(row["input_ids"])


def epochs(count, rows, *, by_length=True, seed=0):
    """The indices in each batch of the first epochs."""
    how = length if by_length else None
    stream = Batches(rows, tiny.collate, how, batch_size=4, seed=seed)
    per_epoch = -(-len(rows) // 4)
    drawn = []
    for batch in itertools.islice(stream, count * per_epoch):
        drawn.append(batch["index"].tolist())
    return [drawn[i : i + per_epoch] for i in range(0, len(drawn), per_epoch)]


@pytest.mark.parametrize("count", [1, 4, 10, 75])
@pytest.mark.parametrize("by_length", [False, True])
def test_every_example_once_in_each_epoch(count, by_length):
    for epoch in epochs(3, tiny.examples(count), by_length=by_length):
        assert sorted(itertools.chain(*epoch)) == list(range(count))
        assert max(map(len, epoch)) <= 4
        # no more batches are incomplete than must be, but for one in each window of lengths
        assert sum(len(batch) < 4 for batch in epoch) <= 1


@pytest.mark.parametrize("by_length", [False, True])
def test_epochs_differ_and_seeds_reproduce(by_length):
    rows = tiny.examples(23)  # not a multiple of lengths and batches, which would fix them
    first = epochs(2, rows, by_length=by_length)
    # other examples share a batch, not only the order of the batches
    assert {frozenset(batch) for batch in first[0]} != {frozenset(batch) for batch in first[1]}
    assert first == epochs(2, rows, by_length=by_length)
    assert first != epochs(2, rows, by_length=by_length, seed=1)


def test_every_example_counts_once_in_expectation():
    """The weight of an example in a batch of b of N is N / b; the longest was always alone."""
    rows = [{"input_ids": torch.zeros(n + 1, dtype=int), "label": 0, "index": n} for n in range(9)]
    weights = torch.zeros(9, dtype=torch.float64)
    for epoch in epochs(4000, rows):
        for batch in epoch:
            weights[batch] += 9 / len(batch) / len(epoch) / 4000
    # alone with chance 1/9: a standard deviation of 0.04
    torch.testing.assert_close(weights, torch.ones_like(weights), atol=0.12, rtol=0)


def test_batches_of_like_lengths_waste_less_padding():
    rows = tiny.examples(64)

    def padding(by_length):
        lengths = [[length(rows[i]) for i in b] for b in epochs(1, rows, by_length=by_length)[0]]
        return sum(max(b) * len(b) - sum(b) for b in lengths)

    assert padding(True) < 0.4 * padding(False)


@pytest.mark.parametrize("by_length", [False, True])
def test_predictions_come_back_in_the_order_of_the_data(by_length):
    blora, rows = tiny.adapted(), tiny.examples(10)
    prediction, labels = predict_dataset(
        lambda batch: blora.predict(batch, 0),
        rows,
        tiny.collate,
        batch_size=4,
        length=length if by_length else None,
        progress=False,
    )
    assert labels.tolist() == [row["label"] for row in rows]
    one_by_one = torch.cat([blora.predict(tiny.collate([row]), 0).samples for row in rows], 1)
    torch.testing.assert_close(prediction.samples, one_by_one)
    assert one_by_one.std(1).max() > 0.01  # the rows do differ
