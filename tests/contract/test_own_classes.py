"""A prior, a guide family and a likelihood of the user's own, as the documentation has them."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroParam
from pyro.optim import ClippedAdam
from torch.distributions import constraints

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import MeanField, SiteGuide
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.models import UpdateModel
from pyro_blora.updates.low_rank_update import LowRankUpdate


class Plain(UpdateModel):
    """The example of ``UpdateModel``: A is learned, B is random."""

    roles: ClassVar[dict[str, str]] = {"A": "direction"}

    def __init__(self, *, rank: int = 2) -> None:
        super().__init__()
        self.rank = rank

    def setup(self, group):
        self.A = PyroParam(self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5)

    def forward(self):
        with self.plate():
            B = pyro.sample(self.site("B"), self.normal(self.group.d_out, self.rank))
        return LowRankUpdate(A=self.A, B=B)


class Scaled(Plain):
    """With a positive random scale for each layer, and both factors random."""

    def forward(self):
        with self.plate():
            tau = pyro.sample(self.site("tau"), dist.HalfNormal(torch.tensor(0.5)))
            A = pyro.sample(self.site("A"), self.normal(self.rank, self.group.d_in))
            B = pyro.sample(self.site("B"), self.normal(self.group.d_out, self.rank))
        return LowRankUpdate(A=A + self.A, B=tau[..., None, None] * B)


class Spread(SiteGuide):
    """The example of ``SiteGuide``: one standard deviation for each layer."""

    roles: ClassVar[dict[str, str]] = {"loc": "mean", "scale": "scale"}

    def setup(self, site):
        loc, scale = site.start()
        self.loc = PyroParam(loc)
        flat = scale.flatten(-site.event_dim).mean(-1) if site.event_dim else scale
        self.scale = PyroParam(self.init_scale * flat, constraints.positive)

    def distribution(self):
        scale = self.scale.reshape(self.scale.shape + (1,) * self.site.event_dim)
        return dist.Normal(self.loc, scale).to_event(self.site.event_dim)


class Weighted(LabelTokens):
    """Shifts the logits: a subclass that writes one method."""

    def logits(self, net, batch):
        return super().logits(net, batch) + torch.tensor([0.0, 0.0, 30.0])


class Wrong(Plain):
    """Returns what ``made`` makes of the right factors."""

    def __init__(self, *, made) -> None:
        super().__init__()
        self.made = made

    def forward(self):
        update = super().forward()
        return self.made(update.A, update.B)


FAMILIES = {**tiny.families(), "Spread": Spread()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prior", [Plain(), Scaled()], ids=repr)
def test_own_prior(prior, family):
    blora, batch = tiny.adapted(prior=prior, guide=FAMILIES[family]), tiny.sequences(8)
    before = tiny.trained(blora)
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(blora.model, blora.guide, ClippedAdam({"lr": 1e-2}), elbo)
    losses = [svi.step(batch) for _ in range(3)]
    assert all(loss == loss and abs(loss) < float("inf") for loss in losses)
    assert not [n for n, value in tiny.trained(blora).items() if torch.equal(value, before[n])]
    assert blora.predict(batch, 4).samples.shape == (4, 8, 3)
    assert blora.predict(batch, 0).samples.shape == (1, 8, 3)


@pytest.mark.parametrize(("prior", "analytic"), [(Plain(), True), (Scaled(), False)])
def test_kl_is_a_number_or_none(prior, analytic):
    """A positive site gets a transformed normal, whose KL is not known in closed form."""
    blora = tiny.adapted(prior=prior, guide=MeanField(init_scale=1.0))
    kl = blora.kl()
    assert (kl is not None) == analytic
    if analytic:
        assert kl.item() == pytest.approx(0.0, abs=1e-5)  # it starts at the prior itself


def test_a_positive_site_stays_positive():
    blora = tiny.adapted(prior=Scaled(), guide=MeanField(init_scale=2.0))
    values = blora.guide(None)
    assert (values["q_proj.tau"] > 0).all()
    assert (blora.guide.center()["q_proj.tau"] > 0).all()
    assert values["q_proj.tau"].shape == (2,)


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (lambda A, B: None, "returned a NoneType"),
        (lambda A, B: (A, B), "returned a tuple"),
        (lambda A, B: LowRankUpdate(A=A.mT, B=B), r"A \(2, 16, 2\), B \(2, 16, 2\), no core"),
        (lambda A, B: LowRankUpdate(A=A, B=B[..., :1]), r"B \(2, 16, 1\), no core"),
        (lambda A, B: LowRankUpdate(A=A[:1], B=B), r"A \(1, 2, 16\)"),
        (lambda A, B: LowRankUpdate(A=A, B=B, core=torch.ones(2, 3, 2)), r"core \(2, 3, 2\)"),
        (lambda A, B: LowRankUpdate(A=A, B=B, core=torch.ones(2)), r"core \(2,\)"),
    ],
)
def test_a_prior_that_returns_something_else_is_refused_at_once(made, given):
    net = tiny.llama()
    with pytest.raises(ConfigurationError, match=rf"group 'q_proj'.*{given}.*\(\.\.\., 2, 16, r"):
        tiny.adapted(net, prior=Wrong(made=made))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_own_likelihood():
    blora = tiny.adapted(likelihood=Weighted(token_ids=tiny.ANSWERS, num_data=12))
    assert (blora.predict(tiny.sequences(), 3).predictions == 2).all()


class Sparse(Plain):
    """The second factor under a law of the user's."""

    law = None

    def forward(self):
        with self.plate():
            B = pyro.sample(self.site("B"), type(self).law(self.group.d_out, self.rank))
        return LowRankUpdate(A=self.A, B=B)


def two_normals(*shape):
    parts = dist.Normal(torch.zeros(2, *shape), torch.tensor([0.1, 1.0])[:, None, None])
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts.to_event(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_real_laws_is_a_site(monkeypatch, family):
    monkeypatch.setattr(Sparse, "law", staticmethod(two_normals))
    blora = tiny.adapted(prior=Sparse(), guide=FAMILIES[family])
    loss = TraceMeanField_ELBO(max_plate_nesting=1)(blora.model, blora.guide)(tiny.sequences(8))
    loss.backward()
    assert loss.isfinite()
    assert blora.predict(tiny.sequences(8), 0).samples.shape == (1, 8, 3)


@pytest.mark.parametrize("family", [MeanField(), Spread()], ids=repr)
def test_a_discrete_site_is_an_error_that_says_what_to_do(monkeypatch, family):
    law = staticmethod(lambda *shape: dist.Bernoulli(torch.full(shape, 0.5)).to_event(2))
    monkeypatch.setattr(Sparse, "law", law)
    with pytest.raises(ConfigurationError, match=r"'q_proj.B' is Independent.*RelaxedBernoulli"):
        tiny.adapted(prior=Sparse(), guide=family)
