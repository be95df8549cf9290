"""What is drawn, and that nothing else changes."""

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.image import imread

from pyro_blora.evaluation import plots
from pyro_blora.prediction import Prediction
from pyro_blora.scores import auroc, evaluate


def random(samples=5, items=60, choices=3):
    return Prediction((2 * torch.randn(samples, items, choices)).softmax(-1))


@pytest.mark.parametrize("num_bins", [1, 10])
def test_draws_the_bins_and_the_scores(num_bins):
    probs, labels = random(1, 200, 4).probs, torch.randint(4, (200,))
    metrics = evaluate(probs, labels, num_bins=num_bins)
    figure = plots.reliability_diagram({"method": (probs, labels)}, num_bins=num_bins)
    top, bottom = figure.axes
    bars, gaps = ([c[0] for c in top.containers[start::2]] for start in (0, 1))
    shares = [container[0] for container in bottom.containers]
    acc = ece = 0.0
    for bar, gap, share in zip(bars, gaps, shares, strict=True):
        assert bar.get_x() == gap.get_x() == share.get_x()
        confidence = bar.get_height() + gap.get_height()
        assert bar.get_x() <= confidence < bar.get_x() + 1 / num_bins
        acc += share.get_height() * bar.get_height()
        ece += share.get_height() * abs(gap.get_height())
    assert sum(share.get_height() for share in shares) == pytest.approx(1)
    assert (acc, ece) == pytest.approx((metrics.acc, metrics.ece), abs=1e-6)
    lines = [line.get_xdata()[0] for line in bottom.lines]
    assert lines == pytest.approx([metrics.acc, float(probs.amax(-1).mean())], abs=1e-6)
    assert f"ECE {100 * metrics.ece:.1f} %" in top.get_title()


def test_a_saved_figure_leaves_global_state_alone(tmp_path):
    before, figures = dict(mpl.rcParams), pyplot.get_fignums()
    pair = random(1).probs, torch.arange(60) % 3
    figure = plots.reliability_diagram({"one": pair, "two": pair, "three": pair})
    assert len(figure.axes) == 6
    plots.save_figure(figure, tmp_path / "figure.png")
    assert min(imread(tmp_path / "figure.png").shape[:2]) > 300
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == figures


def test_the_ood_picture_shows_all_items_of_both():
    inside, outside = random(), random(items=40, choices=4)
    axes = plots.ood_diagram(inside, outside, ("known", "foreign")).axes
    for ax, name in zip(axes, ("entropy", "mutual_information"), strict=True):
        score = auroc(getattr(inside, name), getattr(outside, name))
        assert ax.get_title() == f"AUROC {100 * score:.1f} %"
        for patch in ax.patches[:2]:  # a closed outline of each: its area is that of all items
            x, y = patch.get_xy().T
            area = 0.5 * abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
            low, high = ax.get_xlim()
            assert area == pytest.approx((high - low) / 20, rel=1e-5)
