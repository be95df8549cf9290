"""The three splits of the embedded set."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache

from pyro_blora.data.facts.drafts import Draft, drafts_of, shuffled
from pyro_blora.data.facts.table import Table, tables
from pyro_blora.data.items import DataError, Item

__all__ = ["SPLITS", "drafts", "facts_items", "parts"]

SPLITS = ("train", "validation", "test")

_SHARES = {"validation": 0.14, "test": 0.4}  # of a relation's facts; the rest is for training
_FEWEST = {"lookup": 0, "choice": 0, "order": 4, "property": 3}  # facts, for any question at all
_LIMITS = {"train": 14, "validation": 4, "test": 6}  # questions that list things, for a relation


def facts_items(split: str) -> list[Item]:
    """Return one split of the embedded commonsense set.

    Short English questions about sizes, materials, uses, animals, places, time, causes and more,
    with four choices of which exactly one is right. They are made from tables of facts by a fixed
    seed: the same items in every process. No fact of a relation is in two splits, right labels
    are balanced, and about half of the test items use a wording that no other split has. An id
    such as ``"facts-test-0042-uses.2"`` names the relation and the number of its wording.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        The items, in a fixed mixed order.

    Raises:
        DataError: there is no such split.

    Example::

        >>> item = facts_items("test")[0]
        >>> len(item.choices), item.id[:15]
        (4, 'facts-test-0000')
    """
    if split not in SPLITS:
        near = get_close_matches(split, SPLITS, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SPLITS)}"
        raise DataError(f"the set facts has no split {split!r}; {fix}")
    return list(_items(split))


def drafts(split: str) -> list[Draft]:
    """Return the questions of a split, in order, before their choices have one."""
    found: list[Draft] = []
    for table in tables():
        rng = _rng(split, table.name)
        part = parts(table)[split]
        found += drafts_of(table, part, split == "test", _LIMITS[split], rng)
    return shuffled(_rng(split, "order"), found)


def parts(table: Table) -> Mapping[str, frozenset[str]]:
    """Return which facts of a relation belong to which split."""
    rng = _rng("parts", table.name)
    # things with a property and things without are shared out separately
    pools = [table.facts or table.levels] if not table.yes else [table.yes, table.no]
    shares: dict[str, set[str]] = {split: set() for split in SPLITS}
    for pool in pools:
        rest = shuffled(rng, sorted(pool))
        for split, share in _SHARES.items():
            count = max(_FEWEST[table.kind], round(share * len(pool)))
            shares[split].update(rest[:count])
            rest = rest[count:]
        shares["train"].update(rest)
    return {split: frozenset(names) for split, names in shares.items()}


@cache
def _items(split: str) -> tuple[Item, ...]:
    """Return the items of a split."""
    rng = _rng(split, "choices")
    found = drafts(split)
    labels = shuffled(rng, [index % 4 for index in range(len(found))])
    items = []
    for index, (draft, label) in enumerate(zip(found, labels, strict=True)):
        choices = shuffled(rng, draft.wrong)
        choices.insert(label, draft.right)
        text = draft.text.replace("{list}", _listed(choices))
        name = f"facts-{split}-{index:04d}-{draft.template}"
        items.append(Item(name, text[0].upper() + text[1:], tuple(choices), label))
    return tuple(items)


def _listed(choices: Iterable[str]) -> str:
    """Return ``"a, b, c or d"``."""
    *first, last = choices
    return f"{', '.join(first)} or {last}"


def _rng(*names: str) -> random.Random:
    """Return a source of random numbers of its own for each use."""
    return random.Random("/".join(("pyro_blora.facts", *names)))
