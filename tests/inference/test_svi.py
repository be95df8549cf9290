"""Pyro's own SVI, as in the README, against ``fit``, number for number."""

import math
from collections.abc import Mapping

import pyro
import pytest
import tiny
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.utils.data import DataLoader

from pyro_blora.guides import MatrixNormal
from pyro_blora.inference import loop, optim_args
from pyro_blora.likelihoods import MultipleChoice

N, BATCH, STEPS = 12, 4, 6


def seeded(guide):
    """An adapter whose draws depend on the batch alone, whoever has run the guide before."""
    torch.manual_seed(0)
    blora = tiny.adapted(guide=guide, likelihood=MultipleChoice(num_data=N))

    def seed(module, args):
        if args and isinstance(args[0], Mapping):
            torch.manual_seed(int(args[0]["input_ids"].sum()))

    blora.guide.register_forward_pre_hook(seed)
    return blora


@pytest.mark.parametrize(
    ("guide", "elbo"), [(MatrixNormal(), TraceMeanField_ELBO), (AutoNormal, Trace_ELBO)]
)
def test_svi_takes_the_steps_of_fit(guide, elbo, monkeypatch):
    loader = DataLoader(tiny.rows_of(tiny.choices(N)), BATCH)
    made = [seeded(guide) for _ in range(2)]
    monkeypatch.setattr(loop, "rate", lambda step, num_steps: 1.0)
    monkeypatch.setattr(loop, "_MAX_GRAD_NORM", math.inf)
    plain = {"precision": "float32", "held_out": 0.0}  # as in Pyro's loop
    result = tiny.train(made[0], loader, num_steps=STEPS, **plain)
    ours = [figures["loss"] for figures in result.history]

    pyro.clear_param_store()
    blora, losses = made[1], []
    blora.guide(next(iter(loader)))  # an AutoGuide draws where it starts at its first call
    particles = elbo(
        num_particles=BATCH, vectorize_particles=True, max_plate_nesting=blora.max_plate_nesting
    )
    rates = optim_args(blora, next(iter(loader)))
    # the gradient of fit is per example, and Adam's eps is in units of the gradient
    svi = SVI(blora.model, blora.guide, Adam(lambda n: {**rates(n), "eps": 1e-8 * N}), particles)
    while len(losses) < STEPS:
        losses += [svi.step(batch) / N for batch in loader]
    assert losses == pytest.approx(ours, rel=1e-4)
    assert len(set(losses)) == STEPS
    theirs = dict(made[1].named_parameters())
    for name, parameter in made[0].named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-5)
