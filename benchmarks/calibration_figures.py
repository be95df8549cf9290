"""The picture of the calibration benchmark's report."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pyro_blora.evaluation.plots import reliability_diagram, save_figure

TITLES = {
    "lora": "plain LoRA",
    "lora-best": "its best step",
    "temperature:lora-best": "that one, temperature scaled",
    "bayesian-lora": "BayesianLoRA(net)",
}
Pair = tuple[Tensor, Tensor]  # probabilities, labels


def joined(parts: Iterable[Pair]) -> Pair:
    """The items of several tasks as of one; an option that a task has not has probability zero."""
    probs, labels = zip(*parts, strict=True)
    most = max(p.shape[1] for p in probs)
    pad = torch.nn.functional.pad
    return torch.cat([pad(p, (0, most - p.shape[1])) for p in probs]), torch.cat(labels)


def draw(pooled: Mapping[str, Pair], path: Path, ours: str) -> None:
    """Reliability diagrams, all seeds and tasks together."""
    shown = [m for m in ("lora", "lora-best", "temperature:lora-best", ours) if m in pooled]
    save_figure(reliability_diagram({TITLES.get(m, m): pooled[m] for m in shown}), path)
