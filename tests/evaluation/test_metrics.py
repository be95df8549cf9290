"""Metrics against values computed by hand."""

import math
from itertools import product

import pytest
import torch

from pyro_blora.evaluation.metrics import confidence_bins, ece_by_chance, evaluate

# Confidences 0.75, 0.625, 0.5, 1; the second and the third item are wrong
PROBS = torch.tensor(
    [[0.75, 0.125, 0.125], [0.25, 0.625, 0.125], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 2, 0, 0])


def test_by_hand():
    metrics = evaluate(PROBS, LABELS, num_bins=4)
    assert metrics.n == 4
    assert metrics.acc == pytest.approx(0.5, abs=1e-7)
    # bins: [0.5, 0.75) has 0.625 and 0.5, none right; [0.75, 1] has 0.75 and 1, both right
    assert metrics.ece == pytest.approx(0.5 * 0.5625 + 0.5 * 0.125, abs=1e-7)
    nll = -(math.log(0.75) + math.log(0.125) + math.log(0.25) + 0) / 4
    assert metrics.nll == pytest.approx(nll, abs=1e-7)
    brier = (
        (0.25**2 + 2 * 0.125**2)
        + (0.25**2 + 0.625**2 + 0.875**2)
        + (0.75**2 + 0.25**2 + 0.5**2)
        + 0
    ) / 4
    assert metrics.brier == pytest.approx(brier, abs=1e-7)


def test_certainty_shares_the_last_bin():
    """0.95 and right, 1.0 and wrong: one bin of width 0.1, not two."""
    probs = torch.tensor([[0.95, 0.05], [1.0, 0.0]])
    metrics = evaluate(probs, torch.tensor([0, 1]), num_bins=10)
    assert metrics.ece == pytest.approx(0.975 - 0.5, abs=1e-6)
    assert metrics.nll == pytest.approx((87.33654475 - math.log(0.95)) / 2, abs=1e-5)


def test_rounding_above_one_is_no_logit():
    probs = torch.tensor([[1.0 + 1e-6, 0.0], [0.25, 0.75]])
    assert evaluate(probs, torch.tensor([0, 1]), num_bins=1).ece == pytest.approx(0.125, abs=1e-5)


def test_absent_choices_and_the_dtype_of_labels_do_not_matter():
    padded = torch.nn.functional.pad(PROBS, (0, 2))
    assert evaluate(padded, LABELS) == evaluate(PROBS, LABELS.int()) == evaluate(PROBS, LABELS)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_bins_are_those_of_the_ece(kind):
    """Of one on an edge, right, and one in the bin below, wrong: in one bin they cancel."""
    for edge in range(8, 16):
        top = torch.tensor([edge / 15, (edge - 0.5) / 15], dtype=kind)
        probs, labels = torch.stack([top, 1 - top], -1), torch.tensor([0, 1])
        gaps = torch.zeros(15).index_add(0, confidence_bins(top, 15), 1 - labels - top.float())
        assert float(gaps.abs().sum()) / 2 == pytest.approx(evaluate(probs, labels).ece, abs=1e-6)


def test_ece_by_chance_is_the_mean_over_all_that_a_calibrated_classifier_may_show():
    confidence = torch.tensor([0.55, 0.6, 0.62, 0.85, 0.9, 0.97])
    probs = torch.stack([confidence, 1 - confidence], -1)
    expected = 0.0
    for right in product([True, False], repeat=6):
        right = torch.tensor(right)
        chance = float(torch.where(right, confidence, 1 - confidence).prod())
        expected += chance * evaluate(probs, (~right).long(), num_bins=4).ece
    assert ece_by_chance(probs, num_bins=4) == pytest.approx(expected, abs=0.01)
    with pytest.raises(ValueError, match="n >= 1"):
        ece_by_chance(probs[:0])
    with pytest.raises(ValueError, match="one bin"):
        ece_by_chance(probs, num_bins=0)


@pytest.mark.parametrize(
    ("probs", "labels", "match"),
    [
        (PROBS, LABELS[:3], "the shapes"),
        (PROBS[0], LABELS, "the shapes"),
        (PROBS, LABELS[:, None], "the shapes"),
        (PROBS[:0], LABELS[:0], "n >= 1"),
        (torch.ones(4, 1), 0 * LABELS, "two classes"),
        (PROBS, LABELS + 1, "between 0 and 2"),
        (PROBS, LABELS - 100, "-100"),
        (PROBS, LABELS.double(), "integers"),
        (PROBS, LABELS.bool(), "integers"),
        (4 * PROBS, LABELS, "softmax"),
        (PROBS - 0.1, LABELS, "softmax"),
        (PROBS * math.nan, LABELS, "finite"),
        (PROBS.long(), LABELS, "floating"),
    ],
)
def test_rejects(probs, labels, match):
    with pytest.raises(ValueError, match=match):
        evaluate(probs, labels)


def test_rejects_no_bins():
    with pytest.raises(ValueError, match="one bin"):
        evaluate(PROBS, LABELS, num_bins=0)
