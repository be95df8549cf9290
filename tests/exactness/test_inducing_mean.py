"""``KroneckerInducing``: the mean of dW given U, its gradients, its kernels."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from dense_algebra import M_C, M_R, Dense, N, bind, psi
from gpytorch.kernels import LinearKernel, RBFKernel, ScaleKernel
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule

from pyro_blora.errors import ConfigurationError
from pyro_blora.kronecker import whiten
from pyro_blora.models import KroneckerInducing

RANK = (M_R, M_C)


def conditioned(prior, V):
    return pyro.poutine.condition(prior, data={prior.site("V"): V})()


def weights(update):
    return torch.stack([layer.weight() for layer in update.layers()], -3)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_mean_is_the_dense_one(learn_sigma):
    prior = bind(KroneckerInducing(rank=RANK, learn_sigma=learn_sigma, sigma=0.7))
    V = torch.randn(N, *RANK)
    dW = weights(conditioned(prior, V))
    for layer in range(N):
        torch.testing.assert_close(dW[layer], Dense(prior, layer).mean(V[layer]))


def test_factors_are_lora_s():
    """``B = sigma T_r U`` and ``A = T_c``: the same update with the core split otherwise."""
    prior = bind(KroneckerInducing(rank=RANK))
    V = torch.randn(N, *RANK)
    update = conditioned(prior, V)
    for layer in range(N):
        dense = Dense(prior, layer)
        A = torch.linalg.inv(dense.L_c.mT) @ update.A[layer]
        B = update.B[layer] @ update.core[layer] @ dense.L_c.mT
        U = dense.L_r @ V[layer] @ dense.L_c.mT
        torch.testing.assert_close(A, dense.T_c)
        torch.testing.assert_close(B, dense.sigma * dense.T_r @ U)


def test_particles_are_draws_of_one_prior():
    prior = bind(KroneckerInducing(rank=RANK))
    V = torch.randn(6, N, *RANK)
    with pyro.plate("particles", 6, dim=-2):
        dW = weights(conditioned(prior, V))
    assert dW.shape[:2] == (6, N)
    for p in range(6):
        torch.testing.assert_close(dW[p], weights(conditioned(prior, V[p])))


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
    lazy = prior.lazy_covariance_matrix().to_dense()
    for i in range(N):
        Psi_r, Psi_c = (
            psi(Z[i], D[i]) for Z, D in ((prior.Z_r, prior.D_r), (prior.Z_c, prior.D_c))
        )
        dense = torch.kron(Psi_r, Psi_c)
        torch.testing.assert_close(lazy[i], dense)
        U = torch.linalg.cholesky(Psi_r) @ V[i] @ torch.linalg.cholesky(Psi_c).mT
        p = dist.MultivariateNormal(torch.zeros(len(dense)), dense)
        # A density changes by the determinant of the map, half the log det of the covariance.
        torch.testing.assert_close(p.log_prob(U.flatten()), log_prob[i] - 0.5 * dense.logdet())


def test_rbf_kernel():
    options = {"row_kernel": RBFKernel(), "col_kernel": ScaleKernel(RBFKernel())}
    prior = bind(KroneckerInducing(rank=RANK, **options))
    prior.row_kernel.lengthscale = 1.3
    prior.col_kernel.base_kernel.lengthscale = 0.9
    prior.col_kernel.outputscale = 2.0
    V = torch.randn(N, *RANK)
    dW = weights(conditioned(prior, V))
    for i in range(N):
        K_r = (-0.5 * torch.cdist(prior.Z_r[i], prior.Z_r[i]) ** 2 / 1.3**2).exp()
        K_c = 2 * (-0.5 * torch.cdist(prior.Z_c[i], prior.Z_c[i]) ** 2 / 0.9**2).exp()
        Psi_r, Psi_c = K_r + prior.D_r[i].square().diag(), K_c + prior.D_c[i].square().diag()
        torch.testing.assert_close(prior.row_covariance().to_dense()[i], Psi_r)
        torch.testing.assert_close(prior.col_covariance().to_dense()[i], Psi_c)
        U = torch.linalg.cholesky(Psi_r) @ V[i] @ torch.linalg.cholesky(Psi_c).mT
        T_r, T_c = prior.Z_r[i].mT @ torch.linalg.inv(Psi_r), torch.linalg.inv(Psi_c) @ prior.Z_c[i]
        torch.testing.assert_close(dW[i], prior.scale()[i] * T_r @ U @ T_c)


def test_linear_kernel_is_the_default():
    default = bind(KroneckerInducing(rank=RANK))
    given = bind(KroneckerInducing(rank=RANK, row_kernel=LinearKernel(), col_kernel=LinearKernel()))
    given.load_state_dict(default.state_dict(), strict=False)
    given.row_kernel.variance = given.col_kernel.variance = 1.0
    V = torch.randn(N, *RANK)
    torch.testing.assert_close(weights(conditioned(given, V)), weights(conditioned(default, V)))
    for side in ("row_covariance", "col_covariance"):
        a, b = getattr(given, side)(), getattr(default, side)()
        torch.testing.assert_close(a.to_dense(), b.to_dense())


class Toy(PyroModule):
    """A model of one number, with the guide beside it."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self):
        dW = weights(self.prior())
        pyro.sample("y", dist.Normal(dW.sum(), 0.1), obs=torch.tensor(3.0))

    def guide(self):
        with self.prior.plate():
            pyro.sample(self.prior.site("V"), dist.Normal(torch.ones(RANK), 0.1).to_event(2))


