"""The coupled normal against the dense one of all its entries, and the mixture against its sum."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_blora.distributions import CoupledNormal, NormalMixture

N, EVENT, K, DRAWS = 3, (2, 2), 4, 200_000


@pytest.fixture
def coupled():
    factor = torch.randn(N, N).double().tril(-1) + torch.diag(torch.rand(N).double() + 0.5)
    loc, scale = torch.randn(N, *EVENT).double(), torch.rand(*EVENT).double() + 0.5
    return CoupledNormal(loc.requires_grad_(), scale, factor)


def dense(q, layers=N):
    """The normal of all entries of the first arrays."""
    factor = q.layer_scale_tril[:layers, :layers].contiguous()
    scale_tril = torch.kron(factor, torch.diag(q.scale.flatten()))
    return dist.MultivariateNormal(q.loc[:layers].flatten(), scale_tril=scale_tril)


def test_a_coupled_normal_is_the_dense_one_array_by_array(coupled):
    """By the chain rule, its first entries sum to the distribution of the first arrays."""
    drawn, entropy = coupled.rsample(), coupled.entropy()
    for value in (drawn, drawn.clone(), torch.randn(N, *EVENT).double()):  # by noise, by solving
        log_prob = coupled.log_prob(value)
        # The density of a fresh draw is known by its noise, in the sum alone
        for layers in (N,) if value is drawn else range(1, N + 1):
            expected = dense(coupled, layers).log_prob(value[:layers].flatten())
            torch.testing.assert_close(log_prob[:layers].sum(), expected)
            torch.testing.assert_close(entropy[:layers].sum(), dense(coupled, layers).entropy())
    torch.testing.assert_close(coupled.variance.flatten(), dense(coupled).variance)


def test_expanded_it_has_independent_copies(coupled):
    many, expected = coupled.expand((DRAWS, N)), dense(coupled)
    value = many.rsample().detach()
    flat = value.flatten(1)
    torch.testing.assert_close(flat.T.cov(), expected.covariance_matrix, atol=0.06, rtol=0)
    torch.testing.assert_close(flat.mean(0), many.mean[0].flatten(), atol=0.02, rtol=0)
    torch.testing.assert_close(many.log_prob(value.clone()).sum(-1), expected.log_prob(flat))


@pytest.fixture
def mixture():
    """Of ``K`` normals over arrays for each of ``N`` layers, all with one weight."""
    locs = torch.randn(N, K, *EVENT).double().requires_grad_()
    scales = (torch.rand(N, K, *EVENT).double() + 0.5).requires_grad_()
    normals = dist.Normal(locs, scales).to_event(len(EVENT))
    weights = dist.Categorical(logits=torch.zeros(N, K).double())
    return NormalMixture(weights, normals), locs, scales


def test_a_mixture_has_the_density_and_the_moments_of_its_sum(mixture):
    q, locs, scales = mixture
    value = q.rsample((DRAWS,)).detach()
    each = dist.Normal(locs, scales).log_prob(value[:50].unsqueeze(2)).sum((-2, -1))
    torch.testing.assert_close(q.log_prob(value[:50]), each.logsumexp(-1) - math.log(K))
    mean = locs.mean(1)
    variance = (scales.square() + locs.square()).mean(1) - mean.square()
    torch.testing.assert_close(q.mean, mean)
    torch.testing.assert_close(q.variance, variance)
    for layer in range(N):  # one component is taken for a whole array, and for each layer its own
        flat, shifts = value[:, layer].flatten(1), (locs - mean.unsqueeze(1))[layer].flatten(1)
        within = torch.diag(scales[layer].square().mean(0).flatten())
        expected = shifts.T @ shifts / K + within
        torch.testing.assert_close(flat.T.cov(), expected, atol=0.06, rtol=0)
    first, second = (value[:, layer].flatten(1) - mean[layer].flatten() for layer in (0, 1))
    assert (first.T @ second / DRAWS).abs().max() < 0.06


def test_draws_of_a_mixture_have_the_gradient_of_the_expectation(mixture):
    """``E sin x = exp(-s^2 / 2) sin m`` for each component."""
    q, locs, scales = mixture
    found = torch.autograd.grad(q.rsample((DRAWS,)).sin().mean(0).sum(), (locs, scales))
    exact = ((-scales.square() / 2).exp() * locs.sin()).mean(1).sum()
    torch.testing.assert_close(found, torch.autograd.grad(exact, (locs, scales)), atol=0.01, rtol=0)
