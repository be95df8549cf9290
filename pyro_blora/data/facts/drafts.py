"""Questions with one right and three wrong answers, from a table and a part of its facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TypeVar

from pyro_blora.data.facts.table import Table

__all__ = ["MIN_GAP", "Draft", "drafts_of", "shuffled"]

T = TypeVar("T")

MIN_GAP = 3
"""How far apart in level the highest (lowest) thing and the next are, to be beyond doubt."""


@dataclass(frozen=True)
class Draft:
    """A question whose choices have no order yet.

    Attributes:
        template: the relation and the number of its wording, such as ``"uses.2"``.
        text: the question; ``{list}`` stands for the choices where it lists them.
        right: the right answer.
        wrong: three wrong answers.
        facts: the subjects or things of the relation that the question is about.
    """

    template: str
    text: str
    right: str
    wrong: tuple[str, ...]
    facts: tuple[str, ...]


def shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
    """Return the items in random order, drawn with ``rng.random()`` alone.

    Python promises the same numbers of that method, and no other, in every version.
    """
    return sorted(items, key=lambda _: rng.random())


def drafts_of(
    table: Table, part: Collection[str], test: bool, limit: int, rng: random.Random
) -> Iterator[Draft]:
    """Yield the questions about a part of a relation's facts.

    Args:
        table: the relation.
        part: the subjects or things that the questions may be about.
        test: whether every other question uses a held-out wording.
        limit: the most questions, for the kinds that combine things.
        rng: the source of every choice.
    """
    wordings = list(enumerate(table.wordings + table.held_out))
    seen, unseen = wordings[: len(table.wordings)], wordings[len(table.wordings) :]

    def pool(index: int) -> list[tuple[str, str]]:
        """Return the wordings that may be used for the n-th question, the preferred one first."""
        usable = unseen if test and index % 2 == 0 else seen
        turn = (index // 2 if test else index) % len(usable)
        return [(f"{table.name}.{number}", text) for number, text in usable[turn:] + usable[:turn]]

    if table.kind in ("lookup", "choice"):
        yield from _about_subjects(table, shuffled(rng, sorted(part)), pool, rng)
    else:
        yield from _about_groups(table, part, pool, limit, rng)


def _about_subjects(
    table: Table,
    part: Sequence[str],
    pool: Callable[[int], list[tuple[str, str]]],
    rng: random.Random,
) -> Iterator[Draft]:
    """Ask about every subject once."""
    asked: set[str] = set()
    for index, subject in enumerate(part):
        for template, wording in pool(index):
            draft = _ask(table, subject, part, template, wording, rng)
            if draft is not None and draft.text not in asked:
                asked.add(draft.text)
                yield draft
                break


def _ask(
    table: Table,
    subject: str,
    part: Sequence[str],
    template: str,
    wording: str,
    rng: random.Random,
) -> Draft | None:
    """Return one question about a subject, or ``None`` if there are no three wrong answers."""
    answers = table.facts[subject]
    if table.kind == "choice":
        text = wording.replace("{subject}", subject)
        return Draft(template, text, answers[0], answers[1:], (subject,))
    accepted = table.accepted(subject)
    if "{answer}" in wording:
        same = {answers[0]}.union(*(group for group in table.alike if answers[0] in group))
        others = [other for other in shuffled(rng, part) if not same & table.accepted(other)]
        text = wording.replace("{answer}", answers[0])
        draft = Draft(template, text, subject, tuple(others[:3]), (subject, *others[:3]))
    else:
        # answers are drawn as often as they are right elsewhere, so none is right more often
        # than wrong in a way that tells it from the others
        firsts = [table.facts[other][0] for other in shuffled(rng, sorted(table.facts))]
        wrong = [answer for answer in dict.fromkeys(firsts) if answer not in accepted]
        text = wording.replace("{subject}", subject)
        draft = Draft(template, text, answers[0], tuple(wrong[:3]), (subject,))
    return draft if len(draft.wrong) == 3 else None


def _about_groups(
    table: Table,
    part: Collection[str],
    pool: Callable[[int], list[tuple[str, str]]],
    limit: int,
    rng: random.Random,
) -> Iterator[Draft]:
    """Ask about groups of four things, each in turn for one of the two directions."""
    groups = {
        slot: iter(shuffled(rng, _groups(table, part, slot)))
        for slot in (("most", "least") if table.kind == "order" else ("yes", "no"))
    }
    for index in range(limit):
        template, wording = pool(index)[0]
        slot = next(slot for slot in groups if f"{{{slot}}}" in wording)
        group = next(groups[slot], None)
        if group is not None:
            text = wording.replace(f"{{{slot}}}", "{list}")
            yield Draft(template, text, group[0], group[1:], tuple(sorted(group)))


def _groups(table: Table, part: Collection[str], slot: str) -> Iterator[tuple[str, ...]]:
    """Yield every group of four that has one answer, the answer first."""
    if table.kind == "property":
        asked, others = (table.yes, table.no) if slot == "yes" else (table.no, table.yes)
        ones = sorted(thing for thing in asked if thing in part)
        for one, three in product(ones, combinations(sorted(set(others) & set(part)), 3)):
            yield one, *three
        return
    sign = 1 if slot == "most" else -1
    for group in combinations(sorted(part), 4):
        first, second, *rest = sorted(group, key=lambda thing: -sign * table.levels[thing])
        if sign * (table.levels[first] - table.levels[second]) >= MIN_GAP:
            yield first, second, *rest
