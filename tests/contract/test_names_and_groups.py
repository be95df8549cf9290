"""Names of groups and sites, and a prior and a guide for each group."""

import pytest
import tiny
import torch
from own_classes import Plain, Spread
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_blora import BayesianLoRA, fit, guides
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import Ensemble, FullRank, Laplace, MatrixNormal, MeanField
from pyro_blora.models import KroneckerInducing, Subspace

PRIORS = {".*": KroneckerInducing(rank=2), "v_proj": Subspace(rank=3)}
GUIDES = {"q.*": MatrixNormal(), ".*": FullRank()}


def trained(blora, steps=1, **options):
    usual = {"collate": tiny.collate, "batch_size": 12, "progress": False}
    fit(blora, tiny.examples(12), num_steps=steps, **usual, **options)
    return blora


def test_each_group_has_its_own():
    blora = tiny.adapted(prior=PRIORS, guide=GUIDES)
    assert {site.name: tuple(site.prior.shape()) for site in blora.model.sites} == {
        "q_proj.V": (2, 2, 2),
        "v_proj.s": (2, 3),
    }
    kinds = {name: type(family) for name, family in blora.guide.families().items()}
    assert kinds == {"q_proj.V": MatrixNormal, "v_proj.s": FullRank}
    assert blora.prior is PRIORS
    assert blora.guide_family is GUIDES
    before = tiny.trained(blora)
    trained(blora, steps=2)
    assert not [n for n, value in tiny.trained(blora).items() if torch.equal(value, before[n])]
    assert blora.predict(tiny.sequences(), 4).samples.isfinite().all()


def test_the_posterior_is_that_of_two_adapters_side_by_side():
    """The KL is a sum over groups, and the mean update of each group is that group's alone."""
    torch.manual_seed(0)
    both = tiny.adapted(prior=PRIORS, guide=GUIDES)
    tiny.shaken(both, 0.3)
    state, kl, updates = both.state_dict(), both.kl(), both.posterior.draws(0)
    both.unwrap()
    alone = {"q_proj": (PRIORS[".*"], GUIDES["q.*"]), "v_proj": (PRIORS["v_proj"], GUIDES[".*"])}
    total = 0.0
    for name, (prior, guide) in alone.items():
        blora = tiny.adapted(both.net, target_modules=[name], prior=prior, guide=guide)
        own = (name, "temperature", "mean_temperature")
        blora.load_state_dict({k: v for k, v in state.items() if k.split(".")[1].startswith(own)})
        total += blora.kl()
        found = blora.posterior.draws(0)[name].layers()
        for one, other in zip(found, updates[name].layers(), strict=True):
            assert torch.equal(one.weight(), other.weight())
        blora.unwrap()
    torch.testing.assert_close(kl, total)


@pytest.mark.parametrize(
    ("option", "given", "told"),
    [
        ("prior", {"q_prj": Subspace(), ".*": Subspace()}, "'q_prj'.*did you mean 'q_proj'"),
        ("prior", {"q_proj": Subspace(rank=2)}, r"\['q_proj'\].*'v_proj'.*'\.\*'"),
        ("prior", {".*": KroneckerInducing(rank=9)}, r"rank=9.*'v_proj'.*8 x 16"),
        ("prior", {"q_proj": Subspace, ".*": Subspace(rank=2)}, "not the class"),
        ("guide", {"v_proj": MeanField()}, "group 'q_proj'"),
        ("guide", {".*": AutoNormal}, "AutoGuide"),
        ("guide", {".*": MeanField}, "MeanField"),
    ],
)
def test_what_is_refused_leaves_the_network_alone(option, given, told):
    net = tiny.llama()
    with pytest.raises(ConfigurationError, match=told):
        tiny.adapted(net, **{option: given})
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_that_has_the_name_of_a_part_of_the_model():
    net = torch.nn.Sequential()
    net.likelihood = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigurationError, match=r"'likelihood'.*exclude_modules"):
        tiny.adapted(net, target_modules=["likelihood"])


def test_a_guide_that_reads_the_input_beside_one_that_does_not():
    blora = tiny.adapted(guide={"q.*": guides.Amortized(), ".*": MeanField()})
    batch = tiny.sequences(8)
    tiny.shaken(blora, 0.3)
    elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert all(g.isfinite().all() for g in tiny.gradients(blora, batch, elbo).values())
    whole = blora.predict(batch, 0).probs
    one = {key: value[2:3] for key, value in batch.items()}
    own = blora.predict(one, 0).probs[0]  # the same whatever else is in the batch
    torch.testing.assert_close(whole[2], own, atol=1e-6, rtol=0)
    assert blora.predict(batch, 3).samples.shape == (3, 8, 3)


@pytest.mark.parametrize("other", [MeanField(), Laplace(structure="diag")], ids=repr)
def test_a_post_hoc_guide_beside_another(other):
    blora = trained(tiny.adapted(prior=PRIORS, guide={"q.*": Laplace(), ".*": other}), 3)
    q, v = blora.guide.families().values()
    assert q.finished
    assert (q.width > 0).all()
    assert (v.distribution().variance > 0).all()


OWN = {"q_proj": Plain(), ".*": KroneckerInducing(rank=2)}


def test_own_classes_for_some_groups_are_read_back(tmp_path):
    blora = tiny.adapted(prior=OWN, guide={".*": Ensemble(members=2), "v_proj": Spread()})
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
