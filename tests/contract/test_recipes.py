"""Named methods: each trains, predicts and says where it comes from."""

from types import SimpleNamespace

import pyro
import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, fit, guides, models
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.network import fast_path
from pyro_blora.recipes import RECIPES, Recipe, all_recipes, recipe, usual_prior


def made(name, **options):
    likelihood = LabelTokens(token_ids=tiny.ANSWERS, num_data=10)
    return BayesianLoRA.from_recipe(tiny.llama(), name, rank=2, likelihood=likelihood, **options)


@pytest.mark.parametrize("name", [*RECIPES, "Hierarchical+Flow"])
def test_a_recipe_trains_and_predicts(name):
    blora = made(name)
    options = {"collate": tiny.collate, "num_steps": 12, "progress": False, **recipe(name).fit}
    result = fit(blora, tiny.examples(10), **options)
    assert torch.tensor([step["nll"] for step in result.history]).isfinite().all()
    prediction = blora.predict(tiny.collate(tiny.examples(4)), recipe(name).num_samples or 4)
    assert prediction.samples.isfinite().all()
    assert prediction.samples.shape[1:] == (4, 3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from(name):
    known = RECIPES[name]
    assert known.name == name
    assert "arXiv:" in known.citation
    assert known.summary
    assert known.prior(3).rank == 3
    ours = name in ("fisher", "bayesian-lora", "mean-field", "map")
    assert known.scale == ("relative" if ours else "fixed")


def test_the_lora_recipe_is_maximum_likelihood():
    """The penalty of its prior is nothing beside the likelihood, in value and in gradient."""
    blora = made("lora")
    trace = pyro.poutine.trace(blora.guide).get_trace()
    model = pyro.poutine.trace(pyro.poutine.replay(blora.model.updates, trace=trace)).get_trace()
    site = model.nodes["q_proj.A"]
    value = site["value"].detach().requires_grad_()
    (slope,) = torch.autograd.grad(site["fn"].log_prob(value).sum(), value)
    assert slope.abs().max() < 1e-7


def test_pairs_are_recipes_too():
    assert repr(recipe("Subspace+FullRank").prior(4)) == "Subspace(rank=4)"
    assert isinstance(recipe("Subspace+FullRank").guide(), guides.FullRank)
    for prior in tiny.priors():
        for family in tiny.families():
            pair = recipe(f"{prior}+{family}")
            assert type(pair.prior(2)) is getattr(models, prior)
            assert type(pair.guide()) is getattr(guides, family)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blobb", "recipe 'blobb' is unknown; .*blob.*KroneckerInducing"),
        ("Subspaces+Delta", "prior 'Subspaces' is unknown; .*Subspace"),
        ("Subspace+Deltas", "guide 'Deltas' is unknown; .*Delta"),
        ("temperature", "no prior beside a guide .*compare"),
        ("mc-dropout", "no prior beside a guide .*plain_lora"),
        ("UpdateModel+Delta", "prior 'UpdateModel' is unknown"),
        ("Subspace+Site", "guide 'Site' is unknown"),
    ],
)
def test_unknown_names(name, match):
    with pytest.raises(ConfigurationError, match=match):
        recipe(name)


def test_packages_may_ship_recipes(monkeypatch):
    """Through an entry point; the library's own names cannot be taken."""
    own = Recipe("own", lambda rank: models.Subspace(rank=rank), guides.Delta, "", "a test's")

    def entries(group):
        assert group == "pyro_blora.recipes"
        return [SimpleNamespace(name=name, load=lambda: own) for name in ("own", "blob")]

    monkeypatch.setattr("pyro_blora.recipes.entry_points", entries)
    assert recipe("own") is own
    assert all_recipes()["blob"] is RECIPES["blob"]
    blora = made("own", fast=False)
    assert isinstance(blora.guide_family, guides.Delta)
    assert not fast_path.is_on(blora.net)


def test_the_rank_is_the_usual_prior_s():
    assert repr(BayesianLoRA(tiny.llama(), rank=3).prior) == repr(usual_prior(3))
    with pytest.raises(ConfigurationError, match="rank=3 is the usual prior's; give it to your"):
        BayesianLoRA(tiny.llama(), rank=3, prior=models.Subspace())
