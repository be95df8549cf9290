"""The matrix normal distribution and its divergences against the dense normal of its entries."""

from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_blora.distributions import MatrixNormal

M, N = 3, 2
FOUR = ((4,), (4,), (4,))
# (loc, row, col) batch shapes, all of which broadcast
BATCHES = [((), (), ()), ((4,), (), ()), FOUR, ((5, 4), (5, 1), (1, 4)), ((4,), (5, 1), (2, 1, 1))]


def tril(*shape):
    factor = torch.randn(*shape, shape[-1], dtype=torch.float64).tril(-1)
    diagonal = torch.rand(shape, dtype=torch.float64) + 0.5
    return factor + torch.diag_embed(diagonal)


def make(loc=(), row=(), col=(), m=M, n=N):
    mean = torch.randn(*loc, m, n, dtype=torch.float64)
    return MatrixNormal(mean, tril(*row, m), tril(*col, n))


def normal(loc=(), scale=(), *_):
    loc = torch.randn(*loc, M, N, dtype=torch.float64)
    return dist.Normal(loc, torch.rand(*scale, M, N, dtype=torch.float64) + 0.5).to_event(2)


def dense(d):
    if isinstance(d, MatrixNormal):
        scale_tril = torch.einsum("...ij,...kl->...ikjl", d.row_scale_tril, d.col_scale_tril)
        scale_tril = scale_tril.flatten(-4, -3).flatten(-2)
    else:
        scale_tril = torch.diag_embed(d.base_dist.scale.flatten(-2))
    return dist.MultivariateNormal(d.mean.flatten(-2), scale_tril=scale_tril)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("expand", [(), (3,)])
@pytest.mark.parametrize("event", [(M, N), (2, 1)])
def test_agrees_with_dense(batches, expand, event):
    d = make(*batches, *event)
    d = d.expand(expand + d.batch_shape)
    reference = dense(d)
    for sample_shape in [(), (2, 1)]:
        torch.manual_seed(1)
        own = d.rsample(sample_shape)
        torch.manual_seed(1)
        noise = torch.randn(own.shape, dtype=torch.float64).flatten(-2).unsqueeze(-1)
        expected = reference.mean + (reference.scale_tril @ noise).squeeze(-1)
        assert_close(own.flatten(-2), expected)
        for value in (own, torch.randn(d.shape(torch.Size(sample_shape)), dtype=torch.float64)):
            assert_close(d.log_prob(value), reference.log_prob(value.flatten(-2)))
    one = torch.randn(event, dtype=torch.float64)
    assert_close(d.log_prob(one), reference.log_prob(one.flatten().expand(reference.mean.shape)))
    assert_close(d.entropy(), reference.entropy())
    assert_close(d.variance.flatten(-2), reference.variance)
    assert_close(d.covariance_matrix, reference.covariance_matrix)
    assert d.support.event_dim == 2


@pytest.mark.parametrize("p_batches", BATCHES)
@pytest.mark.parametrize("q_batches", [FOUR, ((4,), (5, 1), ())])
def test_kl_agrees_with_dense(p_batches, q_batches):
    p, q = make(*p_batches), normal(*q_batches)
    batch = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    expected = kl_divergence(dense(p.expand(batch)), dense(q.expand(batch)))
    assert_close(kl_divergence(p, q), expected)
    assert_close(kl_divergence(p.expand((3, *batch)), q.expand(batch)), expected.expand(3, *batch))
    # Independent around a MatrixNormal, which Pyro itself unwraps
    if batch:
        outer = kl_divergence(p.expand(batch).to_event(1), q.expand(batch).to_event(1))
        assert_close(outer, expected.sum(-1))


def test_work_does_not_grow_with_expansion_and_no_cholesky_is_taken():
    """The solves see the factors as they were given, whatever the plates expand them to."""
    q, prior = (d.expand((50, 4)) for d in (make(*FOUR), normal(*FOUR)))
    with (
        patch.object(
            torch.linalg, "solve_triangular", wraps=torch.linalg.solve_triangular
        ) as solve,
        patch.object(torch.linalg, "cholesky", side_effect=AssertionError),
        patch.object(torch.linalg, "cholesky_ex", side_effect=AssertionError),
    ):
        kl_divergence(q, prior)
        q.log_prob(torch.randn(q.shape()).double())
    assert max(arg.shape[:-2].numel() for call in solve.call_args_list for arg in call.args) == 4


@pytest.mark.parametrize("base", [dist.Laplace, dist.LogNormal])
def test_kl_without_closed_form(base):
    other = base(torch.zeros(M, N).double(), 1.0).to_event(2)
    with pytest.raises(NotImplementedError):
        kl_divergence(make(), other)


def test_of_equal_and_tiny_scales_it_is_zero():
    q = MatrixNormal(torch.zeros(2, 3), 1e-9 * torch.eye(2), 1e-9 * torch.eye(3))
    p = dist.Normal(torch.zeros(2, 3), 1e-18).to_event(2)
    assert kl_divergence(q, p).abs() < 1e-4


ONE = torch.ones((), dtype=torch.float64)
STANDARD = {
    "whole": dist.Normal(0 * ONE, ONE).expand([4, M, N]).to_event(2),
    "expanded by the plate alone": dist.Normal(0 * ONE, ONE).expand([M, N]).to_event(2),
}


@pytest.mark.parametrize("prior", STANDARD)
@pytest.mark.parametrize("particles", [1, 3])
def test_mean_field_elbo_uses_the_closed_form(prior, particles):
    """With nothing observed the loss is the divergence itself: exact, whatever was drawn."""
    q = make(*FOUR)

    def sample(distribution):
        with pyro.plate("layers", 4):
            return pyro.sample("V", distribution)

    elbo = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    standard = dist.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    expected = kl_divergence(dense(q), standard.expand([4])).sum().item()
    for _ in range(2):
        loss = elbo.loss(lambda: sample(STANDARD[prior]), lambda: sample(q))
        assert loss == pytest.approx(expected, rel=1e-12)
