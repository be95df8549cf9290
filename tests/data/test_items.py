"""Items, the files that hold them, and the prompts that are made of them."""

import json
import sys
from types import SimpleNamespace

import pytest

from pyro_blora.data import DataError, Item, Template, load_task, read_hub, template_for
from pyro_blora.data.tables import read_table

GOOD = {"id": "a-0", "question": "2 + 2?", "choices": ["3", "4"], "label": 1}


def write_lines(folder, *lines):
    path = folder / "arc" / "test.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(lines))
    return path


def line(**change):
    return json.dumps(GOOD | change).encode()


def test_reads_items_in_file_order_whatever_is_between_and_beside_them(tmp_path):
    bom, question = b"\xef\xbb\xbf", "Caf\u00e9\u2028\u4f60?"
    other = json.dumps(GOOD | {"id": "b", "question": question}, ensure_ascii=False).encode()
    path = write_lines(tmp_path, bom + line(extra=[1]) + b"\r", b"  ", other, b"")
    expected = [Item("a-0", "2 + 2?", ("3", "4"), 1), Item("b", question, ("3", "4"), 1)]
    assert read_table(path) == read_table(str(path))
    assert load_task("arc", data_dir=tmp_path).test == tuple(expected)


@pytest.mark.parametrize("bad", [b"{", b"[1]", b"\xff"])
def test_a_bad_line_is_named(tmp_path, bad):
    with pytest.raises(DataError, match=r"test\.jsonl, line 2"):
        read_table(write_lines(tmp_path, line(), bad))


BAD = [{"question": " "}, {"choices": ["3"]}, {"choices": ["3", 4]}, {"label": 2}, {"label": True}]


@pytest.mark.parametrize("bad", [*(GOOD | change for change in BAD), {"question": "?"}])
def test_an_item_that_is_none_is_shown(bad):
    with pytest.raises(DataError, match="got "):
        load_task({"test": [GOOD, bad]})


@pytest.mark.parametrize(
    "missing", ["arc/train.jsonl", "acr/test.jsonl", "nowhere/arc/test.jsonl", "arc/test.jsonl"]
)
def test_a_file_that_is_missing_or_empty(tmp_path, missing):
    write_lines(tmp_path, b"\n \n")
    with pytest.raises(DataError):
        read_table(tmp_path / missing)


def test_the_template_of_a_task():
    usual, boolq = template_for("another task"), template_for("boolq")
    item = Item("a", "Is {this} a %s?", ("false", "true"), 1)
    assert usual.format(item) == "Question: Is {this} a %s?\nAnswer:"
    assert boolq.format(item) == "Question: Is {this} a %s?\nAnswer (yes or no):"
    assert (usual.scoring, boolq.scoring) == ("options", "labels")
    assert boolq.label_words == (" no", " yes")
    with pytest.raises(DataError, match=r"has no \{q\}"):
        Template("Question:", "options")


LETTERED = {"choices": {"text": ["a leaf", "a stone"], "label": ["1", "2"]}, "answerKey": "2"}
TEXTS = ("a leaf", "a stone")
FILM = {"idx": 0, "sentence": "a fine film ", "label": 1}
CUP = {"sentence": "The _ broke.", "option1": "cup", "option2": "nut", "answer": "2"}
NEWS = ("World", "Sports", "Business", "Sci/Tech")


@pytest.mark.parametrize(
    ("task", "record", "parts"),
    [
        ("arc_easy", {"question": "Heavy?", **LETTERED}, ("Heavy?", TEXTS, 1)),
        ("openbookqa", {"question_stem": "Heavy is", **LETTERED}, ("Heavy is", TEXTS, 1)),
        ("boolq", {"question": "is it so??", "answer": True}, ("is it so?", ("false", "true"), 1)),
        ("winogrande_s", CUP, ("The _ broke.", ("cup", "nut"), 1)),
        ("sst2", FILM, ("a fine film", ("negative", "positive"), 1)),
        ("ag_news", {"text": "Stocks rise.", "label": 2}, ("Stocks rise.", NEWS, 2)),
    ],
)
def test_a_record_of_the_hub_is_an_item(monkeypatch, task, record, parts):
    hub = SimpleNamespace(load_dataset=lambda *args, **options: [record])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read_hub(task, "test") == [Item(f"{task}-test-0", *parts)]
