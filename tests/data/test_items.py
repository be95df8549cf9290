import dataclasses

import pytest

from pyro_blora.data import DataError, Item


def test_answer():
    assert Item("a", "2 + 2?", ("3", "4"), 1).answer == "4"


def test_is_frozen_and_hashable():
    item = Item("a", "2 + 2?", ("3", "4"), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.label = 0
    assert len({item, Item("a", "2 + 2?", ("3", "4"), 1)}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "id is ''"),
        ({"id": 3}, "id is 3"),
        ({"question": "  "}, "question is"),
        ({"choices": ("one",)}, "at least 2"),
        ({"choices": ["a", "b"]}, "at least 2"),
        ({"choices": ("a", 2)}, r"choices\[1\] is 2"),
        ({"choices": ("a", " ")}, r"choices\[1\]"),
        ({"label": 2}, "from 0 to 1"),
        ({"label": -1}, "from 0 to 1"),
        ({"label": "1"}, "expected an integer"),
        ({"label": True}, "expected an integer"),
        ({"label": 1.0}, "expected an integer"),
    ],
)
def test_errors(change, message):
    fields = {"id": "a", "question": "2 + 2?", "choices": ("3", "4"), "label": 1} | change
    with pytest.raises(DataError, match=message) as error:
        Item(**fields)
    assert "\n" not in str(error.value)


def test_a_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)
