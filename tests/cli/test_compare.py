import json
import re

import pytest
import torch
from safetensors.torch import load_file

from pyro_blora.evaluation import comparison
from pyro_blora.options import choose_precision


@pytest.fixture
def results(compare):
    """Runs ``compare``; what it says, and what results.json has."""

    def results(out, methods, *options, **expected):
        said = compare(out, "--methods", methods, *options, **expected)
        return "".join(said), json.loads((out / "results.json").read_text())

    return results


def test_rows_for_every_method_and_seed(results, tmp_path):
    out = tmp_path / "out"
    methods = "lora,best:lora,temperature:lora,bayesian-lora,blob,mean:bayesian-lora"
    methods += ",temperature:bayesian-lora,distilled:bayesian-lora,split:lora"
    (tmp_path / "other.jsonl").write_text('{"text": "the answer is"}\n{"text": "it is"}\n')
    options = ["--seeds", "0,1", "--max-steps", 6, "--max-train", 24]
    options += ["--outside", tmp_path / "other.jsonl"]
    text, document = results(out, methods, *options, "--num-samples", 3, "--rank", 4)
    assert set(document) == {"rows", "versions", "settings"}
    assert {(r["method"], r["seed"]) for r in document["rows"]} == {
        (m, s) for m in methods.split(",") for s in (0, 1)
    }
    for row in document["rows"]:
        assert row["n_test"] == 21  # no example dropped
        assert row["train_seconds"] > 0
        assert 0 <= row["auroc"]["entropy"] <= 1
    by = {(r["method"], r["seed"]): r for r in document["rows"]}
    # Scaling by a temperature keeps the order of the answers.
    assert by["lora", 0]["acc"] == by["temperature:lora", 0]["acc"]
    assert by["bayesian-lora", 0]["acc"] == by["temperature:bayesian-lora", 0]["acc"]
    assert by["bayesian-lora", 0]["nll"] != by["temperature:bayesian-lora", 0]["nll"]
    assert by["bayesian-lora", 0]["nll"] != by["distilled:bayesian-lora", 0]["nll"]
    assert by["bayesian-lora", 0]["nll"] != by["bayesian-lora", 1]["nll"]
    assert by["split:lora", 0]["nll"] != by["lora", 0]["nll"]
    used = {name: row["labels_beside_training"] for (name, _), row in by.items()}
    needs = ("best:lora", "temperature:lora", "temperature:bayesian-lora")
    assert {name for name, count in used.items() if count} == set(needs)
    passes = {name: row["passes"] for (name, _), row in by.items()}
    assert (passes["lora"], passes["bayesian-lora"], passes["distilled:bayesian-lora"]) == (1, 3, 1)
    assert document["versions"]["torch"]
    assert document["settings"]["precision"] == choose_precision("auto")
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "bayesian-lora" in text
    assert "±" in text


def test_a_best_step_cannot_have_a_temperature_of_the_last(compare, tmp_path):
    for name in ("split:best:lora", "split", "distilled"):
        said = compare(tmp_path, "--methods", name, codes=(2,))
        assert "with a single kind" in "".join(said)


def test_an_interrupted_comparison_goes_on_from_there(results, tmp_path, monkeypatch):
    methods, options = "lora,temperature:lora,map,blob", ["--seeds", 0, "--max-steps", 2]
    whole, out = tmp_path / "whole", tmp_path / "out"
    _, expected = results(whole, methods, *options)
    fit = comparison.fit

    def stopped(blora, *args, **options):
        if blora.method.name == "map":
            raise KeyboardInterrupt
        return fit(blora, *args, **options)

    monkeypatch.setattr(comparison, "fit", stopped)  # while the second method is trained
    kept = results(out, methods, *options, codes=(1, 130))[1]["rows"]
    assert [row["method"] for row in kept] == ["lora", "temperature:lora"]

    monkeypatch.setattr(comparison, "fit", fit)
    text, found = results(out, methods, *options)
    assert "lora, seed 0: ACC" in text
    assert found["rows"][:2] == kept  # with their times, so they were not trained again
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert {**row, "train_seconds": 0} == {**other, "train_seconds": 0}
    names = [load_file(f / "predictions.safetensors") for f in (out, whole)]
    torch.testing.assert_close(names[0], names[1], atol=0, rtol=0)

    # All there: nothing is loaded
    monkeypatch.setattr(comparison, "load_for", lambda *_: pytest.fail("it was read"))
    text, _ = results(out, methods, *options)
    assert "blob, seed 0: ACC" in text
    told, there = results(out, methods, *options, "--max-train", 20, codes=(2,))
    assert "made with another max_train" in told
    assert there == found


@pytest.mark.usefixtures("own_module")
def test_methods_and_seeds_may_differ_from_what_is_there(results, tmp_path):
    """And classes of one's own are known by their path."""
    own = ["mine:Plain+MeanField", "temperature:Subspace+mine:Spread"]
    out, short = tmp_path / "out", ["--max-steps", 2, "--rank", 3]
    _, first = results(out, "map", "--seeds", "0", *short)
    _, document = results(out, ",".join([*own, "map"]), "--seeds", "0,1", *short)
    assert document["rows"][:1] == first["rows"]
    keys = {(row["method"], row["seed"]) for row in document["rows"]}
    assert keys == {(name, seed) for name in ("map", *own) for seed in (0, 1)}
    text, again = results(out, own[0], "--seeds", "1", *short)  # fewer are shown, none lost
    assert not re.search(r"\bmap\b", text)
    assert again == document
