"""The tables of facts, as they are in ``tables/*.json``.

A file is an object of relations. A relation has ``wordings``, which every split may use,
``held_out`` wordings, which only test items use, and, depending on its ``kind``,

- ``lookup``: ``facts``, a subject's answer or the list of all its answers, of which the first is
  asked for; ``alike``, groups of answers that are never set against each other. Wordings ask for
  the answer (``{subject}``) or for the subject (``{answer}``);
- ``choice``: ``facts``, a subject's right answer followed by three wrong ones;
- ``order``: ``levels``, a number for each thing, on a rough scale. Wordings ask for the highest
  (``{most}``) or the lowest (``{least}``) of those they list;
- ``property``: the things that have it (``yes``) and those that do not (``no``). Wordings ask for
  the only one of those they list that has it (``{yes}``) or lacks it (``{no}``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["Table", "tables"]


@dataclass(frozen=True)
class Table:
    """One relation: its wordings and its facts; the module says what each kind of relation has.

    Attributes:
        name: the name of the relation, unique in all tables.
        kind: ``"lookup"``, ``"choice"``, ``"order"`` or ``"property"``.
        wordings: the wordings that every split may use.
        held_out: the wordings that only test items use.
        facts: the answers to each subject (lookup), or its right answer and three wrong ones
            (choice).
        alike: groups of answers that are never set against each other (lookup).
        levels: a number for each thing, on a rough scale (order).
        yes: the things that have the property (property).
        no: the things that do not (property).
    """

    name: str
    kind: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    facts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alike: tuple[frozenset[str], ...] = ()
    levels: Mapping[str, int] = field(default_factory=dict)
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()

    def accepted(self, subject: str) -> frozenset[str]:
        """Return every answer that may be right for a subject, so that it is no wrong one."""
        answers = frozenset(self.facts[subject])
        return answers.union(*(group for group in self.alike if group & answers))


@cache
def tables() -> tuple[Table, ...]:
    """Return all relations, by name."""
    found = []
    for file in files(__package__).joinpath("tables").iterdir():
        if file.name.endswith(".json"):
            content = json.loads(file.read_text(encoding="utf-8"))
            found += [_table(name, entry) for name, entry in content.items()]
    return tuple(sorted(found, key=lambda table: table.name))


def _table(name: str, entry: Mapping[str, Any]) -> Table:
    """Return one relation."""
    return Table(
        name=name,
        kind=entry["kind"],
        wordings=tuple(entry["wordings"]),
        held_out=tuple(entry["held_out"]),
        facts={
            subject: (answers,) if isinstance(answers, str) else tuple(answers)
            for subject, answers in entry.get("facts", {}).items()
        },
        alike=tuple(frozenset(group) for group in entry.get("alike", ())),
        levels=entry.get("levels", {}),
        yes=tuple(entry.get("yes", ())),
        no=tuple(entry.get("no", ())),
    )
