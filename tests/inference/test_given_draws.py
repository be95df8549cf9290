"""Predictions under draws that are not the guide's: those of NUTS, or any values of the sites."""

import math

import pyro
import pytest
import tiny
import torch
from own_classes import Sloped
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Amortized, MeanField
from pyro_blora.likelihoods import CausalLM, SequenceClassification
from pyro_blora.models import Hierarchical, KroneckerInducing


def values(blora, count=3, seed=1):
    """Any values of the sites, as ``get_samples`` has them: here draws of the prior."""
    pyro.set_rng_seed(seed)
    return {
        site.name: site.prior.sample((count,)).detach().double()  # as other programs have them
        for site in blora.model.sites
    }


def conditioned(blora, samples, batch):
    """The site ``labels`` of the plain Pyro model at each of the values, one after the other."""
    for index in range(len(next(iter(samples.values())))):
        data = {name: value[index].float() for name, value in samples.items()}
        with torch.no_grad():
            model = pyro.condition(blora.model, data)
            yield pyro.poutine.trace(model).get_trace(batch).nodes["labels"]


def choosing():
    """GPT-2 whose scores have a scale that was learned."""
    blora = tiny.adapted(tiny.gpt2(), target_modules=["c_attn"], likelihood=Sloped(num_data=12))
    torch.nn.init.constant_(blora.likelihood.slope, 2.5)
    return blora, tiny.choices()


def headed():
    """BERT whose head was trained as a point, under sites outside of the layers' plate."""
    options = {"prior": Hierarchical(rank=2), "likelihood": SequenceClassification(num_data=12)}
    blora = tiny.adapted(tiny.bert(), target_modules=["query", "value"], **options)
    tiny.shaken(blora.model.trained_heads, 1.0)
    return blora, tiny.sequences()


def amortized():
    return tiny.adapted(guide=Amortized()), tiny.sequences()


def untouched():
    """An AutoGuide that has not run, and never does."""
    return tiny.adapted(guide=AutoNormal), tiny.sequences()


@pytest.mark.parametrize("make", [choosing, headed, amortized, untouched])
def test_a_prediction_is_that_of_the_conditioned_model(make):
    blora, batch = make()
    samples = values(blora)
    expected = torch.stack([node["fn"].probs for node in conditioned(blora, samples, batch)])
    given = {"labels": torch.zeros(3, 4), **samples}  # as Predictive has them
    found = blora.predict(batch, samples=given)
    torch.testing.assert_close(found.samples, expected, atol=1e-5, rtol=0)
    assert found.mutual_information.max() > 1e-3  # the values matter


@pytest.mark.parametrize("prior", [Hierarchical(rank=2), KroneckerInducing(core="horseshoe")])
def test_draws_of_predictive_are_taken(prior):
    """In parallel they have dimensions of size one for the plates outside of theirs."""
    blora, batch = tiny.adapted(prior=prior, guide=MeanField(init_scale=0.3)), tiny.sequences()
    drawn = Predictive(blora.guide, num_samples=3, parallel=True)(batch)
    shapes = {site.name: (3, *site.prior.shape()) for site in blora.model.sites}
    plain = {name: drawn[name].reshape(shape) for name, shape in shapes.items()}
    expected = blora.predict(batch, samples=plain).samples
    for given in (drawn, {name: value.tolist() for name, value in plain.items()}):
        torch.testing.assert_close(blora.predict(batch, samples=given).samples, expected)


def test_the_log_predictive_is_the_mean_over_them():
    likelihood = CausalLM(num_data=12)
    blora = tiny.adapted(tiny.gpt2(), target_modules=["c_attn"], likelihood=likelihood)
    samples, batch = values(blora, 5), tiny.texts()
    nodes = conditioned(blora, samples, batch)
    scores = torch.stack([node["fn"].log_prob(node["value"]) for node in nodes])
    expected = scores.logsumexp(0) - math.log(5)
    found = blora.log_predictive(batch, samples=samples)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


Q, V = "q_proj.V", "v_proj.V"


SPOILED = [
    lambda s: {},
    lambda s: {Q: s[Q]},
    lambda s: {**s, Q: s[Q][None]},
    lambda s: {**s, Q: s[Q][..., :1]},
    lambda s: {name: value[:0] for name, value in s.items()},
    lambda s: {**s, V: s[V][:2]},
    lambda s: {**s, Q: s[Q] * math.nan},
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_values_that_are_no_draws_are_refused(spoil):
    blora, batch = tiny.adapted(), tiny.sequences()
    samples = spoil(values(blora))
    for ask in (blora.predict, blora.log_predictive):
        with pytest.raises(ConfigurationError):
            ask(batch=batch, samples=samples)


def test_unconstrained_values_and_a_linearization_are_refused():
    blora, batch = headed()
    samples = values(blora)
    tau = next(name for name in samples if name.endswith("tau"))
    with pytest.raises(ConfigurationError, match="outside of it"):
        blora.predict(batch, samples={**samples, tau: samples[tau].log() - 9})
    with pytest.raises(ConfigurationError, match="linearized"):
        blora.predict(batch, samples=samples, linearized=True)
