"""The factor reading: equal to the published code where that is right, and not where it is wrong.

``published_factor.json`` has numbers that the published code computed, and says how.
"""

import json
from pathlib import Path

import pyro
import pytest
import tiny
import torch
from dense_algebra import N
from dense_algebra import at_start as bind
from torch import nn

from pyro_blora import fit
from pyro_blora.guides import MeanField
from pyro_blora.models import FactorInducing
from pyro_blora.updates import Side, conditional_kl, inducing_covariance, weight_noise, whiten

PUBLISHED = json.loads(Path(__file__).with_name("published_factor.json").read_text("utf-8"))


def published(name):
    return {
        k: torch.tensor(v, dtype=torch.float64)
        for k, v in PUBLISHED[name].items()
        if not isinstance(v, str)
    }


def side_of(Z, D):
    return Side.of(*whiten(Z, inducing_covariance(Z, D)), D)


def as_published():
    """A prior of one layer with the parameters of the fixture, in double precision."""
    options = {"rank": 3, "inducing": 2, "sigma": 0.7, "scale": "fixed", "conditional": "scaled"}
    prior = bind(FactorInducing(**options, lambda_init=0.02), n=1).double()
    values = {}
    for name in "AB":
        given = published(name)
        for side in "rc":
            setattr(prior, f"Z_{side}_{name}", given[f"Z_{side}"][None])
            setattr(prior, f"D_{side}_{name}", given[f"D_{side}"][None])
        setattr(prior, f"lambda_{name}", given["lambda_"][None])
        values[prior.site(f"U_{name}")] = given["V"][None]
    return prior, values


def test_the_conditional_mean_is_the_published_one():
    prior, values = as_published()
    prior.conditional = "deterministic"
    update = pyro.poutine.condition(prior, data=values)()
    # sigma is on B here; the published code has one for each factor
    torch.testing.assert_close(0.7 * update.A[0], published("A")["mean"])
    torch.testing.assert_close(update.B[0], published("B")["mean"])


@pytest.mark.parametrize("name", ["A", "B"])
def test_the_conditional_covariance_is_the_published_one(name):
    given = published(name)
    rows, cols = (side_of(given[f"Z_{s}"], given[f"D_{s}"]) for s in "rc")
    scale = (given["sigma"] * given["lambda_"]).square()
    eye = torch.eye(len(given["covariance"]), dtype=torch.float64)
    closed = scale * (eye - torch.kron(rows.Q.mT @ rows.Q, cols.Q.mT @ cols.Q))
    torch.testing.assert_close(closed, given["covariance"])
    noise = weight_noise(torch.Size([200_000]), rows, cols)
    drawn = scale * noise.flatten(1).mT.cov()
    torch.testing.assert_close(drawn, given["covariance"], rtol=0.02, atol=0.01 * scale.item())


def test_the_conditional_kl_is_the_published_one():
    prior, values = as_published()
    trace = pyro.poutine.trace(pyro.poutine.condition(prior, data=values)).get_trace()
    for name, shape in {"A": (3, 5), "B": (4, 3)}.items():
        given = published(name)
        expected = given["conditional_kl"]
        torch.testing.assert_close(conditional_kl(given["lambda_"], *shape), expected)
        factor = trace.nodes[prior.site(f"conditional_kl_{name}")]["fn"].log_factor
        torch.testing.assert_close(factor.sum(), -expected)


def test_draws_of_the_update_are_products_of_the_two_factors():
    """Mean and covariance of ``B A`` under the prior: zero, and the product of the factors' own."""
    prior = bind(FactorInducing(rank=2, conditional="exact", sigma=0.5, scale="fixed"))
    with pyro.plate("draws", 50_000, dim=-2):
        update = prior()
    weights = torch.stack([layer.weight() for layer in update.layers()], 1)  # S x n x 4 x 5
    # With lambda = 1 every entry of A has variance 1 and every entry of B sigma^2: the published
    # transform and covariance had directions of their own each.
    torch.testing.assert_close(update.A.var(0), torch.ones(N, 2, 5), atol=0.03, rtol=0)
    torch.testing.assert_close(weights.mean(0), torch.zeros(N, 4, 5), atol=0.02, rtol=0)
    torch.testing.assert_close(weights.var(0), torch.full((N, 4, 5), 2 * 0.25), atol=0.03, rtol=0)


