"""Pyro's own guides."""

from functools import partial

from pyro.distributions import transforms
from pyro.infer import autoguide

# Base classes, and such as need parts of the user's own
NOT_ALONE = {"Guide", "Callable", "Continuous", "DiscreteParallel", "GuideList", "Messenger"}


def autoguides():
    """Every kind of AutoGuide that needs nothing besides a model, by its name."""
    names = [n for n in autoguide.__all__ if n.startswith("Auto") and n[4:] not in NOT_ALONE]
    flow = partial(transforms.iterated, 1, transforms.planar)
    kinds = {name: getattr(autoguide, name) for name in names}
    return {
        **kinds,
        "AutoNormalizingFlow": partial(kinds["AutoNormalizingFlow"], init_transform_fn=flow),
    }
