"""A warning for values that are given to a site that the model does not have."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.poutine import Trace
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK

from pyro_blora.errors import near_miss

__all__ = ["warns_of_unknown_sites"]


@contextmanager
def warns_of_unknown_sites(latent: Collection[str]) -> Iterator[None]:
    """Warns where ``pyro.condition``, ``do`` or ``replay`` around has a value for no site within.

    Pyro takes no notice of it. Where every latent site has its value, others may come along: an
    AutoGuide's draws have auxiliary ones.
    """
    given = _given()
    if not given or given.issuperset(latent):
        yield
        return
    with pyro.poutine.trace() as seen:
        yield
    there = _sites(seen.trace)
    for name in sorted(given - there):
        warnings.warn(
            f"A value was given for {name!r}, which is no site of the model, so it has no effect; "
            f"{near_miss(name, there)}.",
            stacklevel=4,
        )


def _given() -> set[str]:
    """Names of the sites for which a handler that Pyro is running now has a value."""
    names: set[str] = set()
    for handler in _PYRO_STACK:
        data: Any = ()
        if isinstance(handler, ConditionMessenger | DoMessenger):
            data = handler.data
        elif isinstance(handler, ReplayMessenger):
            data = handler.trace or ()
        if isinstance(data, Trace):
            data = _sites(data)
        names.update(data)
    return names


def _sites(trace: Trace) -> set[str]:
    return {*trace.stochastic_nodes, *trace.observation_nodes}
