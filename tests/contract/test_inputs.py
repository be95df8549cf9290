"""A wrong input is refused at the place that knows, and before anything is changed."""

import json
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import Plain
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration

from pyro_blora import BayesianLoRA, checkpoints
from pyro_blora.checkpoints import peft
from pyro_blora.checkpoints.checkpoint import read_tensors, write_tensors
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import MeanField
from pyro_blora.likelihoods import CausalLM, LabelTokens, SequenceClassification
from pyro_blora.models import KroneckerInducing, Subspace
from pyro_blora.updates import LowRankUpdate

ROWS = tiny.examples(10)


@pytest.fixture
def blora():
    return tiny.adapted(num_data=10)


@pytest.mark.parametrize("way", ["loader", "Trainer"])
def test_another_size_than_that_of_the_data_warns(way, tmp_path):
    blora = tiny.adapted(num_data=5000)
    loader = DataLoader(ROWS, 5, collate_fn=tiny.collate)
    run = {
        "loader": lambda: tiny.train(blora, loader, collate=None),
        "Trainer": lambda: tiny.trainer(tmp_path, blora, ROWS),
    }
    with pytest.warns(UserWarning, match="=5000, but train has 10 .* so the KL weighs 0.002 times"):
        run[way]()


NUMBERS = [
    lambda b: tiny.train(b, learning_rates={"mean": -0.05}),
    lambda b: tiny.train(b, num_steps=None, num_epochs=torch.nan),
    lambda b: tiny.train(b, batch_size=2.5),
    lambda b: b.predict(tiny.sequences(), True),
    lambda b: b.export_peft("x", 2.5),
    lambda b: b.distill(ROWS, tiny.collate, num_samples=2.5),
    lambda b: KroneckerInducing(rank=(2, 2.5)),
    lambda b: CausalLM(num_data=0),
    lambda b: LabelTokens(token_ids=[5, 6, 5]),
    lambda b: LabelTokens(token_ids=[-1, 5]),
    lambda b: LabelTokens(token_ids=[5, 6], num_data=12.5),
]


@pytest.mark.parametrize("call", NUMBERS)
def test_an_option_out_of_range(call, blora):
    before = tiny.trained(blora)
    with pytest.raises(ConfigurationError):
        call(blora)
    assert tiny.equal(tiny.trained(blora), before)
    assert not Path("x").exists()


def test_an_adapter_that_is_off_is_not_trained(tmp_path, blora):
    before = tiny.trained(blora)
    trainer = tiny.trainer(tmp_path, blora, ROWS, max_steps=1)
    for train in (lambda: tiny.train(blora), trainer.train):
        with blora.disable_adapter(), pytest.raises(ConfigurationError, match="adapter is off"):
            train()
    assert tiny.equal(tiny.trained(blora), before)


def infinite():
    net = tiny.llama()
    net.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.inf
    return net


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **sizes))


def named_likelihood():
    net = nn.Sequential()
    net.q_proj, net.likelihood = nn.Linear(4, 4), nn.Linear(4, 4)
    return net


def broken(**members):
    return {"prior": type("Broken", (Plain,), members)()}


def returns(make):
    """A prior whose update is this of A and B of zeros."""
    return broken(forward=lambda self: make(torch.zeros(2, 2, 16), torch.zeros(2, 16, 2)))


def discrete(self):
    with self.plate():
        probs = torch.full((self.group.d_out, self.rank), 0.5)
        B = pyro.sample(self.site("B"), dist.Bernoulli(probs).to_event(2))
    return LowRankUpdate(A=self.A, B=B)


