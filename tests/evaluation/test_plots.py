"""Reliability diagrams: what is drawn, and that nothing else changes."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread

from pyro_blora.evaluation.metrics import evaluate, reliability
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
    width, height = figure.get_size_inches()
    assert width == pytest.approx(0.7 + 2.5 * methods)
    assert height < 6
    top = figure.axes[:methods]
    assert len({ax.get_ylim() for ax in top}) == 1
    figure.draw_without_rendering()


def test_draws_the_bins_and_the_scores():
    pairs = results(1)
    probs, labels = pairs["method 0"]
    bins, metrics = reliability(probs, labels), evaluate(probs, labels)
    top, bottom = reliability_diagram(pairs).axes
    filled = (bins.count > 0).numpy()
    heights = [bar.get_height() for bar in top.containers[0]]
    np.testing.assert_allclose(heights, bins.accuracy.numpy()[filled])
    gaps = [bar.get_height() for group in top.containers[1:] for bar in group]
    expected = (bins.confidence - bins.accuracy).numpy()[filled]
    np.testing.assert_allclose(sorted(gaps), sorted(expected[expected != 0]))
    shares = [bar.get_height() for bar in bottom.containers[0]]
    np.testing.assert_allclose(shares, bins.count.numpy() / 200)
    assert bottom.lines[0].get_xdata()[0] == pytest.approx(metrics.acc)
    assert bottom.lines[1].get_xdata()[0] == pytest.approx(float(probs.amax(-1).mean()), abs=1e-6)
    assert f"ECE {100 * metrics.ece:.1f} %" in top.get_title()
    assert f"NLL {metrics.nll:.3f}" in top.get_title()


def test_draws_into_given_axes():
    figure = Figure()
    axes = figure.subplots(2, 2)
    assert reliability_diagram(results(2), axes=axes) is figure
    assert figure.axes == list(axes.ravel())
    with pytest.raises(ValueError, match=r"2 x 1 axes.*\(2, 2\)"):
        reliability_diagram(results(1), axes=axes)


def test_rejects_nothing_and_logits():
    with pytest.raises(ValueError, match="one method"):
        reliability_diagram({})
    with pytest.raises(ValueError, match="softmax"):
        reliability_diagram({"a": (torch.randn(3, 2) - 5, torch.zeros(3).long())})


def test_leaves_global_state_alone(tmp_path):
    before, figures = dict(mpl.rcParams), pyplot.get_fignums()
    save_figure(reliability_diagram(results(1)), tmp_path / "figure.png", dpi=50)
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == figures


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_saves(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    path.write_text("old")
    save_figure(reliability_diagram(results(1)), path, dpi=50)
    assert path.stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == "png":
        assert imread(path).std() > 0.05


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(Figure(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_save_errors(tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        save_figure(Figure(), tmp_path / "figure")
    with pytest.raises(ValueError, match="xyz"):
        save_figure(Figure(), tmp_path / "figure.xyz")
    with pytest.raises(FileNotFoundError):
        save_figure(Figure(), tmp_path / "missing" / "figure.png")
