import hashlib
import json
from collections import Counter
from itertools import combinations

import pytest

from pyro_blora.data import DataError, facts_items
from pyro_blora.data.facts.drafts import MIN_GAP
from pyro_blora.data.facts.generate import SPLITS, drafts
from pyro_blora.data.facts.table import tables

DIGEST = "4de3771ee8beead67435f4fd4e9816be9fe6f9358421fb8e98fc945693ab08f1"

TABLES = {table.name: table for table in tables()}
ITEMS = {split: facts_items(split) for split in SPLITS}
EVERY = [item for items in ITEMS.values() for item in items]


def template_of(item):
    return item.id.split("-", 3)[3]


def relation_of(draft):
    return draft.template.rsplit(".", 1)[0]


def test_sizes():
    assert len(ITEMS["train"]) >= 800
    assert len(ITEMS["validation"]) >= 200
    assert len(ITEMS["test"]) >= 500


def test_the_set_is_always_the_same():
    text = json.dumps([[i.id, i.question, i.choices, i.label] for i in EVERY])
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == DIGEST


def test_a_caller_may_change_its_list():
    facts_items("test").clear()
    assert facts_items("test") == ITEMS["test"]


def test_an_unknown_split():
    with pytest.raises(DataError, match="did you mean 'train'"):
        facts_items("trian")
    with pytest.raises(DataError, match="choose one of train, validation, test"):
        facts_items("dev")


def test_four_different_choices():
    assert all(len(item.choices) == len(set(item.choices)) == 4 for item in EVERY)


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(split):
    counts = Counter(item.label for item in ITEMS[split])
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == {0, 1, 2, 3}


@pytest.mark.parametrize("split", SPLITS)
def test_ids(split):
    for index, item in enumerate(ITEMS[split]):
        assert item.id.startswith(f"facts-{split}-{index:04d}-")
        relation, number = template_of(item).rsplit(".", 1)
        table = TABLES[relation]
        assert 0 <= int(number) < len(table.wordings + table.held_out)


def test_no_question_is_asked_twice():
    assert max(Counter(item.question for item in EVERY).values()) == 1


def test_questions_read_well():
    for item in EVERY:
        assert item.question[0] == item.question[0].upper()
        assert "{" not in item.question
        assert "  " not in item.question
        assert item.question.isascii()


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_no_fact_is_in_two_splits(one, other):
    first, second = (
        {(relation_of(draft), fact) for draft in drafts(split) for fact in draft.facts}
        for split in (one, other)
    )
    assert not first & second


def test_a_third_of_the_test_items_has_wordings_of_their_own():
    known = {template_of(item) for split in ("train", "validation") for item in ITEMS[split]}
    new = [item for item in ITEMS["test"] if template_of(item) not in known]
    assert len(new) >= len(ITEMS["test"]) / 3
    assert len({template_of(item).split(".")[0] for item in new}) == len(TABLES)


def test_wordings_are_different():
    wordings = [
        (table.name, text) for table in TABLES.values() for text in table.wordings + table.held_out
    ]
    assert len(wordings) == len(set(wordings))


def right_answers(table, draft):
    """Return the choices of a question that the table itself says are right, or may be."""
    choices = (draft.right, *draft.wrong)
    number = int(draft.template.rsplit(".", 1)[1])
    wording = (table.wordings + table.held_out)[number]
    if table.kind == "choice":
        return [choice for choice in choices if choice == table.facts[draft.facts[0]][0]]
    if table.kind == "property":
        having = table.yes if "{yes}" in wording else table.no
        return [choice for choice in choices if choice in having]
    if table.kind == "order":
        sign = 1 if "{most}" in wording else -1
        levels = {choice: sign * table.levels[choice] for choice in choices}
        return [choice for choice in choices if levels[choice] > max(levels.values()) - MIN_GAP]
    if "{subject}" in wording:
        return [choice for choice in choices if choice in table.accepted(draft.facts[0])]
    asked = table.facts[draft.right][0]
    return [choice for choice in choices if asked in table.accepted(choice)]


@pytest.mark.parametrize("split", SPLITS)
def test_one_answer_is_right(split):
    found = drafts(split)
    for draft, item in zip(found, ITEMS[split], strict=True):
        assert set(item.choices) == {draft.right, *draft.wrong}
        assert right_answers(TABLES[relation_of(draft)], draft) == [draft.right] == [item.answer]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_are_sound(table):
    assert table.kind in ("lookup", "choice", "order", "property")
    assert table.wordings
    assert table.held_out
    for answers in table.facts.values():
        assert len(answers) == len(set(answers))
        assert table.kind != "choice" or len(answers) == 4
    assert not set(table.yes) & set(table.no)
    slots = {
        "lookup": ("{subject}", "{answer}"),
        "choice": ("{subject}",),
        "order": ("{most}", "{least}"),
        "property": ("{yes}", "{no}"),
    }[table.kind]
    for wording in table.wordings + table.held_out:
        assert sum(wording.count(slot) for slot in slots) == wording.count("{") == 1


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_relation_is_asked_about_in_train_and_test(name):
    for split in ("train", "test"):
        assert any(relation_of(draft) == name for draft in drafts(split))


def test_no_answer_can_be_told_by_its_length():
    longest = sum(
        len(item.answer) == max(map(len, item.choices))
        and sum(len(choice) == len(item.answer) for choice in item.choices) == 1
        for item in EVERY
    )
    assert longest / len(EVERY) < 0.4
