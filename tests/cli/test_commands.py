import csv
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from pyro_blora import BayesianLoRA, load_task
from pyro_blora.evaluation import comparison, results
from pyro_blora.likelihoods import MultipleChoice
from pyro_blora.methods import METHODS
from pyro_blora.network import precision, pretrained

ROW = {"method", "seed", "acc", "ece", "nll", "brier", "n_test", "train_seconds"}
ROW |= {"trainable_parameters"}


@pytest.fixture
def words(model_dir, data_dir):
    return ["--model", model_dir, "--task", "words", "--data-dir", data_dir]


def test_compare_writes_rows_for_every_method_and_seed(run, words, tmp_path):
    out = tmp_path / "out"
    methods = "lora,lora-best,temperature,temperature:lora,bayesian-lora,blob"
    methods += ",temperature:bayesian-lora"
    options = ["--methods", methods, "--seeds", "0,1", "--max-steps", 6, "--max-train", 24]
    code, text, err = run(
        "compare", *words, *options, "--num-samples", 3, "--rank", 4, "--out", out
    )
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"rows", "versions", "settings"}
    assert {(r["method"], r["seed"]) for r in results["rows"]} == {
        (m, s) for m in methods.split(",") for s in (0, 1)
    }
    for row in results["rows"]:
        assert set(row) == ROW
        assert row["n_test"] == 21  # no example dropped
        assert 0 <= row["acc"] <= 1
        assert 0 <= row["ece"] <= 1
        assert row["nll"] > 0
        assert row["train_seconds"] > 0
    by = {(r["method"], r["seed"]): r for r in results["rows"]}
    # Scaling by a temperature keeps the order of the answers.
    assert by["lora", 0]["acc"] == by["temperature", 0]["acc"]
    assert by["temperature:lora", 0]["nll"] == by["temperature", 0]["nll"]  # one and the same
    assert by["bayesian-lora", 0]["acc"] == by["temperature:bayesian-lora", 0]["acc"]
    assert by["bayesian-lora", 0]["nll"] != by["temperature:bayesian-lora", 0]["nll"]
    assert by["bayesian-lora", 0]["nll"] != by["bayesian-lora", 1]["nll"]
    assert results["versions"]["torch"]
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "bayesian-lora" in text
    assert "±" in text


@pytest.mark.parametrize("pays", [False, True])
def test_the_precision_chosen_is_said_and_recorded(run, words, tmp_path, monkeypatch, pays):
    monkeypatch.setattr(precision, "_bfloat16_pays", lambda kind: pays)
    name = "bfloat16" if pays else "float32"
    options = ["--seeds", 0, "--methods", "map", "--max-steps", 1, "--out", tmp_path / "out"]
    code, text, err = run("compare", *words, *options)
    assert code == 0, err
    assert f"precision: {name} (auto" in text
    assert json.loads((tmp_path / "out/results.json").read_text())["settings"]["precision"] == name


def test_an_interrupted_comparison_goes_on_from_there(run, words, tmp_path, monkeypatch):
    common = [*words, "--methods", "lora,temperature,map,tfb", "--seeds", 0, "--max-steps", 2]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("compare", *common, "--out", whole)[0] == 0
    fit, fitted = comparison.fit, []

    def counted(*args, **options):
        fitted.append(1)
        return fit(*args, **options)

    def stopped(blora, *args, **options):
        if blora.method.name == "map":
            raise KeyboardInterrupt
        return fit(blora, *args, **options)

    monkeypatch.setattr(comparison, "fit", stopped)  # while the second method is trained
    code, text, _ = run("compare", *common, "--out", out)
    assert code not in (0, 2)
    assert "2 of 4 rows" in text
    kept = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in kept] == ["lora", "temperature"]

    monkeypatch.setattr(comparison, "fit", counted)
    monkeypatch.setattr(precision, "_bfloat16_pays", lambda kind: True)  # it stays what it was
    code, text, err = run("compare", *common, "--out", out)
    assert code == 0, err
    assert len(fitted) == 2
    for phase in ("load ...", "train map, seed 0 ...", "predict tfb, seed 0 ..."):
        assert phase in text
    rows = [json.loads((f / "results.json").read_text())["rows"] for f in (out, whole)]
    assert rows[0][:2] == kept
    for row, expected in zip(*rows, strict=True):
        assert {**row, "train_seconds": 0} == {**expected, "train_seconds": 0}
    names = [load_file(f / "predictions.safetensors") for f in (out, whole)]
    torch.testing.assert_close(names[0], names[1], atol=0, rtol=0)

    # All there: nothing is trained, or loaded
    monkeypatch.setattr(pretrained, "load_pretrained", lambda name: pytest.fail("it was read"))
    code, text, err = run("compare", *common, "--out", out)
    assert code == 0, err
    assert "4 of 4 rows" in text
    assert len(fitted) == 2
    code, _, err = run("compare", *common, "--max-train", 20, "--out", out)
    assert code == 2
    assert "made with another max_train" in err
    assert json.loads((out / "results.json").read_text())["rows"] == rows[0]


