"""Whether a method's doubt tells items of another data set from those it was trained for."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

from pyro_blora.evaluation.metrics import auroc

__all__ = ["Doubts", "doubts", "told_apart"]

Doubts = dict[str, dict[str, Tensor]]  # by data set, and by what measures it; of each item
KINDS = ("entropy", "mutual information")


def doubts(found: Mapping[str, Tensor], scale: float) -> tuple[Doubts, Doubts]:
    """The doubts of a run's items, in nats, and those of the run with its temperature scaled.

    Items are those with as many options as the first test item has: more make more entropy.
    Mutual information is that of the draws, before any temperature.

    Args:
        found: the arrays of a cell, ``"set/probs"`` and ``"set/epistemic"``.
        scale: the temperature.
    """
    plain: Doubts = defaultdict(dict)
    scaled: Doubts = defaultdict(dict)
    options = int((found["test/probs"][0] > 0).sum())
    for key in (key for key in found if key.endswith("/probs")):
        name = key.split("/")[0]
        alike = (found[key] > 0).sum(1) == options
        if not bool(alike.any()):
            continue
        p, mutual = found[key][alike].double(), found[f"{name}/epistemic"][alike]
        plain[name]["entropy"] = torch.special.entr(p).sum(1)
        scaled[name]["entropy"] = torch.special.entr((p.log() / scale).softmax(1)).sum(1)
        if bool((mutual > 0).any()):  # a point has none
            plain[name]["mutual information"] = mutual.double()
    return plain, scaled


def told_apart(runs: Mapping[str, Mapping[int, Doubts]], sets: Sequence[str]) -> list[str]:
    """A table of the AUROC in % of each doubt for another set's items against the test items.

    Means over seeds; the last column is that over sets, with its standard error over seeds. 50 is
    chance, and below it other sets' items are doubted less. Empty where there is nothing to tell.
    """
    rows: list[tuple[float, str]] = []
    sets = [d for d in sets if all(d in run for seeds in runs.values() for run in seeds.values())]
    for method, seeds in runs.items():
        for kind in KINDS if sets else ():
            asked = [run for run in seeds.values() if all(kind in run[d] for d in ["test", *sets])]
            found = [[100 * auroc(run["test"][kind], run[d][kind]) for d in sets] for run in asked]
            if found:
                each = " | ".join(f"{fmean(column):.1f}" for column in zip(*found, strict=True))
                means = [fmean(row) for row in found]
                spread = f" ± {stdev(means) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
                mean = fmean(means)
                text = f"| {method} | {kind} | {len(means)} | {each} | {mean:.1f}{spread} |"
                rows.append((-mean, text))
    if not rows:
        return []
    head = f"| method | doubt | seeds | {' | '.join(sets)} | mean |"
    return [head, "|---" * (len(sets) + 4) + "|", *(row for _, row in sorted(rows))]
