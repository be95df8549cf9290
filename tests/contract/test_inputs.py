"""A wrong input is refused at the place that knows, and before anything is changed."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import Plain
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, T5Config, T5ForConditionalGeneration

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import MeanField
from pyro_blora.likelihoods import CausalLM, LabelTokens, Ordinal, SequenceClassification
from pyro_blora.models import KroneckerInducing, Subspace
from pyro_blora.updates import LowRankUpdate

ROWS = tiny.examples(10)


def test_another_size_than_that_of_the_data_warns():
    blora, loader = tiny.adapted(num_data=5000), DataLoader(ROWS, 5, collate_fn=tiny.collate)
    with pytest.warns(UserWarning, match="=5000, but train has 10 .* so the KL weighs 0.002 times"):
        tiny.train(blora, loader, collate=None)


def test_an_adapter_that_is_off_is_not_trained(tmp_path):
    blora = tiny.adapted(num_data=10)
    before = tiny.trained(blora)
    trainer = tiny.trainer(tmp_path, blora, ROWS, max_steps=1)
    for train in (lambda: tiny.train(blora), trainer.train):
        with blora.disable_adapter(), pytest.raises(ConfigurationError, match="adapter is off"):
            train()
    assert tiny.equal(tiny.trained(blora), before)
    with blora.posterior(), pytest.raises(ConfigurationError, match="outside of posterior"):
        blora.disable_adapter().__enter__()


NUMBERS = [lambda: KroneckerInducing(rank=(2, 2.5)), lambda: CausalLM(num_data=0)]
NUMBERS += [lambda: Ordinal(num_classes=1), lambda: LabelTokens(token_ids=[5, 6, 5])]
NUMBERS += [lambda: LabelTokens(token_ids=[-1, 5])]
NUMBERS += [lambda: LabelTokens(token_ids=[5, 6], num_data=12.5)]


@pytest.mark.parametrize("call", NUMBERS)
def test_an_option_out_of_range(call):
    with pytest.raises(ConfigurationError):
        call()


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **sizes))


def masked():
    return AutoModelForMaskedLM.from_config(tiny.bert().config)


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


NOISY = KroneckerInducing(rank=2, conditional="exact")
CLASSES, SUBSPACE = {"likelihood": SequenceClassification()}, Subspace(rank=2)
REFUSED = [
    (tiny.llama, {"prior": {"q_prj": SUBSPACE, ".*": SUBSPACE}}),
    (tiny.llama, {"prior": {"q_proj": SUBSPACE}}),  # v_proj has none
    (tiny.llama, {"prior": {".*": KroneckerInducing(rank=9)}}),  # v_proj is 8 x 16
    (tiny.llama, {"guide": {"v_proj": MeanField()}}),
    (tiny.llama, {"guide": {".*": AutoNormal}}),
    (tiny.llama, {"guide": "AutoNormal"}),
    (tiny.llama, {"guide": AutoNormal(lambda batch: None)}),
    (tiny.llama, {"prior": KroneckerInducing}),
    # of the density of noise a Hessian would be that of one draw
    (tiny.llama, {"prior": NOISY, "guide": AutoLaplaceApproximation}),
    (tiny.llama, {"likelihood": LabelTokens(token_ids=(5, 32))}),  # beyond the vocabulary
    (named_likelihood, {"target_modules": ["likelihood"]}),  # a name of a part of the model
    (tiny.llama, CLASSES),
    (partial(tiny.bert, num_labels=1), CLASSES),
    (partial(tiny.bert, problem_type="regression"), CLASSES),
    (t5, {"likelihood": LabelTokens(token_ids=[5, 31])}),
    (tiny.bert, {"likelihood": CausalLM()}),
    (masked, {"likelihood": CausalLM()}),  # which sees the tokens that it is scored on
    (tiny.llama, returns(lambda A, B: None)),
    (tiny.llama, returns(lambda A, B: LowRankUpdate(A=A.mT, B=B))),
    (tiny.llama, returns(lambda A, B: LowRankUpdate(A=A, B=B, core=torch.ones(2, 3, 2)))),
    (tiny.llama, broken(setup=lambda self, group: setattr(self, "A", nn.Parameter(torch.ones(1))))),
    (tiny.llama, broken(forward=discrete)),
]


@pytest.mark.parametrize(("build", "options"), REFUSED)
def test_a_refused_adapter_leaves_the_network_alone(build, options):
    net = build()
    targets = None if build is tiny.llama else "all-linear"
    with pytest.raises(ConfigurationError):
        tiny.adapted(net, **{"target_modules": targets, **options})
    assert all(parameter.requires_grad for parameter in net.parameters())
    for module in net.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


class Weighed(LabelTokens):
    def __init__(self, *, token_ids, weights, num_data=None):
        super().__init__(token_ids=token_ids, num_data=num_data)
        self.register_buffer("weights", torch.as_tensor(weights))


def test_an_argument_may_have_the_name_of_a_buffer():
    likelihood = Weighed(token_ids=(5, 6), weights=[1.0, 2.0])
    assert likelihood.weights is likelihood.state_dict(keep_vars=True)["weights"]
