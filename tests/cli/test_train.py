"""``pyro-blora train``: what it writes, from a LoRA of PEFT, and after Ctrl-C."""

import json
import re
from functools import partial

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer
from transformers import AutoModelForCausalLM

from pyro_blora import BayesianLoRA, load_pretrained, load_task
from pyro_blora.likelihoods import MultipleChoice

ADAPTER = "bayesian_lora.safetensors"
STOPPED = (1, 130)  # by Ctrl-C, as the releases of typer have it


@pytest.fixture
def train(run_words):
    """Trains on the task ``words``."""
    return partial(run_words, "train")


def test_it_shows_its_validation_and_writes_an_adapter(train, tmp_path):
    out = tmp_path / "out"
    options = ["--max-steps", 2, "--rank", 2, "--max-validation", 5, "--top", 1, "--peft"]
    text, _ = train(out, *options)
    assert "trainable" in text
    assert re.search(r"step 2: NLL \d\.\d+ on 5 validation items", text)
    config = (out / "bayesian_lora_config.json").read_text()
    assert "layers.1." in config
    assert "layers.0." not in config
    written = {"adapter_config.json", "adapter_model.safetensors", "one_pass.json", "README.md"}
    assert tiny.written(out / "peft") == written


def test_a_class_of_ones_own_by_its_path_and_what_is_there_is_kept(train, own_module, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "mine:Plain+MeanField", "--max-steps", 2, "--rank", 3]
    assert "Plain(rank=3)" in train(out, *options)[0]
    config = json.loads((out / "bayesian_lora_config.json").read_text())
    assert config["prior"]["name"] == "Plain"
    first = (out / ADAPTER).read_bytes()
    assert "--overwrite" in train(out, *options, "--seed", 1, codes=(2,))[1]
    assert (out / ADAPTER).read_bytes() == first
    train(out, *options, "--overwrite", "--seed", 1)
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


def test_it_starts_from_a_lora_with_or_without_steps(lora, run, model_dir, data_dir, tmp_path):
    folder, expected = lora
    out = tmp_path / "out"
    words = ("--task", "words", "--data-dir", data_dir)  # no model: the LoRA names its base
    options = ("train", *words, "--from-peft", folder, "--max-validation", 5, "--out")
    no_steps = ("--max-steps", 0, "--method")
    assert run(*options, out, *no_steps, "laplace-lora")[1] == ""
    blora, found = mean_logits(model_dir, out)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert all(family.finished for family in blora.guide.families().values())
    assert blora.method.linearized
    asked = ("--adapter", out, "--model", model_dir, "--data-dir", data_dir)
    assert "words, 21 test items" in run("evaluate", *asked)[0]  # what it was made for
    _, err = run(*options, tmp_path / "blob", *no_steps, "blob", codes=(2,))
    assert "Laplace" in err
    out = tmp_path / "trained"
    run(*options, out, "--max-steps", 1)
    blora, found = mean_logits(model_dir, out)
    assert blora.prior.rank == 3
    assert blora.model.temperature == 1  # nothing is held out, because the LoRA has learned it all
    assert 0 < (found - expected).abs().max() < 0.5


def test_a_bert_and_a_csv_file_are_trained_evaluated_and_compared(run, tmp_path):
    """The head of the saved adapter and its classes come back, and no class is mistaken."""
    rows = [f"it was {word} {k},{word}" for k, word in enumerate(["wet", "dry", "hot"] * 20)]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]))
    tokenizer = build_tokenizer([line.split(",")[0] for line in rows], bos="<s>", pad="<pad>")
    tokenizer.save_pretrained(tmp_path / "bert")
    net = tiny.bert()
    net.resize_token_embeddings(len(tokenizer))
    torch.nn.init.normal_(net.get_input_embeddings().weight)
    net.bert.save_pretrained(tmp_path / "bert")
    own = ["--model", tmp_path / "bert", "--task", tmp_path / "own.csv"]
    run("train", *own, "--out", tmp_path / "out", "--max-steps", 60, "--batch-size", 12)
    said, _ = run("evaluate", *own, "--adapter", tmp_path / "out", "--out", tmp_path / "test")
    document = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert document["n"] == len(load_task(tmp_path / "own.csv").test)
    assert document["acc"] > 0.8, said
    net, words = load_pretrained(str(tmp_path / "bert"), num_labels=3)
    blora = BayesianLoRA.from_pretrained(net, tmp_path / "out", tokenizer=words)
    assert blora.likelihood.classes == ("dry", "hot", "wet")
    prediction, labels = blora.predict_dataset(tmp_path / "own.csv", progress=False)
    assert float((prediction.predictions == labels).float().mean()) > 0.8
    run("distill", "--model", tmp_path / "bert", "--adapter", tmp_path / "out", *own[2:])
    short = ["--max-steps", 2, "--seeds", 0, "--out", tmp_path / "compared"]
    said, _ = run("compare", *own, "--methods", "lora,bayesian-lora", *short)
    assert "NLL minus lora's" in said
