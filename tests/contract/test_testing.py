"""The contracts find what they are there to find: classes that are broken on purpose fail them."""

import unittest

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from own_classes import Plain, Spread
from pyro.nn import PyroParam
from torch import nn
from torch.distributions.kl import register_kl

from pyro_blora.likelihoods import LabelTokens
from pyro_blora.testing import GuideContract, LikelihoodContract, PriorContract
from pyro_blora.updates.low_rank_update import LowRankUpdate


class Unregistered(Plain):
    def setup(self, group):
        self.A = self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5


class TorchParameter(Plain):
    def setup(self, group):
        self.A = nn.Parameter(self.randn(group.n, self.rank, group.d_in) / group.d_in**0.5)


class NoRole(Plain):
    roles = {}  # noqa: RUF012


def changed(name, made):
    """A prior whose factors are what ``made`` makes of the right ones."""

    def forward(self):
        update = Plain.forward(self)
        return LowRankUpdate(**made(update.A, update.B))

    return type(name, (Plain,), {"forward": forward})


Transposed = changed("Transposed", lambda A, B: {"A": A.mT, "B": B.mT})
Deaf = changed("Deaf", lambda A, B: {"A": A, "B": 0 * B})
AwayFromZero = changed("AwayFromZero", lambda A, B: {"A": A, "B": 1 + B})
OneForAllParticles = changed(
    "OneForAllParticles", lambda A, B: {"A": A, "B": B.reshape(-1, *B.shape[-3:])[0]}
)


class OutsideThePlate(Plain):
    def forward(self):
        scale = torch.ones(self.group.n, self.group.d_out, self.rank)
        B = pyro.sample(self.site("B"), dist.Normal(0 * scale, scale).to_event(2))
        return LowRankUpdate(A=self.A, B=B)


class LayersInTheEvent(Plain):
    def forward(self):
        law = self.normal(self.group.n, self.group.d_out, self.rank)
        return LowRankUpdate(A=self.A, B=pyro.sample(self.site("B"), law))


class HiddenNoise(Plain):
    def forward(self):
        update = super().forward()
        return LowRankUpdate(A=update.A, B=update.B + torch.randn(()))


class Late(Plain):
    """Samples within the layers."""

    def forward(self):
        update = super().forward()
        noise = tuple(self.noise(layer) for layer in range(self.group.n))
        return LowRankUpdate(A=update.A, B=update.B, noise=noise)

    def noise(self, layer):
        def drawn(x, *_):
            size = pyro.sample(self.site(f"late_{layer}"), dist.Normal(0.0, 1.0))
            return size * x.new_zeros(*x.shape[:-1], self.group.d_out)

        return drawn


class Unmoved(Spread):
    def setup(self, site):
        self.loc, scale = site.start()
        self.scale = scale.flatten(-site.event_dim).mean(-1) if site.event_dim else scale


class WrongShape(Spread):
    def distribution(self):
        loc = self.loc.mT if self.site.event_dim > 1 else self.loc
        return dist.Normal(loc, 1.0).to_event(self.site.event_dim)


class LeavesTheSupport(Spread):
    def forward(self):
        return self.distribution()


class ForgetsInitScale(Spread):
    def setup(self, site):
        super().setup(site)
        self.scale = PyroParam(0.5 * self.scale.detach(), dist.constraints.positive)


class Backwards(dist.Normal):
    """A normal whose divergence has the wrong sign."""


@register_kl(Backwards, dist.Normal)
def _(q, p):
    forwards = dist.Normal(q.loc, q.scale)
    return -torch.distributions.kl_divergence(forwards, p)


class WrongSign(Spread):
    def distribution(self):
        scale = self.scale.reshape(self.scale.shape + (1,) * self.site.event_dim)
        return Backwards(self.loc, scale).to_event(self.site.event_dim)


class IgnoresLabels(LabelTokens):
    def labels(self, batch):
        return None if batch.get("labels") is None else 0 * batch["labels"]


