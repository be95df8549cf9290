"""Pyro's own guides, made by the facade or by the user, and Pyro's own tools on the model."""

import copy
from functools import partial

import pyro
import pytest
import tiny
import torch
from autoguides import autoguides
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import ClippedAdam

from pyro_blora import BayesianLoRA
from pyro_blora.guides import MatrixNormal, MeanField
from pyro_blora.models import KroneckerInducing

BATCH = tiny.sequences(8)
UNLABELED = tiny.unlabeled(BATCH)


def listed(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["v_proj.V"])))
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, hide=["q_proj.V"])))
    return guide


KINDS = {
    **autoguides(),
    "mvn": partial(autoguide.AutoStructured, conditionals="mvn", dependencies="linear"),
    "low rank of 3": partial(AutoLowRankMultivariateNormal, rank=3),
    "listed": listed,
}


def predicted(blora, batch=UNLABELED):
    pyro.set_rng_seed(0)
    return torch.cat([blora.predict(batch, n).samples for n in (0, 3)])


def read_again(blora, folder, **given):
    pyro.clear_param_store()
    return BayesianLoRA.from_pretrained(blora.unwrap(), folder, **given)


def train(blora, batch, steps=30):
    """By SVI; where parameters are module-local, Pyro's own AutoGuides only work with torch's."""
    elbo = tiny.elbo(8, Trace_ELBO)
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
@pytest.mark.parametrize("kind", [AutoNormal, AutoLowRankMultivariateNormal, AutoDelta])
def test_one_trains_and_predicts_in_the_place_of_families(kind, tmp_path):
    blora = tiny.adapted(guide={"q_proj": MeanField(), ".*": MatrixNormal()})
    blora.guide = kind(blora.model)
    start = blora.log_predictive(BATCH, 0).mean()  # an AutoGuide is set up here
    train(blora, BATCH)
    assert blora.log_predictive(BATCH, 0).mean() > 0.9 * start
    # of the latents alone, and not of each particle; a low-rank guide's factor is the largest
    latents = sum(group.n * 2 * 2 for group in blora.model.groups)
    largest = max(parameter.numel() for parameter in blora.guide.parameters())
    assert largest <= latents * getattr(blora.guide, "rank", 1)
    expected = predicted(blora)
    assert (expected[1:].std(0).max() == 0) == (kind is AutoDelta)
    assert blora.kl() is None
    blora.save_pretrained(tmp_path)
    for given in ({}, {"guide": kind}):
        blora = read_again(blora, tmp_path, **given)
        assert torch.equal(predicted(blora), expected)


@pytest.mark.parametrize("name", KINDS)
def test_every_autoguide_that_trains_is_read_as_it_was_saved(name, tmp_path):
    kind = KINDS[name]
    blora = tiny.adapted(tiny.llama(1), guide=kind)
    tiny.train(blora, num_steps=2)
    blora.save_pretrained(tmp_path / "saved")
    expected = predicted(blora)
    assert torch.equal(predicted(copy.deepcopy(blora)), expected)
    given = {"guide": kind} if name in ("AutoNormalizingFlow", "listed") else {}
    read = read_again(blora, tmp_path / "saved", **given)
    torch.testing.assert_close(predicted(read), expected)


def test_one_that_never_ran_is_the_prior_and_is_saved_as_it_starts(tmp_path):
    blora = tiny.adapted(guide=AutoNormal)
    blora.save_pretrained(tmp_path)
    expected = predicted(blora)
    assert expected[1:].std(0).max() > 0
    assert torch.equal(predicted(read_again(blora, tmp_path)), expected)


def test_autolaplace_is_a_point_until_it_is_finished(tmp_path):
    net, prior = tiny.llama(attn_implementation="eager"), KroneckerInducing(rank=1, sigma=0.3)
    blora = tiny.adapted(net, guide=AutoLaplaceApproximation, prior=prior)
    train(blora, BATCH)
    with pytest.warns(UserWarning, match=r"laplace_approximation\(batch\).*Laplace\(\)"):
        assert blora.predict(BATCH, 4).samples.std(0).max() == 0
    blora.guide = blora.guide.laplace_approximation(BATCH)
    assert blora.predict(BATCH, 4).samples.std(0).max() > 1e-3
    blora.save_pretrained(tmp_path)
    expected, read = blora.guide.get_posterior(), read_again(blora, tmp_path)
    found = read.guide.get_posterior()
    torch.testing.assert_close(found.loc, expected.loc)
    torch.testing.assert_close(found.covariance_matrix, expected.covariance_matrix)
    assert predicted(read).isfinite().all()
