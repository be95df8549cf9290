"""The library's ELBO against Pyro's own: value, gradients, and what it leaves out."""

import pyro
import pytest
import tiny
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_blora import guides, models
from pyro_blora.inference import AnalyticELBO

PAIRS = {
    "analytic": (models.KroneckerInducing(rank=2), guides.MatrixNormal()),
    "conditional": (models.KroneckerInducing(rank=2, conditional="scaled"), guides.MatrixNormal()),
    "not analytic": (models.KroneckerInducing(rank=2, core="student-t"), guides.MeanField()),
    "some analytic": (models.KroneckerInducing(rank=2, core="ard"), guides.MeanField()),
    "flow": (models.KroneckerInducing(rank=2), guides.Flow()),
    "factors": (models.GaussianFactors(rank=2), guides.MeanField()),
}


def loss_and_gradients(elbo, blora):
    found = tiny.gradients(blora, tiny.sequences(), elbo, seed=1)
    return found.pop("loss"), found


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("pair", PAIRS)
def test_value_and_gradients_are_those_of_pyro(pair, particles, validate):
    blora = tiny.adapted(prior=PAIRS[pair][0], guide=PAIRS[pair][1])
    blora.model.kl_weight = 0.3
    options = {"num_particles": particles, "vectorize_particles": True}
    options["max_plate_nesting"] = blora.max_plate_nesting
    with pyro.validation_enabled(validate):
        loss, gradients = loss_and_gradients(AnalyticELBO(**options), blora)
        expected, wanted = loss_and_gradients(TraceMeanField_ELBO(**options), blora)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, wanted)


def test_no_density_is_taken_where_the_kl_is_analytic(monkeypatch):
    blora = tiny.adapted()
    scored = []
    plain = torch.distributions.Independent.log_prob
    monkeypatch.setattr(
        torch.distributions.Independent,
        "log_prob",
        lambda self, value: scored.append(value.shape) or plain(self, value),
    )
    options = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    with pyro.validation_enabled(False):
        loss_and_gradients(AnalyticELBO(**options), blora)
        assert not scored
        loss_and_gradients(TraceMeanField_ELBO(**options), blora)
    assert len(scored) == 2  # the core of either group


def test_svi_takes_it():
    blora = tiny.adapted()
    svi = SVI(blora.model, blora.guide, pyro.optim.Adam({"lr": 0.01}), AnalyticELBO())
    with pyro.validation_enabled(False):
        losses = [svi.step(tiny.sequences()) for _ in range(20)]
        assert svi.evaluate_loss(tiny.sequences()) == pytest.approx(losses[-1], rel=0.5)
    assert sum(losses[-5:]) < sum(losses[:5])
