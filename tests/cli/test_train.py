"""``pyro-blora train``: what it writes, from a LoRA of PEFT, and after Ctrl-C."""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pyro_blora import BayesianLoRA
from pyro_blora.inference.objective import Objective
from pyro_blora.likelihoods import MultipleChoice

ADAPTER = "bayesian_lora.safetensors"


@pytest.fixture
def train(run, model_dir, data_dir):
    """Trains on the task ``words``."""

    def train(out, *options, model=True):
        words = ["--task", "words", "--data-dir", data_dir, "--out", out]
        return run("train", *words, *(["--model", model_dir] if model else []), *options)

    return train


def test_it_shows_its_validation_and_writes_an_adapter(train, tmp_path):
    out = tmp_path / "out"
    options = ["--max-steps", 60, "--rank", 2, "--max-validation", 5, "--top", 1, "--peft"]
    code, text, err = train(out, *options)
    assert code == 0, err
    assert "trainable" in text
    for step in (50, 60):
        assert re.search(rf"step {step}: NLL \d\.\d+ on 5 validation items", text)
    config = (out / "bayesian_lora_config.json").read_text()
    assert "layers.1." in config
    assert "layers.0." not in config
    written = {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in (out / "peft").iterdir()} == written


def test_a_class_of_ones_own_by_its_path_and_what_is_there_is_kept(train, own_module, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "mine:Plain+MeanField", "--max-steps", 2, "--rank", 3]
    code, text, err = train(out, *options)
    assert code == 0, err
    assert "Plain(rank=3)" in text
    config = json.loads((out / "bayesian_lora_config.json").read_text())
    assert config["prior"]["name"] == "Plain"
    first = (out / ADAPTER).read_bytes()
    code, _, err = train(out, *options, "--seed", 1)
    assert (code, "--overwrite" in err) == (2, True)
    assert (out / ADAPTER).read_bytes() == first
    assert train(out, *options, "--overwrite", "--seed", 1)[0] == 0
    assert (out / ADAPTER).read_bytes() != first


@pytest.fixture
def lora(model_dir, tmp_path):
    """A PEFT adapter of rank 3 whose base is named in it, and the network's logits under it."""
    peft = pytest.importorskip("peft")
    net = AutoModelForCausalLM.from_pretrained(model_dir)
    config = peft.LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(net, config).eval()
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora", model(torch.arange(8)[None]).logits.detach()


def mean_logits(model_dir, out):
    net = AutoModelForCausalLM.from_pretrained(model_dir)
    blora = BayesianLoRA.from_pretrained(net, out, likelihood=MultipleChoice())
    with blora.posterior():
        return blora, net(torch.arange(8)[None]).logits.detach()


def test_it_starts_from_a_lora_with_or_without_steps(
    lora, train, run, model_dir, data_dir, tmp_path
):
    folder, expected = lora
    out = tmp_path / "out"
    options = ("--from-peft", folder, "--max-steps", 0, "--max-validation", 5)
    code, _, err = train(out, *options, "--method", "laplace-lora", model=False)
    assert (code, err) == (0, ""), err
    blora, found = mean_logits(model_dir, out)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert repr(blora.guide_family) == "Laplace()"
    assert all(family.finished for family in blora.guide.families().values())
    assert blora.method.linearised
    asked = ("--adapter", out, "--model", model_dir, "--data-dir", data_dir)
    code, said, err = run("evaluate", *asked)
    assert (code, "words, 21 test items" in said) == (0, True), err  # what it was made for
    code, _, err = train(tmp_path / "blob", *options, "--method", "blob", model=False)
    assert (code, "Laplace, Isotropic" in err) == (2, True)
    out = tmp_path / "trained"
    code, said, err = train(out, *options[:2], "--max-steps", 1, model=False)
    assert (code, err) == (0, ""), err
    assert "k_proj" in said
    blora, found = mean_logits(model_dir, out)
    assert blora.prior.rank == 3
    assert 0 < (found - expected).abs().max() < 0.5


@pytest.mark.usefixtures("interruptible")
def test_it_stops_and_goes_on(train, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    short = ("--rank", 2, "--max-steps", 6, "--batch-size", 4)
    code, text, err = train(whole, *short, "--resume")
    assert code == 0, err
    assert f"{whole / 'training'} has no run to go on with: this one begins" in text

    loss, steps = Objective.__call__, []

    def interrupted(self, batch):
        steps.append(batch)
        if len(steps) in (4, 10):
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    assert train(out, *short)[0] not in (0, 2)
    assert not (out / ADAPTER).exists()
    for flags, told in (
        ((), "has a run that was stopped; add --resume to go on, or --overwrite"),
        (("--resume", "--overwrite"), "leave one of them out"),
        (("--resume", "--rank", 3), "prior.rank was 2, is 3"),
    ):
        code, _, err = train(out, *short, *flags)
        assert code == 2
        assert told in err
    assert len(steps) == 4  # and it is what is done

    code, _, err = train(out, *short, "--resume")
    assert code == 0, err
    assert len(steps) == 6
    expected = load_file(whole / ADAPTER)
    for name, value in load_file(out / ADAPTER).items():
        assert value.equal(expected[name]), name

    assert train(out, *short, "--resume")[0] == 0  # finished: nothing is trained
    assert len(steps) == 6
    assert train(out, *short, "--overwrite")[0] not in (0, 2)
    assert len(steps) == 10
