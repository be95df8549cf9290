"""The matrix normal distribution against the dense multivariate normal of its entries."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_normal_dense import (
    BATCHES,
    M,
    N,
    assert_close,
    dense,
    make,
    normal,
    parameters,
)
from torch.distributions import biject_to, kl_divergence

from pyro_blora.distributions import MatrixNormal


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("expand", [(), (3,)])
def test_agrees_with_dense(batches, expand):
    d = make(*batches)
    d = d.expand(torch.Size(expand) + d.batch_shape)
    reference = dense(d)
    assert d.batch_shape == reference.batch_shape
    for sample_shape in [(), (7,), (2, 1)]:
        assert d.rsample(sample_shape).shape == d.shape(torch.Size(sample_shape))
        value = torch.randn(d.shape(torch.Size(sample_shape)), dtype=torch.float64)
        assert_close(d.log_prob(value), reference.log_prob(value.flatten(-2)))
    one = torch.randn(M, N, dtype=torch.float64)
    assert_close(d.log_prob(one), reference.log_prob(one.flatten().expand(reference.mean.shape)))
    assert_close(d.entropy(), reference.entropy())
    assert_close(d.mean.flatten(-2), reference.mean)
    assert_close(d.mode, d.mean)
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

    def log_prob(value, loc, row, col):
        return MatrixNormal(loc, row.tril(), col.tril()).log_prob(value)

    def rsample(loc, row, col):
        torch.manual_seed(0)
        return MatrixNormal(loc, row.tril(), col.tril()).expand((3, 2)).rsample()

    assert torch.autograd.gradcheck(log_prob, [value, *parameters(d)])
    assert torch.autograd.gradcheck(rsample, parameters(d))


def test_no_cholesky():
    p, q = make((4,), (4,), (4,)).expand((5, 4)), make()
    with (
        patch.object(torch.linalg, "cholesky", side_effect=AssertionError),
        patch.object(torch.linalg, "cholesky_ex", side_effect=AssertionError),
    ):
        p.log_prob(p.rsample((2,)))
        kl_divergence(p, q)
        kl_divergence(p, normal())
        kl_divergence(normal(), p)
        p.entropy()


def test_expand_shares_storage():
    d = make((4,), (), ())
    expanded = d.expand((5, 4)).expand((2, 5, 4))
    for name in ["loc", "row_scale_tril", "col_scale_tril"]:
        mine, theirs = getattr(d, name), getattr(expanded, name)
        assert mine.data_ptr() == theirs.data_ptr()
        assert theirs.untyped_storage().nbytes() == mine.untyped_storage().nbytes()
    assert expanded._unbroadcasted_row.shape == (M, M)
    for shape in ((5,), ()):
        with pytest.raises(RuntimeError, match="expand"):
            d.expand(shape)


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
    assert make().support.event_dim == 2
    transform = biject_to(make().support)
    value = torch.randn(4, M, N)
    assert_close(transform(value), value)
    assert transform.log_abs_det_jacobian(value, value).shape == (4,)
    assert make().mask(False).log_prob(torch.zeros(M, N)).shape == ()
