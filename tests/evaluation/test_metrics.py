"""Metrics, temperatures and rankings against values by hand, by counting and on a grid."""

import math
from itertools import product

import pytest
import torch
from scipy.stats import binom
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation import metrics as m
from pyro_blora.generation import Generation
from pyro_blora.prediction import Prediction
from pyro_blora.scores import auroc, ece_by_chance, evaluate, item_scores

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
    brier = [0.25**2 + 2 * 0.125**2, 0.25**2 + 0.625**2 + 0.875**2, 0.75**2 + 0.25**2 + 0.5**2]
    assert metrics.brier == pytest.approx(sum(brier) / 4, abs=1e-7)
    rounded = torch.tensor([[1.0 + 1e-6, 0.0], [0.25, 0.75]])  # above one it is no logit
    ece = evaluate(rounded, torch.tensor([0, 1]), num_bins=1).ece
    assert ece == pytest.approx(0.125, abs=1e-5)


@pytest.mark.parametrize(("kind", "num_bins"), [(torch.float32, 15), (torch.float64, 10)])
def test_metrics_are_those_of_torchmetrics_and_the_means_over_items(kind, num_bins):
    probs = torch.softmax(3 * torch.randn(2000, 4, dtype=kind), -1)
    probs[:300] = probs.new_tensor([0.8, 0.2, 0.0, 0.0])  # at edges of 15 and of 10 bins
    probs[300:600] = probs.new_tensor([0.4, 0.4, 0.2, 0.0])
    probs[600:700] = probs.new_tensor([0.0, 1.0, 0.0, 0.0])
    labels = torch.randint(4, (2000,))
    metrics = evaluate(probs, labels, num_bins=num_bins)
    items = item_scores(probs, labels, num_bins=num_bins)
    assert (metrics.nll, metrics.brier, metrics.ece) == tuple(items.mean(1).tolist())
    top = probs.float().clamp(max=1 - torch.finfo(torch.float32).eps)  # 1 would be its own bin
    acc = multiclass_accuracy(top, labels, 4, average="micro")
    ece = multiclass_calibration_error(top, labels, 4, n_bins=num_bins)
    least = torch.finfo(torch.float32).tiny
    nll = torch.nn.functional.nll_loss(probs.double().clamp(min=least).log(), labels)
    for mine, theirs in ((metrics.acc, acc), (metrics.ece, ece), (metrics.nll, nll)):
        assert mine == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("by_seeds", [0.0, 0.5, 1.0, 2.0, 4.0, 100.0])
def test_two_errors_to_each_side_are_an_interval_of_95_percent(by_seeds):
    torch.manual_seed(0)
    item, seed = torch.randn(1, 2000, 60), torch.randn(3, 2000, 1) * (3 / 60) ** 0.5
    gaps = item + by_seeds * seed + 0.3 * torch.randn(3, 2000, 60)  # around 0
    off = gaps.mean((0, -1)).abs()
    assert 0.94 <= float((off <= 2 * m.error_of(gaps)).double().mean()) <= 0.985
    alone = m.error_of(gaps[:1])  # of one seed the error is that of the items
    torch.testing.assert_close(alone, gaps[0].std(-1) / 60**0.5, rtol=0.03, atol=0)


def test_absent_choices_and_the_dtype_of_labels_do_not_matter():
    padded = torch.nn.functional.pad(PROBS, (0, 2))
    assert evaluate(padded, LABELS) == evaluate(PROBS, LABELS.int()) == evaluate(PROBS, LABELS)
    logits, labels = synthetic(3.0, n=500)
    padded = torch.nn.functional.pad(logits, (0, 2), value=-math.inf)
    expected = m.fit_temperature(logits, labels)
    assert m.fit_temperature(padded, labels) == pytest.approx(expected, rel=1e-9)


def test_ece_by_chance_is_the_mean_over_all_labels_of_a_calibrated_one():
    confidence = torch.tensor([0.55, 0.6, 0.62, 0.85, 0.9, 0.97])
    probs = torch.stack([confidence, 1 - confidence], -1)
    expected = 0.0
    for labels in map(torch.tensor, product([0, 1], repeat=6)):
        chance = float(probs.gather(1, labels[:, None]).prod())
        expected += chance * evaluate(probs, labels, num_bins=4).ece
    assert ece_by_chance(probs, num_bins=4) == pytest.approx(expected, abs=0.01)


def synthetic(temperature, n, k=4):
    """Logits that are right at ``temperature``: labels are drawn from softmax(logits / T)."""
    truth = 2 * torch.randn(n, k)
    labels = torch.multinomial(truth.softmax(-1), 1).squeeze(1)
    return temperature * truth, labels


