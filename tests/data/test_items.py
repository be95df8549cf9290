"""Items, the files that hold them, and the prompts that are made of them."""

import json

import pytest

from pyro_blora.data import DataError, Item, Template, read_json_lines, template_for

GOOD = {"id": "a-0", "question": "2 + 2?", "choices": ["3", "4"], "label": 1}


def write_lines(folder, *lines):
    path = folder / "arc" / "test.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(lines))
    return path


def line(**change):
    return json.dumps(GOOD | change).encode()


def message_of(path):
    with pytest.raises(DataError) as error:
        read_json_lines(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_reads_items_in_file_order_whatever_is_between_and_beside_them(tmp_path):
    bom, question = b"\xef\xbb\xbf", "Caf\u00e9\u2028\u4f60?"
    other = json.dumps(GOOD | {"id": "b", "question": question}, ensure_ascii=False).encode()
    path = write_lines(tmp_path, bom + line(extra=[1]) + b"\r", b"  ", other, b"")
    expected = [Item("a-0", "2 + 2?", ("3", "4"), 1), Item("b", question, ("3", "4"), 1)]
    assert read_json_lines(path) == read_json_lines(str(path)) == expected


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (b"{", "Expecting"),
        (b"[1]", "an item must be"),
        (b"\xff", "utf-8"),
        (line(question=" "), "must be texts, got ' '"),
        (line(choices=["3"]), "two answers or more, got ('3',)"),
        (line(choices=["3", 4]), "must be texts, got 4"),
        (line(label=2), "an integer from 0 to 1, got 2"),
        (line(label=True), "an integer from 0 to 1, got True"),
        (b'{"id": "a", "question": "?", "choices": ["3", "4"]}', "KeyError('label')"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, part):
    path = write_lines(tmp_path, line(), bad)
    message = message_of(path)
    assert message.startswith(f"{path}, line 2")
    assert part in message


@pytest.mark.parametrize(
    ("missing", "parts"),
    [
        ("arc/train.jsonl", ("no split 'train'", "Known: test")),
        ("acr/test.jsonl", ("no task 'acr'", "did you mean 'arc'")),
        ("nowhere/arc/test.jsonl", ("no TASK/SPLIT.jsonl", "nowhere")),
    ],
)
def test_what_is_there_in_place_of_a_missing_file_is_named(tmp_path, missing, parts):
    write_lines(tmp_path, line())
    message = message_of(tmp_path / missing)
    assert all(part in message for part in parts)
    assert "has no items" in message_of(write_lines(tmp_path, b"\n \n"))


def test_the_template_of_a_task():
    own, boolq = template_for("my own task"), template_for("boolq")
    item = Item("a", "Is {this} a %s?", ("false", "true"), 1)
    assert own.format(item) == "Question: Is {this} a %s?\nAnswer:"
    assert boolq.format(item) == "Question: Is {this} a %s?\nAnswer (yes or no):"
    assert [(t.scoring, t.label_words) for t in (own, boolq)] == [
        ("options", ()),
        ("labels", (" no", " yes")),
    ]
    with pytest.raises(DataError, match=r"has no \{q\}"):
        Template("Question:", "options")
