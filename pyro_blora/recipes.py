"""Named pairs of a prior and a guide."""

from collections.abc import Callable

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.guides import Delta, MatrixNormal, MeanField, SiteGuide
from pyro_blora.models import KroneckerInducing, UpdateModel

__all__ = ["RECIPES", "Recipe", "recipe"]

Recipe = tuple[UpdateModel, SiteGuide]

RECIPES: dict[str, Callable[[int], Recipe]] = {
    "map": lambda rank: (KroneckerInducing(rank=rank), Delta()),
    "mean-field": lambda rank: (KroneckerInducing(rank=rank), MeanField()),
    "bayesian-lora": lambda rank: (KroneckerInducing(rank=rank), MatrixNormal()),
}


def recipe(name: str, *, rank: int = 8) -> Recipe:
    """The prior and the guide of a recipe.

    Args:
        name: a key of ``RECIPES``.
        rank: the rank of the update.

    Raises:
        ConfigurationError: there is no such recipe; the message lists near misses.

    Example::

        >>> recipe("bayesian-lora")[1]
        MatrixNormal()
    """
    if name not in RECIPES:
        raise ConfigurationError(f"recipe {name!r} is unknown; {near_miss(name, RECIPES)}")
    return RECIPES[name](rank)
