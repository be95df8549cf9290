"""The loss that ``fit`` reports is the negative ELBO, whatever the guide."""

from functools import partial

import pyro
import pytest
import tiny
import torch
from autoguides import autoguides
from own_classes import RandomScale
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO, autoguide
from torch.distributions import Normal, kl_divergence, register_kl

from pyro_blora import fit, guides, models
from pyro_blora.errors import ConfigurationError
from pyro_blora.inference.objective import Objective

N = 32
# Their own start, at a mean, is not finite for a half-Cauchy site
MESSENGERS = ("AutoNormalMessenger", "AutoHierarchicalNormalMessenger", "AutoRegressiveMessenger")
BATCH = tiny.sequences(N, 4)


def kinds():
    messengers = {name: getattr(autoguide, name) for name in MESSENGERS}
    init = {"init_loc_fn": autoguide.init_to_median}
    return autoguides() | {name: partial(kind, **init) for name, kind in messengers.items()}


PRIORS = {
    "normal": models.KroneckerInducing(rank=2),
    "half-cauchy": RandomScale(),
    "hierarchical": models.Hierarchical(rank=2),
    "horseshoe": models.KroneckerInducing(rank=2, core="horseshoe"),
}


SOME = ["normal", "half-cauchy"]
SOME += [pytest.param(name, marks=pytest.mark.slow) for name in ("hierarchical", "horseshoe")]


def adapted(**options):
    return tiny.adapted(tiny.llama(1), num_data=N, **options)


def losses(blora, repeats):
    objective = Objective(blora)
    with torch.no_grad(), pyro.validation_enabled(False):
        return torch.tensor([objective(BATCH)[1]["loss"] * N for _ in range(repeats)])


def reference(blora, repeats):
    elbo = Trace_ELBO(
        num_particles=N, vectorize_particles=True, max_plate_nesting=blora.max_plate_nesting
    )
    with torch.no_grad(), pyro.validation_enabled(False):
        found = [elbo.loss(blora.model, blora.guide, BATCH) for _ in range(repeats)]
    return torch.tensor(found)


def assert_same_mean(a, b):
    error = (a.var() / len(a) + b.var() / len(b)).sqrt()
    # 3 for one comparison; there are some hundred of them, some with heavy tails
    assert abs(a.mean() - b.mean()) <= 4 * error + 1e-3


def train(blora, steps=10):
    rows = tiny.examples(N)
    fit(blora, rows, collate=tiny.collate, num_steps=steps, batch_size=16, progress=False)


@pytest.mark.parametrize("prior", SOME)
@pytest.mark.parametrize("kind", kinds())
def test_an_autoguide(kind, prior):
    if kind == "AutoHierarchicalNormalMessenger" and prior != "normal":
        pytest.skip("Pyro's AutoHierarchicalNormalMessenger starts at an infinite mean")
    blora = adapted(prior=PRIORS[prior], guide=kinds()[kind])
    blora.guide(BATCH)
    assert_same_mean(losses(blora, 25), reference(blora, 25))
    train(blora)
    assert_same_mean(losses(blora, 25), reference(blora, 25))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("family", [guides.MatrixNormal(), guides.MeanField(), guides.Flow()])
def test_a_family(family, prior):
    blora = adapted(prior=PRIORS[prior], guide=family)
    train(blora)
    assert_same_mean(losses(blora, 25), reference(blora, 25))


def test_the_kl_of_a_structured_autoguide_against_its_closed_form():
    """Normals in all coordinates: what the loss has beyond the NLL is the sum of their KLs."""
    kind = partial(autoguide.AutoStructured, conditionals="normal", dependencies={})
    blora = adapted(guide=kind)
    blora.guide(BATCH)
    train(blora)
    objective = Objective(blora)
    with torch.no_grad(), pyro.validation_enabled(False):
        kls = torch.tensor([objective(BATCH)[1]["kl"] for _ in range(20)])
    guide, expected = blora.guide, 0.0
    for group in blora.model.groups:
        loc, scale = (getattr(part, group.name).V for part in (guide.locs, guide.scales))
        expected += kl_divergence(Normal(loc, scale), Normal(0.0, 1.0)).sum().item()
    assert expected > 1
    assert abs(kls.mean() - expected) < 3 * kls.std() / len(kls) ** 0.5


