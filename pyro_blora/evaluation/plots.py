"""Reliability diagrams, drawn without touching matplotlib's global state."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from pyro_blora.evaluation.metrics import ReliabilityBins, evaluate, reliability

__all__ = ["reliability_diagram", "save_figure"]

_ACCURACY = "#2f5f94"
_OVER, _OVER_FILL = "#d9484a", "#fbdedd"
_UNDER, _UNDER_FILL = "#3a8f5c", "#d9efe1"
_BAR = "#a9c1dc"
_INK = "#333333"
_DASHES = (0, (3, 2))


def reliability_diagram(
    results: Mapping[str, tuple[Tensor, Tensor]], *, num_bins: int = 15, axes: Any = None
) -> Figure:
    """Draw a reliability diagram of each method, next to one another.

    Above, the accuracy of each bin of confidence (bars), and the gap to the diagonal, on which a
    calibrated method lies: red where the method claims too much, green where it claims too little.
    The title gives the scores of :func:`pyro_blora.evaluation.metrics.evaluate`. Below, the share
    of the items in each bin, with the mean confidence (dashed) and the accuracy (solid): the
    distance of the two lines is the net over- or under-confidence.

    Args:
        results: ``{method: (probs, labels)}``, ``probs`` of shape ``(n, K)`` and ``labels`` of
            shape ``(n,)``. One column per method, in order; up to five are readable.
        num_bins: number of bins of confidence, of equal width.
        axes: where to draw: ``2 x len(results)`` matplotlib axes. Default: a new figure.

    Returns:
        The figure, not registered with pyplot: show it as the last line of a notebook's cell, or
        write it with :func:`save_figure`.

    Raises:
        ValueError: there is no method, ``axes`` has another shape, or ``probs`` and ``labels`` are
            not what :func:`pyro_blora.evaluation.metrics.evaluate` takes.

    Reference:
        A. Niculescu-Mizil, R. Caruana (2005), "Predicting Good Probabilities with Supervised
        Learning".

    Example::

        >>> import torch
        >>> probs, labels = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1])
        >>> figure = reliability_diagram({"LoRA": (probs, labels)})
        >>> len(figure.axes)
        2
    """
    if not results:
        raise ValueError("reliability_diagram needs one method or more, got none.")
    # Before anything is drawn: an error leaves the caller's axes as they were
    rows = [
        (name, reliability(*pair, num_bins=num_bins), evaluate(*pair, num_bins=num_bins))
        for name, pair in results.items()
    ]
    own = axes is None
    if own:
        figure = Figure(figsize=(0.7 + 2.5 * len(rows), 4.4), dpi=150, layout="constrained")
        axes = figure.subplots(
            2, len(rows), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1)
        )
    axes = np.asarray(axes, dtype=object)
    if axes.shape != (2, len(rows)):
        raise ValueError(
            f"axes must be an array of 2 x {len(rows)} axes, one column per method; got the shape "
            f"{axes.shape}. figure.subplots(..., squeeze=False) makes one."
        )
    for column, (name, bins, metrics) in enumerate(rows):
        top, bottom = axes[:, column]
        _draw_accuracy(top, bins)
        top.set_title(
            f"ECE {100 * metrics.ece:.1f} %   ACC {100 * metrics.acc:.1f} %\nNLL {metrics.nll:.3f}",
            fontsize=8,
            color=_INK,
        )
        top.annotate(
            name,
            (0.5, 1),
            xytext=(0, 30),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
            color=_INK,
        )
        _draw_histogram(bottom, bins, metrics.acc)
        for ax in (top, bottom):
            _style(ax)
    axes[0, 0].set_ylabel("Accuracy", fontsize=9, color=_INK)
    axes[1, 0].set_ylabel("Share", fontsize=9, color=_INK)
    figure = axes[0, 0].get_figure()
    if own:
        columns = 2 if len(rows) == 1 else 4
        options = {"loc": "outside lower center", "ncols": columns, "columnspacing": 1.6}
        figure.legend(handles=_legend(), fontsize=8, frameon=False, handlelength=1.6, **options)
    else:
        axes[0, 0].legend(handles=_legend(), loc="upper left", fontsize=7, frameon=False)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 200) -> None:
    """Write a figure; a reader sees the old file or the whole new one.

    Args:
        figure: any matplotlib figure.
        path: the file; its suffix is the format, such as ``.png``, ``.pdf`` or ``.svg``.
        dpi: resolution of raster formats, in dots per inch.

    Raises:
        ValueError: the suffix is missing or no format of matplotlib.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.suffix:
        raise ValueError(f"{path.name!r} has no suffix to tell the format: add .png, .pdf or .svg.")
    # On the same file system, without which os.replace is not atomic
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        whole = Path(folder) / path.name
        figure.savefig(whole, dpi=dpi, format=path.suffix[1:], bbox_inches="tight")
        os.replace(whole, path)


def _legend() -> list[Any]:
    over: dict[str, Any] = {
        "facecolor": _OVER_FILL,
        "edgecolor": _OVER,
        "hatch": "/////",
        "linewidth": 0.6,
    }
    under: dict[str, Any] = {
        "facecolor": _UNDER_FILL,
        "edgecolor": _UNDER,
        "hatch": "/////",
        "linewidth": 0.6,
    }
    return [
        Line2D([], [], color=_ACCURACY, linewidth=2, label="accuracy"),
        Line2D([], [], color=_OVER, linewidth=1.3, linestyle=_DASHES, label="mean confidence"),
        Patch(label="over-confident", **over),
        Patch(label="under-confident", **under),
    ]


def _draw_accuracy(ax: Any, bins: ReliabilityBins) -> None:
    filled = (bins.count > 0).numpy()
    left = bins.edges.numpy()[:-1][filled]
    width = np.diff(bins.edges.numpy())[filled]
    accuracy, confidence = bins.accuracy.numpy()[filled], bins.confidence.numpy()[filled]
    bar = {"align": "edge", "linewidth": 0.6}
    ax.bar(left, accuracy, width, color=_BAR, edgecolor="white", **bar)
    for sign, fill, edge in ((1, _OVER_FILL, _OVER), (-1, _UNDER_FILL, _UNDER)):
        gap = sign * (confidence - accuracy) > 0
        ax.bar(
            left[gap],
            (confidence - accuracy)[gap],
            width[gap],
            bottom=accuracy[gap],
            facecolor=fill,
            edgecolor=edge,
            hatch="/////",
            **bar,
        )
    ax.hlines(accuracy, left, left + width, color=_ACCURACY, linewidth=2)
    ax.plot([0, 1], [0, 1], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    # Room for the thick line of an accuracy of 1
    ax.set_ylim(0, 1.01)


def _draw_histogram(ax: Any, bins: ReliabilityBins, accuracy: float) -> None:
    edges, share = bins.edges.numpy(), (bins.count / bins.count.sum()).numpy()
    ax.bar(edges[:-1], share, np.diff(edges), align="edge", color="#c4c4c4", edgecolor="white")
    confidence = float((bins.confidence.nan_to_num().numpy() * share).sum())
    ax.axvline(accuracy, color=_ACCURACY, linewidth=1.5)
    ax.axvline(confidence, color=_OVER, linewidth=1.3, linestyle=_DASHES)
    ax.set_xlabel("Confidence", fontsize=9, color=_INK)


def _style(ax: Any) -> None:
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_INK)
    ax.tick_params(labelsize=8, color=_INK, labelcolor=_INK)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
