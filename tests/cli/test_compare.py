import json
import re

import pytest
import torch
from neighbors import NEIGHBORS, put, tree
from safetensors.torch import load_file

from pyro_blora.evaluation import comparison
from pyro_blora.network.pretrained import choose_precision


@pytest.fixture
def compare(run_words):
    def compare(out, methods, *options, **expected):
        said = run_words("compare", out, "--methods", methods, *options, **expected)
        return "".join(said), json.loads((out / "results.json").read_text())

    return compare


def test_rows_for_every_method_and_seed_beside_the_files_of_others(compare, tmp_path):
    out = tmp_path / "out"
    put(out, NEIGHBORS)
    before = tree(out)
    methods = "lora,bayesian-lora,blob,mean:bayesian-lora,distilled:bayesian-lora,split:lora"
    (tmp_path / "other.jsonl").write_text('{"text": "the answer is"}\n{"text": "it is"}\n')
    options = ["--seeds", "0,1", "--max-steps", 6, "--max-train", 24]
    options += ["--outside", tmp_path / "other.jsonl"]
    text, results = compare(out, methods, *options, "--num-samples", 3, "--rank", 4)
    assert set(results) == {"rows", "versions", "settings"}
    by = {(row["method"], row["seed"]): row for row in results["rows"]}
    assert by.keys() == {(method, seed) for method in methods.split(",") for seed in (0, 1)}
    for row in results["rows"]:
        assert row["n_test"] == 21  # no example dropped
        assert 0 <= row["auroc"] <= 1
    both = (by[f"{kind}:bayesian-lora", 0] for kind in ("mean", "distilled"))
    assert len({row["metrics"]["acc"] for row in both}) == 1  # a temperature keeps the answers
    nll = {key: row["metrics"]["nll"] for key, row in by.items()}
    assert nll["distilled:bayesian-lora", 0] != nll["mean:bayesian-lora", 0]
    assert nll["bayesian-lora", 0] != nll["bayesian-lora", 1]
    assert nll["split:lora", 0] != nll["lora", 0]
    passes = [by[f"{kind}bayesian-lora", 0]["passes"] for kind in ("", "distilled:", "mean:")]
    assert passes == [3, 1, 1]
    assert results["settings"]["precision"] == choose_precision("auto")
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "±" in text
    after = tree(out)
    assert {name: after.get(name) for name in before} == before


def test_an_interrupted_comparison_goes_on_from_there(compare, tmp_path, monkeypatch):
    methods, options = "lora,mean:lora,map,blob", ["--seeds", 0, "--max-steps", 2]
    whole, out = tmp_path / "whole", tmp_path / "out"
    _, expected = compare(whole, methods, *options)
    fit = comparison.fit

    def stopped(blora, *args, **options):
        if blora.method.name == "map":
            raise KeyboardInterrupt
        return fit(blora, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "fit", stopped)  # while the second method is trained
        kept = compare(out, methods, *options, codes=(1, 130))[1]["rows"]
    assert [row["method"] for row in kept] == ["lora", "mean:lora"]
    _, found = compare(out, methods, *options)
    assert found["rows"][:2] == kept
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert {**row, "train_seconds": 0} == {**other, "train_seconds": 0}
    tensors = [load_file(f / "predictions.safetensors") for f in (out, whole)]
    torch.testing.assert_close(*tensors, atol=0, rtol=0)
    # All there: nothing is loaded
    monkeypatch.setattr(comparison, "load_for", lambda *_: pytest.fail("it was read"))
    compare(out, methods, *options)
    text, there = compare(out, methods, *options, "--max-train", 20, codes=(2,))
    assert "of another max_train" in text
    assert there == found


@pytest.mark.usefixtures("own_module")
def test_methods_and_seeds_may_differ_from_what_is_there(compare, tmp_path):
    own = ["mine:Plain+MeanField", "mean:Subspace+mine:Spread"]
    out, short = tmp_path / "out", ["--max-steps", 2, "--rank", 3]
    _, first = compare(out, "map", "--seeds", "0", *short)
    _, document = compare(out, ",".join([*own, "map"]), "--seeds", "0,1", *short)
    assert document["rows"][:1] == first["rows"]
    keys = {(row["method"], row["seed"]) for row in document["rows"]}
    assert keys == {(name, seed) for name in ("map", *own) for seed in (0, 1)}
    text, again = compare(out, own[0], "--seeds", "1", *short)  # fewer are shown, none lost
    assert not re.search(r"\bmap\b", text)
    assert again == document
