"""Pyro's own guides, made by the facade or by the user, and Pyro's own tools on the model."""

import pyro
import pytest
import tiny
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from pyro.optim import ClippedAdam

from pyro_blora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.guides import MeanField
from pyro_blora.models import KroneckerInducing

AUTOGUIDES = [AutoNormal, autoguide.AutoLowRankMultivariateNormal, AutoDelta]
MORE = [autoguide.AutoDiagonalNormal, autoguide.AutoMultivariateNormal]


def train(blora, batch, steps=30):
    """By SVI; where parameters are module-local, Pyro's own AutoGuides only work with torch's."""
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    if not pyro.settings.get("module_local_params"):
        svi = SVI(blora.model, blora.guide, ClippedAdam({"lr": 5e-2}), elbo)
        for _ in range(steps):
            svi.step(batch)
        return
    loss_of = elbo(blora.model, blora.guide)
    blora.guide(batch)
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=5e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()


@pytest.mark.usefixtures("parameter_store")
@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_train_and_predict(kind):
    blora, batch = tiny.adapted(), tiny.sequences(8)
    blora.guide = kind(blora.model)
    start = blora.log_predictive(batch, 0).mean()  # an AutoGuide is set up here
    train(blora, batch)
    assert blora.log_predictive(batch, 0).mean() > 0.9 * start
    # of the latents alone, and not of each particle; a low-rank guide's factor is the largest
    latents = sum(group.n * 2 * 2 for group in blora.model.groups)
    largest = max(parameter.numel() for parameter in blora.guide.parameters())
    assert largest <= latents * getattr(blora.guide, "rank", 1)
    unlabeled = {key: value for key, value in batch.items() if key != "labels"}
    prediction = blora.predict(unlabeled, 5)
    assert prediction.samples.shape == (5, 8, 3)
    spread = prediction.samples.std(0).max()
    assert (spread == 0) == (kind is AutoDelta)
    assert blora.kl() is None


@pytest.mark.parametrize("prior", tiny.priors())
@pytest.mark.parametrize("kind", [*AUTOGUIDES, *MORE])
def test_every_prior_takes_an_autoguide(prior, kind):
    blora, batch = tiny.adapted(prior=tiny.priors()[prior], guide=kind), tiny.sequences(8)
    blora.guide(batch)
    before = tiny.trained(blora)
    train(blora, batch, steps=3)
    assert not [n for n, value in tiny.trained(blora).items() if torch.equal(value, before[n])]
    for num_samples in (0, 4):
        assert blora.predict(batch, num_samples).samples.isfinite().all()


def test_an_autoguide_that_never_saw_labels_is_the_prior():
    blora, batch = tiny.adapted(guide=AutoNormal), tiny.sequences()
    del batch["labels"]
    drawn = blora.predict(batch, 4).samples
    assert drawn.std(0).max() > 0
    assert blora.guide.scales.q_proj.V.shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"guide": "AutoNormal"}, "guide must be .* got 'AutoNormal'"),
        ({"guide": MeanField}, "not.* the class"),
        ({"prior": KroneckerInducing}, "not.* the class"),
        # of whose density a Hessian would be that of one draw of the noise
        (
            {"prior": KroneckerInducing(conditional="exact"), "guide": AutoLaplaceApproximation},
            r"must .*, got .*'deterministic'",
        ),
        ({"guide": AutoNormal(lambda batch: None)}, "the class, AutoNormal, not as an object"),
    ],
)
def test_what_is_no_guide(option, told):
    with pytest.raises(ConfigurationError, match=told):
        BayesianLoRA(tiny.llama(), **option)


def test_autolaplace_is_a_point_until_it_is_finished():
    net, batch = tiny.llama(attn_implementation="eager"), tiny.sequences(8)
    blora = tiny.adapted(net, guide=AutoLaplaceApproximation)
    train(blora, batch)
    with pytest.warns(UserWarning, match=r"laplace_approximation\(batch\).*Laplace\(\)"):
        assert blora.predict(batch, 4).samples.std(0).max() == 0
    blora.guide = blora.guide.laplace_approximation(batch)
    assert blora.predict(batch, 4).samples.std(0).max() > 1e-3
    assert blora.predict(batch, 0).samples.shape == (1, 8, 3)


def test_a_batch_larger_than_the_data_set_in_a_loop_of_ones_own():
    blora = tiny.adapted(num_data=3)
    with pytest.raises(BatchError, match=r"batch of 4 examples.*num_data=3"):
        Trace_ELBO().loss(blora.model, blora.guide, tiny.sequences(4))
