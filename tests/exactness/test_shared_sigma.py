"""``sigma="shared"``: what all layers do together does not grow with their number."""

import pyro
import pytest
import tiny
import torch
from torch import nn

from pyro_blora import BayesianLoRA
from pyro_blora.models import KroneckerInducing
from pyro_blora.network.targets import group_layers


def prior(n, **options):
    """Of ``n`` layers with the same directions, so that only sigma tells them apart."""
    pyro.clear_param_store()
    layers = {f"{i}.q": nn.Linear(6, 5) for i in range(n)}
    bound = KroneckerInducing(rank=2, sigma="shared", **options).bind(group_layers(layers)[0])
    with torch.no_grad():
        for Z in (bound.Z_r, bound.Z_c):
            Z.copy_(torch.linspace(-1, 1, Z[0].numel()).cos().reshape(Z[0].shape).expand_as(Z))
    return bound


def summed(prior):
    """One draw of the sum of the layers' updates."""
    update = prior()
    return (update.B @ update.core @ update.A).sum(0)


@torch.no_grad()
def spread(prior, draws=1500):
    """The variance of that sum, by Monte Carlo, of its largest entry."""
    return torch.stack([summed(prior) for _ in range(draws)]).var(0).max()


@pytest.mark.parametrize("scale", ["learned", "fixed"])
def test_layers_that_agree_do_as_much_together_from_six_on(scale):
    V, found = torch.randn(2, 2), []
    for n in (3, 6, 24):
        bound = prior(n, scale=scale)
        with pyro.condition(data={bound.site("V"): V.expand(n, 2, 2)}):
            found.append(summed(bound))
    three, six, many = found
    torch.testing.assert_close(many, six)
    torch.testing.assert_close(2 * three, six)


@pytest.mark.parametrize("scale", ["learned", "fixed"])
def test_draws_which_do_not_agree_add_less(scale):
    three, six, many = (spread(prior(n, scale=scale)) for n in (3, 6, 24))
    torch.testing.assert_close(4 * many, six, rtol=0.15, atol=0)
    torch.testing.assert_close(2 * three, six, rtol=0.15, atol=0)


def test_a_random_scale_has_its_median_there():
    bound = prior(24, scale="half-cauchy")
    sites = pyro.poutine.trace(bound).get_trace().nodes
    law = sites[bound.site("sigma")]["fn"].base_dist
    torch.testing.assert_close(law.scale, torch.full((24,), 0.25))


def test_it_is_the_default():
    blora = BayesianLoRA(tiny.llama())
    assert blora.prior.options()["sigma"] == "shared"
    assert repr(blora.prior) == "KroneckerInducing(sigma='shared', keep=0.9)"
