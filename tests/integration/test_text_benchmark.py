"""The benchmark of facts as text in two steps, on a tiny network by its own command."""

import json
from pathlib import Path

import pytest
import tiny
from own_tokenizer import build_tokenizer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_it_measures_lora_the_mean_and_draws_on_the_same_prompts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    text = pytest.importorskip("text")
    import typer

    known, unknown = text.facts(3)
    assert not {name for name, _ in known} & {name for name, _ in unknown}
    phrases = [row["prompt"] for row in text.rows(known, *text.PHRASINGS)]
    assert not set(phrases) & {text.ASKED.format(name) for name, _ in known}
    net = tiny.llama(vocab_size=400, max_position_embeddings=128)
    net.save_pretrained(tmp_path / "net")
    tokenizer = build_tokenizer(phrases, eos="<e>", pad="<p>")
    tokenizer.save_pretrained(tmp_path / "net")
    app = typer.Typer()
    app.command()(text.main)
    how = ["--model", str(tmp_path / "net"), "--steps", "2", "--seeds", "0,1"]
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), *how])
    assert done.exit_code == 0, done.exception
    cells = [json.loads(line) for line in (tmp_path / "out/cells.jsonl").read_text().splitlines()]
    assert [cell["seed"] for cell in cells] == [0] * 5 + [1] * 5
    assert all(0 <= cell["kept"] <= cell["right"] <= 20 for cell in cells)
    report = (tmp_path / "out/report.md").read_text()
    assert report == text.report(cells, str(tmp_path / "net"))
    assert report.count("±") == 1 + 5 * 5
