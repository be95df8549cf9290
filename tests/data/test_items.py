import pytest

from pyro_blora.data import DataError, Item


def test_is_hashable():
    assert len({Item("a", "2 + 2?", ("3", "4"), 1), Item("a", "2 + 2?", ("3", "4"), 1)}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "id is ''"),
        ({"id": 3}, "id is 3"),
        ({"question": "  "}, "question is"),
        ({"choices": ("one",)}, "at least 2"),
        ({"choices": "ab"}, "choices is 'ab'"),
        ({"choices": ("a", 2)}, r"choices\[1\] is 2"),
        ({"choices": ("a", " ")}, r"choices\[1\]"),
        ({"label": 2}, "label is 2.* from 0 to 1"),
        ({"label": -1}, "from 0 to 1"),
        ({"label": "1"}, "label is '1'.* an integer"),
        ({"label": True}, "an integer"),
        ({"label": 1.0}, "an integer"),
    ],
)
def test_errors(change, message):
    fields = {"id": "a", "question": "2 + 2?", "choices": ("3", "4"), "label": 1} | change
    with pytest.raises(DataError, match=message) as error:
        Item(**fields)
    assert "\n" not in str(error.value)