class TestCorrectedDefects:
    """One test for each defect of the published code that this prior corrects."""

    def test_every_cholesky_is_of_its_own_matrix(self):
        """The published cache took chol(Z Z^T + D^2) for chol(Z Z^T): draws were too wide."""
        prior = bind(FactorInducing(rank=2, noise_init=1.0))
        Z, D = prior.Z_r_A, prior.D_r_A
        side = side_of(nn.functional.normalize(Z, dim=-1), D)
        noise = weight_noise(torch.Size([100_000, N]), side, side)
        for i in range(N):
            R = side.Q[i].mT @ side.Q[i]
            exact = torch.eye(4) - torch.kron(R, R)
            torch.testing.assert_close(noise[:, i].flatten(1).mT.cov(), exact, atol=0.03, rtol=0)

    @pytest.mark.parametrize("factor", [0.1, 10.0])
    def test_the_length_of_directions_does_nothing(self, factor):
        """So that sigma alone sets the size of an update, and in proportion."""
        prior = bind(FactorInducing(rank=2))
        values = {prior.site(f"U_{f}"): torch.randn(N, 2, 2) for f in "AB"}
        before = pyro.poutine.condition(prior, data=values)()
        with torch.no_grad():
            for name, parameter in prior.named_parameters():
                if name.startswith("Z_"):
                    parameter.mul_(factor)
        after = pyro.poutine.condition(prior, data=values)()
        torch.testing.assert_close(after.B @ after.A, before.B @ before.A)
        prior.sigma_ = factor * prior.sigma_.detach()
        scaled = pyro.poutine.condition(prior, data=values)()
        torch.testing.assert_close(scaled.B @ scaled.A, factor * before.B @ before.A)

    def test_layers_of_one_shape_and_seeds_start_differently(self):
        torch.manual_seed(1)
        one = bind(FactorInducing(rank=2))
        assert not torch.equal(one.Z_c_A[0], one.Z_c_A[1])
        torch.manual_seed(2)
        assert not torch.equal(bind(FactorInducing(rank=2)).Z_c_A, one.Z_c_A)

    def test_lambda_is_capped_and_never_zero_or_without_gradient(self):
        prior = bind(FactorInducing(rank=2, conditional="scaled"))
        name, free = next((n, p) for n, p in prior.named_parameters() if n.startswith("lambda_A"))
        assert name.endswith("_unconstrained")
        for value in (-6.0, 0.0, 6.0):
            with torch.no_grad():
                free.fill_(value)
            assert ((prior.lambda_A > 0) & (prior.lambda_A < 0.03)).all()
            (grad,) = torch.autograd.grad(prior.lambda_A.sum(), free)
            assert (grad > 0).all()

    def test_the_kl_is_weighed_by_one_over_the_data(self):
        """Loss per example = NLL + KL / N, with the U's KL in closed form and lambda's."""
        prior = FactorInducing(rank=2, conditional="scaled")
        blora = tiny.adapted(prior=prior, guide=MeanField(), num_data=10)
        kl = blora.kl()
        assert kl is not None
        conditional = sum(
            conditional_kl(getattr(blora.model, g.name).lambda_A, 2, g.d_in).sum()
            + conditional_kl(getattr(blora.model, g.name).lambda_B, g.d_out, 2).sum()
            for g in blora.model.groups
        )
        options = {"collate": tiny.collate, "num_steps": 1, "progress": False}
        (step,) = fit(blora, tiny.examples(10), **options).history
        expected = step["nll"] + (kl + conditional).item() / 10
        assert step["loss"] == pytest.approx(expected, rel=1e-4)
