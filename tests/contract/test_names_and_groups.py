"""Names of groups and sites, and a prior and a guide for each group."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from own_classes import Plain, Spread
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_blora import BayesianLoRA, checkpoints, fit
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.guides import (
    Amortized,
    Delta,
    Ensemble,
    FullRank,
    Isotropic,
    Laplace,
    MatrixNormal,
    MeanField,
)
from pyro_blora.models import (
    FisherInducing,
    Hierarchical,
    KroneckerInducing,
    SpectralInducing,
    Subspace,
)

PRIORS = {".*": KroneckerInducing(rank=2), "v_proj": Subspace(rank=3)}
GUIDES = {"q.*": MatrixNormal(), ".*": FullRank()}


def trained(blora, steps=1, **options):
    rows = tiny.examples(12)
    options = {"collate": tiny.collate, "batch_size": 12, "progress": False, **options}
    fit(blora, rows, num_steps=steps, **options)
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
    state, kl, updates = both.state_dict(), both.kl(), both.sample_updates(0)
    both.unwrap()
    alone = {"q_proj": (PRIORS[".*"], GUIDES["q.*"]), "v_proj": (PRIORS["v_proj"], GUIDES[".*"])}
    total = 0.0
    for name, (prior, guide) in alone.items():
        blora = tiny.adapted(both.net, target_modules=[name], prior=prior, guide=guide)
        own = (name, "temperature")
        blora.load_state_dict({k: v for k, v in state.items() if k.split(".")[1].startswith(own)})
        total += blora.kl()
        found = blora.sample_updates(0)[name].layers()
        for one, other in zip(found, updates[name].layers(), strict=True):
            assert torch.equal(one.weight(), other.weight())
        blora.unwrap()
    torch.testing.assert_close(kl, total)


@pytest.mark.parametrize(
    ("option", "given", "told"),
    [
        ("prior", {"q_prj": Subspace(), ".*": Subspace()}, r"'q_prj' matches no.*mean 'q_proj'"),
        ("prior", {"q_proj": Subspace(rank=2)}, r"no key of \['q_proj'\].*'v_proj'.*'\.\*'"),
        ("prior", {}, "group 'q_proj'"),
        ("prior", {".*": KroneckerInducing(rank=9)}, r"rank=9.*'v_proj'.*8 x 16.*at most 8"),
        ("prior", {"q_proj": Subspace, ".*": Subspace(rank=2)}, "not the class"),
        ("guide", {"proj": Delta()}, "'proj' matches no group"),
        ("guide", {"v_proj": Delta()}, "group 'q_proj'"),
        ("guide", {".*": AutoNormal}, "AutoGuide is one for the whole"),
        ("guide", {".*": MeanField}, "as an object"),
        ("guide", {"q.*": Laplace(), ".*": Isotropic()}, r"Isotropic\(\) and Laplace\(\) both"),
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
    with pytest.raises(ConfigurationError, match=r"called 'likelihood'.*exclude_modules"):
        tiny.adapted(net, target_modules=["likelihood"])


RATES = {"q_proj": FisherInducing(rank=2), "v_proj": SpectralInducing(rank=2)}  # means: 5e-2, 2e-2


@pytest.mark.parametrize(("given", "ratio"), [({}, 2.5), ({"learning_rates": 1e-2}, 1.0)])
def test_rates_of_each_group_in_fit(given, ratio):
    """AdamW's first step is of the length of its rate."""
    blora = tiny.adapted(prior=RATES)
    before = tiny.trained(blora)
    trained(blora, **given)
    moved = {n: (v - before[n]).abs().max().item() for n, v in tiny.trained(blora).items()}
    q, v = (moved[f"guide.{group}_V.loc_unconstrained"] for group in RATES)
    assert q / v == pytest.approx(ratio, rel=1e-3)
    assert blora.model.q_proj.informed


@pytest.mark.parametrize("prior", [KroneckerInducing(rank=2), Hierarchical(rank=2)], ids=repr)
def test_a_guide_that_reads_the_input_beside_one_that_does_not(prior):
    blora = tiny.adapted(prior=prior, guide={"q.*": Amortized(), ".*": MeanField()})
    batch = tiny.sequences(8)
    tiny.shaken(blora, 0.3)
    elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert all(g.isfinite().all() for g in tiny.gradients(blora, batch, elbo).values())
    whole = blora.predict(batch, 0).probs
    one = {key: value[2:3] for key, value in batch.items()}
    own = blora.predict(one, 0).probs[0]  # the same whatever else is in the batch
    exact = type(prior) is KroneckerInducing
    torch.testing.assert_close(whole[2], own, atol=1e-6 if exact else 0.05, rtol=0)
    assert blora.predict(batch, 3).samples.shape == (3, 8, 3)


def test_a_post_hoc_guide_beside_one_that_is_trained():
    blora = trained(tiny.adapted(prior=PRIORS, guide={"q.*": Laplace(), ".*": MeanField()}), 3)
    q, v = blora.guide.families().values()
    assert q.finished
    assert (q.width > 0).all()
    assert (v.distribution().variance > 0).all()


OWN = {"q_proj": Plain(), ".*": KroneckerInducing(rank=2)}


def test_own_classes_for_some_groups_are_read_back(tmp_path):
    blora = tiny.adapted(prior=OWN, guide={".*": Ensemble(members=2), "v_proj": Spread()})
    expected = blora.state_dict()
    blora.save_pretrained(tmp_path)
    config = json.loads((tmp_path / checkpoints.CONFIG).read_text())
    assert list(config["prior"]["by_group"]) == ["q_proj", ".*"]
    net = blora.unwrap()
    parts = {"prior": {"q_proj": Plain()}, "guide": {"v_proj": Spread()}}
    again = BayesianLoRA.from_pretrained(net, tmp_path, **parts)
    assert tiny.equal(again.state_dict(), expected)
    assert repr(again) == repr(blora)
    again.unwrap()
    for wrong, told in (
        ({}, "'Plain' is of own_classes"),
        ({**parts, "prior": {"q": Plain()}}, r"those of \['q_proj', '\.\*'\]"),
        ({**parts, "prior": Plain()}, r"those of \['q_proj', '\.\*'\]"),
    ):
        with pytest.raises(CheckpointError, match=told):
            BayesianLoRA.from_pretrained(net, tmp_path, **wrong)


def test_print_shows_groups_and_sites():
    text = repr(tiny.adapted(prior=PRIORS, guide=GUIDES))
    for line in (
        "prior:      {'.*': KroneckerInducing(rank=2), 'v_proj': Subspace(rank=3)}",
        "q_proj: 2 layers of 16 x 16, 138 parameters in the prior",
        "q_proj.V: 2 x 2 x 2, 24 parameters in the guide",
        "v_proj: 2 layers of 8 x 16, 144 parameters in the prior",
        "v_proj.s: 2 x 3, 24 parameters in the guide",
        "trainable: 330 beside",
    ):
        assert line in text


def test_the_page_runs():
    reference = Path(__file__).resolve().parents[2] / "docs" / "reference"
    page = (reference / "names.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"net": tiny.llama()}
    exec(program, names)
    found = {name: type(q) for name, q in names["blora"].guide.families().items()}
    assert found == {"q_proj.s": FullRank, "v_proj.V": MatrixNormal}
