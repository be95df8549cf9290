"""A wrong input is refused at the place that knows, and before anything is changed."""

from functools import partial

import pytest
import tiny
import torch
from own_classes import Plain
from torch.utils.data import DataLoader

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import MeanField
from pyro_blora.likelihoods import CausalLM, LabelTokens, SequenceClassification
from pyro_blora.models import KroneckerInducing, Subspace
from pyro_blora.updates import LowRankUpdate

ROWS = tiny.examples(10)


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


def broken(**members):
    return {"prior": type("Broken", (Plain,), members)()}


def returns(make):
    """A prior whose update is this of A and B of zeros."""
    return broken(forward=lambda self: make(torch.zeros(2, 2, 16), torch.zeros(2, 16, 2)))


CLASSES, SUBSPACE = {"likelihood": SequenceClassification()}, Subspace(rank=2)
REFUSED = [
    (tiny.llama, {"prior": {"q_prj": SUBSPACE, ".*": SUBSPACE}}),
    (tiny.llama, {"prior": {".*": KroneckerInducing(rank=9)}}),  # v_proj is 8 x 16
    (tiny.llama, {"guide": {"v_proj": MeanField()}}),
    (tiny.llama, {"prior": KroneckerInducing}),
    (tiny.llama, {"guide": MeanField}),
    (tiny.llama, {"likelihood": LabelTokens(token_ids=(5, 32))}),  # beyond the vocabulary
    (tiny.llama, CLASSES),
    (partial(tiny.bert, problem_type="regression"), CLASSES),
    (tiny.bert, {"likelihood": CausalLM()}),
    (tiny.llama, returns(lambda A, B: None)),
    (tiny.llama, returns(lambda A, B: LowRankUpdate(A=A.mT, B=B))),
    (tiny.llama, returns(lambda A, B: LowRankUpdate(A=A, B=B, core=torch.ones(2, 3, 2)))),
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
