"""Kronecker algebra against loops and dense products."""

import pyro
import pytest
import torch
from linear_operator.settings import cholesky_jitter
from linear_operator.utils.warnings import NumericalWarning

from pyro_blora.errors import NonFiniteLossError
from pyro_blora.updates import inducing_covariance, whiten

BATCHES = [(), (3,), (2, 3)]


def sides(*batch, m=3, d=5):
    return torch.randn(*batch, m, d), torch.rand(*batch, m) + 0.1


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
    """The jitter is for a failing factorization alone: a tiny Psi keeps its scale."""
    Z, D = sides()
    Psi = 1e-10 * inducing_covariance(Z, D)
    L, _ = whiten(Z, Psi)
    torch.testing.assert_close(L @ L.mT, Psi, rtol=1e-10, atol=0)


def test_whiten_refuses():
    Z, _ = sides()
    with pytest.warns(NumericalWarning, match="jitter"), pytest.raises(NonFiniteLossError):
        whiten(Z, -torch.eye(3))
    with pytest.raises(NonFiniteLossError):
        whiten(Z, torch.full((3, 3), torch.nan))


def test_without_checks_the_factor_is_the_same_and_a_failure_is_nan():
    Z, D = sides(3)
    Psi = inducing_covariance(Z, D)
    Psi[0] = torch.diag(Psi.new_tensor([1.0, 1.0, -3 * cholesky_jitter.value(Psi.dtype)]))
    with pytest.warns(NumericalWarning, match="jitter"):
        L, _ = whiten(Z, Psi)
    with pyro.validation_enabled(False):
        torch.testing.assert_close(whiten(Z, Psi)[0], L)
        assert whiten(Z, -Psi)[0].isnan().all()