def nll(logits, labels, temperature):
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))


@pytest.mark.parametrize("temperature", [0.02, 1.0, 60.0])
def test_beats_a_grid(temperature):
    logits, labels = synthetic(temperature, n=100)
    found = m.fit_temperature(logits, labels)
    grid = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    values = [nll(logits, labels, t) for t in grid]
    assert nll(logits, labels, found) <= min(values) + 1e-12
    assert found == pytest.approx(float(grid[values.index(min(values))]), rel=5e-3)
    assert found == pytest.approx(temperature, rel=0.5)  # of 100 items


def test_bounds_and_where_every_temperature_is_as_good():
    logits, labels = torch.eye(3), torch.arange(3)
    with pytest.warns(UserWarning, match="0.01"):
        assert m.fit_temperature(logits, labels) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="NaN"):
        m.fit_temperature(logits * math.nan, labels)
    logits = torch.tensor([[0.1, 0.1, -math.inf], [7.0, 7.0, 7.0], [-math.inf, 0.0, 0.0]])
    assert nll(logits, labels, 0.01) == pytest.approx(nll(logits, labels, 100), rel=1e-12)
    assert m.fit_temperature(logits, labels) == 1
    logits[0, 0] += 1  # one that is right
    with pytest.warns(UserWarning, match="0.01"):
        assert m.fit_temperature(logits, labels) == pytest.approx(0.01)


def test_risk_at_every_threshold_by_counting():
    doubt = torch.randint(8, (40,)).float()  # with many ties
    wrong = torch.rand(40) < 0.4
    coverage, risk, area = m.risk_coverage(doubt, wrong)
    kept = doubt <= doubt.unique()[:, None]
    torch.testing.assert_close(coverage, kept.double().mean(1), check_dtype=False)
    torch.testing.assert_close(risk, (kept & wrong).sum(1) / kept.sum(1), check_dtype=False)
    assert area == pytest.approx(float((coverage.diff(prepend=0 * coverage[:1]) * risk).sum()))


def answered(u, wrong):
    """Items of two classes whose entropy grows with u, in (0, 1); their labels."""
    top = 1 - u.double() / 2
    return Prediction(torch.stack([top, 1 - top], -1)[None]), wrong.long()


def kept_of(prediction, labels, **options):
    threshold = m.threshold_for(prediction, labels, **options)
    return prediction.entropy <= threshold, threshold


RATES = {  # errors at the quantile u of the score; the ties, if any, are of so many values
    "flat, just too high": (lambda u: 0.0 * u + 0.0505, None),
    "flat, with ties": (lambda u: 0.0 * u + 0.0505, 37),
    "too high from the middle on": (lambda u: torch.where(u < 0.5, 0.045, 0.07), None),
    "rising and falling": (lambda u: 0.0505 + 0.05 * torch.sin(60 * u), None),
}


@pytest.mark.filterwarnings("ignore:No threshold has")
@pytest.mark.parametrize("rate", RATES)
def test_the_risk_above_the_threshold_is_too_high_in_few_sets_of_labels(rate):
    rate, ties = RATES[rate]
    grid = (torch.arange(100_000) + 0.5) / 100_000
    risk = rate(grid).cumsum(0) / torch.arange(1, 100_001)
    failed, sets = 0, 1000
    for _ in range(sets):
        u = torch.rand(600)
        wrong = torch.rand(600) < rate(u)
        u = (u * ties).ceil() / ties if ties else u
        kept, _ = kept_of(*answered(u, wrong))
        failed += bool(kept.any() and risk[int(u[kept].max() * 99_999)] > 0.05)
    assert failed / sets <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / sets)


def test_much_is_kept_where_much_can_be():
    u = (torch.arange(2000) + 0.5) / 2000
    for rate, (low, high) in ((0.3 * u**2, (0.5, 0.75)), (0.03 + 0 * u, (1, 1))):
        kept, _ = kept_of(*answered(u, torch.rand(2000) < rate))
        assert low <= float(kept.double().mean()) <= high


def test_the_threshold_is_the_last_before_a_p_value_is_too_high():
    wrong = torch.zeros(60, dtype=torch.bool)
    wrong[45::5] = True
    prediction, labels = answered(torch.arange(1, 61) / 61, wrong)
    p_values = binom.cdf(wrong.cumsum(0), range(1, 61), 0.1)
    first = next(k for k in range(60) if binom.cdf(0, k, 0.1) <= 0.05)
    last = next(k for k in range(first, 60) if p_values[k] > 0.05)
    order = torch.randperm(60)
    kept, _ = kept_of(Prediction(prediction.samples[:, order]), labels[order], risk=0.1)
    assert int(kept.sum()) == last > 46


