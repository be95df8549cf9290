"""Divergences of the matrix normal distribution, against dense ones and by Monte Carlo."""

from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from matrix_normal_dense import (
    BATCHES,
    M,
    N,
    assert_close,
    dense,
    dense_normal,
    make,
    normal,
)
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_blora.distributions import MatrixNormal


@pytest.mark.parametrize("p_batches", BATCHES)
@pytest.mark.parametrize("q_batches", [((), (), ()), ((4,), (4,), (4,)), ((4,), (5, 1), ())])
def test_kl_agrees_with_dense(p_batches, q_batches):
    p, q = make(*p_batches), make(*q_batches)
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    expected = kl_divergence(dense(p.expand(batch)), dense(q.expand(batch)))
    assert_close(kl_divergence(p, q), expected)
    assert_close(kl_divergence(p.expand((3, *batch)), q.expand(batch)), expected.expand(3, *batch))


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("normal_batch", [(), (4,), (5, 4)])
def test_kl_with_independent_normal(batches, normal_batch):
    p, q = make(*batches), normal(*normal_batch)
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    dense_p, dense_q = dense(p.expand(batch)), dense_normal(q.expand(batch))
    assert_close(kl_divergence(p, q), kl_divergence(dense_p, dense_q))
    assert_close(kl_divergence(q, p), kl_divergence(dense_q, dense_p))


def test_kl_with_expanded_standard_normal():
    p = make((4,), (4,), (4,))
    zero = torch.zeros((), dtype=torch.float64)
    q = dist.Normal(zero, zero + 1).expand([4, M, N]).to_event(2).expand((5, 4))
    p = p.expand((5, 4))
    standard = dist.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    expected = kl_divergence(dense(p), standard.expand((5, 4)))
    assert_close(kl_divergence(p, q), expected)
    torch_q = torch.distributions.Independent(torch.distributions.Normal(zero, zero + 1), 0)
    torch_q = torch.distributions.Independent(torch_q.base_dist.expand([M, N]), 2)
    assert_close(kl_divergence(p, torch_q), expected)
    # Independent around a MatrixNormal, which Pyro itself unwraps
    assert_close(kl_divergence(p.to_event(1), q.to_event(1)), expected.sum(-1))


def test_kl_work_does_not_grow_with_expansion():
    """The solves see the factors as they were given, whatever the plates expand them to."""
    p, q = make((4,), (4,), (4,)).expand((50, 4)), make((4,), (4,), (4,)).expand((50, 4))
    sizes = []
    solve = torch.linalg.solve_triangular

    def counted(a, b, **kwargs):
        sizes.append(max(a.shape[:-2].numel(), b.shape[:-2].numel()))
        return solve(a, b, **kwargs)

    with patch.object(torch.linalg, "solve_triangular", counted):
        kl_divergence(p, q)
        kl_divergence(normal(4).expand((50, 4)), q)
        p.log_prob(p.sample())
    assert max(sizes) == 4


@pytest.mark.parametrize("base", [dist.Laplace, dist.LogNormal, dist.Cauchy])
def test_kl_without_closed_form(base):
    p, zero = make(), torch.zeros(M, N, dtype=torch.float64)
    other = base(zero, zero + 1).to_event(2)
    with pytest.raises(NotImplementedError, match="closed form"):
        kl_divergence(p, other)
    with pytest.raises(NotImplementedError, match="closed form"):
        kl_divergence(other, p)


def test_kl_rejects_other_event_shapes():
    with pytest.raises(ValueError, match="equal event shapes"):
        kl_divergence(make(), make(n=4))
    with pytest.raises(ValueError, match="equal event shapes"):
        kl_divergence(make(), normal(n=4))


def test_of_equal_and_tiny_scales_it_is_zero():
    scale = torch.full((2, 3), 1e-18)
    q = MatrixNormal(torch.zeros(2, 3), 1e-9 * torch.eye(2), 1e-9 * torch.eye(3))
    p = dist.Normal(torch.zeros(2, 3), scale).to_event(2)
    assert kl_divergence(q, p).abs() < 1e-4


NUM = 4


def prior(expanded):
    one = torch.ones((), dtype=torch.float64)
    if expanded == "normal":
        return dist.Normal(0 * one, one).expand([NUM, M, N]).to_event(2)
    if expanded == "auto":  # expanded by the plate alone
        return dist.Normal(0 * one, one).expand([M, N]).to_event(2)
    eye_m, eye_n = torch.eye(M, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    return MatrixNormal(torch.zeros(M, N, dtype=torch.float64), eye_m, eye_n)


@pytest.mark.parametrize("expanded", ["normal", "auto", "matrix"])
@pytest.mark.parametrize("particles", [1, 3])
def test_mean_field_elbo_uses_the_closed_form(expanded, particles):
    """With nothing observed the loss is the divergence itself: exact, whatever was drawn."""
    q = make((NUM,), (NUM,), (NUM,))

    def model():
        with pyro.plate("layers", NUM):
            return pyro.sample("V", prior(expanded))

    def guide():
        with pyro.plate("layers", NUM):
            return pyro.sample("V", q)

    elbo = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    standard = dist.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    expected = kl_divergence(dense(q), standard.expand([NUM])).sum().item()
    assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-12)
    assert elbo.loss(model, guide) == elbo.loss(model, guide)
