"""What PEFT loads of an export, in a process of its own; and PEFT's habits by PEFT's names."""

import copy
import os
import subprocess
import sys

import pyro
import pytest
import tiny
import torch
from own_classes import RandomScale
from own_tokenizer import build_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TorchAoConfig, pipeline

from pyro_blora import BayesianLoRA, fit, guides, models
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import LabelTokens, SequenceClassification

peft = pytest.importorskip("peft")
from peft_adapters import BATCH, logits, trained  # noqa: E402


def moved(net, **options):
    """An adapter away from its start."""
    if not hasattr(net, "lm_head"):
        options.setdefault("likelihood", SequenceClassification(num_data=12))
    blora = tiny.adapted(net, **{"target_modules": None, **options})
    return tiny.shaken(blora, 0.2)


def mean_logits(blora):
    with blora.posterior():
        return logits(blora.net)


HEAD = {"target_modules": ["q_proj", "lm_head"]}
EXPORTS = {
    "gpt2": (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "qwen2": (tiny.qwen2, {"target_modules": "all-linear"}),
    "head": (tiny.llama, HEAD),
    "tied": (lambda: tiny.llama(tied=True), HEAD),
    "bert": (tiny.bert, {}),
    "score": (tiny.llama_classifier, {}),
}
# Besides: a head of two layers, quantised weights, around a PeftModel, a head that is adapted
MORE = {
    # of different ranks: 16 x 16 and 64 x 16
    "ranks": (tiny.gpt2, {"target_modules": ["c_proj"], "prior": models.FisherInducing(rank=20)}),
    "roberta": (tiny.roberta, {}),
    "int8": (tiny.llama, {}),
    "wrapped": (tiny.bert, {}),
    "target": (tiny.bert, {"target_modules": ["query", "classifier"]}),
}
TASKS = dict.fromkeys(["bert", "score", "roberta", "wrapped"], "SEQ_CLS") | {"target": "None"}

IN_PEFT = """
import pathlib, sys
import peft, safetensors.torch, torch, transformers
ids = {"input_ids": torch.load(sys.argv[2]), "attention_mask": torch.load(sys.argv[3])}

def base(folder, **options):
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, kind).from_pretrained(folder, **options)

def logits(model):
    with torch.no_grad():
        return model.eval()(**ids).logits

def answers(logits):
    if logits.dim() == 2:
        return logits
    last = ids["attention_mask"].sum(-1) - 1
    return logits[torch.arange(len(last)), last][:, [5, 6, 7]]

for case in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    expected = safetensors.torch.load_file(case / "expected.safetensors")
    options = {}
    if case.name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        options = {"quantization_config": transformers.TorchAoConfig(Int8WeightOnlyConfig())}
    model = peft.PeftModel.from_pretrained(base(case / "net", **options), case / "mean")
    error = (logits(model) - expected["mean"]).abs().max()
    # the averaging example of the documentation
    model = peft.PeftModel.from_pretrained(
        base(case / "net", **options), case / "draws" / "0", adapter_name="0"
    )
    for k in ("1", "2", "3"):
        model.load_adapter(case / "draws" / k, adapter_name=k)
    probs = []
    for k in ("0", "1", "2", "3"):
        model.set_adapter(k)
        probs.append(answers(logits(model)).softmax(-1))
    spread = torch.stack(probs).std(0).max()
    off = (torch.stack(probs).mean(0) - expected["probs"]).abs().max()
    task = getattr(model.peft_config["0"].task_type, "value", model.peft_config["0"].task_type)
    print(case.name, float(error), float(off), float(spread), task)
"""


@pytest.mark.slow
def test_exports_load_in_peft_in_another_process(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    cases = EXPORTS | MORE
    for name, (build, options) in cases.items():
        place, net = tmp_path / "cases" / name, build()
        net.save_pretrained(place / "net")
        if name == "int8":
            config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
            net = AutoModelForCausalLM.from_pretrained(place / "net", quantization_config=config)
        if name == "wrapped":
            net = peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS"))
        blora = moved(net.eval(), **options)
        blora.export_peft(place / "mean")
        torch.manual_seed(1)
        blora.export_peft(place / "draws", num_samples=4)
        torch.manual_seed(1)  # the same draws again
        probs = blora.predict(BATCH, 4, max_rows=99).probs
        expected = {"mean": mean_logits(blora).contiguous(), "probs": probs}
        save_file(expected, place / "expected.safetensors")
    for key, value in BATCH.items():
        torch.save(value, tmp_path / key)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_PEFT, tmp_path / "cases"]
        + [tmp_path / key for key in BATCH],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert lines.keys() == cases.keys()
    for name, (*figures, task) in lines.items():
        error, off, spread = map(float, figures)
        assert error < 1e-5, (name, error)
        assert off < 1e-5, (name, off)
        assert spread > 1e-3, (name, spread)
        assert task == TASKS.get(name, "CAUSAL_LM")


ALONE = """
import sys
import peft, torch
model = peft.AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    probs = model(**torch.load(sys.argv[2])).logits.softmax(-1)
torch.save({"probs": probs, "names": model.config.id2label}, sys.argv[2])
"""


def test_a_folder_alone_is_enough_where_the_base_has_one(tmp_path):
    """PEFT finds the base by its folder, and with its configuration the names of the classes."""
    net, names = tiny.bert(), {0: "no", 1: "maybe", 2: "yes"}
    net.config.id2label, net.config.label2id = names, {name: k for k, name in names.items()}
    net.save_pretrained(tmp_path / "net")
    blora = moved(type(net).from_pretrained(tmp_path / "net"))
    blora.export_peft(tmp_path / "lora")
    torch.save(BATCH, tmp_path / "batch")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, tmp_path / "lora", tmp_path / "batch"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    found = torch.load(tmp_path / "batch")
    torch.testing.assert_close(found["probs"], blora.predict(BATCH, 0).probs, atol=1e-6, rtol=0)
    assert found["names"] == names


def test_what_peft_reads_is_the_mean_of_the_drawn_weights(tmp_path):
    """With a random scale its median would be too little."""
    guide = guides.MeanField(init_scale=0.8)
    blora = moved(tiny.llama(), guide=guide, prior=RandomScale())
    with torch.no_grad():  # so narrow a core that its draws tell the mean of the scale
        blora.guide.families()["q_proj.V"].scale_unconstrained.fill_(-4.0)
    blora.export_peft(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    draws = blora.sample_updates(10_000)["q_proj"].layers()[0].weight()
    name = f"base_model.model.{blora.model.groups[0].module_names[0]}"
    found = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    error = draws.std(0) * (1 / len(draws) + 1 / 1024) ** 0.5
    assert ((found - draws.mean(0)).abs() < 5 * error).all()


def test_a_model_that_is_asked_gives_the_posterior_mean():
    blora = moved(tiny.llama())
    assert torch.equal(blora(**BATCH).logits, mean_logits(blora))
    tokenizer = build_tokenizer(["a b c d e f g h i j"], eos="</s>")
    blora = moved(tiny.llama(vocab_size=len(tokenizer)))
    inputs = tokenizer("a b", return_tensors="pt")
    ask = pipeline("text-generation", model=blora, tokenizer=tokenizer)
    torch.manual_seed(0)  # of the draws
    expected = blora.generate(**inputs, max_new_tokens=3, do_sample=False).sequences[0]
    torch.manual_seed(0)
    told = ask("a b", max_new_tokens=3, do_sample=False, return_tensors=True)
    assert told[0]["generated_token_ids"] == expected.tolist()
    assert ask.device == blora.device


def test_a_disabled_adapter_and_its_head_are_out_of_the_way():
    net = tiny.bert()
    before = logits(net)
    blora = moved(net)
    after, loss = mean_logits(blora), blora.log_predictive(tiny.sequences(), 2)
    with blora.disable_adapter():
        assert torch.equal(blora(**BATCH).logits, before)
        with blora.disable_adapter():
            pass
        assert torch.equal(blora.predict(BATCH, 3).samples.var(0), torch.zeros(4, 3))
    assert torch.equal(mean_logits(blora), after)
    assert loss.shape == (4,)


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    model = trained()
    model.print_trainable_parameters()
    form = capsys.readouterr().out
    blora = moved(model.unload())
    blora.print_trainable_parameters()
    told = capsys.readouterr().out
    words = [w for w in form.split() if not w[0].isdigit()]
    assert [w for w in told.split() if not w[0].isdigit()] == words
    assert f"trainable params: {blora.trainable_parameters:,}" in told


@pytest.mark.parametrize("name", EXPORTS)
def test_a_merged_network_stands_by_itself(name, tmp_path):
    """Its weights are W + E[dW] by dense algebra, and it is saved and read as any other."""
    build, options = EXPORTS[name]
    net = build()
    old = {n: p.detach().clone() for n, p in net.named_parameters()}
    blora = moved(net, **options)
    expected = mean_logits(blora)
    deltas = {
        f"{n}.weight": update.weight()
        for group in blora.model.groups
        for n, update in zip(
            group.module_names, blora.sample_updates(0)[group.name].layers(), strict=True
        )
    }
    heads = blora.model.trained_heads.tensors()
    whole = blora.merge_and_unload()
    torch.testing.assert_close(logits(whole), expected, atol=1e-5, rtol=0)
    for n, p in whole.named_parameters():
        delta = deltas.get(n, torch.zeros(()))
        delta = delta.mT if name == "gpt2" and n in deltas else delta
        source = old.get(n, old.get("model.embed_tokens.weight"))  # an untied head is new
        torch.testing.assert_close(p, heads.get(n, source + delta), atol=1e-6, rtol=1e-5)
    whole.save_pretrained(tmp_path)
    again = type(whole).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
    assert not any(module._forward_hooks for module in whole.modules())
    moved(whole)  # and can be adapted again


@pytest.mark.parametrize("local", [False, True])
def test_two_adapters_take_turns_on_one_network(local, tmp_path):
    with pyro.settings.context(module_local_params=local):
        net = tiny.llama()
        wanted = {n: p.requires_grad for n, p in net.named_parameters()}
        before = logits(net)
        blora, batch = moved(net), tiny.sequences()
        first = blora.predict(batch, 0).probs
        blora.save_pretrained(tmp_path)
        likelihood = LabelTokens(token_ids=tiny.ANSWERS, num_data=8)
        options = {"prior": models.Subspace(rank=2), "target_modules": ["k_proj"]}
        other = blora.add_adapter("other", **options, likelihood=likelihood)
        assert torch.equal(blora.predict(batch, 0).probs, first)  # which is active still
        assert blora.active_adapter == other.active_adapter == "default"
        with pytest.raises(ConfigurationError, match="set_adapter"):
            other.predict(batch)
        assert blora.set_adapter("other") is other
        fit(other, tiny.examples(8), collate=tiny.collate, num_steps=2, progress=False)
        second = other.predict(batch, 0).probs
        assert not torch.allclose(second, first, atol=1e-3)
        assert torch.equal(other.set_adapter("default").predict(batch, 0).probs, first)
        fit(blora, tiny.examples(8), collate=tiny.collate, num_steps=2, progress=False)
        assert torch.equal(blora.set_adapter("other").predict(batch, 0).probs, second)
        loaded = other.load_adapter(tmp_path, "loaded")
        assert torch.equal(other.predict(batch, 0).probs, second)
        assert torch.equal(other.set_adapter("loaded").predict(batch, 0).probs, first)
        other.delete_adapter("other")
        for wrong, told in (
            (lambda: blora.set_adapter("other"), "Known: default, loaded"),
            (lambda: blora.delete_adapter("loaded"), "is active"),
            (lambda: blora.add_adapter("loaded"), "there already"),
            (lambda: blora.add_adapter("big", prior=models.Subspace(rank=99)), "too large"),
        ):
            with pytest.raises(ConfigurationError, match=told):
                wrong()
            assert loaded.active_adapter == "loaded"
            assert torch.equal(loaded.predict(batch, 0).probs, first)
        assert loaded.unwrap() is net
        assert torch.equal(logits(net), before)
        assert {n: p.requires_grad for n, p in net.named_parameters()} == wanted
        assert not any(module._forward_hooks for module in net.modules())
        with pytest.raises(ConfigurationError, match="unwrapped"):
            blora.add_adapter("late")


def test_draws_that_are_no_loras_are_refused_and_nothing_is_written(tmp_path):
    noisy = {"prior": models.KroneckerInducing(rank=2, conditional="exact")}
    for options, count, told in (
        (noisy, 2, "conditional='deterministic'"),
        ({"guide": guides.Amortized()}, 2, "depends on the input"),
        ({}, -1, "num_samples=-1"),
    ):
        blora = moved(tiny.llama(), **options)
        with pytest.raises(ConfigurationError, match=told):
            blora.export_peft(tmp_path / "x", num_samples=count)
        assert not (tmp_path / "x").exists()
    wrapped = moved(peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["k_proj"])))
    with pytest.raises(ConfigurationError, match="merge that one first"):
        wrapped.merge_and_unload()


def test_what_goes_out_comes_in_again(tmp_path):
    """Mean, layers and heads, by PEFT's files alone."""
    blora = moved(tiny.bert())
    expected = mean_logits(blora)
    blora.export_peft(tmp_path)
    net = copy.deepcopy(blora.unwrap())
    again = BayesianLoRA.from_peft(net, tmp_path)
    torch.testing.assert_close(mean_logits(again), expected, atol=1e-5, rtol=0)
    assert again.model.layer_names == blora.model.layer_names
    assert again.prior.rank == 2
