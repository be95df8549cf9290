"""The benchmark of methods in a small setting, by its own command, interrupted and continued."""

import base64
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


def test_a_run_goes_on_where_it_was_killed_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from methods import app

    name = str(tmp_path / "net")
    net = tiny.llama(vocab_size=400, max_position_embeddings=256)
    for part in (net, build_tokenizer(["a few words"], eos="<e>", pad="<p>")):
        part.save_pretrained(name)
    settings = yaml.safe_load((BENCHMARKS / "methods.yaml").read_text())
    settings |= {"rank": 2, "num_samples": 2, "seeds": [0, 1], "max_validation": 8, "max_test": 8}
    facts = {"data": "facts", "rows": 16, "steps": 4}
    settings["networks"] = {name: {"target_modules": ["q_proj"], "tasks": {"facts": facts}}}
    names = ("bayesian-lora", "lora", "lora-split", "peft")
    settings["methods"] = {each: settings["methods"][each] for each in names}
    for each in names[1:]:
        settings["methods"][each]["rate"] = 5e-6  # soon at the end of the ladder
    config, out = tmp_path / "config.yaml", tmp_path / "results"
    config.write_text(yaml.safe_dump(settings))
    cells = out / "cells.jsonl"

    def run(command, *options):
        done = CliRunner().invoke(app, [command, f"--out={out}", f"--config={config}", *options])
        assert done.exit_code == 0, done.exception

    run("run", "--only", "bayesian-lora", "--only", "facts")
    first = cells.read_text()
    cells.write_text(first + '{"task": "facts", "meth')  # killed within a line
    run("run")
    whole = cells.read_text()
    assert whole.startswith(first)
    run("run")
    assert cells.read_text() == whole
    lines = [json.loads(line) for line in whole.splitlines()]
    tested = [line for line in lines if line["items"] == "test"]
    rows = ["bayesian-lora", *(f"{view}:bayesian-lora" for view in ("mean", "distilled"))]
    assert {line["method"] for line in tested} >= {*rows, "lora", "lora-split", "peft"}
    for line in tested:
        nlls = np.frombuffer(base64.b64decode(line["nlls"]), dtype="<f2")
        assert nlls.astype(float).mean() == pytest.approx(line["nll"], rel=2e-3)
        assert line["sure_wrong"] <= line["sure"] <= len(nlls)
    for method, split in (("lora", False), ("lora-split", True)):
        trials = [c for c in lines if c["method"] == method and c["items"] == "validation"]
        best = min(trials, key=lambda line: line["nll"])["setting"]
        assert {line["setting"]["split"] for line in trials} == {split}
        chosen = [line["setting"] for line in tested if line["method"] == method]
        assert chosen == [best] * 2
    run("report")
    report = (out / "report.md").read_text()
    found = re.findall(r"^\| ([\w:-]+) \| [^|]*\| (\d+) \| 2 \| \d", report, re.MULTILINE)
    assert {("bayesian-lora", "0"), ("mean:bayesian-lora", "0")} <= set(found)
    assert (out / "figures" / "sure.png").stat().st_size > 0


@pytest.mark.parametrize(("best", "trials"), [(1e-3, 5 + 1 + 1), (2e-2, 9 + 1 + 1)])
def test_the_search_goes_on_until_the_best_rate_lies_between_others(best, trials, monkeypatch):
    """The trials are five rates or more, a further setting, and the best without a split."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from methods import Benchmark

    spec = {"rate": 5e-4, "trials": [{"fit": {"kl_weight": 0.1}}]}
    settings = {"seeds": [0], "networks": {"net": {}}, "methods": {"mine": spec}}
    benchmark, tried = Benchmark(settings, Path(), []), []

    def cells_of(network, task, name, setting, seed, items):
        assert (items, seed) == ("validation", 0)
        tried.append(setting)
        far = abs(np.log(setting["rate"] / best))
        return [{"nll": far + 0.1 * setting["split"] - 0.1 * ("fit" in setting)}]

    monkeypatch.setattr(benchmark, "cells_of", cells_of)
    found = benchmark.chosen("net", "task", "mine")
    assert found == {"rate": best, "split": False, **spec["trials"][0]}
    assert len({str(sorted(setting.items())) for setting in tried}) == trials
