"""Draws in pairs: the same distribution, an exact mean of each pair, less spread of an average."""

import pyro
import pytest
import tiny
import torch
from own_classes import RandomScale
from pyro.distributions import Gumbel

from pyro_blora import guides, models

FAMILIES = {
    "MatrixNormal": guides.MatrixNormal(),
    "MeanField": guides.MeanField(),
    "FullRank": guides.FullRank(),
}


def adapted(guide, prior=None):
    torch.manual_seed(0)
    blora = tiny.adapted(guide=guide, prior=prior or models.KroneckerInducing(rank=2))
    tiny.shaken(blora.guide, 0.2)
    return blora


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair_has_the_mean_of_q_and_each_draw_is_from_q(name):
    blora = adapted(FAMILIES[name])
    draw = blora.posterior.pairs()
    cores = torch.cat([draw(count)["q_proj"].core for count in (1, 4, 3, 2, 3990)])
    mean = blora.posterior.draws(0)["q_proj"].core
    pairs = cores.unflatten(0, (2000, 2))
    torch.testing.assert_close(pairs.mean(1), mean.expand(2000, *mean.shape))
    alone = blora.posterior.draws(4000)["q_proj"].core
    for ours in (pairs[:, 0], pairs[:, 1]):
        torch.testing.assert_close(ours.std(0), alone.std(0), rtol=0.12, atol=0)


@pytest.mark.parametrize("guide", [guides.Flow(), guides.Ensemble(), guides.Delta()], ids=repr)
def test_what_is_not_symmetric_is_drawn_as_it_is(guide):
    blora = adapted(guide)
    torch.manual_seed(1)
    expected = blora.posterior.draws(5)["q_proj"].core
    if isinstance(guide, guides.Ensemble):
        blora.guide.q_proj_V.turn.zero_()
        blora.guide.v_proj_V.turn.zero_()
    torch.manual_seed(1)
    found = blora.posterior.pairs()(5)["q_proj"].core
    assert torch.equal(found, expected)


class Leaning(guides.MeanField):
    """A Gumbel distribution, which has a skewness of 1.14."""

    def distribution(self):
        return Gumbel(self.loc, self.scale).to_event(2)


class LeaningLaplace(guides.Laplace):
    def distribution(self):
        return Gumbel(self.loc, 1.0).to_event(2)


@pytest.mark.parametrize("family", [Leaning, LeaningLaplace])
def test_a_skewed_user_distribution_has_no_mirror_image(family):
    blora = adapted(family())
    core = blora.posterior.pairs()(10_000)["q_proj"].core
    white = (core - core.mean(0)) / core.std(0)
    assert float(white.pow(3).mean()) == pytest.approx(1.14, abs=0.1)


def test_a_random_scale_is_mirrored_in_its_logarithm(monkeypatch):
    blora = adapted(guides.MeanField(), RandomScale())
    updates, seen = type(blora.model).updates, {}

    def watched(model):
        trace = pyro.poutine.trace(updates).get_trace(model)
        seen.update({k: node["value"] for k, node in trace.nodes.items() if "value" in node})
        return seen["_RETURN"]

    monkeypatch.setattr(type(blora.model), "updates", watched)
    blora.posterior.pairs()(2)
    center = blora.guide.families()["q_proj.sigma"].center()
    torch.testing.assert_close(seen["q_proj.sigma"].log().mean(0), center.log())


def test_an_average_of_four_has_less_spread_than_of_four_alone():
    blora = adapted(guides.MatrixNormal())
    batch = tiny.sequences(2)
    model = blora.model

    def spread(run):
        return torch.stack([run().mean(0) for _ in range(60)]).var(0).mean()

    def alone():
        with torch.no_grad(), model.applied(blora.posterior.draws(4)) as net:
            rows = {key: value.repeat(4, 1) for key, value in batch.items() if key != "labels"}
            return blora.likelihood.logits(net, rows).unflatten(0, (4, 2)).softmax(-1)

    assert spread(lambda: blora.predict(batch, 4).samples) < 0.5 * spread(alone)
