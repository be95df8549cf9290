"""The calibration benchmark in a small setting, by its own command, interrupted and continued."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from own_tokenizer import build_tokenizer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
METHODS = ("lora", "lora-best", "bayesian-lora")


def test_a_run_goes_on_where_it_was_killed_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from calibration import app

    net = tiny.llama(vocab_size=400, max_position_embeddings=256)
    for part in (net, build_tokenizer(["a few words"], eos="<e>", pad="<p>")):
        part.save_pretrained(tmp_path / "net")
    settings = yaml.safe_load((BENCHMARKS / "calibration.yaml").read_text())
    settings |= {"rank": 2, "best_every": 2, "out_of_distribution": {"facts": ["facts"]}}
    settings["methods"] = {name: settings["methods"][name] for name in METHODS}
    net = {"model": str(tmp_path / "net"), "blocks": 1, "target_modules": ["q_proj"]}
    settings["networks"] = {"tiny": net}
    cells = {"networks": ["tiny"], "tasks": ["facts"], "steps": [300], "seeds": [0, 1]}
    settings["sweeps"] = {"table": {**cells, "methods": [*METHODS]}}
    settings["development"] = {"networks": {"tiny": ["facts"]}, "seeds": [0], "steps": 300}
    config, out = tmp_path / "config.yaml", tmp_path / "results"
    config.write_text(yaml.safe_dump(settings))

    def run(command, *options):
        done = CliRunner().invoke(app, [command, f"--out={out}", f"--config={config}", *options])
        assert done.exit_code == 0, done.exception
        return done.stdout

    run("tune", "--smoke", "--only", "lora", "--only", "facts")
    run("run", "--smoke", "--only", "bayesian-lora")
    first = (out / "cells.jsonl").read_text()
    (out / "cells.jsonl").write_text(first + '{"task": "facts", "meth')  # killed within a line
    assert "6 cells, 2 of them there" in run("run", "--smoke")
    lines = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert lines[:2] == [json.loads(line) for line in first.splitlines()]
    arrays = np.load(out / "probabilities.npz")
    assert len({(line["method"], line["seed"]) for line in lines}) == len(lines) == 6
    for line in lines:
        name = f"tiny-facts-16-4-{line['method']}-{line['seed']}/test"
        probs, labels = arrays[f"{name}/probs"], arrays[f"{name}/labels"]
        nll = -np.log(probs[np.arange(len(labels)), labels]).mean()
        assert nll == pytest.approx(line["metrics"]["test"]["nll"], rel=1e-4)
    run("report")
    report = (out / "report.md").read_text()
    found = re.findall(r"^\| ([\w:-]+) \| (\d+) \| (\d+) \| (\d) \| \d", report, re.MULTILINE)
    expected = {("lora", "0", "1", "2"), ("lora-best", "8", "1", "2")}
    assert expected | {("bayesian-lora", "0", "2", "2")} <= set(found)
    assert "| lora | entropy | 2 | 50.0 | 50.0 ± 0.0 |" in report  # the other set is the test's
