"""Names of groups and sites, and a prior and a guide for each group."""

import pytest
import tiny
import torch
from own_classes import Plain, Spread

from pyro_blora import BayesianLoRA
from pyro_blora.errors import CheckpointError
from pyro_blora.guides import Ensemble, FullRank, Laplace, MatrixNormal, MeanField
from pyro_blora.models import KroneckerInducing, Subspace

PRIORS = {".*": KroneckerInducing(rank=2), "v_proj": Subspace(rank=3)}
GUIDES = {"q.*": MatrixNormal(), ".*": FullRank()}


def test_each_group_has_its_own():
    blora = tiny.adapted(prior=PRIORS, guide=GUIDES)
    assert {site.name: tuple(site.prior.shape()) for site in blora.model.sites} == {
        "q_proj.V": (2, 2, 2),
        "v_proj.s": (2, 3),
    }
    kinds = {name: type(family) for name, family in blora.guide.families().items()}
    assert kinds == {"q_proj.V": MatrixNormal, "v_proj.s": FullRank}
    before = tiny.trained(blora)
    tiny.train(blora, num_steps=2)
    assert not [n for n, value in tiny.trained(blora).items() if torch.equal(value, before[n])]


def test_the_posterior_is_that_of_two_adapters_side_by_side():
    both = tiny.adapted(prior=PRIORS, guide=GUIDES)
    tiny.shaken(both, 0.3)
    state, kl, updates = both.state_dict(), both.kl(), both.posterior.draws(0)
    both.unwrap()
    alone = {"q_proj": (PRIORS[".*"], GUIDES["q.*"]), "v_proj": (PRIORS["v_proj"], GUIDES[".*"])}
    total = 0.0
    for name, (prior, guide) in alone.items():
        blora = tiny.adapted(both.net, target_modules=[name], prior=prior, guide=guide)
        parts = (name, "temperature", "mean_temperature", "likelihood")
        blora.load_state_dict({k: v for k, v in state.items() if k.split(".")[1].startswith(parts)})
        total += blora.kl()
        mean = blora.posterior.draws(0)[name]
        for one, other in zip(mean.layers(), updates[name].layers(), strict=True):
            assert torch.equal(one.weight(), other.weight())
        blora.unwrap()
    torch.testing.assert_close(kl, total)


@pytest.mark.parametrize("other", [MeanField(), Laplace(structure="diag")], ids=repr)
def test_a_post_hoc_guide_beside_another(other):
    blora = tiny.adapted(prior=PRIORS, guide={"q.*": Laplace(), ".*": other})
    tiny.train(blora, num_steps=3)
    q, v = blora.guide.families().values()
    assert q.finished
    assert (q.width > 0).all()
    assert (v.distribution().variance > 0).all()


def test_own_classes_for_some_groups_are_read_back(tmp_path):
    prior = {"q_proj": Plain(), ".*": KroneckerInducing(rank=2)}
    blora = tiny.adapted(prior=prior, guide={".*": Ensemble(members=2), "v_proj": Spread()})
    expected = blora.state_dict()
    blora.save_pretrained(tmp_path)
    net = blora.unwrap()
    parts = {"prior": {"q_proj": Plain()}, "guide": {"v_proj": Spread()}}
    again = BayesianLoRA.from_pretrained(net, tmp_path, **parts)
    assert tiny.equal(again.state_dict(), expected)
    assert repr(again) == repr(blora)
    again.unwrap()
    for wrong in ({}, {**parts, "prior": {"q": Plain()}}, {**parts, "prior": Plain()}):
        with pytest.raises(CheckpointError, match=r"own_classes|q_proj"):
            BayesianLoRA.from_pretrained(net, tmp_path, **wrong)