def test_a_negative_kl_is_an_error():
    class Off(pyro.distributions.Normal):
        pass

    class Own(guides.MeanField):
        def distribution(self):
            return Off(self.loc, self.scale).to_event(self.site.event_dim)

    @register_kl(Off, pyro.distributions.Normal)
    def _(q, p):
        return -torch.ones(q.batch_shape)

    objective = Objective(adapted(guide=Own()))
    figures = {name: figure.item() for name, figure in objective(BATCH)[1].items()}
    with pytest.raises(ConfigurationError, match=r"must not be negative, got -8 nats.*Trace_ELBO"):
        objective.check(BATCH, 0, figures)


@pytest.mark.parametrize("family", [guides.Delta(), guides.Laplace(), guides.Ensemble()])
def test_minus_the_density_of_a_point_may_be_negative(family):
    blora = adapted(prior=models.GaussianFactors(rank=2), guide=family)
    assert Objective(blora)(BATCH)[1]["kl"] < -1


def test_steps_of_a_wide_guide_stay_at_the_elbo():
    """By draws as by the closed form, where 128 entries of a layer are correlated."""
    torch.set_default_dtype(torch.float32)
    blora = adapted(prior=models.KroneckerInducing(rank=(8, 16)), guide=guides.FullRank())
    svi = SVI(blora.model, blora.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(6):
        loss = svi.step(BATCH)
    exact = TraceMeanField_ELBO().loss(blora.model, blora.guide, BATCH)
    assert loss == pytest.approx(exact, abs=100)  # of 256 entries a draw has 11 nats of noise


class Sharpened(guides.MeanField):
    """The same normal, each draw a Delta that carries its density, as AutoGuides make theirs."""

    def distribution(self):
        q = super().distribution()
        value = q.rsample()
        return pyro.distributions.Delta(value, q.log_prob(value), event_dim=2)


@pytest.mark.slow
def test_a_delta_with_a_density_is_no_point():
    """Against the same distribution written as a normal, whose KL has a closed form."""
    found = {}
    for family in (Sharpened, guides.MeanField):
        blora = adapted(guide=family())
        objective = Objective(blora, 1)
        with torch.no_grad(), pyro.validation_enabled(False):
            found[family] = torch.tensor([objective(BATCH)[1]["kl"] for _ in range(400)])
    mean, error = found[Sharpened].mean(), found[Sharpened].std() / 20
    assert abs(mean - found[guides.MeanField].mean()) < 4 * error < 1


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, guides.MatrixNormal()])
def test_the_weight_of_the_kl_holds_for_every_guide(kind):
    blora = adapted(guide=kind)
    blora.guide(BATCH)
    found = []
    for weight in (1.0, 2.0, 3.0):
        blora.zero_grad()
        pyro.set_rng_seed(0)
        loss, figures = Objective(blora, kl_weight=weight)(BATCH)
        loss.backward()
        parts = figures["nll"] + weight / N * figures["kl"]
        assert loss.item() == pytest.approx(parts.item(), rel=1e-5)
        found.append(torch.cat([p.grad.flatten() for p in blora.parameters()]))
    assert (found[1] - found[0]).abs().max() > 1e-3
    torch.testing.assert_close(found[2] - found[1], found[1] - found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"conditional": "exact"}], ids=str)
def test_nuts_needs_a_density_that_stands_still(options):
    blora = adapted(prior=models.KroneckerInducing(rank=2, **options))
    mcmc = MCMC(NUTS(blora.model, max_tree_depth=2), 2, warmup_steps=2, disable_progbar=True)
    if not options:
        mcmc.run(BATCH)
        assert mcmc.get_samples()["q_proj.V"].shape == (2, 1, 2, 2)
    else:
        with pytest.raises(ConfigurationError, match="conditional='deterministic'"):
            mcmc.run(BATCH)
