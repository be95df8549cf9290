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
    for i in range(start, start + count):
        word = WORDS[i % len(WORDS)]
        choices = [other for other in WORDS if other != word][:2]
        choices.insert(i % 3, word)
        question = f"Which word is {word}, number {i}?"
        yield {"id": str(i), "question": question, "choices": choices, "label": i % 3}


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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "words").mkdir()
    for split, part in (("train", items(40, 0)), ("test", items(21, 100))):
        lines = "".join(json.dumps(item) + "\n" for item in part)
        (folder / "words" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line, whose exit code is one of ``codes``; gives stdout and stderr."""

    def run(*arguments, codes=(0,)):
        monkeypatch.setattr(sys, "argv", ["pyro-blora", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert code in codes, err
        return out, err

    return run


@pytest.fixture
def run_words(run, model_dir, data_dir):
    """The same for what trains: ``COMMAND OUT ...`` on the task ``words``."""

    def run_words(command, out, *options, **expected):
        words = ["--model", model_dir, "--task", "words", "--data-dir", data_dir, "--out", out]
        return run(command, *words, *options, **expected)

    return run_words


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """The current folder has a module ``mine`` with a prior and a guide."""
    (tmp_path / "mine.py").write_text("from own_classes import Plain, Spread\n")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mine", None)
