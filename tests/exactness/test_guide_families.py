"""Every guide family against posteriors that are known.

Families that contain the posterior reach it; the others reach the best that they have; flows follow
bent posteriors that a mean-field normal cannot; no density is more than a density, so no ELBO
exceeds the log evidence.
"""

import math

import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import NOISE, Toy, divergence
from pyro.nn import PyroParam
from torch.distributions.transforms import ExpTransform

from pyro_blora import guides
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import (
    Ensemble,
    Flow,
    FullRank,
    MatrixNormal,
    MeanField,
    Site,
    SiteGuide,
)

# Point masses are no densities (Ensemble, and Laplace until it is finished).
BOUNDS = [
    Flow(),
    FullRank(),
    MatrixNormal(),
    MeanField(),
]
BOUNDS += [Flow(flows=("householder", "spline")), Flow(flows=("planar", "radial"))]


def bound(family, n=1, event=(1, 2)):
    """The family at a standard normal site of ``n`` layers."""
    prior = dist.Normal(torch.zeros(n, *event), 1.0).to_event(len(event))
    return family.bind(Site("V", prior, ()))


def train(q, log_density, steps=1500, draws=64, lr=0.02):
    """Maximizes the ELBO of ``q`` for ``log_density`` of values ``(draws, n, *event)``."""
    optimizer = torch.optim.Adam(q.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        density = q.distribution()
        value = density.rsample((draws,))
        loss = (density.log_prob(value).sum(-1) - log_density(value)).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return q


@torch.no_grad()
def elbo(q, log_density, draws=10_000):
    density = q.distribution()
    value = density.sample((draws,))
    terms = log_density(value) - density.log_prob(value).sum(-1)
    return terms.mean().item(), terms.std().item() / draws**0.5


def log_joint(toy):
    """``log p(y, V)`` of the linear-Gaussian toy, for values ``(draws, 1, m_r, m_c)``."""

    def density(V):
        V = V.flatten(1)
        fit = dist.Normal(V @ toy.design.mT, NOISE).log_prob(toy.residual).sum(-1)
        return fit + dist.Normal(0.0, 1.0).log_prob(V).sum(-1)

    return density


def test_a_normal_with_all_correlations_reaches_any_normal_posterior():
    toy = Toy(FullRank())
    assert divergence(toy) > 1
    toy.fit().assert_reached(1e-4, of_elbo=1e-5)


def test_correlations_close_the_gap():
    gaps = []
    for family in (MeanField(), FullRank()):
        torch.manual_seed(0)
        toy = Toy(family).fit()
        gaps.append((toy.log_evidence - toy.elbo()).item())
    assert gaps[0] > 0.01
    assert gaps[1] < 1e-5


def banana(V):
    x, y = V[:, 0, 0, 0], V[:, 0, 0, 1]
    return dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x.square() - 1, 0.3).log_prob(y)


@pytest.mark.slow
def test_a_flow_follows_what_a_normal_cannot():
    """The density is normalized: the log evidence is 0."""
    best, _ = elbo(train(bound(MeanField()), banana), banana)
    reached, error = elbo(train(bound(Flow(init_scale=1.0)), banana), banana)
    assert best < -0.6
    assert -0.05 < reached < 4 * error


@pytest.mark.parametrize("family", BOUNDS, ids=repr)
@pytest.mark.parametrize("steps", [0, 150])
def test_no_elbo_exceeds_the_log_evidence(family, steps):
    toy = Toy(family)
    if steps:
        train(toy.q, log_joint(toy), steps, lr=0.05)
    reached, error = elbo(toy.q, log_joint(toy))
    evidence = toy.log_evidence.item()
    assert evidence - (20 if steps else math.inf) < reached < evidence + 4 * error


@pytest.mark.parametrize("family", BOUNDS, ids=repr)
@torch.no_grad()
def test_every_density_is_normalized(family):
    """``E_q[f(V) / q(V)]`` is one for a narrow normal density ``f`` amid ``q``."""
    q = bound(family, n=2, event=(1, 2)).distribution()
    value = q.sample((200_000,))
    center, width = value.mean(0), 0.5 * value.std(0)
    inside = dist.Normal(center, width).log_prob(value).sum((-3, -2, -1))
    weights = (inside - q.log_prob(value).sum(-1)).exp()
    error = weights.std().item() / len(weights) ** 0.5
    assert weights.mean().item() == pytest.approx(1, abs=5 * error + 1e-3)
    assert error < 0.1


FAR = {"FullRank": (1, (16, 16)), "MatrixNormal": (1, (256, 1))}


