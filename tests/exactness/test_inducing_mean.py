"""``KroneckerInducing``: the mean of dW given U, its gradients, its kernels."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from dense_algebra import M_C, M_R, Dense, N, bind, psi

from pyro_blora.errors import ConfigurationError, NonFiniteLossError
from pyro_blora.models import KroneckerInducing
from pyro_blora.updates import whiten

RANK = (M_R, M_C)


def conditioned(prior, V):
    return pyro.poutine.condition(prior, data={prior.site("V"): V})()


def weights(update):
    return torch.stack([layer.weight() for layer in update.layers()], -3)


@pytest.mark.parametrize("scale", ["learned", "fixed"])
def test_mean_is_the_dense_one(scale):
    prior = bind(KroneckerInducing(rank=RANK, scale=scale, sigma=0.7))
    V = torch.randn(N, *RANK)
    dW = weights(conditioned(prior, V))
    for layer in range(N):
        torch.testing.assert_close(dW[layer], Dense(prior, layer).mean(V[layer]))


def test_gradients_are_those_of_the_dense_formula():
    prior = bind(KroneckerInducing(rank=RANK))
    V, G = torch.randn(N, *RANK), torch.randn(N, 4, 5)
    names, parameters = zip(*prior.named_parameters(), strict=True)
    fast = torch.autograd.grad((weights(conditioned(prior, V)) * G).sum(), parameters)
    dense = sum((Dense(prior, i).mean(V[i]) * G[i]).sum() for i in range(N))
    slow = torch.autograd.grad(dense, parameters)
    assert {n.removesuffix("_unconstrained") for n in names} == {
        "Z_r",
        "Z_c",
        "D_r",
        "D_c",
        "sigma_",
    }
    for name, a, b in zip(names, fast, slow, strict=True):
        assert b.abs().min() > 0, name
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_core_is_whitened():
    """``p(U) = MN(0, Psi_r, Psi_c)``: the Jacobian of U in V squares to the Kronecker product."""
    prior = bind(KroneckerInducing(rank=RANK))
    V = torch.randn(N, *RANK)
    trace = pyro.poutine.trace(prior).get_trace()
    log_prob = trace.nodes[prior.site("V")]["fn"].log_prob(V)
    for i in range(N):
        Psi_r, Psi_c = (
            psi(Z[i], D[i]) for Z, D in ((prior.Z_r, prior.D_r), (prior.Z_c, prior.D_c))
        )
        dense = torch.kron(Psi_r, Psi_c)
        U = torch.linalg.cholesky(Psi_r) @ V[i] @ torch.linalg.cholesky(Psi_c).mT
        p = dist.MultivariateNormal(torch.zeros(len(dense)), dense)
        # A density changes by the determinant of the map, half the log det of the covariance.
        torch.testing.assert_close(p.log_prob(U.flatten()), log_prob[i] - 0.5 * dense.logdet())


@pytest.mark.parametrize("rank", [5, (5, 1), (1, 6)])
def test_rank_is_bounded_by_the_layer(rank):
    with pytest.raises(ConfigurationError, match=r"too large for group .*4 x 5; .*exclude_modules"):
        bind(KroneckerInducing(rank=rank))
    bind(KroneckerInducing(rank=(4, 5)))  # the largest


def test_a_psi_that_is_not_finite_is_named():
    prior = bind(KroneckerInducing(rank=RANK))
    with torch.no_grad():
        prior.Z_c.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match=r"Psi_c of group 'q' has no Cholesky.*noise_init"):
        prior()
    whiten(prior.Z_r, psi(prior.Z_r, prior.D_r))  # the other side is sound
