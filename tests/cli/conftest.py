import json
import sys

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer

from pyro_blora import cli

WORDS = ("red", "green", "blue", "cold", "warm", "round")


def items(count, start):
    """Questions whose answer is the word they repeat: learnable by a tiny network."""
    made = []
    for i in range(start, start + count):
        word = WORDS[i % len(WORDS)]
        others = [w for w in WORDS if w != word][:2]
        choices = [*others[: i % 3], word, *others[i % 3 :]]
        question = f"Which word is {word}, number {i}?"
        made.append({"id": str(i), "question": question, "choices": choices, "label": i % 3})
    return made


@pytest.fixture(scope="session")
def word_items():
    """:func:`items`."""
    return items


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny random Llama and its tokenizer, saved as a hub folder is."""
    folder = tmp_path_factory.mktemp("model")
    texts = [f"Question: {item['question']}\nAnswer: {' '.join(WORDS)}" for item in items(30, 0)]
    tokenizer = build_tokenizer(texts, eos="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "max_position_embeddings": 128}
    tiny.llama(**sizes, initializer_range=0.02).save_pretrained(folder)
    return folder


@pytest.fixture
def data_dir(tmp_path):
    """A folder with one task, ``words``."""
    folder = tmp_path / "data" / "words"
    folder.mkdir(parents=True)
    for split, count, start in (("train", 40, 0), ("test", 21, 100)):
        lines = "".join(json.dumps(item) + "\n" for item in items(count, start))
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder.parent


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line; gives the exit code, stdout and stderr."""

    def run(*arguments, columns=160):
        monkeypatch.setattr(sys, "argv", ["pyro-blora", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code or 0, out, err

    return run


OWN = """
from own_classes import Plain, Spread

class Needs(Plain):
    def __init__(self, what):
        super().__init__()
        self.what = what
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """The current folder has a module ``mine`` with a prior and a guide."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mine", None)
