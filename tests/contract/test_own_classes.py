"""A prior and a guide family of the user's own."""

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import Plain, Scaled, Spread
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Delta, Ensemble, Laplace, MeanField, Site
from pyro_blora.testing import GuideContract, PriorContract
from pyro_blora.updates import LowRankUpdate

ONE = torch.ones(1)


tiny.contract(globals(), PriorContract, "Plain", parts={"prior": Plain(), "guide": Spread()})
tiny.contract(globals(), PriorContract, "Scaled", make=Scaled())
scaled = {"prior": Scaled(), "guide": Spread()}
tiny.contract(globals(), GuideContract, "Spread", make=Spread(), parts=scaled)


def test_kl_is_a_number_or_none():
    """A positive site gets a transformed normal, whose KL is not known in closed form."""
    kl = tiny.adapted(prior=Plain(), guide=MeanField(init_scale=1.0)).kl()
    assert kl.item() == pytest.approx(0.0, abs=1e-5)  # it starts at the prior itself
    assert tiny.adapted(prior=Scaled(), guide=MeanField()).kl() is None
    for point in (Delta(), Ensemble()):
        assert tiny.adapted(guide=point).kl() is None


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (lambda A, B: None, "NoneType"),
        (lambda A, B: LowRankUpdate(A=A.mT, B=B), r"A \(2, 16, 2\), B \(2, 16, 2\)"),
        (lambda A, B: LowRankUpdate(A=A, B=B, core=torch.ones(2, 3, 2)), r"core \(2, 3, 2\)"),
    ],
)
def test_a_prior_that_returns_something_else_is_refused_at_once(monkeypatch, made, given):
    A, B = torch.zeros(2, 2, 16), torch.zeros(2, 16, 2)
    monkeypatch.setattr(Plain, "forward", lambda self: made(A, B))
    net = tiny.llama()
    with pytest.raises(ConfigurationError, match=rf"'q_proj'.*{given}"):
        tiny.adapted(net, prior=Plain())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_parameter_that_pyro_does_not_see_is_named_at_once(monkeypatch):
    monkeypatch.setattr(Plain, "setup", lambda self, group: setattr(self, "A", nn.Parameter(ONE)))
    with pytest.raises(ConfigurationError, match=r"Plain.*\['A'\]"):
        tiny.adapted(prior=Plain())


class Sparse(Plain):
    """The second factor under a law of the user's."""

    law = None

    def forward(self):
        with self.plate():
            B = pyro.sample(self.site("B"), type(self).law(self.group.d_out, self.rank))
        return LowRankUpdate(A=self.A, B=B)


def cauchy(*shape):
    return dist.Cauchy(torch.zeros(shape), 1.0).to_event(2)


def student(df):
    return lambda *shape: dist.StudentT(df * torch.ones(shape), 0.0, 1.0).to_event(2)


prior = type("CauchyPlain", (Sparse,), {"law": staticmethod(cauchy)})
tiny.contract(globals(), PriorContract, "Cauchy", make=prior())


@pytest.mark.parametrize("heavy", [cauchy, student(1.0), student(2.0)])
def test_a_law_without_moments_starts_at_its_exact_median(heavy):
    law = heavy(3, 2).expand([4])
    loc, scale = Site("g.s", law, ()).start()
    assert loc.shape == scale.shape == (4, 3, 2)
    assert (loc == 0).all()
    draws = law.sample(torch.Size([20_000])).flatten()
    inside = (draws.abs() < scale.mean()).double().mean()
    assert inside.item() == pytest.approx(0.68, abs=0.02)


def two_normals(*shape):
    parts = dist.Normal(torch.zeros(2, *shape), torch.tensor([0.1, 1.0])[:, None, None])
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts.to_event(2))


def two_normals_an_entry(*shape):
    parts = dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.0]))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts).expand(shape).to_event(2)


@pytest.mark.parametrize("law", [two_normals, two_normals_an_entry])
@pytest.mark.parametrize("family", [MeanField(), Laplace(), Spread()], ids=repr)
def test_a_mixture_of_real_laws_is_a_site(monkeypatch, family, law):
    monkeypatch.setattr(Sparse, "law", staticmethod(law))
    blora = tiny.adapted(prior=Sparse(), guide=family)
    loss = TraceMeanField_ELBO(max_plate_nesting=1)(blora.model, blora.guide)(tiny.sequences(8))
    loss.backward()
    assert loss.isfinite()
    assert blora.predict(tiny.sequences(8), 0).samples.shape == (1, 8, 3)


def test_a_discrete_site_is_an_error_that_says_what_to_do(monkeypatch):
    law = staticmethod(lambda *shape: dist.Bernoulli(torch.full(shape, 0.5)).to_event(2))
    monkeypatch.setattr(Sparse, "law", law)
    with pytest.raises(ConfigurationError, match=r"'q_proj.B'.*RelaxedBernoulli"):
        tiny.adapted(prior=Sparse(), guide=MeanField())
