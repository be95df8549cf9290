"""The contracts find what they are there to find: classes that are broken on purpose fail them."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import Plain, Spread
from pyro.nn import PyroParam
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform

from pyro_blora.likelihoods import LabelTokens
from pyro_blora.scores import Metrics
from pyro_blora.testing import GuideContract, LikelihoodContract, PriorContract
from pyro_blora.updates import LowRankUpdate


def broken(base, **members):
    return type("Broken", (base,), members)


def plain_tensor(self, group):
    self.A = self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5


def changed(change):
    """A prior whose second factor is a function of the right one."""

    def forward(self):
        update = Plain.forward(self)
        return LowRankUpdate(A=update.A, B=change(update.B))

    return broken(Plain, forward=forward)


def in_both_factors(self):
    """A scale whose square multiplies the update, of which the factors' means know nothing."""
    with self.plate():
        tau = pyro.sample(self.site("tau"), dist.HalfNormal(torch.ones(())))[..., None, None]
        B = pyro.sample(self.site("B"), self.normal(self.group.d_out, self.rank))
    return LowRankUpdate(A=tau * self.A, B=tau * (B + 1))


def answering(change):
    return broken(LabelTokens, logits=lambda *args: change(LabelTokens.logits(*args)))


def outside_of_the_plate(self):
    scale = torch.ones(self.group.n, self.group.d_out, self.rank)
    B = pyro.sample(self.site("B"), dist.Normal(0 * scale, scale).to_event(2))
    return LowRankUpdate(A=self.A, B=B)


def unmoved(self, site):
    self.loc, scale = site.start()
    self.scale = scale.flatten(-site.event_dim).mean(-1) if site.event_dim else scale


class Backwards(AffineTransform):
    """With the wrong sign of the log-Jacobian, which is zero where the scale is one."""

    def log_abs_det_jacobian(self, x, y):
        return -super().log_abs_det_jacobian(x, y)


class Stretched(Spread):
    roles: ClassVar[dict[str, str]] = {**Spread.roles, "stretch": "scale"}

    def setup(self, site):
        super().setup(site)
        self.stretch = PyroParam(torch.ones_like(self.loc), constraints.positive)

    def distribution(self):
        change = Backwards(0.0, self.stretch, event_dim=self.site.event_dim)
        return dist.TransformedDistribution(super().distribution(), [change])


def drawing(base, rsample, *arguments):
    kind = broken(base, rsample=rsample)

    def distribution(self):
        scale = self.scale.reshape(self.scale.shape + (1,) * self.site.event_dim)
        return kind(*arguments, self.loc, scale).to_event(self.site.event_dim)

    return broken(Spread, distribution=distribution)


def wider(self, *shape):
    """A tenth wider than the density; the KL of a Student-t has no closed form."""
    return self.loc + 1.1 * (dist.StudentT.rsample(self, *shape) - self.loc)


def detached(self, *shape):
    return dist.Normal(self.loc, self.scale.detach()).rsample(*shape)


def blind(self, net, batch):
    mask = torch.ones_like(batch["attention_mask"])
    return LabelTokens.logits(self, net, {**batch, "attention_mask": mask})


def no_number(self, prediction, labels):
    return Metrics(nll=torch.nan)


BROKEN = [
    (PriorContract, broken(Plain, setup=plain_tensor), "test_a_trained", "restore it.*PyroParam"),
    (PriorContract, broken(Plain, roles={}), "test_every_parameter", "must give .'A'. one of"),
    (PriorContract, broken(Plain, forward=outside_of_the_plate), "test_sites", "no plate has dim"),
    (PriorContract, changed(lambda B: 0 * B), "test_the_mean_u", "ignores its sit"),
    (PriorContract, changed(lambda B: 1 + B), "test_the_mean_u", "mean is not"),
    (PriorContract, broken(Plain, forward=in_both_factors), "test_the_mean_of", "in one factor"),
    (PriorContract, changed(lambda B: B + 0.01 * B.square()), "test_the_mean_of", "mark it nonl"),
    (GuideContract, broken(Spread, setup=unmoved), "test_the_kl", "no parameters.*PyroParam"),
    (GuideContract, broken(Spread, forward=Spread.distribution), "test_draws_have", "excludes"),
    # These three pass all the other tests of the contract
    (GuideContract, Stretched, "test_the_draws", "the integral of p"),
    (GuideContract, drawing(dist.StudentT, wider, 4.0), "test_the_draws", "the integral of p"),
    (GuideContract, drawing(dist.Normal, detached), "test_the_draws", "a slope of zero in scale"),
    (LikelihoodContract, broken(LabelTokens, logits=blind), "test_padding", "with padding"),
    (LikelihoodContract, broken(LabelTokens, metrics=no_number), "test_a_pred", "must be finite"),
    (LikelihoodContract, answering(lambda x: x.flip(0)), "test_each_row", "in pairs"),
    (LikelihoodContract, answering(lambda x: x.detach()), "test_each_row", "detach"),
]


@pytest.mark.parametrize(("contract", "kind", "method", "message"), BROKEN)
def test_a_broken_class_fails(contract, kind, method, message):
    class Checked(contract):
        def make(self):
            options = {"token_ids": tiny.ANSWERS, "num_data": 12}
            return kind(**options) if issubclass(kind, LabelTokens) else kind()

    (found,) = [name for name in dir(Checked) if name.startswith(method)]
    with pytest.raises((AssertionError, ValueError), match=message):
        getattr(Checked(), found)()
