"""Kronecker algebra against loops and dense products."""

import pytest
import torch
from dense_algebra import psi
from linear_operator.operators import to_linear_operator
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning

from pyro_blora.errors import NonFiniteLossError
from pyro_blora.updates.kronecker import (
    inducing_covariance,
    kronecker_covariance,
    lazy_covariance,
    whiten,
    whitened_directions,
)

BATCHES = [(), (3,), (2, 3)]


def sides(*batch, m=3, d=5):
    return torch.randn(*batch, m, d), torch.rand(*batch, m) + 0.1


def test_inducing_covariance_by_loops():
    Z, D = sides()
    expected = torch.zeros(3, 3)
    for i in range(3):
        for j in range(3):
            expected[i, j] = sum(Z[i, k] * Z[j, k] for k in range(5)) + (i == j) * D[i] ** 2
    torch.testing.assert_close(inducing_covariance(Z, D), expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_whiten(batch):
    Z, D = sides(*batch)
    Psi = inducing_covariance(Z, D)
    L, Q = whiten(Z, Psi)
    torch.testing.assert_close(L @ L.mT, Psi)
    assert torch.equal(L, L.tril())
    assert (L.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(Q, torch.linalg.inv(L) @ Z)
    # The whitened directions are short of orthonormal by what the noise takes.
    F = torch.linalg.inv(L) @ torch.diag_embed(D)
    torch.testing.assert_close(Q @ Q.mT + F @ F.mT, torch.eye(3).expand(*batch, 3, 3))


def test_whiten_does_not_change_a_good_psi():
    """The jitter is for a failing factorisation alone: a tiny Psi keeps its scale."""
    Z, D = sides()
    Psi = 1e-10 * inducing_covariance(Z, D)
    L, _ = whiten(Z, Psi)
    torch.testing.assert_close(L @ L.mT, Psi, rtol=1e-10, atol=0)


def test_whiten_refuses():
    Z, _ = sides()
    with pytest.warns(NumericalWarning, match="jitter"), pytest.raises(NotPSDError):
        whiten(Z, -torch.eye(3))
    with pytest.raises(NanError):
        whiten(Z, torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("batch", BATCHES)
def test_whitened_directions_have_the_gradient_of_whiten(batch):
    Z, D = sides(*batch)
    G = torch.randn_like(Z)

    def slow(Z, D):
        return whiten(Z, inducing_covariance(Z, D))[1]

    def fast(Z, D):
        return whitened_directions(Z, D, "r", "here")

    found, expected = [], []
    for function, grads in ((fast, found), (slow, expected)):
        z, d = Z.clone().requires_grad_(), D.clone().requires_grad_()
        Q = function(z, d)
        grads += [Q.detach(), *torch.autograd.grad(Q, (z, d), G)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.autograd.gradcheck(fast, (Z.requires_grad_(), D.requires_grad_()))


def test_whitened_directions_say_whose_psi_has_no_factor():
    Z, D = sides()
    with pytest.raises(NonFiniteLossError, match=r"Psi_r of group 'q' .* noise_init"):
        whitened_directions(Z * torch.nan, D, "r", "group 'q'")


@pytest.mark.parametrize("batch", BATCHES)
def test_lazy_covariance_is_the_dense_one(batch):
    Z, D = sides(*batch)
    lazy, v = lazy_covariance(Z, D), torch.randn(*batch, 3, 1)
    torch.testing.assert_close(lazy.to_dense(), psi(Z, D))
    torch.testing.assert_close(lazy @ v, psi(Z, D) @ v)
    torch.testing.assert_close(lazy.logdet(), psi(Z, D).logdet())


def test_kronecker_covariance_is_that_of_row_major_vec():
    (Z_r, D_r), (Z_c, D_c) = sides(m=2), sides(m=3)
    Psi_r, Psi_c = psi(Z_r, D_r), psi(Z_c, D_c)
    lazy = kronecker_covariance(lazy_covariance(Z_r, D_r), lazy_covariance(Z_c, D_c))
    torch.testing.assert_close(lazy.to_dense(), torch.kron(Psi_r, Psi_c))
    # Psi_r acts on the rows of U and Psi_c on its columns.
    U = torch.randn(2, 3)
    torch.testing.assert_close((lazy @ U.flatten()).reshape(2, 3), Psi_r @ U @ Psi_c)


def test_kronecker_covariance_is_batched():
    Psi_r, Psi_c = psi(*sides(4, m=2)), psi(*sides(4, m=3))
    lazy = kronecker_covariance(to_linear_operator(Psi_r), to_linear_operator(Psi_c))
    expected = torch.stack([torch.kron(r, c) for r, c in zip(Psi_r, Psi_c, strict=True)])
    torch.testing.assert_close(lazy.to_dense(), expected)
