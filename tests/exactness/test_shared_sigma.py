"""``sigma="shared"``: what draws of all layers add together does not grow with their number."""

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


@torch.no_grad()
def spread(prior, draws=1500):
    """The variance of the sum over layers of one entry's draws, by Monte Carlo, largest entry."""
    total = []
    for _ in range(draws):
        update = prior()
        total.append((update.B @ update.core @ update.A).sum(0))
    return torch.stack(total).var(0).max()


@pytest.mark.parametrize("scale", ["learned", "fixed"])
def test_the_sum_over_layers_has_one_variance_from_six_layers_on(scale):
    three, six, many = (spread(prior(n, scale=scale)) for n in (3, 6, 24))
    torch.testing.assert_close(many, six, rtol=0.15, atol=0)
    torch.testing.assert_close(2 * three, six, rtol=0.15, atol=0)


def test_a_random_scale_has_its_median_there():
    bound = prior(24, scale="half-cauchy")
    sites = pyro.poutine.trace(bound).get_trace().nodes
    law = sites[bound.site("sigma")]["fn"].base_dist
    torch.testing.assert_close(law.scale, torch.full((24,), 0.5))


def test_it_is_the_default():
    blora = BayesianLoRA(tiny.llama())
    assert blora.prior.options()["sigma"] == "shared"
    assert repr(blora.prior) == "KroneckerInducing(sigma='shared', keep=0.9)"