@pytest.mark.parametrize("name", FAR)
def test_a_draw_keeps_its_density_where_a_triangle_is_far_from_diagonal(name):
    """Of ``k`` normals the mean of ``log q`` is minus the entropy, its variance ``k / 2``.

    As after three Adam steps of 1e-2 from a diagonal of 0.1: the inverse has ``1.3 ** 256``.
    """
    n, event = FAR[name]
    q = bound(getattr(guides, name)(), n, event)
    triangles = [t for key, t in q.named_parameters() if "tril" in key and t.shape[-1] == 256]
    with torch.no_grad():
        for triangle in triangles:
            size = triangle.diagonal(dim1=-2, dim2=-1).exp().mean()
            triangle.sub_(0.3 * size * torch.ones_like(triangle).tril(-1))
    density = q.distribution().expand((400, n))
    score = density.log_prob(density.rsample()).sum(-1)
    k = n * math.prod(event)
    gap = (score + density.entropy().sum(-1)).mean().item()
    assert gap == pytest.approx(0, abs=5 * (k / 2 / 400) ** 0.5)
    score.mean().backward()  # of -log det: by the logarithms of the diagonal
    for triangle in triangles:
        expected = (-k / 256 * torch.eye(256)).expand_as(triangle)
        torch.testing.assert_close(triangle.grad, expected)


@pytest.mark.parametrize("family", [FullRank(), MatrixNormal()], ids=repr)
def test_a_draw_that_is_held_fixed_has_the_gradient_of_its_density(family):
    """In the mean it is ``(x - loc) / 0.01^2``; its density is that of the draw."""
    for event in ((), (3,), (2, 3)):
        density = bound(family, 4, event).distribution().expand((5, 4))
        value = density.rsample()
        torch.testing.assert_close(density.log_prob(value), density.log_prob(value.detach()))
    q = bound(family)
    for draw in ("sample", "rsample"):
        density = q.distribution()
        value = getattr(density, draw)().detach()
        q.zero_grad()
        density.log_prob(value).sum().backward()
        torch.testing.assert_close(q.loc_unconstrained.grad, (value - q.loc).detach() / 1e-4)


def test_an_ensemble_is_its_members_in_turn():
    q = bound(Ensemble(members=3), n=2)
    draws = q.distribution().expand((7, 2)).rsample()
    assert torch.equal(draws, q.points[torch.arange(7) % 3])
    assert torch.equal(q.distribution().expand((2, 2)).rsample()[0], q.points[1])  # 7 mod 3
    torch.testing.assert_close(q.center(), torch.zeros(2, 1, 2), atol=1e-6, rtol=0)


def test_an_ensemble_s_objective_is_the_mean_of_its_members_map_objectives():
    toy = Toy(Ensemble(members=4))
    joint, q = log_joint(toy), toy.q.distribution()
    value = q.expand((8, 1)).rsample()
    objective = (joint(value) - q.log_prob(value).sum(-1)).mean()
    torch.testing.assert_close(objective, joint(toy.q.points).mean())
    train(toy.q, joint, steps=800, draws=4, lr=0.05)
    modes = toy.posterior.mean.expand(4, -1)
    torch.testing.assert_close(toy.q.points.flatten(1), modes, atol=0.02, rtol=0)


class Exponentials(SiteGuide):
    """Exponentials of normals, a distribution that does not say its mean, ``exp(1/8)``."""

    def setup(self, site):
        self.scale = PyroParam(torch.full(site.shape, 0.5))

    def distribution(self):
        normal = dist.Normal(0 * self.scale, self.scale).to_event(self.site.event_dim)
        return dist.TransformedDistribution(normal, ExpTransform())


@pytest.mark.parametrize(
    "prior", [dist.Normal(torch.zeros(3, 2), 1.0), dist.HalfNormal(torch.ones(3, 2))]
)
def test_a_center_that_no_formula_gives_is_that_of_draws(prior):
    site = Site("V", prior.to_event(1), ())
    q = Exponentials().bind(site)
    with pytest.raises(NotImplementedError):
        assert q.distribution().mean
    state = torch.get_rng_state()
    first = q.center()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(q.center(), first)
    mean = site.transform.inv(first)
    torch.testing.assert_close(mean, torch.full((3, 2), math.exp(1 / 8)), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bound(FullRank(), event=(8, 200)),
        lambda: Ensemble(members=1),
        lambda: Flow(flows=()),
        lambda: Flow(flows=("splin",)),
    ],
)
def test_what_a_family_cannot_do_is_refused(make):
    with pytest.raises(ConfigurationError):
        make()
