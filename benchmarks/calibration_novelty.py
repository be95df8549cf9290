"""Whether a method's doubt tells items of another data set from those it was trained for."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean, stdev

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

__all__ = ["doubts", "told_apart"]

Doubts = dict[str, dict[str, Tensor]]  # by data set, and by what measures it; of each item


def doubts(found: Mapping[str, Tensor], scale: float) -> tuple[Doubts, Doubts]:
    """The doubts of a run's items, in nats, and those of the run with its temperature scaled.

    Mutual information is that of the draws, before any temperature.

    Args:
        found: the arrays of a cell, ``"set/probs"`` and ``"set/epistemic"``.
        scale: the temperature.
    """
    plain: Doubts = defaultdict(dict)
    scaled: Doubts = defaultdict(dict)
    for key, values in found.items():
        name, kind = key.split("/")
        if kind == "probs":
            log = values.double().log()
            for doubt, p in ((plain, values.double()), (scaled, (log / scale).softmax(-1))):
                doubt[name]["entropy"] = torch.special.entr(p).sum(-1)
        elif kind == "epistemic" and bool((values > 0).any()):  # a point has none
            plain[name]["mutual information"] = values
    return plain, scaled


def told_apart(runs: Mapping[str, Mapping[int, Doubts]], sets: list[str]) -> list[str]:
    """A table of the AUROC in % of each doubt for other sets' items against the test items.

    The mean over the sets, and its standard error over seeds; 50 is chance.
    """
    rows: list[tuple[float, str]] = []
    for method, seeds in runs.items():
        for kind in ("entropy", "mutual information"):
            means = [
                fmean(auroc(run["test"][kind], run[name][kind]) for name in sets)
                for run in seeds.values()
                if all(kind in run.get(name, {}) for name in ["test", *sets])
            ]
            if means:
                spread = f" ± {stdev(means) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
                row = f"| {method} | {kind} | {len(means)} | {fmean(means):.1f}{spread} |"
                rows.append((-fmean(means), row))
    head = [f"| method | doubt | seeds | AUROC %, mean of {', '.join(sets)} |", "|---|---|---|---|"]
    return [*head, *(row for _, row in sorted(rows))] if rows else []


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability in % that an item from outside is doubted more than one from inside."""
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    doubt = torch.cat([inside, outside]).double()
    return 100 * float(binary_auroc(doubt / doubt.max(), target))  # in [0, 1], as it takes them
