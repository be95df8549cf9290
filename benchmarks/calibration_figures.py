"""The pictures of the calibration benchmark's report."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_blora.evaluation.metrics import evaluate, risk_coverage
from pyro_blora.evaluation.plots import reliability_diagram, save_figure

TITLES = {
    "lora": "plain LoRA",
    "lora-best": "its best step",
    "temperature:lora-best": "that one, temperature scaled",
    "default": "BayesianLoRA(net)",
}
Pair = tuple[Tensor, Tensor]  # probabilities, labels


def joined(parts: Iterable[Pair]) -> Pair:
    """The items of several tasks as of one; an option that a task has not has probability zero."""
    probs, labels = zip(*parts, strict=True)
    most = max(p.shape[1] for p in probs)
    pad = torch.nn.functional.pad
    return torch.cat([pad(p, (0, most - p.shape[1])) for p in probs]), torch.cat(labels)


def draw(pooled: Mapping[str, Pair], folder: Path, name: str, ours: str) -> None:
    """Reliability, accuracy beside NLL, and risk beside coverage, all seeds together."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = [m for m in ("lora", "lora-best", "temperature:lora-best", ours) if m in pooled]
    diagrams = reliability_diagram({TITLES.get(m, m): pooled[m] for m in shown})
    save_figure(diagrams, folder / f"{name}-reliability.png")

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, (probs, labels) in pooled.items():
        if method.startswith("temperature:"):
            continue
        found = evaluate(probs, labels)
        axes.scatter(found.nll, 100 * found.acc, color="#d9484a" if method == ours else "#2f5f94")
        axes.annotate(
            method,
            (found.nll, 100 * found.acc),
            fontsize=7,
            xytext=(3, 3),
            textcoords="offset points",
        )
    axes.set(xlabel="NLL (lower is better)", ylabel="accuracy %")
    save_figure(figure, folder / f"{name}-nll.png")

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in shown:
        probs, labels = pooled[method]
        confidence, predicted = probs.max(-1)
        coverage, risk, _ = risk_coverage(-confidence, predicted != labels)
        axes.plot(100 * coverage, 100 * risk, label=method, linewidth=2 if method == ours else 1)
    axes.set(xlabel="items answered, the most confident first, %", ylabel="error among them, %")
    axes.legend(frameon=False)
    save_figure(figure, folder / f"{name}-risk.png")
