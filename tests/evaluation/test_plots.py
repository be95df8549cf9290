"""Reliability diagrams: what is drawn, and that nothing else changes."""

import io

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread

from pyro_blora.evaluation.metrics import evaluate
from pyro_blora.evaluation.plots import reliability_diagram, save_figure


def results(methods):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    return {
        f"method {i}": ((2 * torch.randn(200, 4, generator=generator)).softmax(-1), labels)
        for i in range(methods)
    }


@pytest.mark.parametrize("methods", [1, 2, 5])
def test_one_column_per_method(methods):
    figure = reliability_diagram(results(methods), num_bins=10)
    assert len(figure.axes) == 2 * methods
    figure.draw_without_rendering()


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_draws_the_bins_and_the_scores(num_bins):
    pairs = results(1)
    metrics = evaluate(*pairs["method 0"], num_bins=num_bins)
    top, bottom = reliability_diagram(pairs, num_bins=num_bins).axes
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
    confidence = float(pairs["method 0"][0].amax(-1).mean())
    assert [line.get_xdata()[0] for line in bottom.lines] == pytest.approx(
        [metrics.acc, confidence], abs=1e-6
    )
    assert f"ECE {100 * metrics.ece:.1f} %" in top.get_title()
    assert f"NLL {metrics.nll:.3f}" in top.get_title()


def test_certainty_is_in_the_last_bin():
    figure = reliability_diagram({"a": (torch.tensor([[1 + 1e-6, 0.0]]), torch.tensor([0]))})
    assert figure.axes[0].containers[0][0].get_x() == pytest.approx(14 / 15)


def test_rejects_nothing_and_logits():
    with pytest.raises(ValueError, match="one method"):
        reliability_diagram({})
    with pytest.raises(ValueError, match="softmax"):
        reliability_diagram({"a": (torch.randn(3, 2) - 5, torch.zeros(3).long())})


def test_a_notebook_without_pyplot_is_given_a_picture():
    """IPython asks an object for its ``_repr_png_``; of pyplot it knows the figures alone."""
    figure = reliability_diagram(results(1))
    height, width = imread(io.BytesIO(figure._repr_png_())).shape[:2]
    assert min(height, width) > 300
    figure.set_dpi(figure.dpi / 2)
    halved = imread(io.BytesIO(figure._repr_png_())).shape[0]
    assert halved == pytest.approx(height / 2, rel=0.1)


def test_leaves_global_state_alone(tmp_path):
    before, figures = dict(mpl.rcParams), pyplot.get_fignums()
    save_figure(reliability_diagram(results(1)), tmp_path / "figure.png")
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == figures


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_saves_the_whole_file_or_keeps_the_old_one(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"figure.{suffix}"
    save_figure(reliability_diagram(results(1)), path)
    size = path.stat().st_size
    assert size > 1000
    if suffix == "png":
        assert imread(path).std() > 0.05

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(Figure(), path)
    assert path.stat().st_size == size
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["", ".xyz"])
def test_an_unknown_format(tmp_path, suffix):
    with pytest.raises(ValueError, match=f"'{suffix[1:]}' is not supported"):
        save_figure(Figure(), tmp_path / f"figure{suffix}")
