"""Sample splitting: directions learn from some of the examples, the posterior from the others.

Directions are parameters of the prior: they are fitted, and no KL sees it. A posterior that learns
from the same examples takes what they have memorised for evidence, and the scale of the scores
with it. From examples that they have not seen it learns what they are worth on new ones.

Reference: for data-dependent priors of PAC-Bayes bounds, Perez-Ortiz et al. 2021, "Tighter risk
certificates for neural networks", arXiv:2007.12911. What it does here: docs/calibration.md.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from pyro_blora.errors import ConfigurationError

__all__ = ["check_share", "parts_of", "spared"]


def check_share(share: float) -> None:
    """Raises ConfigurationError where ``share`` is none in [0, 1)."""
    if not 0 <= share < 1:
        raise ConfigurationError(f"direction_share={share!r} must be a share in [0, 1).")


def parts_of(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """The indices of the examples that directions learn from, and of the others.

    Each part has one at least, but for no share, or a single example: then all are others.
    """
    order = list(range(count))
    if share == 0 or count < 2:
        return [], order
    random.Random(seed).shuffle(order)
    cut = min(max(round(share * count), 1), count - 1)
    return sorted(order[:cut]), sorted(order[cut:])


def spared(
    indices: Sequence[int], of_directions: Collection[int], groups: Sequence[Mapping[str, Any]]
) -> list[nn.Parameter]:
    """The parameters that do not learn from these examples.

    Args:
        indices: the examples of a batch, all of one part.
        of_directions: the examples that directions learn from.
        groups: the optimizer's, named by the role. Where they have no directions, or nothing else,
            and where no example is theirs, everything learns from every example.
    """
    roles = {group["name"] for group in groups}
    if not of_directions or "direction" not in roles or len(roles) == 1:
        return []
    theirs = indices[0] in of_directions
    return [p for g in groups if (g["name"] == "direction") != theirs for p in g["params"]]
