"""The contracts find what they are there to find: classes that are broken on purpose fail them."""

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import Plain, Spread

from pyro_blora.likelihoods import LabelTokens
from pyro_blora.testing import GuideContract, LikelihoodContract, PriorContract
from pyro_blora.updates import LowRankUpdate


def broken(base, **members):
    return type("Broken", (base,), members)


def unregistered(self, group):
    self.A = self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5


def changed(made):
    """A prior whose factors are what ``made`` makes of the right ones."""

    def forward(self):
        update = Plain.forward(self)
        return LowRankUpdate(**made(update.A, update.B))

    return broken(Plain, forward=forward)


def answering(made):
    return broken(LabelTokens, logits=lambda *args: made(LabelTokens.logits(*args)))


def outside_of_the_plate(self):
    scale = torch.ones(self.group.n, self.group.d_out, self.rank)
    B = pyro.sample(self.site("B"), dist.Normal(0 * scale, scale).to_event(2))
    return LowRankUpdate(A=self.A, B=B)


def unmoved(self, site):
    self.loc, scale = site.start()
    self.scale = scale.flatten(-site.event_dim).mean(-1) if site.event_dim else scale


BROKEN = [
    (PriorContract, broken(Plain, setup=unregistered), "test_a_trained", "restore it.*PyroParam"),
    (PriorContract, broken(Plain, roles={}), "test_every_parameter", "must give .'A'. one of"),
    (PriorContract, broken(Plain, forward=outside_of_the_plate), "test_sites", "no plate has dim"),
    (PriorContract, changed(lambda A, B: {"A": A, "B": 0 * B}), "test_the_mean", "ignores its sit"),
    (PriorContract, changed(lambda A, B: {"A": A, "B": 1 + B}), "test_the_mean", "mean is not"),
    (GuideContract, broken(Spread, setup=unmoved), "test_the_kl", "no parameters.*PyroParam"),
    (GuideContract, broken(Spread, forward=Spread.distribution), "test_the_law", "excludes"),
    (LikelihoodContract, answering(lambda x: x.flip(0)), "test_each_row", "in pairs"),
    (LikelihoodContract, answering(lambda x: x.detach()), "test_each_row", "detach"),
]


@pytest.mark.parametrize(("contract", "kind", "method", "told"), BROKEN)
def test_a_broken_class_fails(contract, kind, method, told):
    class Checked(contract):
        def make(self):
            options = {"token_ids": tiny.ANSWERS, "num_data": 12}
            return kind(**options) if issubclass(kind, LabelTokens) else kind()

    (found,) = [name for name in dir(Checked) if name.startswith(method)]
    with pytest.raises((AssertionError, ValueError), match=told):
        getattr(Checked(), found)()
