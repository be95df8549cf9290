"""The calibration benchmark in a small setting, by its own command, interrupted and continued."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from own_tokenizer import build_tokenizer
from typer.testing import CliRunner

from pyro_blora.data import load_task
from pyro_blora.evaluation import comparison

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("zero-shot", "lora", "lora-best", "dropout-split", "laplace-lora", "bayesian-lora")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def run():
    from calibration import app

    def run(command, out, *arguments):
        done = CliRunner().invoke(app, [command, "--out", str(out), *arguments])
        assert done.exit_code == 0, done.exception
        return done.stdout

    return run


@pytest.fixture
def config(tmp_path):
    """The benchmark's own settings, on a network of a few thousand weights and the embedded set."""
    net = tiny.llama(vocab_size=400, max_position_embeddings=256)
    net.save_pretrained(tmp_path / "net")
    build_tokenizer(["a few words"], eos="<e>", pad="<p>").save_pretrained(tmp_path / "net")
    settings = yaml.safe_load((ROOT / "benchmarks" / "calibration.yaml").read_text())
    settings |= {"rank": 2, "best_every": 2}
    net = {"model": str(tmp_path / "net"), "blocks": 1, "target_modules": ["q_proj", "v_proj"]}
    settings["networks"] = {"tiny": net, "tiny-all": {**net, "blocks": 0, "like": "tiny"}}
    settings["methods"] = {name: settings["methods"][name] for name in METHODS}
    settings["methods"]["bayesian-lora"]["guide"] = {"init_scale": 1.0}  # few steps
    cells = {"tasks": ["facts"], "steps": [300], "seeds": [0, 1]}
    settings["sweeps"] = {
        "table": {"networks": ["tiny"], **cells, "methods": [*METHODS]},
        "both": {"networks": ["tiny-all"], **cells, "seeds": [0], "methods": ["lora"]},
    }
    settings["development"] = {"networks": {"tiny": ["facts"]}, "seeds": [0], "steps": 300}
    settings["out_of_distribution"] = {"facts": ["facts"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_cells_are_tuned_run_once_gone_on_with_and_reported(run, config, tmp_path):
    small = ["--config", str(config), "--smoke"]
    out = tmp_path / "results"
    run("tune", out, *small, "--only", "lora", "--only", "lora-best", "--only", "facts")
    trials = len(yaml.safe_load(config.read_text())["methods"]["lora"]["trials"])
    tried = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert len(tried) == 2 * trials  # last, best
    fits = {json.dumps(line["settings"]): line["nll"] for line in tried if line["method"] != "lora"}
    run("run", out, *small, "--only", "bayesian-lora")
    file = out / "cells.jsonl"
    first = file.read_text()
    with file.open("a") as cells:
        cells.write('{"task": "facts", "meth')  # a kill in the middle of a line
    assert "13 cells, 2 of them there" in run("run", out, *small)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.read_text().startswith(first)
    keys = {tuple(line[k] for k in ("network", "method", "seed")) for line in lines}
    assert len(keys) == len(lines) == 13
    chosen = {json.dumps(line["settings"]) for line in lines if line["method"] == "lora-best"}
    assert chosen == {min(fits, key=fits.__getitem__)}
    again = run("run", out, *small)
    assert "13 of them there" in again
    assert again.strip().endswith("missing: ['dropout-split', 'laplace-lora']")
    other = yaml.safe_load(config.read_text())
    other["methods"]["bayesian-lora"]["prior"] = {"sigma": 0.8}
    changed = tmp_path / "other.yaml"
    changed.write_text(yaml.safe_dump(other))
    told = run("run", out, "--config", str(changed), "--smoke")
    named = [f"tiny-facts-16-4-bayesian-lora-{seed}" for seed in (0, 1)]
    assert told.strip().endswith(f"run them again: {named}")
    arrays = np.load(out / "probabilities.npz")
    for line in lines:
        name = f"{line['network']}-facts-16-4-{line['method']}-{line['seed']}/test"
        probs, labels = arrays[f"{name}/probs"], arrays[f"{name}/labels"]
        nll = -np.log(probs[np.arange(len(labels)), labels]).mean()
        assert nll == pytest.approx(line["metrics"]["test"]["nll"], rel=1e-4)
    run("report", out, "--config", str(config))
    report = (out / "report.md").read_text()
    seeds = dict.fromkeys((*METHODS, "temperature:lora-best"), 2)
    found = set(re.findall(r"^\| ([\w:-]+) \| (\d+ \| \d+ \| \d) \| \d", report, re.MULTILINE))
    options = len(load_task("facts").test[0].choices)
    passes = dict.fromkeys(("bayesian-lora", "dropout-split"), 2)  # a draw each
    passes |= dict.fromkeys(("laplace-lora",), options)  # linearized
    expected = {
        name: f"{8 if name.endswith('-best') else 0} | {passes.get(name, 1)} | {count}"
        for name, count in seeds.items()
    }
    expected["temperature:lora-best"] = "8 | 1 | 2"
    assert expected.items() <= found
    assert "| `bayesian-lora` less | seeds |" in report
    assert "| lora | entropy | 2 | 50.0 | 50.0 ± 0.0 |" in report  # the other set is the test's own
    assert "| bayesian-lora | mutual information | 2 | 50.0 | 50.0 ± 0.0 |" in report


def test_early_stopping_sees_validation_items_alone(run, config, tmp_path, monkeypatch):
    seen, fit = [], comparison.fit

    def watched(*arguments, validation, **options):
        seen.append(validation)
        return fit(*arguments, validation=validation, **options)

    monkeypatch.setattr(comparison, "fit", watched)
    small = ["--config", str(config), "--smoke", "--only", "lora-best"]
    run("run", tmp_path / "results", *small)
    task = load_task("facts", max_train=16, max_validation=8, seed=0)
    assert list(seen[0]) == list(task.validation)
    assert not {item.question for item in task.validation} & {item.question for item in task.test}


def test_the_error_of_a_difference_of_ece_is_that_of_drawing_items_anew():
    from calibration_report import OURS, paired

    from pyro_blora.evaluation.metrics import evaluate

    torch.manual_seed(0)
    logits = torch.randn(2000, 3)
    labels = torch.distributions.Categorical(logits=logits).sample()
    ours, other = ((scale * logits).softmax(-1) for scale in (1.6, 0.4))

    def gap(items):
        found = [evaluate(probs[items], labels[items]).ece for probs in (ours, other)]
        return found[0] - found[1]

    methods = {OURS: {0: {"test": (ours, labels)}}, "other": {0: {"test": (other, labels)}}}
    (row,) = paired(methods, "test")[2:]
    mean, error = (float(number) for number in row.split("|")[5].split("±"))
    assert mean == pytest.approx(gap(torch.arange(2000)), abs=1e-4)
    anew = torch.tensor([gap(torch.randint(2000, (2000,))) for _ in range(200)])
    assert error == pytest.approx(float(anew.std()), rel=0.2)
