"""Sample splitting: directions learn from some of the examples, the posterior from the others.

Directions are parameters of the prior: they are fitted, and no KL sees it. A posterior that learns
from the same examples takes what they have memorised for evidence, and the scale of the scores
with it. From examples that they have not seen, or not for a while, it learns what they are worth
on new ones.

Reference: for data-dependent priors of PAC-Bayes bounds, Perez-Ortiz et al. 2021, "Tighter risk
certificates for neural networks", arXiv:2007.12911. What it does here: docs/calibration_tried.md.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.inference.batches import Batches

__all__ = ["learners", "parts_of", "sparing"]


def parts_of(count: int, share: float, seed: int) -> tuple[list[int], ...]:
    """The indices, sorted, of the examples that directions learn from, and of the others.

    Each has one at least; a single example makes no parts. Examples that tell of each other, such
    as a question asked twice, may come apart.

    Args:
        count: of the examples.
        share: of them that directions learn from, in (0, 1).
        seed: of the choice.
    """
    if count < 2:
        return ()
    order = list(range(count))
    random.Random(seed).shuffle(order)
    cut = min(max(round(share * count), 1), count - 1)
    return sorted(order[:cut]), sorted(order[cut:])


def learners(
    model: nn.Module, groups: Sequence[Mapping[str, Any]]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Directions, factors that are not random and heads; and all else. A guide has no directions.

    Args:
        model: the prior, which has the directions, and the heads that are trained as points.
        groups: the optimizer's, named by the role.

    Raises:
        ConfigurationError: there are none of either.
    """
    points = set(model.parameters())
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for group in groups:
        for parameter in group["params"]:
            is_point = group["name"] in ("direction", "head") and parameter in points
            found[not is_point].append(parameter)
    if not all(found):
        missing = "no directions" if found[1] else "directions alone"
        raise ConfigurationError(
            f"direction_share= parts examples between directions and all else, and there are "
            f"{missing} to train here; pass direction_share=0."
        )
    return found


def sparing(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], stream: Batches
) -> Callable[[list[int]], list[nn.Parameter]]:
    """What tells the parameters that do not learn from a batch, by the indices of its examples.

    Args:
        model: as of :func:`learners`, which says what is raised, too.
        groups: likewise.
        stream: the batches, of two parts as of :func:`parts_of`.
    """
    directions, others = learners(model, groups)
    of_others = frozenset(stream.parts[1])

    def spared(indices: list[int]) -> list[nn.Parameter]:
        if not stream.parted:
            return []
        return directions if indices[0] in of_others else others

    return spared
