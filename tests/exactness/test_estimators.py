"""Estimators of the ELBO: the same expectation for every number of particles that divides B."""

import pyro
import pytest
import tiny
import torch
from elbo_estimates import NUM_DATA, B, likelihood_of, make, mean_and_error, reference, statistics
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch.nn import functional

from pyro_blora.errors import ParticleError

KINDS = [Trace_ELBO, TraceMeanField_ELBO]
COUNTS = (1, 2, 3, 6)


@pytest.mark.parametrize("likelihood", ["LabelTokens", "MultipleChoice"])
@pytest.mark.parametrize("kind", KINDS)
def test_means_agree_with_their_gradients(likelihood, kind):
    blora, batch = make(likelihood)
    expected, error = mean_and_error(reference(blora, batch, draws=40, repeats=12))
    for particles in COUNTS:
        values = statistics(blora, batch, kind, particles, copies=20, repeats=12)
        mean, spread = mean_and_error(values)
        assert ((mean - expected).abs() <= 4 * (spread**2 + error**2).sqrt() + 1e-9).all()
        assert spread[0] < 0.02 * mean[0]  # the loss, sharp enough to see a wrong scale
    assert (expected[1:].abs() > 10 * error[1:]).any()  # so are the gradients


@pytest.mark.parametrize("likelihood", ["LabelTokens", "MultipleChoice"])
@pytest.mark.parametrize("particles", COUNTS)
def test_sharing_by_hand(likelihood, particles):
    """Particle p has examples p B/P to (p + 1) B/P - 1; here each runs by itself."""
    blora, batch = make(likelihood)
    drawn = {}

    def guide(batch):
        drawn.update(blora.guide(batch))
        return drawn

    elbo = tiny.elbo(particles)
    with torch.no_grad():
        loss, found = tiny.scored(elbo.loss, blora.model, guide, batch)
        nll, share = [], B // particles
        for b in range(B):
            # A single particle has no dimension of its own
            values = {n: V if particles == 1 else V[b // share] for n, V in drawn.items()}
            updates = pyro.poutine.condition(blora.model.updates, data=values)()
            one = {key: value[b : b + 1] for key, value in batch.items()}
            with blora.model.applied(updates) as net:
                logits = likelihood_of(likelihood).logits(net, one)
            nll.append(functional.cross_entropy(logits, one["labels"]))
    expected = NUM_DATA / B * sum(nll) + blora.kl()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert found.item() == pytest.approx(sum(nll).item() / B, rel=1e-10)
    assert torch.stack(nll).std() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_particles_must_divide_the_batch(kind):
    blora, batch = make("LabelTokens")
    with pytest.raises(ParticleError, match=r"6 examples .* 4 particles.*\[1, 2, 3, 6\]"):
        tiny.elbo(4, kind).loss(blora.model, blora.guide, batch)


@pytest.mark.slow
@pytest.mark.parametrize("particles", COUNTS)
def test_variance_is_that_of_the_shares(particles):
    """``(N/B)^2`` times the covariance of the examples' losses, summed within each share alone."""
    blora, batch = make("LabelTokens")
    S, draws = 800, 300
    with torch.no_grad(), blora.model.applied(blora.posterior.draws(S)) as net:
        rows = {key: value.repeat(S, *[1] * (value.dim() - 1)) for key, value in batch.items()}
        logits = likelihood_of("LabelTokens").logits(net, rows)
        nll = functional.cross_entropy(logits, rows["labels"], reduction="none").reshape(S, B)
    blocks = torch.kron(torch.eye(particles), torch.ones(B // particles, B // particles))
    expected = (NUM_DATA / B) ** 2 * (nll.mT.cov() * blocks).sum()
    elbo = tiny.elbo(particles)
    with torch.no_grad():
        losses = [elbo.loss(blora.model, blora.guide, batch) for _ in range(draws)]
    # a variance of n draws is off by sqrt((kurtosis - 1)/n) of itself, and these have heavy tails
    losses = torch.tensor(losses)
    kurtosis = (losses - losses.mean()).pow(4).mean() / losses.var().square()
    error = expected * ((kurtosis - 1) * (1 / draws + 1 / S)) ** 0.5
    assert (losses.var() - expected).abs() < 4 * error


@pytest.mark.slow
def test_a_particle_per_example_has_lower_variance_than_a_shared_draw():
    """B equal examples: the noise of B draws averages out, to exactly 1/B of the variance."""
    blora, batch = make("LabelTokens")
    batch = {key: value[:1].expand(B, *value.shape[1:]) for key, value in batch.items()}
    kind = TraceMeanField_ELBO
    shared, each = (statistics(blora, batch, kind, p, copies=1, repeats=200).var(0) for p in (1, B))
    for part in (slice(0, 1), slice(1, None)):  # the loss; all gradients together
        ratio = each[part].sum() / shared[part].sum()
        assert 0.4 / B < ratio < 2.5 / B


@pytest.mark.parametrize("likelihood", ["LabelTokens", "MultipleChoice"])
def test_parallel_predictive_sees_the_whole_batch_in_every_sample(likelihood):
    """On a batch that nobody repeated, with S = B to tempt it into sharing."""
    blora, batch = make(likelihood)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with pyro.plate("draws", B, dim=-2), torch.no_grad():
        samples = {name: V.detach() for name, V in blora.guide(inputs).items()}

    def model(batch):
        with pyro.poutine.trace() as tracer:
            blora.model(batch)
        return tracer.trace.nodes["labels"]["fn"].logits

    with torch.no_grad():
        sites = ("labels", "_RETURN")
        parallel, sequential = (
            Predictive(model, samples, return_sites=sites, parallel=way)(inputs)
            for way in (True, False)
        )
    assert parallel["labels"].shape == sequential["labels"].shape == (B, B)
    a, b = (p["_RETURN"].reshape(B, B, -1) for p in (parallel, sequential))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert b.std(0).max() > 1e-3  # samples differ
