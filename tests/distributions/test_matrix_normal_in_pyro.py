"""Matrix normal sample sites under plates, ELBOs and Pyro's tools."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from matrix_normal_dense import (
    M,
    N,
    dense,
    make,
)
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.inspect import get_dependencies
from torch.distributions import kl_divergence

from pyro_blora.distributions import MatrixNormal

NUM = 4


def prior(expanded):
    one = torch.ones((), dtype=torch.float64)
    if expanded == "normal":
        return dist.Normal(0 * one, one).expand([NUM, M, N]).to_event(2)
    if expanded == "auto":  # expanded by the plate alone
        return dist.Normal(0 * one, one).expand([M, N]).to_event(2)
    eye_m, eye_n = torch.eye(M, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    return MatrixNormal(torch.zeros(M, N, dtype=torch.float64), eye_m, eye_n)


@pytest.mark.parametrize("expanded", ["normal", "auto", "matrix"])
@pytest.mark.parametrize("particles", [1, 3])
def test_mean_field_elbo_uses_the_closed_form(expanded, particles):
    """With nothing observed the loss is the divergence itself: exact, whatever was drawn."""
    q = make((NUM,), (NUM,), (NUM,))

    def model():
        with pyro.plate("layers", NUM):
            return pyro.sample("V", prior(expanded))

    def guide():
        with pyro.plate("layers", NUM):
            return pyro.sample("V", q)

    elbo = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    standard = dist.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    expected = kl_divergence(dense(q), standard.expand([NUM])).sum().item()
    assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-12)
    assert elbo.loss(model, guide) == elbo.loss(model, guide)


def test_pyro_tools_accept_the_site():
    def model(data=None):
        with pyro.plate("layers", NUM):
            v = pyro.sample("V", prior("matrix"))
        return pyro.sample("y", dist.Normal(v.sum(), 1.0), obs=data)

    y = torch.tensor(1.0, dtype=torch.float64)
    assert get_dependencies(model, (y,))["prior_dependencies"]["V"] == {"V": set()}
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(y))
    draws = Predictive(model, num_samples=5, parallel=True)()
    assert draws["V"].shape == (5, NUM, M, N)
