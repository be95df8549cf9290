"""Densities of the core: their moments, and the rank that they learn."""

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from dense_algebra import N
from dense_algebra import at_start as bind
from linear_gaussian import Observed
from own_classes import RandomScale
from torch import nn

from pyro_blora import BayesianLoRA, fit
from pyro_blora.evaluation.metrics import effective_rank, effective_ranks
from pyro_blora.guides import MeanField
from pyro_blora.models import Hierarchical, KroneckerInducing, SpectralInducing
from pyro_blora.models._update_model import CORES
from pyro_blora.updates import LowRankUpdate


def draws(prior, count=100_000):
    with pyro.plate("draws", count, dim=-2):
        return pyro.poutine.trace(prior).get_trace()


def student(shape):
    return dist.StudentT(4.0, torch.zeros(shape), 0.5**0.5).to_event(len(shape))


@pytest.mark.parametrize("core", ["normal", student])
def test_plain_cores_have_mean_zero_and_variance_one(core):
    V = draws(bind(KroneckerInducing(rank=2, core=core))).nodes["q.V"]["value"]
    assert V.shape == (100_000, N, 2, 2)
    torch.testing.assert_close(V.mean(0), torch.zeros(N, 2, 2), atol=0.03, rtol=0)
    torch.testing.assert_close(V.var(0), torch.ones(N, 2, 2), atol=0.15, rtol=0)
    tail = (V.abs() > 4).double().mean()
    assert (tail > 1e-3) == (core != "normal")


@pytest.mark.parametrize(("core", "sites"), [("horseshoe", {"tau", "local"}), ("ard", {"columns"})])
def test_shrinking_cores_are_products_of_their_sites(core, sites):
    prior = bind(KroneckerInducing(rank=(2, 3), core=core, sigma=1.0, scale="fixed"))
    with pyro.plate("draws", 4, dim=-2):
        trace = pyro.poutine.trace(prior).get_trace()
    values = {n.split(".")[1]: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}
    assert sites | {"V"} <= set(values)
    found = trace.nodes["_RETURN"]["value"].core
    if core == "ard":
        expected = values["V"] * values["columns"][..., None, :]
    else:
        width = values["tau"][..., None, None] * values["local"]
        expected = values["V"] * (1 / (1 / width.square() + 1 / 4)).sqrt()  # slab of 2
    torch.testing.assert_close(found, expected)


def test_a_random_scale_is_a_site_of_each_layer():
    prior = bind(RandomScale(sigma=0.5))
    trace = draws(prior)
    sigma = trace.nodes["q.sigma"]["value"]
    assert sigma.shape == (100_000, N)
    # the median of a half-Cauchy is its scale
    torch.testing.assert_close(sigma.median(0).values, torch.full((N,), 0.5), atol=0.02, rtol=0)
    V, core = trace.nodes["q.V"]["value"], trace.nodes["_RETURN"]["value"].core
    torch.testing.assert_close(core, sigma[..., None, None] * V)


def test_layers_share_a_hyperprior():
    prior = bind(Hierarchical(rank=2, sigma=0.5, spread=0.3))
    trace = draws(prior)
    tau, z = trace.nodes["q.tau"]["value"], trace.nodes["q.z"]["value"]
    assert tau.shape == (100_000, 1)
    assert z.shape == (100_000, N)
    V, core = trace.nodes["q.V"]["value"], trace.nodes["_RETURN"]["value"].core
    torch.testing.assert_close(core, (tau * (0.3 * z).exp())[..., None, None] * V)
    logs = (tau * (0.3 * z).exp()).log()
    between = torch.corrcoef(logs.mT)[0, 1]
    assert between > 0.9  # most of the spread is common


class TestEffectiveRank:
    def test_of_known_singular_values(self):
        P, _ = torch.linalg.qr(torch.randn(6, 3))
        R, _ = torch.linalg.qr(torch.randn(7, 3))
        for values, expected in (
            ([1.0, 1.0, 1.0], 3.0),
            ([2.0, 2.0, 0.0], 2.0),
            ([5.0, 0.0, 0.0], 1.0),
            ([0.0, 0.0, 0.0], 0.0),
        ):
            core = torch.diag(torch.tensor(values))
            update = LowRankUpdate(A=R.mT[None], B=P[None], core=core[None])
            assert effective_rank(update).item() == pytest.approx(expected, abs=1e-4)

    def test_of_every_layer(self):
        blora = tiny.adapted(guide=MeanField())
        assert set(effective_ranks(blora).values()) == {0.0}
        with torch.no_grad():
            for family in blora.guide.families().values():
                family.loc.normal_()
        ranks = effective_ranks(blora)
        assert set(ranks) == {n for g in blora.model.groups for n in g.module_names}
        assert all(1 < rank <= 2 for rank in ranks.values())


class Noisy(Observed):
    def distribution(self, logits, labels):
        return dist.Normal(logits, 1.5).to_event(1)


def planted(core):
    """A linear layer whose labels come from a weight that differs by rank 2; rank 8 is offered.

    Between fixed directions, for learned ones are point estimates: no density of the core keeps
    them from fitting noise.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12))
    P, _, Rt = torch.linalg.svd(net[0].weight.detach())
    dW = torch.outer(P[:, 1], Rt[2]) - torch.outer(P[:, 4], Rt[6])
    x = torch.randn(200, 12)
    with torch.no_grad():
        y = net(x) + x @ dW.mT + 1.5 * torch.randn(200, 12)
    blora = BayesianLoRA(
        net,
        target_modules=["0"],
        prior=SpectralInducing(rank=8, core=core),
        guide=MeanField(),
        likelihood=Noisy(num_data=200),
    )
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    options = {"num_steps": 1000, "batch_size": 50, "progress": False}
    options["learning_rates"] = {"scale": 3e-2}
    fit(blora, rows, collate=torch.utils.data.default_collate, **options)
    update = next(iter(blora.posterior.draws(0).values()))
    error = update.layers()[0].weight() - dW
    return next(iter(effective_ranks(blora).values())), (error.norm() / dW.norm()).item()


@pytest.mark.slow
def test_a_planted_rank_two_update_is_recovered():
    found = {}
    for core in ("normal", "horseshoe", "ard"):
        found[core] = planted(core)
    assert 1.9 < found["horseshoe"][0] < 2.2
    assert 1.9 < found["ard"][0] < 2.4
    assert found["normal"][0] > 3  # what shrinkage spares us
    assert found["horseshoe"][1] < found["ard"][1] < found["normal"][1]
    assert set(CORES) == {"normal", "horseshoe", "ard"}
