"""One object for all groups of layers, or others by the groups' names."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pyro_blora.errors import ConfigurationError, near_miss
from pyro_blora.network.targets import LayerGroup

__all__ = ["by_group"]

T = TypeVar("T")


def by_group(option: str, given: T | Mapping[str, T], groups: Sequence[LayerGroup]) -> dict[str, T]:
    """What ``given`` says of each group, by the group's name.

    Args:
        option: what it is called, for messages.
        given: one object for all groups; or a mapping, whose keys are names of groups or regular
            expressions that match a whole name. A name goes before expressions, and of these the
            first counts, so that ``".*"`` at the end is what all others get.
        groups: the groups.

    Raises:
        ConfigurationError: a key matches no group, or a group no key.

    Example::

        >>> from pyro_blora.network.targets import group_layers
        >>> groups = group_layers({f"0.{name}": nn.Linear(4, 4) for name in "qkv"})
        >>> by_group("prior", {"v": "another", "[qk]": "one"}, groups)
        {'q': 'one', 'k': 'one', 'v': 'another'}
    """
    names = [group.name for group in groups]
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    for key in given:
        if not any(_matches(option, key, name) for name in names):
            raise ConfigurationError(
                f"{option}: {key!r} matches no group of layers; {near_miss(str(key), names)}."
            )
    chosen = {}
    for name in names:
        keys = [name] if name in given else [k for k in given if _matches(option, k, name)]
        if not keys:
            raise ConfigurationError(
                f"{option}: no key of {list(given)} matches group {name!r}; add it, or '.*' at the "
                "end for all others."
            )
        chosen[name] = given[keys[0]]
    return chosen


def _matches(option: str, key: str, name: str) -> bool:
    try:
        return key == name or re.fullmatch(key, name) is not None
    except (re.error, TypeError) as error:
        raise ConfigurationError(
            f"{option}: {key!r} is neither the name of a group nor a regular expression ({error})."
        ) from error
