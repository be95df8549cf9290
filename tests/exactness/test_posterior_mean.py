"""``posterior.draws(0)`` is E_q[dW]: against draws of the posterior, and in closed form."""

import pyro.infer.autoguide as auto
import pytest
import tiny
import torch
from own_classes import RandomScale

from pyro_blora import guides
from pyro_blora.models import Hierarchical, KernelInducing, KroneckerInducing, SpectralInducing

PRIORS = [
    RandomScale(),
    KroneckerInducing(rank=2, core="ard"),
    KernelInducing(rank=2, core="horseshoe"),
    SpectralInducing(rank=2, core="ard"),
    Hierarchical(rank=2),
    KroneckerInducing(rank=2),
]
FAMILIES = [
    guides.MeanField(init_scale=1.0),
    guides.MatrixNormal(init_scale=1.0),
    guides.Ensemble(members=5, spread=1.0),
    auto.AutoNormal,
    auto.AutoMultivariateNormal,
    auto.AutoIAFNormal,
]
BATCH, COUNT = tiny.sequences(2), 1024


def moved(prior, family):
    """An adapter whose guide is away from its start, where every mean is zero."""
    blora = tiny.adapted(prior=prior, guide=family)
    blora.guide(BATCH)
    with torch.no_grad():
        for name, parameter in blora.guide.named_parameters():
            is_mean = ("loc" in name and "weight" not in name) or "points" in name
            parameter.add_((0.5 if is_mean else 0.05) * torch.randn_like(parameter))
    return blora


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: getattr(f, "__name__", repr(f)))
@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_the_mean_update_is_the_mean_of_its_draws(prior, family):
    blora = moved(prior, family)
    found, draws = (blora.posterior.draws(count)["q_proj"] for count in (0, 20_000))
    core = draws.core
    error = core.std(0) * (1 / len(core) + 1 / COUNT) ** 0.5
    assert ((found.core - core.mean(0)).abs() < 5 * error).all()
    assert found.core.all()
    torch.testing.assert_close(found.A, draws.A)  # so the mean of B C A is B E[C] A
    torch.testing.assert_close(found.B, draws.B)


def test_a_log_normal_scale_in_closed_form():
    """``E[sigma V] = exp(mu + s^2 / 2) E[V]`` for independent sites."""
    blora = moved(PRIORS[0], guides.MeanField(init_scale=0.5))
    sigma, V = (blora.guide.families()[f"q_proj.{name}"] for name in ("sigma", "V"))
    mean = (sigma.loc + sigma.scale.square() / 2).exp()[:, None, None] * V.loc
    spread = (sigma.scale.square().exp() - 1).sqrt()[:, None, None]  # of sigma, over its mean
    found = blora.posterior.draws(0)["q_proj"].core
    assert ((found - mean).abs() < 5 * mean.abs() * spread / COUNT**0.5).all()  # V is not drawn


@pytest.mark.parametrize("family", [guides.MeanField(), guides.Ensemble()], ids=repr)
def test_it_is_the_same_every_time_and_leaves_no_trace(family):
    blora = moved(PRIORS[0], family)
    state, buffers = torch.get_rng_state(), [b.clone() for b in blora.buffers()]
    first = blora.predict(BATCH, 0).samples
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, blora.buffers(), strict=True))
    blora.predict(BATCH, 3)
    assert torch.equal(blora.predict(BATCH, 0).samples, first)
