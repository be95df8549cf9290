"""A prior and a guide family of the user's own."""

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import Centered, Plain, Scaled, Shifted, Spread

from pyro_blora.guides import Delta, Ensemble, Laplace, MeanField, Site
from pyro_blora.inference import finish
from pyro_blora.posterior.linearized import logit_jacobian
from pyro_blora.testing import GuideContract, PriorContract
from pyro_blora.updates import LowRankUpdate

tiny.contract(globals(), PriorContract, "Plain", parts={"prior": Plain(), "guide": Spread()})
tiny.contract(globals(), PriorContract, "Scaled", make=Scaled())
tiny.contract(globals(), PriorContract, "Centered", make=Centered())
scaled = {"prior": Scaled(), "guide": Spread()}
tiny.contract(globals(), GuideContract, "Spread", make=Spread(), parts=scaled)


def test_kl_is_a_number_or_none():
    """A positive site gets a transformed normal, whose KL is not known in closed form."""
    kl = tiny.adapted(prior=Plain(), guide=MeanField(init_scale=1.0)).kl()
    assert kl.item() == pytest.approx(0.0, abs=1e-5)  # it starts at the prior itself
    assert tiny.adapted(prior=Scaled(), guide=MeanField()).kl() is None
    assert tiny.adapted(prior=Shifted(), guide=MeanField()).kl() is None
    for point in (Delta(), Ensemble()):
        assert tiny.adapted(guide=point).kl() is None


def test_a_site_starts_where_the_scale_it_depends_on_does():
    """The median of a half Cauchy is its scale; the normal's own is fixed, whatever was drawn."""
    blora = tiny.adapted(prior=Centered(), guide=MeanField(init_scale=1.0))
    families = blora.guide.families()
    tau = families["q_proj.tau"].center()
    assert tau.item() == pytest.approx(0.5, rel=0.1)
    for name in ("q_proj.B", "v_proj.B"):
        torch.testing.assert_close(families[name].scale, tau.expand_as(families[name].scale))


def test_a_linearization_ignores_a_site_of_another_density():
    blora, batch = tiny.adapted(prior=Centered(), guide=MeanField()), tiny.sequences()
    drawn, linear = blora.predict(batch, 2000), blora.predict(batch, 2000, linearized=True)
    torch.testing.assert_close(drawn.probs, linear.probs, atol=0.01, rtol=0)
    assert not logit_jacobian(blora.model, blora.guide, batch)[1]["q_proj.tau"].any()


def test_laplace_leaves_a_site_of_another_density_the_width_of_its_prior():
    blora, batch = tiny.adapted(prior=Centered(), guide=Laplace()), tiny.sequences()
    found = finish(blora, tiny.examples(), collate=tiny.collate, progress=False)
    family = blora.guide.families()["q_proj.tau"]
    width = family.site.start()[1]
    assert torch.equal(family.width, width)
    assert found["q_proj.tau"] == pytest.approx(width.item() ** -2)
    drawn, linear = blora.predict(batch, 2000), blora.predict(batch, 2000, linearized=True)
    torch.testing.assert_close(drawn.probs, linear.probs, atol=0.02, rtol=0)


class Own(Plain):
    def forward(self):
        with self.plate():
            B = pyro.sample(self.site("B"), type(self).of(self.group.d_out, self.rank))
        return LowRankUpdate(A=self.A, B=B)


def prior(distribution):
    return type("Other", (Own,), {"of": staticmethod(distribution)})()


def cauchy(*shape):
    return dist.Cauchy(torch.zeros(shape), 1.0).to_event(2)


def student(df):
    return lambda *shape: dist.StudentT(df * torch.ones(shape), 0.0, 1.0).to_event(2)


tiny.contract(globals(), PriorContract, "Cauchy", make=prior(cauchy))


@pytest.mark.parametrize("heavy", [cauchy, student(1.0), student(2.0)])
def test_a_distribution_without_moments_starts_at_its_exact_median(heavy):
    distribution = heavy(3, 2).expand([4])
    loc, scale = Site("g.s", distribution, ()).start()
    assert loc.equal(torch.zeros(4, 3, 2))
    assert scale.shape == (4, 3, 2)
    draws = distribution.sample(torch.Size([20_000])).flatten()
    inside = (draws.abs() < scale.mean()).double().mean()
    assert inside.item() == pytest.approx(0.68, abs=0.02)


def two_normals(*shape):
    parts = dist.Normal(torch.zeros(2, *shape), torch.tensor([0.1, 1.0])[:, None, None])
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts.to_event(2))


def two_normals_an_entry(*shape):
    parts = dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.0]))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts).expand(shape).to_event(2)


for mixture in (two_normals, two_normals_an_entry):
    tiny.contract(globals(), PriorContract, mixture.__name__, make=prior(mixture))