@pytest.mark.filterwarnings("ignore:No threshold has")
@pytest.mark.parametrize("errors", range(5, 13))
def test_tests_begin_again_with_a_third_of_the_level(errors):
    """Of 400 items the first are wrong: too many for 80 and for 160 items, not always for 320."""
    kept, _ = kept_of(*answered(torch.arange(1, 401) / 401, torch.arange(400) < errors))
    assert kept.all() if binom.cdf(errors, 320, 0.05) <= 0.05 / 3 else not kept.any()


def test_ties_are_kept_or_dropped_together():
    u = torch.tensor([0.1] * 60 + [0.2] * 60)
    wrong = torch.zeros(120, dtype=torch.bool)
    wrong[110:] = True  # the p-values of the first fifty of the second value are low enough
    prediction, labels = answered(u, wrong)
    assert m.threshold_for(prediction, labels) == float(prediction.entropy[0])
    wrong[50] = True
    with pytest.warns(UserWarning, match="got 11 errors in"):
        assert m.threshold_for(*answered(u, wrong)) == -math.inf


def test_the_threshold_of_texts_is_for_the_rule_of_generate():
    scores = torch.rand(2, 80)
    right = scores[1] <= scores[1].sort().values[69]
    texts = Generation(torch.zeros(80, 1), mean_entropy=scores[0], epistemic=scores[1])
    found = m.threshold_for(texts, right, by="mutual_information")
    abstained = scores[1] > found  # as generate has it
    assert right[~abstained].float().mean() > 0.95
    assert 59 < int((~abstained).sum()) < 80
    with pytest.warns(UserWarning, match="No threshold"):
        assert m.threshold_for(texts, ~right) == -math.inf


def test_out_of_scope_by_counting():
    torch.manual_seed(0)
    inside, outside = (
        Prediction((scale * torch.randn(3, n, 4)).round().softmax(-1))
        for scale, n in ((3.0, 40), (1.0, 25))
    )
    for by in ("entropy", "mutual_information"):
        mine, others = (sorted(getattr(p, by).tolist()) for p in (inside, outside))
        found = m.out_of_scope(inside, outside, by=by, recall=0.9)
        assert sum(value <= found.threshold for value in mine) >= 36
        assert sum(value < found.threshold for value in mine) < 36
        assert found.false_positive_rate == sum(value <= found.threshold for value in others) / 25
        pairs = [(a < b) + (a == b) / 2 for a in mine for b in others]
        assert found.auroc == pytest.approx(sum(pairs) / 1000, abs=1e-6)
    both, labels = Prediction.cat([inside, outside]), torch.tensor([0] * 40 + [-1] * 25)
    with pytest.warns(UserWarning, match="No threshold"):
        m.threshold_for(both, labels)


def test_auroc_of_ties_and_of_scores_that_are_close():
    assert auroc(torch.zeros(3), torch.zeros(2)) == 0.5
    close = torch.tensor([0.0, 1e-9, 2e-9], dtype=torch.float64)
    assert auroc(close, close + 3e-9) == 1


def test_ranks_are_those_of_the_scores():
    p = Prediction((2 * torch.randn(5, 60, 3)).softmax(-1))
    for by in ("mutual_information", "entropy"):
        scores = getattr(p, by).tolist()
        assert m.rank(p, by).tolist() == sorted(range(60), key=lambda i: -scores[i])
    assert m.rank(p, "confidence")[0] == p.confidence.argmin()  # the least sure one
    with pytest.raises(ConfigurationError, match="by must be random or one of"):
        m.rank(p, "samples")
    first, again, other = (m.rank(p, "random", seed=seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == list(range(60))


ONE, LABEL = answered(torch.rand(60), torch.rand(60) < 0.5)
REFUSED = [
    *((m.threshold_for, LABEL, options) for options in ({"risk": 0}, {"confidence": 95})),
    *((m.threshold_for, labels, {}) for labels in (LABEL.bool(), LABEL[:1])),
    *((m.out_of_scope, ONE, options) for options in ({"by": "surprise"}, {"recall": 0.0})),
]


@pytest.mark.parametrize(("measure", "second", "options"), REFUSED)
def test_what_cannot_be_measured(measure, second, options):
    with pytest.raises(ConfigurationError):
        measure(ONE, second, **options)