def test_methods_and_seeds_may_differ_from_what_is_there(run, words, tmp_path, monkeypatch):
    def compare(methods, seeds, out):
        options = [
            "--methods",
            methods,
            "--seeds",
            seeds,
            "--max-steps",
            2,
            "--out",
            tmp_path / out,
        ]
        code, text, err = run("compare", *words, *options)
        assert code == 0, err
        return text, json.loads((tmp_path / out / "results.json").read_text())

    fit, fitted = comparison.fit, []
    monkeypatch.setattr(comparison, "fit", lambda *a, **k: fitted.append(1) or fit(*a, **k))
    compare("map", "0", "out")
    text, document = compare("mean-field,map", "0,1", "out")
    assert "1 of 4 rows" in text
    assert len(fitted) == 4
    assert document["settings"]["methods"] == ["map", "mean-field"]
    assert document["settings"]["seeds"] == [0, 1]
    _, whole = compare("mean-field,map", "0,1", "whole")
    by = [{(r["method"], r["seed"]): r["nll"] for r in d["rows"]} for d in (document, whole)]
    assert by[0] == by[1]
    text, again = compare("mean-field", "1", "out")  # fewer are shown, none is lost
    assert not re.search(r"\bmap\b", text)
    assert again == document


def test_a_full_disk_keeps_the_rows_before(run, words, tmp_path, monkeypatch):
    write, out = results.write, tmp_path / "out"

    def full(rows, *args):
        if len(rows) > 1:
            raise OSError(28, "No space left on device", "predictions")
        write(rows, *args)

    monkeypatch.setattr(results, "write", full)
    options = [*words, "--methods", "map,mean-field", "--seeds", 0, "--max-steps", 1]
    code, text, err = run("compare", *options, "--out", out)
    assert code == 2
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1
    assert "1 of 2 rows" in text
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 1


def test_classes_of_ones_own_by_their_path(run, words, tmp_path, own_module):
    pair, out = "mine:Plain+MeanField", tmp_path / "out"
    methods = f"{pair},temperature:Subspace+mine:Spread"
    options = ["--seeds", 0, "--max-steps", 2, "--rank", 3]
    code, text, err = run("compare", *words, "--methods", methods, *options, "--out", out)
    assert code == 0, err
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == methods.split(",")
    assert pair in text
    assert "as it was then" not in text
    code, text, err = run("compare", *words, "--methods", f"{methods},map", *options, "--out", out)
    assert code == 0, err
    assert re.findall(r"rows of (\S+) are of the class as it was then", text) == methods.split(",")
    more = ["--max-steps", 2, "--rank", 3, "--out", tmp_path / "adapter"]
    code, text, err = run("train", *words, "--method", pair, *more)
    assert code == 0, err
    assert "Plain(rank=3)" in text
    config = json.loads((tmp_path / "adapter" / "bayesian_lora_config.json").read_text())
    assert config["prior"]["name"] == "Plain"


def test_train_shows_its_validation(run, words, tmp_path):
    options = ["--max-steps", 60, "--rank", 2, "--max-validation", 5, "--out", tmp_path / "out"]
    code, text, err = run("train", *words, *options)
    assert code == 0, err
    for step in (50, 60):
        assert re.search(rf"step {step}: NLL \d\.\d+ on 5 validation items", text)


