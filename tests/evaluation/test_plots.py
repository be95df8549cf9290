"""What is drawn, and that nothing else changes."""

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.image import imread

from pyro_blora.evaluation import plots
from pyro_blora.scores import evaluate


def random(items=60, choices=3):
    return (2 * torch.randn(items, choices)).softmax(-1)


@pytest.mark.parametrize("num_bins", [1, 10])
def test_draws_the_bins_and_the_scores(num_bins):
    probs, labels = random(200, 4), torch.randint(4, (200,))
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
    pair = random(), torch.arange(60) % 3
    figure = plots.reliability_diagram({"one": pair, "two": pair, "three": pair})
    assert len(figure.axes) == 6
    plots.save_figure(figure, tmp_path / "figure.png")
    assert min(imread(tmp_path / "figure.png").shape[:2]) > 300
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == figures
