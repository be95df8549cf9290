"""The matrix normal distribution and its divergences against the dense normal of its entries."""

from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import biject_to, kl_divergence

from pyro_blora.distributions import MatrixNormal

M, N, NUM = 3, 2, 4
# (loc, row, col) batch shapes, all of which broadcast
BATCHES = [
    ((), (), ()),
    ((4,), (), ()),
    ((), (4,), ()),
    ((), (), (4,)),
    ((4,), (4,), (4,)),
    ((5, 1), (4,), ()),
    ((5, 4), (5, 1), (1, 4)),
    ((4,), (5, 1), (2, 1, 1)),
]


def tril(*shape):
    factor = torch.randn(*shape, shape[-1], dtype=torch.float64).tril(-1)
    diagonal = torch.rand(shape, dtype=torch.float64) + 0.5
    return factor + torch.diag_embed(diagonal)


def make(loc=(), row=(), col=(), m=M, n=N):
    mean = torch.randn(*loc, m, n, dtype=torch.float64)
    return MatrixNormal(mean, tril(*row, m), tril(*col, n))


def dense(d):
    row, col = d.row_scale_tril, d.col_scale_tril
    scale_tril = torch.einsum("...ij,...kl->...ikjl", row, col)
    size = d.event_shape.numel()
    return dist.MultivariateNormal(
        d.loc.flatten(-2), scale_tril=scale_tril.reshape(*d.batch_shape, size, size)
    )


def normal(*batch, m=M, n=N):
    shape = (*batch, m, n)
    loc = torch.randn(shape, dtype=torch.float64)
    return dist.Normal(loc, torch.rand(shape, dtype=torch.float64) + 0.5).to_event(2)


def dense_normal(d):
    loc, scale = d.base_dist.loc.flatten(-2), d.base_dist.scale.flatten(-2)
    return dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))


def assert_close(actual, expected, **kwargs):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-9, **kwargs})


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("expand", [(), (3,)])
def test_agrees_with_dense(batches, expand):
    d = make(*batches)
    d = d.expand(torch.Size(expand) + d.batch_shape)
    reference = dense(d)
    for sample_shape in [(), (7,), (2, 1)]:
        assert d.rsample(sample_shape).shape == d.shape(torch.Size(sample_shape))
        value = torch.randn(d.shape(torch.Size(sample_shape)), dtype=torch.float64)
        assert_close(d.log_prob(value), reference.log_prob(value.flatten(-2)))
    one = torch.randn(M, N, dtype=torch.float64)
    assert_close(d.log_prob(one), reference.log_prob(one.flatten().expand(reference.mean.shape)))
    assert_close(d.entropy(), reference.entropy())
    assert_close(d.mean.flatten(-2), reference.mean)
    assert_close(d.variance.flatten(-2), reference.variance)
    assert_close(d.covariance_matrix, reference.covariance_matrix)


def test_moments():
    d = make((2,), (), (2,))
    draws = d.sample((40_000,)).flatten(-2)
    error = draws.mean(0) - d.mean.flatten(-2)
    assert (error.abs() < 4 * (d.variance.flatten(-2) / len(draws)).sqrt()).all()
    for i in range(2):
        expected = d.covariance_matrix[i]
        # Var[S_ij] = (S_ii S_jj + S_ij^2) / (n - 1) for a Gaussian sample
        spread = torch.outer(expected.diagonal(), expected.diagonal()) + expected.square()
        error = torch.cov(draws[:, i].T) - expected
        assert (error.abs() < 4.5 * (spread / (len(draws) - 1)).sqrt()).all()


def test_gradcheck():
    d = make((2,), (), (2,))
    value = torch.randn(3, 2, M, N, dtype=torch.float64, requires_grad=True)
    given = [x.requires_grad_() for x in (d._unbroadcasted_loc, tril(M), tril(2, N))]

    def log_prob(value, loc, row, col):
        return MatrixNormal(loc, row.tril(), col.tril()).log_prob(value)

    def rsample(loc, row, col):
        torch.manual_seed(0)
        return MatrixNormal(loc, row.tril(), col.tril()).expand((3, 2)).rsample()

    assert torch.autograd.gradcheck(log_prob, [value, *given])
    assert torch.autograd.gradcheck(rsample, given)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    ones=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=3, max_size=3),
    drop=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    event=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sample=st.lists(st.integers(1, 3), max_size=2),
)
def test_shapes(batch, ones, drop, event, sample):
    shapes = [
        tuple(1 if one else size for size, one in zip(batch, row, strict=False))[cut:]
        for row, cut in zip(ones, drop, strict=True)
    ]
    d = make(*shapes, m=event[0], n=event[1]).expand(batch)
    draws = d.rsample(sample)
    assert draws.shape == (*sample, *batch, *event)
    log_prob = d.log_prob(draws)
    assert log_prob.shape == (*sample, *batch)
    assert_close(log_prob, dense(d).log_prob(draws.flatten(-2)), rtol=1e-7, atol=1e-7)
    assert kl_divergence(d, normal(m=event[0], n=event[1])).shape == tuple(batch)


def test_support():
    transform = biject_to(make().support)
    value = torch.randn(4, M, N)
    assert_close(transform(value), value)
    assert transform.log_abs_det_jacobian(value, value).shape == (4,)


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
    # Independent around a MatrixNormal, which Pyro itself unwraps
    if batch:
        outer = kl_divergence(p.expand(batch).to_event(1), q.expand(batch).to_event(1))
        assert_close(outer, kl_divergence(p, q).sum(-1))


def test_work_does_not_grow_with_expansion_and_no_cholesky_is_taken():
    """The solves see the factors as they were given, whatever the plates expand them to."""
    p, q = make((4,), (4,), (4,)).expand((50, 4)), make((4,), (4,), (4,)).expand((50, 4))
    sizes = []
    solve = torch.linalg.solve_triangular

    def counted(a, b, **kwargs):
        sizes.append(max(a.shape[:-2].numel(), b.shape[:-2].numel()))
        return solve(a, b, **kwargs)

    with (
        patch.object(torch.linalg, "solve_triangular", counted),
        patch.object(torch.linalg, "cholesky", side_effect=AssertionError),
        patch.object(torch.linalg, "cholesky_ex", side_effect=AssertionError),
    ):
        kl_divergence(p, q)
        kl_divergence(normal(4).expand((50, 4)), q)
        p.log_prob(p.sample())
    assert max(sizes) == 4


@pytest.mark.parametrize("base", [dist.Laplace, dist.LogNormal])
def test_kl_without_closed_form(base):
    p, zero = make(), torch.zeros(M, N, dtype=torch.float64)
    other = base(zero, zero + 1).to_event(2)
    for pair in ((p, other), (other, p)):
        with pytest.raises(NotImplementedError, match="closed form"):
            kl_divergence(*pair)


def test_of_equal_and_tiny_scales_it_is_zero():
    scale = torch.full((2, 3), 1e-18)
    q = MatrixNormal(torch.zeros(2, 3), 1e-9 * torch.eye(2), 1e-9 * torch.eye(3))
    p = dist.Normal(torch.zeros(2, 3), scale).to_event(2)
    assert kl_divergence(q, p).abs() < 1e-4


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

    def sampled(law):
        with pyro.plate("layers", NUM):
            return pyro.sample("V", law)

    elbo = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    standard = dist.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    expected = kl_divergence(dense(q), standard.expand([NUM])).sum().item()
    for _ in range(2):
        loss = elbo.loss(lambda: sampled(prior(expanded)), lambda: sampled(q))
        assert loss == pytest.approx(expected, rel=1e-12)