def test_train_then_evaluate(run, words, tmp_path):
    out = tmp_path / "adapter"
    code, text, err = run("train", *words, "--out", out, "--max-steps", 4, "--rank", 2, "--peft")
    assert code == 0, err
    assert "trainable" in text
    assert {p.name for p in (out / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    own = [word for word in words if word not in ("--task", "words")]  # the adapter's task
    evaluate = ["evaluate", *own, "--adapter", out, "--out", tmp_path]
    code, text, err = run(*evaluate, "--num-samples", 4, "--csv", tmp_path / "new" / "items.csv")
    assert code == 0, err
    assert "words, 21 test items" in text
    sampled = json.loads((tmp_path / "metrics.json").read_text())
    assert sampled["n"] == 21
    with (tmp_path / "new" / "items.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == [str(i) for i in range(100, 121)]
    right = sum(line["label"] == line["prediction"] for line in lines)
    assert right / 21 == pytest.approx(sampled["acc"])
    for line in lines:
        probs = [float(line[f"p{k}"]) for k in range(3)]
        assert sum(probs) == pytest.approx(1)
        assert max(probs) == float(line["confidence"]) == probs[int(line["prediction"])]
        entropy = -sum(p * math.log(p) for p in probs)
        assert float(line["entropy"]) == pytest.approx(entropy, rel=1e-4)
    for name in ("entropy", "mutual_information"):
        mean = sum(float(line[name]) for line in lines) / 21
        assert sampled[name] == pytest.approx(mean, rel=1e-4)
    code, text, err = run(*evaluate, "--linearised", "--num-samples", 64)
    assert code == 0, err
    linearised = json.loads((tmp_path / "metrics.json").read_text())
    assert linearised["nll"] != sampled["nll"]
    assert linearised["nll"] == pytest.approx(sampled["nll"], rel=0.1)


@pytest.mark.parametrize("scale", ["learned", "fixed"])
def test_evaluate_scores_options_as_the_adapter_does(run, words, tmp_path, data_dir, scale):
    path = data_dir / "words" / "test.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    for item in items:  # options of one, two and three tokens
        item["choices"] = [" ".join([word] * k) for k, word in enumerate(item["choices"], 1)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    net, tokenizer = pretrained.load_pretrained(words[1])
    task = load_task("words", data_dir=data_dir)
    likelihood = MultipleChoice(num_data=len(task.train), scale=scale)
    blora = BayesianLoRA(net, rank=2, likelihood=likelihood)
    with torch.no_grad():
        for parameter in blora.likelihood.parameters():
            parameter.fill_(1.7)
    own = blora.predict(task.collator(tokenizer)(task.test), 0).probs
    blora.save_pretrained(tmp_path / "adapter")
    options = ["--adapter", tmp_path / "adapter", "--num-samples", 0, "--precision", "float32"]
    code, _, err = run("evaluate", *words, *options, "--csv", tmp_path / "items.csv")
    assert code == 0, err
    with (tmp_path / "items.csv").open(newline="") as file:
        found = [[float(line[f"p{k}"]) for k in range(3)] for line in csv.DictReader(file)]
    torch.testing.assert_close(torch.tensor(found), own, atol=1e-4, rtol=1e-3)


def test_train_the_top_blocks_alone(run, words, tmp_path):
    options = ["--max-steps", 8, "--batch-size", 4, "--rank", 2, "--top", 1, "--max-train", 8]
    out = tmp_path / "adapter"
    code, _, err = run("train", *words, *options, "--out", out)
    assert code == 0, err
    config = (out / "bayesian_lora_config.json").read_text()
    assert "layers.1." in config
    assert "layers.0." not in config
    code, _, err = run("evaluate", *words, "--adapter", out, "--num-samples", 2)
    assert code == 0, err
    code, _, err = run("train", *words, "--top", 2, "--out", tmp_path / "none")
    assert code == 2
    assert "--top 2 is not below the network's 2 blocks" in err


def test_info_counts_llama_2_7b_as_the_papers_do(run):
    code, text, err = run("info", "--model", "llama-2-7b", "--rank", 8)
    assert code == 0, err
    # r (d_out + d_in): 64 projections of 4096 x 4096 and a head of 32000 x 4096.
    assert f"{8 * (64 * 8192 + 36096):,}" == "4,483,072"
    assert "4,483,072" in text
    surplus = int(text.split("(0.0")[-2].split()[-1].replace(",", ""))
    assert 0 < surplus <= 20_000


def test_info_lists_methods_and_breaks_no_word_in_80_columns(run):
    code, text, err = run("info", "--methods", columns=80)
    assert code == 0, err
    assert max(map(len, text.splitlines())) <= 80
    words = set(text.split())
    for name, made in METHODS.items():
        assert {name, *made.summary.split(), *made.citation.split()} <= words


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "rank", "compare", "generate", "laplace", "info"]
)
def test_help_teaches(run, command):
    code, text, _ = run(command, "--help")
    assert code == 0
    assert "Example: pyro-blora" in text


@pytest.mark.parametrize("command", ["evaluate", "rank", "generate"])
def test_both_commands_that_write_an_adapter_are_named(run, command):
    _, text, _ = run(command, "--help", columns=200)
    assert "`pyro-blora train` or `pyro-blora laplace` wrote" in text


def test_no_arguments_shows_the_commands(run):
    _, text, _ = run()
    for command in ("train", "evaluate", "rank", "compare", "info"):
        assert command in text