CLASSES, SUBSPACE = {"likelihood": SequenceClassification()}, Subspace(rank=2)
REFUSED = [
    (tiny.llama, {"prior": {"q_prj": SUBSPACE, ".*": SUBSPACE}}),
    (tiny.llama, {"prior": {"q_proj": SUBSPACE}}),  # v_proj has none
    (tiny.llama, {"prior": {".*": KroneckerInducing(rank=9)}}),  # v_proj is 8 x 16
    (tiny.llama, {"prior": {"q_proj": Subspace, ".*": SUBSPACE}}),
    (tiny.llama, {"guide": {"v_proj": MeanField()}}),
    (tiny.llama, {"guide": {".*": AutoNormal}}),
    (tiny.llama, {"guide": {".*": MeanField}}),
    (infinite, {"prior": KroneckerInducing(rank=2)}),  # whose scale is that of the weights
    (tiny.llama, {"likelihood": LabelTokens(token_ids=(5, 32))}),  # beyond the vocabulary
    (named_likelihood, {"target_modules": ["likelihood"]}),  # a name of a part of the model
    (tiny.llama, CLASSES),
    (partial(tiny.bert, num_labels=1), CLASSES),
    (partial(tiny.bert, problem_type="regression"), CLASSES),
    (t5, {"likelihood": LabelTokens(token_ids=[5, 31])}),
    (tiny.bert, {"likelihood": CausalLM()}),
    (tiny.llama, returns(lambda A, B: None)),
    (tiny.llama, returns(lambda A, B: LowRankUpdate(A=A.mT, B=B))),
    (tiny.llama, returns(lambda A, B: LowRankUpdate(A=A, B=B, core=torch.ones(2, 3, 2)))),
    (tiny.llama, broken(setup=lambda self, group: setattr(self, "A", nn.Parameter(torch.ones(1))))),
    (tiny.llama, broken(forward=discrete)),
]


@pytest.mark.parametrize(("build", "options"), REFUSED)
def test_a_refused_adapter_leaves_the_network_alone(build, options):
    net = build()
    targets = None if build in (tiny.llama, infinite) else "all-linear"
    with pytest.raises(ConfigurationError):
        tiny.adapted(net, **{"target_modules": targets, **options})
    assert all(parameter.requires_grad for parameter in net.parameters())
    for module in net.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_an_edited_configuration(tmp_path, blora):
    blora.net.config.name_or_path = "me/base"
    blora.save_pretrained(tmp_path)
    base = blora.unwrap()
    header, tensors = read_tensors(tmp_path / checkpoints.WEIGHTS)
    (name,) = header.keys() - {"format"}
    right = json.loads(header[name])
    unknown = {**right["prior"], "options": {**right["prior"]["options"], "lengths": 3}}
    newer = {**right["method"], "schedule": "new"}
    wrong = [[right], {**right, "prior": unknown}, {**right, "method": newer}]
    needed = "base base_model layers modules_to_save method prior guide likelihood"
    wrong += [{k: v for k, v in right.items() if k != key} for key in needed.split()]
    for text in ("{", *map(json.dumps, wrong)):
        write_tensors(tmp_path / checkpoints.WEIGHTS, tensors, {name: text})
        with pytest.raises(CheckpointError, match=r"safetensors cannot be used"):
            BayesianLoRA.from_pretrained(base, tmp_path)
        assert not any(module._forward_hooks for module in base.modules())


def test_an_edited_lora(tmp_path, blora):
    pytest.importorskip("peft")
    blora.export_peft(tmp_path)
    base = blora.unwrap()
    config, weights = (tmp_path / n for n in (peft.PEFT_CONFIG, peft.PEFT_WEIGHTS))
    kept = {n: t for n, t in read_tensors(weights)[1].items() if "lora_B" not in n}
    right = config.read_text()
    for text in ("{", "[1]", right):
        config.write_text(text)
        if text is right:
            save_file(kept, weights)
        with pytest.raises(CheckpointError, match="cannot be used"):
            BayesianLoRA.from_peft(base, tmp_path)


class Weighed(LabelTokens):
    def __init__(self, *, token_ids, weights, num_data=None):
        super().__init__(token_ids=token_ids, num_data=num_data)
        self.register_buffer("weights", torch.as_tensor(weights))


def test_an_argument_may_have_the_name_of_a_buffer():
    likelihood = Weighed(token_ids=(5, 6), weights=[1.0, 2.0])
    assert likelihood.weights is likelihood.state_dict(keep_vars=True)["weights"]
