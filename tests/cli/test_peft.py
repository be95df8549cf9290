"""From a PEFT adapter to a Bayesian one by the command line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyro_blora import BayesianLoRA
from pyro_blora.likelihoods import MultipleChoice

peft = pytest.importorskip("peft")


@pytest.fixture
def lora(model_dir, tmp_path):
    """A PEFT adapter of rank 3 whose base is named in it, and the network's logits under it."""
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


def test_laplace_gives_a_trained_lora_a_width(lora, model_dir, data_dir, tmp_path, run):
    folder, expected = lora
    out = tmp_path / "out"
    where = ("--adapter", folder, "--task", "words", "--data-dir", data_dir)
    code, said, err = run("laplace", *where, "--out", out, "--max-validation", 5)
    assert (code, err) == (0, ""), err
    assert f"Written: {out}" in said
    blora, found = mean_logits(model_dir, out)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert repr(blora.guide_family) == "Laplace()"
    assert all(family.finished for family in blora.guide.families().values())
    assert blora.method.linearised
    assert "predict(batch)" in (out / "README.md").read_text()
    again = ("--adapter", out, "--model", model_dir, "--data-dir", data_dir)
    code, said, err = run("evaluate", *again)
    assert (code, "words, " in said) == (0, True), err  # what it was made for
    code, _, err = run("laplace", *where, "--out", out)
    assert (code, "--overwrite" in err) == (2, True)
    code, _, err = run("laplace", *where, "--out", out, "--method", "blob", "--overwrite")
    assert (code, "train --from-peft" in err) == (2, True)


def test_train_goes_on_from_a_lora(lora, model_dir, data_dir, tmp_path, run):
    folder, expected = lora
    out, data = tmp_path / "out", ("--task", "words", "--data-dir", data_dir)
    short = ("--max-steps", 1, "--max-validation", 4, "--out", out)
    code, said, err = run("train", "--from-peft", folder, *data, *short)
    assert (code, err) == (0, ""), err
    assert "k_proj" in said
    blora, found = mean_logits(model_dir, out)
    assert blora.prior.rank == 3
    assert 0 < (found - expected).abs().max() < 0.5
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    for wrong, told in (((), "use_dora=True"), (("--top", 1), "--top is not for")):
        code, _, err = run("train", "--from-peft", folder, *data, *short, "--overwrite", *wrong)
        assert (code, told in err) == (2, True), err