@pytest.mark.parametrize(("loop", "local"), [("SVI", False), ("module", False), ("module", True)])
def test_kernels_are_trained(loop, local):
    """A kernel's own parameters are plain ones, yet both of Pyro's loops reach them."""
    with pyro.settings.context(module_local_params=local):
        prior = bind(KroneckerInducing(rank=RANK, row_kernel=RBFKernel()))
        toy, before = Toy(prior), prior.row_kernel.lengthscale.item()
        if loop == "SVI":
            SVI(toy, toy.guide, pyro.optim.SGD({"lr": 1e-4}), Trace_ELBO()).step()
        else:
            objective = Trace_ELBO()(toy, toy.guide)
            objective().backward()
            torch.optim.SGD(objective.parameters(), lr=1e-4).step()
    assert prior.row_kernel.lengthscale.item() != before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"conditional": "none"}, "conditional='none' is not one of"),
        ({"noise": "white"}, "noise='white' is not one of"),
        ({"sigma": 0.0}, "sigma=0.0 must be positive"),
        ({"sigma": float("nan")}, "sigma=nan must be positive"),
        ({"lambda_init": -1.0}, "lambda_init=-1.0 must be positive"),
        ({"noise_init": float("inf")}, "noise_init=inf must be positive and finite"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": (2, 0)}, r"rank=\(2, 0\) must be at least 1"),
        ({"conditional": "exact", "row_kernel": RBFKernel()}, "needs the linear kernel"),
        ({"conditional": "scaled", "col_kernel": RBFKernel()}, "needs the linear kernel"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ConfigurationError, match=match):
        KroneckerInducing(**options)


@pytest.mark.parametrize("rank", [5, (5, 1), (1, 6)])
def test_rank_is_bounded_by_the_layer(rank):
    with pytest.raises(ConfigurationError, match=r"too large for group .*4 x 5; .*exclude_modules"):
        bind(KroneckerInducing(rank=rank))
    bind(KroneckerInducing(rank=(4, 5)))  # the largest


def test_a_psi_that_is_not_finite_is_named():
    prior = bind(KroneckerInducing(rank=RANK))
    with torch.no_grad():
        prior.Z_c.fill_(torch.nan)
    with pytest.raises(
        ArithmeticError, match=r"Psi_c of group 'layer' has no Cholesky.*noise_init"
    ):
        prior()
    whiten(prior.Z_r, psi(prior.Z_r, prior.D_r))  # the other side is sound
