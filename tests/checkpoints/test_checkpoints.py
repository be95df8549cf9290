import copy
import json
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from pyro_blora import BayesianLoRA, checkpoints, guides
from pyro_blora.errors import CheckpointError
from pyro_blora.likelihoods import LabelTokens, SequenceClassification
from pyro_blora.models import KroneckerInducing


def network(hidden=16):
    torch.manual_seed(0)
    return tiny.llama(hidden_size=hidden)


def batch():
    ids = torch.arange(24).reshape(4, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def adapter(net, guide=None, **prior):
    blora = BayesianLoRA(
        net,
        target_modules=["q_proj", "v_proj", "lm_head"],
        prior=KroneckerInducing(rank=3, **prior),
        guide=guide,
        likelihood=LabelTokens(token_ids=[5, 6, 7], num_data=10),
    )
    return tiny.shaken(blora, 0.3)  # away from the start, where every update is zero


def reread(net, blora, folder, **options):
    """The adapter that is read from where ``blora`` is saved, and put on its network."""
    blora.save_pretrained(folder)
    blora.unwrap()
    return BayesianLoRA.from_pretrained(net, folder, **options)


@pytest.fixture
def saved(tmp_path):
    net = network()
    blora = adapter(net)
    blora.save_pretrained(tmp_path / "a")
    blora.unwrap()
    return net, tmp_path / "a"


def test_what_is_read_is_what_was_saved(tmp_path):
    """The contract of priors and guides has a round trip of every pair."""
    net = network()
    blora = adapter(net, conditional="scaled", sigma=0.2)
    probs, state = blora.predict(batch(), 0).probs, copy.deepcopy(blora.state_dict())
    again = reread(net, blora, tmp_path, fast=False)
    assert not again.model.shortcuts.on
    assert torch.equal(again.predict(batch(), 0).probs, probs)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    assert repr(again) == repr(blora)
    names = ["README.md", checkpoints.WEIGHTS, checkpoints.CONFIG]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    size = (tmp_path / checkpoints.WEIGHTS).stat().st_size
    assert size < 4 * sum(p.numel() for p in net.parameters())


def bert_body():
    """An encoder without a head."""
    return tiny.bert().bert


CLASSIFIERS = {"bert": tiny.bert, "roberta": tiny.roberta, "llama": tiny.llama_classifier}


def classifier(net, **options):
    options = {"target_modules": None, "likelihood": SequenceClassification(), **options}
    blora = tiny.adapted(net, **options)
    return tiny.shaken(blora, 0.3)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_round_trip_of_a_trained_head(name, tmp_path):
    net = CLASSIFIERS[name]()
    blora = classifier(net)
    probs = blora.predict(batch(), 0).probs
    assert torch.equal(reread(net, blora, tmp_path).predict(batch(), 0).probs, probs)


def test_a_checkpoint_from_before_heads_were_trained(tmp_path):
    net = tiny.bert()
    blora = classifier(net, modules_to_save=())
    probs = blora.predict(batch(), 0).probs
    blora.save_pretrained(tmp_path)
    config = json.loads((tmp_path / checkpoints.CONFIG).read_text())
    assert config.pop("modules_to_save") == []
    del config["sha256"]
    (tmp_path / checkpoints.CONFIG).write_text(json.dumps(config))
    blora.unwrap()
    assert torch.equal(BayesianLoRA.from_pretrained(net, tmp_path).predict(batch(), 0).probs, probs)


def test_a_head_for_another_base_is_refused(tmp_path):
    blora = classifier(tiny.llama_classifier())
    blora.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score.*LlamaForCausalLM has no such"):
        BayesianLoRA.from_pretrained(tiny.llama(), tmp_path)


LOAD_IN_PEFT = """
import pathlib, sys
import peft, safetensors.torch, torch, transformers
ids = torch.arange(24).reshape(4, 6)
for case in pathlib.Path(sys.argv[1]).iterdir():
    kind = transformers.AutoConfig.from_pretrained(case / "net").architectures[0]
    net = getattr(transformers, kind).from_pretrained(case / "net")
    model = peft.PeftModel.from_pretrained(net, str(case / "adapter")).eval()
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    expected = safetensors.torch.load_file(case / "expected.safetensors")["logits"]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5, msg=str)
    print(case.name, model.peft_config["default"].task_type)
"""


@pytest.mark.slow
def test_exports_load_in_peft_in_another_process(tmp_path):
    peft = pytest.importorskip("peft")
    own = {"wrapped": tiny.bert, "target": tiny.bert, "causal": tiny.llama, "body": bert_body}
    for name, build in {**CLASSIFIERS, **own}.items():
        net = build()
        net.save_pretrained(tmp_path / name / "net")
        options = {"target_modules": ["query", "classifier"]} if name == "target" else {}
        if name == "wrapped":
            net = peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS")).eval()
        if name in ("causal", "body"):
            options["likelihood"] = LabelTokens(token_ids=[5, 6])
        blora = classifier(net, **options)
        blora.export_peft(tmp_path / name / "adapter")
        with torch.no_grad(), blora.posterior(0):
            logits = {"logits": net(**batch())[0].contiguous()}
        save_file(logits, tmp_path / name / "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD_IN_PEFT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kinds = dict.fromkeys([*CLASSIFIERS, "wrapped"], "SEQ_CLS")
    kinds |= {"causal": "CAUSAL_LM", "target": "None", "body": "None"}
    found = dict(line.split() for line in done.stdout.splitlines())
    assert {name: kind.removeprefix("TaskType.") for name, kind in found.items()} == kinds


def test_the_posterior_mean_loads_in_peft(saved, tmp_path):
    peft = pytest.importorskip("peft")
    net, folder = saved
    blora = BayesianLoRA.from_pretrained(net, folder)
    blora.export_peft(tmp_path / "peft")
    likelihood, probs = blora.likelihood, blora.predict(batch(), 0).probs
    blora.unwrap()
    with pytest.raises(CheckpointError, match=r"PEFT adapter.*PeftModel\.from_pretrained"):
        BayesianLoRA.from_pretrained(net, tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "peft"))
    logits = likelihood.logits(model.base_model.model, batch())
    # The head's own rows are computed whole there: PEFT's layer is no plain nn.Linear.
    assert torch.allclose(logits.softmax(-1), probs, atol=1e-6)
    base = likelihood.logits(net, batch()).softmax(-1)
    assert not torch.allclose(base, probs, atol=1e-3)


def test_what_peft_reads_is_the_mean_of_the_drawn_weights(tmp_path):
    """With a random scale its median would be too little."""
    pytest.importorskip("peft")
    blora = adapter(network(), guides.MeanField(init_scale=0.8), scale="half-cauchy")
    with torch.no_grad():  # so narrow a core that its draws tell the mean of the scale
        blora.guide.families()["q_proj.V"].scale_unconstrained.fill_(-4.0)
    blora.export_peft(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    draws = blora.sample_updates(10_000)["q_proj"].layers()[0].weight()
    name = f"base_model.model.{blora.model.groups[0].module_names[0]}"
    found = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    error = draws.std(0) * (1 / len(draws) + 1 / 1024) ** 0.5
    assert ((found - draws.mean(0)).abs() < 5 * error).all()


def cut(size):
    def spoil(folder):
        path = folder / checkpoints.WEIGHTS
        path.write_bytes(path.read_bytes()[:size])

    return spoil


def poison(folder):
    path = folder / checkpoints.WEIGHTS
    tensors = load_file(path)
    tensors["guide.q_proj_V.loc_unconstrained"].fill_(float("nan"))
    save_file(tensors, path)


def changed(**parts):
    """By hand, as it is when the line with the checksum is taken out."""

    def spoil(folder):
        path = folder / checkpoints.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": ""} | parts))

    return spoil


def named(name, **options):
    return {"name": name, "options": options}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        *((cut(size), "corrupt or incomplete") for size in (0, 5, 100, -1)),
        (lambda folder: torch.save({}, folder / checkpoints.WEIGHTS), "corrupt"),
        (poison, "not finite"),
        (changed(sha256="0"), "not as it was saved"),
        (lambda folder: (folder / checkpoints.WEIGHTS).unlink(), checkpoints.WEIGHTS),
        (lambda folder: (folder / checkpoints.CONFIG).unlink(), "does not exist"),
        (lambda folder: (folder / checkpoints.CONFIG).write_text("{"), "not readable JSON"),
        (changed(format=99), "format 99"),
        (changed(layers=None), "lacks 'layers'"),
        (changed(prior=named("os.system", command="true")), "pass prior="),
        (changed(prior=named("UpdateModel", x=1)), "cannot be made"),
        (changed(prior=named("KroneckerInducing", rank=2)), "do not fit"),
        (changed(guide=named("MatrixNormal", init_scale=-1)), "cannot be made"),
    ],
)
def test_a_spoiled_folder_is_refused(saved, spoil, told):
    net, folder = saved
    spoil(folder)
    with pytest.raises(CheckpointError, match=told):
        BayesianLoRA.from_pretrained(net, folder)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_file_is_no_folder_to_save_in(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="out is a file; save_pretrained writes a folder"):
        tiny.adapted().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_wrong_base_is_refused_and_left_as_it_was(saved):
    other = network(hidden=32)
    with pytest.raises(CheckpointError, match=r"q_proj of \[16, 16\].*32 x 32"):
        BayesianLoRA.from_pretrained(other, saved[1])
    assert not any(m._forward_hooks for m in other.modules())


class Own(guides.MeanField):
    """A guide of the user's own."""


@pytest.mark.parametrize(
    ("part", "wrong", "right", "told"),
    [
        ("prior", KroneckerInducing(rank=3, sigma=9.0), KroneckerInducing, "sigma=None for 9.0"),
        ("guide", Own(), Own, "init_scale=0.5 for 0.01"),
    ],
)
def test_the_saved_options_of_a_part_are_taken(part, wrong, right, told, tmp_path):
    """Of its class without a word; of an object that has others with a warning."""
    net, own = network(), Own(init_scale=0.5)
    likelihood = LabelTokens(token_ids=[5, 6, 7], num_data=99)
    blora = adapter(net, own)
    expected = repr(blora).replace("num_data=10", "num_data=99")
    right = {"guide": own, part: right, "likelihood": likelihood}
    read = reread(net, blora, tmp_path, **right)
    assert repr(read) == expected
    read.unwrap()
    with pytest.warns(UserWarning, match=rf"{part}=.*saved options are taken, {told}"):
        read = BayesianLoRA.from_pretrained(net, tmp_path, **{**right, part: wrong})
    assert repr(read) == expected
