"""Whether a method's doubt tells items of another data set from those it was trained for."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import torch
from calibration_figures import Pair
from torch import Tensor

from pyro_blora.evaluation.metrics import auroc

__all__ = ["Doubts", "doubts", "told_apart"]

Doubts = dict[str, dict[str, Tensor]]  # by data set, and by what measures it; of each item
KINDS = ("entropy", "mutual information")


def doubts(run: Mapping[str, Pair], epistemic: Mapping[str, Tensor]) -> Doubts:
    """The doubts of a run's items, in nats.

    Items are those with as many options as the first test item has: more make more entropy.

    Args:
        run: probabilities and labels of each data set.
        epistemic: mutual information of its items, where there is any; that of a point is zero.
    """
    found: Doubts = defaultdict(dict)
    options = int((run["test"][0][0] > 0).sum())
    for name, (probs, _) in run.items():
        alike = (probs > 0).sum(1) == options
        if not bool(alike.any()):
            continue
        found[name]["entropy"] = torch.special.entr(probs[alike].double()).sum(1)
        mutual = epistemic.get(name, torch.zeros(len(alike)))[alike].double()
        if bool((mutual > 0).any()):
            found[name]["mutual information"] = mutual
    return found


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
