"""The program for a network of billions in two steps, on a tiny network by its own command."""

import json
from pathlib import Path

import pytest
import tiny
from own_tokenizer import build_tokenizer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize("quantized", [False, True])
def test_it_prints_its_table_beside_what_papers_print(tmp_path, monkeypatch, quantized):
    monkeypatch.syspath_prepend(BENCHMARKS)
    large = pytest.importorskip("large")
    import typer

    if quantized:  # on a CPU with AVX512-BF16 it would pack its weights, after which none train
        layers = pytest.importorskip("bitsandbytes.nn.modules", reason="needs bitsandbytes")
        monkeypatch.setattr(layers, "has_avx512bf16", lambda: False)
    net = tiny.llama(
        vocab_size=400,
        max_position_embeddings=128,
        hidden_size=64,
        intermediate_size=64,
        num_key_value_heads=4,
    )
    net.save_pretrained(tmp_path / "net")
    build_tokenizer(["a few words"], eos="<e>", pad="<p>").save_pretrained(tmp_path / "net")
    folder = tmp_path / "data" / "arc_easy"
    folder.mkdir(parents=True)
    for split, count in {"train": 10, "test": 6}.items():
        rows = [
            {"question": f"{split} {k}?", "choices": ["one", "two words"], "label": k % 2}
            for k in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    app = typer.Typer()
    app.command()(large.main)
    monkeypatch.setattr(large, "PUBLISHED", tmp_path / "published.yaml")
    row = "[1.0 2.0 n/a, 55.0 4.0 0.7]"
    large.PUBLISHED.write_text(
        f"tasks: [boolq, arc_easy]\nmodels: {{{tmp_path / 'net'}: {{a paper: {row}}}}}"
    )
    how = ["--model", str(tmp_path / "net"), "--data-dir", str(tmp_path / "data")]
    how += ["--task", "arc_easy", "--max-steps", "2", "--seeds", "0"]
    how += ["--quantized"] if quantized else []
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), *how])
    assert done.exit_code == 0, done.exception
    for name in ("lora", "split:lora", "bayesian-lora"):
        assert f"predict {name}, seed 0: " in done.stdout
        assert f"\n| {name} | " in done.stdout
    assert "\n| a paper | 55.0 | 4.0 | 0.7 |\n" in done.stdout
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["n_train"] for row in found["rows"]} == {10}
    assert "'mean': 0.0001" in found["settings"]["methods"]["lora"]