class Invents(LabelTokens):
    def labels(self, batch):
        return batch.get("labels", torch.zeros(len(batch["input_ids"]), dtype=torch.long))


class TurnsRows(LabelTokens):
    def logits(self, net, batch):
        return super().logits(net, batch).flip(0)


class Clamped(LabelTokens):
    def labels(self, batch):
        return None if batch.get("labels") is None else batch["labels"].clamp(0, 2)


class Unscaled(LabelTokens):
    def __init__(self, *, token_ids, num_data=None) -> None:
        super().__init__(token_ids=token_ids, num_data=4)


class Detached(LabelTokens):
    def logits(self, net, batch):
        return super().logits(net, batch).detach()


BROKEN = [
    (PriorContract, Unregistered, "test_a_trained_adapter_travels", "load_state_dict .*PyroParam"),
    (PriorContract, TorchParameter, "test_every_parameter", "'A'.*PyroParam"),
    (PriorContract, NoRole, "test_every_parameter", "roles must give .'A'. one of"),
    (PriorContract, Transposed, "test_sites_and_updates", r"must return a LowRankUpdate of B"),
    (PriorContract, OutsideThePlate, "test_sites_and_updates", r"B: no plate .*-1.*self.plate"),
    (PriorContract, LayersInTheEvent, "test_sites_and_updates", "B: its layers are in its event"),
    (PriorContract, HiddenNoise, "test_a_trained_adapter_travels", "Two means differ.*pyro.sample"),
    (PriorContract, Late, "test_sites_and_updates", "late_0.* sampled by a layer"),
    (PriorContract, Deaf, "test_the_mean_update", "ignores its sites"),
    (PriorContract, Deaf, "test_both_loops", "stay at module_local_params"),
    (PriorContract, AwayFromZero, "test_the_mean_update", "mean is not zero"),
    (PriorContract, OneForAllParticles, "test_guide_and_particles", "q_proj"),
    (GuideContract, Unmoved, "test_the_kl", "no parameters.*PyroParam"),
    (GuideContract, WrongShape, "test_the_law", r"For \(2, 3\)"),
    (GuideContract, LeavesTheSupport, "test_the_law", "excludes"),
    (GuideContract, LeavesTheSupport, "test_guide_and_particles", "tau"),
    (GuideContract, ForgetsInitScale, "test_the_kl", "not the prior"),
    (GuideContract, WrongSign, "test_the_kl", "The KL is -"),
    (LikelihoodContract, IgnoresLabels, "test_each_row", "Other labels"),
    (LikelihoodContract, TurnsRows, "test_each_row", "in pairs"),
    (LikelihoodContract, Detached, "test_each_row", "detach"),
    (LikelihoodContract, Clamped, "test_labels_are_checked", "Label 99: no BatchError"),
    (LikelihoodContract, Invents, "test_labels_are_checked", "None where the batch has none"),
    (LikelihoodContract, Unscaled, "test_the_data_is_scaled", "particles=1"),
]


@pytest.mark.parametrize(
    ("contract", "broken", "method", "told"),
    BROKEN,
    ids=[f"{b[1].__name__}-{b[2]}" for b in BROKEN],
)
def test_a_broken_class_fails(contract, broken, method, told):
    class Checked(contract):
        def make(self):
            options = {"token_ids": tiny.ANSWERS, "num_data": 12}
            return broken(**options) if issubclass(broken, LabelTokens) else broken()

    (found,) = [name for name in dir(Checked) if name.startswith(method)]
    with pytest.raises((AssertionError, ValueError), match=told):
        getattr(Checked(), found)()


def test_a_subclass_says_what_it_makes():
    class Nothing(PriorContract):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define make\(\)"):
        Nothing().adapted()


class TestUnderUnittest(LikelihoodContract, unittest.TestCase):
    """unittest runs the same methods."""

    def make(self):
        return LabelTokens(token_ids=tiny.ANSWERS, num_data=12)
