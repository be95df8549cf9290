"""Paired differences of the calibration benchmark: a method less the best others, item by item."""

from collections.abc import Collection, Mapping

import torch
from calibration_figures import Pair
from torch import Tensor

__all__ = ["Run", "paired"]

Run = dict[str, Pair]  # by data set


def paired(
    methods: Mapping[str, Mapping[int, Run]], ours: str, kin: Collection[str], *data: str
) -> list[str]:
    """The difference of NLL, Brier score and ECE to the three best others, mean over data sets.

    Each is compared on the seeds that both have. There are two errors of the mean: over items, each
    item's differences averaged over seeds first, and over seeds, where there are several.

    Args:
        methods: predictions by method, seed and data set.
        ours: the method that the others are compared with.
        kin: variants of it, which are no others.
        data: the data sets over which the mean is.
    """
    found = {}
    for name in set(methods) - {ours, *kin} if ours in methods else ():
        gaps = [
            [_scores(*methods[ours][seed][d]) - _scores(*methods[name][seed][d]) for d in data]
            for seed in sorted(set(methods[ours]) & set(methods[name]))
            if set(data) <= set(methods[ours][seed]) & set(methods[name][seed])
        ]
        if gaps:
            found[name] = [torch.stack(gap) for gap in zip(*gaps, strict=True)]
    rows = []
    for index, title in enumerate(("NLL", "Brier", "ECE")):

        def by_seed(name: str, index: int = index) -> Tensor:
            return torch.stack([gap[:, index].mean(-1) for gap in found[name]]).mean(0)

        behind = sorted(found, key=lambda name: (-float(by_seed(name).mean()), name))
        for other in behind[:3]:
            each = [gap[:, index].mean(0) for gap in found[other]]
            error = sum(float(gap.var()) / len(gap) for gap in each) ** 0.5 / len(data)
            means = by_seed(other)
            text = f"{title} of `{ours}` less that of `{other}`: {float(means.mean()):+.4f}"
            text += f" ± {error:.4f} over items"
            if len(means) > 1:
                text += f", ± {float(means.std()) / len(means) ** 0.5:.4f} over {len(means)} seeds"
            rows.append(text + ".")
    return rows


def _scores(probs: Tensor, labels: Tensor) -> Tensor:
    """NLL and Brier score of each item, and what it adds to the ECE's mean, ``3 x N``.

    The ECE is the mean of confidence less correctness, with the sign that its sum has in the item's
    bin: to first order, where no sign changes, the variance of these is that of the ECE.
    """
    probs = probs.double()
    nll = -probs.gather(1, labels[:, None]).squeeze(1).clamp_min(1e-38).log()
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[1])
    confidence, predicted = probs.max(1)
    gap = confidence - (predicted == labels).double()
    bins = (15 * confidence).ceil().long()
    sign = torch.zeros(16).double().index_add(0, bins, gap).sign()[bins]
    return torch.stack([nll, (probs - one_hot).square().sum(1), sign * gap])
