import json

import pytest

from pyro_blora.data import DataError, Item, read_json_lines

GOOD = {"id": "a-0", "question": "2 + 2?", "choices": ["3", "4"], "label": 1}


def write(folder, *lines):
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


def test_reads_items_in_file_order(tmp_path):
    path = write(tmp_path, line(), line(id="a-1", label=0), b"")
    expected = [Item("a-0", "2 + 2?", ("3", "4"), 1), Item("a-1", "2 + 2?", ("3", "4"), 0)]
    assert read_json_lines(path) == expected
    assert read_json_lines(str(path)) == expected


def test_tolerates_further_keys_blank_lines_line_ends_and_a_byte_order_mark(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + line(extra=[1]) + b"\r", b"  ", line())
    assert len(read_json_lines(path)) == 2


def test_text_is_utf8_and_other_line_separators_do_not_split(tmp_path):
    question = "Caf\u00e9\u2028\u4f60?"
    record = json.dumps(GOOD | {"question": question}, ensure_ascii=False).encode()
    assert read_json_lines(write(tmp_path, record))[0].question == question


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (b"{", "not JSON"),
        (b"[1]", "expected an object"),
        (b'"text"', "expected an object"),
        (b"\xff", "not UTF-8"),
        (line(label=2), "from 0 to 1"),
        (line(label=None), "expected an integer"),
        (line(choices=["3"]), "at least 2"),
        (line(choices="34"), "expected a list"),
        (line(choices=["3", 4]), r"choices[1] is 4"),
        (line(question=""), "question is ''"),
        (b'{"id": "a", "question": "?", "choices": ["3", "4"]}', "'label' is missing"),
        (
            b'{"id": "a", "question": "?", "choices": ["3", "4"], "labels": 0}',
            "rename 'labels' to 'label'",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, part):
    path = write(tmp_path, line(), bad)
    message = message_of(path)
    assert message.startswith(f"{path}, line 2: ")
    assert part in message


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file(tmp_path, content):
    assert "has no items" in message_of(write(tmp_path, content))


def test_a_missing_split_names_the_others(tmp_path):
    path = write(tmp_path, line())
    message = message_of(path.with_name("train.jsonl"))
    assert "no split 'train'" in message
    assert "it has test" in message


def test_a_missing_task_names_the_near_ones(tmp_path):
    write(tmp_path, line())
    assert "did you mean arc?" in message_of(tmp_path / "acr" / "test.jsonl")


def test_a_missing_task_without_near_ones_names_all(tmp_path):
    write(tmp_path, line())
    (tmp_path / "README.md").write_text("text")
    assert "did you mean arc?" in message_of(tmp_path / "zzz" / "test.jsonl")


def test_a_missing_folder(tmp_path):
    assert "no folder" in message_of(tmp_path / "nowhere" / "arc" / "test.jsonl")


def test_an_empty_folder(tmp_path):
    assert "no task folders" in message_of(tmp_path / "arc" / "test.jsonl")
    (tmp_path / "arc").mkdir()
    assert "no .jsonl" in message_of(tmp_path / "arc" / "test.jsonl")


def test_a_folder_in_place_of_a_file(tmp_path):
    assert "is a folder" in message_of(write(tmp_path, line()).parent)
