"""Risk and coverage, out of distribution, and the ranking of a pool: by counting, and as drawn."""

import math

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot

from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.metrics import auroc, doubts, risk_coverage
from pyro_blora.evaluation.plots import ood_diagram, risk_coverage_diagram
from pyro_blora.evaluation.ranking import CRITERIA, rank
from pyro_blora.posterior.prediction import Prediction


def random(samples=5, items=60, choices=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, items, choices, generator=generator)
    return Prediction((2 * logits).softmax(-1))


def test_risk_at_every_threshold_by_counting():
    generator = torch.Generator().manual_seed(0)
    doubt = torch.randint(8, (40,), generator=generator).float()  # with many ties
    wrong = torch.rand(40, generator=generator) < 0.4
    coverage, risk, area = risk_coverage(doubt, wrong)
    by_hand = [(doubt <= t) for t in sorted(set(doubt.tolist()))]
    assert coverage.tolist() == pytest.approx([float(kept.float().mean()) for kept in by_hand])
    assert risk.tolist() == pytest.approx([float(wrong[kept].float().mean()) for kept in by_hand])
    shares = [b - a for a, b in zip([0, *coverage.tolist()], coverage.tolist(), strict=False)]
    assert area == pytest.approx(sum(s * r for s, r in zip(shares, risk.tolist(), strict=True)))
    # a doubt without ties: the mean risk of the k least doubtful
    order = torch.randperm(40, generator=generator)
    _, risk, area = risk_coverage(order.float(), wrong)
    assert area == pytest.approx(float(risk.mean()))
    kept = wrong[order.argsort()].double().cumsum(0) / torch.arange(1, 41)
    torch.testing.assert_close(risk, kept)


def test_nothing_is_better_than_the_oracle_and_a_constant_says_nothing():
    p, wrong = random(), torch.arange(60) % 3 == 0
    oracle = risk_coverage(wrong.float() + torch.linspace(0, 0.5, 60), wrong)[2]
    assert all(oracle < risk_coverage(doubt, wrong)[2] for doubt in doubts(p).values())
    coverage, risk, area = risk_coverage(torch.zeros(60), wrong)
    assert (coverage.tolist(), risk.tolist()) == ([1], pytest.approx([1 / 3]))
    assert area == pytest.approx(1 / 3)


def test_auroc_is_the_share_of_pairs_in_order():
    inside = torch.tensor([0.0, 1.0, 2.0, 2.0, 7.5])
    outside = torch.tensor([1.0, 2.0, 9.0])
    pairs = outside[:, None] - inside
    share = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()
    assert auroc(inside, outside) == pytest.approx(float(share))
    assert auroc(inside, inside) == pytest.approx(0.5)
    assert auroc(inside, inside + 10) == 1
    assert auroc(inside + 10, inside) == 0
    assert auroc(torch.zeros(3), torch.zeros(2)) == 0.5
    tiny = torch.tensor([0.0, 1e-9, 2e-9], dtype=torch.float64)
    assert auroc(tiny, tiny + 3e-9) == 1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: risk_coverage(torch.zeros(3), torch.zeros(2).bool()), r"got \(3,\) and \(2,\)"),
        (lambda: risk_coverage(torch.zeros(0), torch.zeros(0).bool()), "n >= 1"),
        (lambda: risk_coverage(torch.tensor([math.nan]), torch.ones(1).bool()), "NaN"),
        (lambda: auroc(torch.zeros(0), torch.zeros(2)), "got 0 and 2"),
        (lambda: risk_coverage_diagram(random(), torch.zeros(3).long()), "labels"),
        (lambda: ood_diagram(random(), random(items=0), ("a", "b")), "both sides"),
    ],
)
def test_bad_scores_are_told(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_the_risk_coverage_picture_has_a_line_for_each_doubt():
    p, labels = random(), torch.arange(60) % 3
    before, figures = dict(mpl.rcParams), pyplot.get_fignums()
    figure = risk_coverage_diagram(p, labels)
    (ax,) = figure.axes
    wrong = p.predictions != labels
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    for line, name, (key, doubt) in zip(ax.lines, names, doubts(p).items(), strict=False):
        coverage, risk, area = risk_coverage(doubt, wrong)
        assert list(line.get_xdata()) == pytest.approx(coverage.tolist())
        assert list(line.get_ydata()) == pytest.approx(risk.tolist())
        assert name == f"{key.replace('_', ' ')} (AURC {area:.3f})"
    assert len(names) == 5
    overall = float(wrong.float().mean())
    assert list(ax.lines[-1].get_ydata()) == pytest.approx([overall, overall])
    mean = Prediction(p.samples[:1])  # of the posterior mean there is no mutual information
    names = [t.get_text() for t in risk_coverage_diagram(mean, labels).legends[0].get_texts()]
    assert not any("mutual" in name for name in names)
    assert (dict(mpl.rcParams), pyplot.get_fignums()) == (before, figures)


@pytest.mark.parametrize("samples", [1, 5])
def test_the_ood_picture_shows_all_items_of_both(samples):
    inside, outside = random(samples), random(samples, items=40, choices=4, seed=1)
    figure = ood_diagram(inside, outside, ("known", "foreign"))
    for ax, name in zip(figure.axes, ("entropy", "mutual_information"), strict=True):
        score = auroc(getattr(inside, name), getattr(outside, name))
        assert ax.get_title() == f"AUROC {100 * score:.1f} %"
        for patch in ax.patches[:2]:  # a closed outline of each: its area is that of all items
            x, y = patch.get_xy().T
            area = 0.5 * abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
            low, high = ax.get_xlim()
            assert area == pytest.approx((high - low) / 20, rel=1e-5)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["known (60 items)", "foreign (40 items)"]
    figure.draw_without_rendering()


def test_ranks_are_those_of_the_scores():
    p = random()
    for by in ("mutual_information", "entropy"):
        scores = getattr(p, by).tolist()
        assert rank(p, by).tolist() == sorted(range(60), key=lambda i: -scores[i])
    orders = {by: tuple(rank(p, by).tolist()) for by in CRITERIA}
    assert len(set(orders.values())) == 3
    assert sorted(orders["random"]) == list(range(60))
    assert orders["random"] == tuple(rank(p, "random", seed=0).tolist())
    assert orders["random"] != tuple(rank(p, "random", seed=1).tolist())
    state = torch.get_rng_state()
    rank(p, "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_criterion_that_cannot_rank():
    with pytest.raises(ConfigurationError, match="'mutual_info'; did you mean 'mutual_informatio"):
        rank(random(), "mutual_info")
    with pytest.raises(ConfigurationError, match="single draw"):
        rank(random(samples=1))
    assert len(rank(random(samples=1), "entropy")) == 60
