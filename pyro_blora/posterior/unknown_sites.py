"""A warning for values that are given to a site that the model does not have."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK

from pyro_blora.errors import near_miss

__all__ = ["warns_of_unknown_sites"]


class _Names(Messenger):
    """Notes the names of all sites within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        self.names.add(msg["name"])


@contextmanager
def warns_of_unknown_sites(latent: Collection[str]) -> Iterator[None]:
    """Warns where ``pyro.condition``, ``do`` or ``replay`` around has a value for no site within.

    Pyro takes no notice of it. Where every latent site has its value, others may come along: an
    AutoGuide's draws have auxiliary ones.
    """
    given = _given()
    if given.issuperset(latent):
        yield
        return
    with _Names() as seen:
        yield
    for name in sorted(given - seen.names):
        warnings.warn(
            f"A value was given for {name!r}, which is no site of the model, so it has no effect; "
            f"{near_miss(name, seen.names)}.",
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
            data = [*data.stochastic_nodes, *data.observation_nodes]
        names.update(data)
    return names
