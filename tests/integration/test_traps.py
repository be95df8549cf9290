"""What went wrong once: each test is a trap that somebody fell into."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA
from pyro_blora.guides import Ensemble, Flow, Site
from pyro_blora.guides.flow import FLOWS, make_chain
from pyro_blora.likelihoods import CausalLM
from pyro_blora.models import KernelInducing


@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_knows_its_own_jacobian(name):
    torch.manual_seed(0)
    chain = make_chain([name], 6)
    tiny.shaken(chain, 0.3)
    x = torch.randn(6)
    J = torch.autograd.functional.jacobian(lambda x: chain(x)[0], x)
    torch.testing.assert_close(chain(x)[1], J.slogdet().logabsdet, atol=1e-3, rtol=1e-3)


def test_a_flow_that_has_run_can_be_copied_and_pickled():
    blora = tiny.adapted(guide=Flow())
    blora.predict(tiny.sequences(), 3)
    chain = blora.guide.families()["q_proj.V"]._chain
    assert pickle.dumps(copy.deepcopy(chain))


def test_no_member_of_an_ensemble_keeps_to_its_places():
    """Eight particles and four members: member k must not always have the same examples."""
    prior = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    q = Ensemble(members=4).bind(Site("V", prior, ()))
    draws = [q.distribution().expand((8, 3)).rsample() for _ in range(4)]
    seen = [next(k for k in range(4) if torch.equal(d[0], q.points[k])) for d in draws]
    assert sorted(seen) == [0, 1, 2, 3]


def test_kernel_priors_reach_most_neurons():
    net = torch.nn.Sequential(torch.nn.Linear(64, 64))
    options = {"prior": KernelInducing(rank=8), "likelihood": CausalLM(num_data=1)}
    blora = BayesianLoRA(net, target_modules=["0"], **options)
    update = getattr(blora.model, blora.model.groups[0].name)()
    q = update.B[0].square().sum(-1)  # the prior variance that is left of one at distance zero
    assert (q > 0.05).float().mean() > 0.8
    assert q.max() <= 1.001


class CalledByName(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(16, 16)

    def forward(self, hidden):
        return self.q_proj(input=hidden)


def test_a_layer_may_be_called_by_the_name_of_its_input():
    net, batch = tiny.llama(), tiny.sequences()
    net.model.layers[0].self_attn.q_proj = CalledByName()
    blora = tiny.adapted(net, target_modules=["q_proj"], layers_to_transform=[0])
    mean, drawn = (blora.predict(batch, draws).probs for draws in (0, 2))
    assert not torch.allclose(mean, drawn, atol=1e-4)
