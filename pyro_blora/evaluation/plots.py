"""Reliability diagrams."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from pyro_blora.checkpoints.files import write_file
from pyro_blora.scores import confidence_bins, evaluate

_INK = "#333333"
_LEGEND: dict[str, Any] = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
_ACCURACY: dict[str, Any] = {"color": "#2f5f94"}
_CONFIDENCE: dict[str, Any] = {"color": "#d9484a", "linewidth": 1.3, "linestyle": (0, (3, 2))}
_OVER: dict[str, Any] = {"facecolor": "#fbdedd", "edgecolor": "#d9484a", "hatch": "/////"}
_UNDER: dict[str, Any] = {"facecolor": "#d9efe1", "edgecolor": "#3a8f5c", "hatch": "/////"}


def reliability_diagram(
    results: Mapping[str, tuple[Tensor, Tensor]], *, num_bins: int = 15
) -> Figure:
    """Draws the reliability diagrams of several methods side by side.

    Above are the accuracy in each bin of confidence (bars) and the gap to the diagonal, on which a
    calibrated method lies. Below are the share of the items in each bin, the mean confidence
    (dashed) and the accuracy (solid); their distance is the net over- or under-confidence.
    ``results`` is ``{method: (probs, labels)}``, of shapes ``(n, K)`` and ``(n,)``. The figure is
    not registered with pyplot; a notebook shows it, and :func:`save_figure` writes it.
    """
    count = len(results)
    figure = _Shown(figsize=(0.7 + 2.5 * count, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for (top, bottom), (name, pair) in zip(axes.T, results.items(), strict=True):
        metrics = evaluate(*pair, num_bins=num_bins)
        _style(top)
        _style(bottom, "Confidence")
        _draw_bins(top, bottom, *pair, num_bins)
        bottom.axvline(metrics.acc, linewidth=1.5, **_ACCURACY)
        bottom.axvline(float(pair[0].amax(-1).mean()), **_CONFIDENCE)
        scores = f"ECE {100 * metrics.ece:.1f} %   ACC {100 * metrics.acc:.1f} %"
        top.set_title(f"{scores}\nNLL {metrics.nll:.3f}", fontsize=8, color=_INK)
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        bold = {"ha": "center", "fontsize": 10, "fontweight": "bold", "color": _INK}
        top.annotate(name, (0.5, 1), xytext=(0, 30), **place, **bold)
    axes[0, 0].set_ylabel("Accuracy", fontsize=9, color=_INK)
    axes[1, 0].set_ylabel("Share", fontsize=9, color=_INK)
    handles = [
        Line2D([], [], linewidth=2, label="accuracy", **_ACCURACY),
        Line2D([], [], label="mean confidence", **_CONFIDENCE),
        Patch(label="over-confident", **_OVER),
        Patch(label="under-confident", **_UNDER),
    ]
    narrow = {"columnspacing": 1.6, "handlelength": 1.6}
    figure.legend(handles=handles, ncols=2 if count == 1 else 4, **narrow, **_LEGEND)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure in the format of the suffix, whole or not at all."""
    write_file(Path(path), lambda file: figure.savefig(file, dpi=200, bbox_inches="tight"))


class _Shown(Figure):
    """A figure that a notebook shows even if nothing has imported pyplot."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", bbox_inches="tight", dpi=self.dpi)
        return png.getvalue()


def _draw_bins(top: Any, bottom: Any, probs: Tensor, labels: Tensor, num_bins: int) -> None:
    """Draws accuracy, gap and share in each bin of the ECE that has an item."""
    confidence, predicted = probs.float().cpu().max(-1)
    right = (predicted == labels.cpu()).float()
    index = confidence_bins(confidence, num_bins)
    for k in index.unique().tolist():
        inside = index == k
        accuracy, claimed = float(right[inside].mean()), float(confidence[inside].mean())
        left, bar = k / num_bins, {"width": 1 / num_bins, "align": "edge"}
        top.bar(left, accuracy, color="#a9c1dc", edgecolor="white", linewidth=0.6, **bar)
        style = _OVER if claimed > accuracy else _UNDER
        top.bar(left, claimed - accuracy, bottom=accuracy, linewidth=0.6, **bar, **style)
        top.hlines(accuracy, left, left + 1 / num_bins, linewidth=2, **_ACCURACY)
        share = float(inside.float().mean())
        bottom.bar(left, share, color="#c4c4c4", edgecolor="white", **bar)
    top.plot([0, 1], [0, 1], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    top.set_ylim(0, 1.01)  # room for the thick line of an accuracy of 1


def _style(ax: Any, label: str = "") -> None:
    """Sets the look of axes, whose x axis is a share from 0 to 1."""
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    ax.set_xlabel(label, fontsize=9, color=_INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_INK)
    ax.tick_params(labelsize=8, color=_INK, labelcolor=_INK)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
