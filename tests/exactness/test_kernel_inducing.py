"""Kernels between neurons against dense algebra, and the linear one against the default prior."""

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from dense_algebra import N
from dense_algebra import at_start as bind
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from pyro.infer import SVI

from pyro_blora.models import KernelInducing, KroneckerInducing

RANK = (2, 3)


def weights(prior, V):
    update = pyro.poutine.condition(prior, data={prior.site("V"): V})()
    return torch.stack([layer.weight() for layer in update.layers()])


def rbf(x, y, lengthscale):
    return (-0.5 * torch.cdist(x, y).square() / lengthscale**2).exp()


def test_the_mean_is_that_of_a_sparse_gaussian_process():
    row, col = RBFKernel(), ScaleKernel(RBFKernel())
    row.lengthscale, col.base_kernel.lengthscale, col.outputscale = 1.3, 0.9, 2.0
    prior = bind(KernelInducing(rank=RANK, row_kernel=row, col_kernel=col, embedding_size=2))
    V = torch.randn(N, *RANK)
    dW = weights(prior, V)
    for i in range(N):
        Psi_r = rbf(prior.Z_r[i], prior.Z_r[i], 1.3) + prior.D_r[i].square().diag()
        Psi_c = 2 * rbf(prior.Z_c[i], prior.Z_c[i], 0.9) + prior.D_c[i].square().diag()
        K_r, K_c = rbf(prior.Z_r[i], prior.E_r[i], 1.3), 2 * rbf(prior.Z_c[i], prior.E_c[i], 0.9)
        L_r, L_c = torch.linalg.cholesky(Psi_r), torch.linalg.cholesky(Psi_c)
        U = L_r @ V[i] @ L_c.mT
        expected = K_r.mT @ torch.linalg.inv(Psi_r) @ U @ torch.linalg.inv(Psi_c) @ K_c
        torch.testing.assert_close(dW[i], prior.sigma_[i] * expected, atol=1e-6, rtol=1e-4)


def test_the_prior_covariance_is_the_kernels_product():
    """With as many inducing points as neurons, at them, and hardly any noise, nothing is lost."""
    options = {"rank": (4, 5), "sigma": 1.0, "noise_init": 1e-3, "embedding_size": 2}
    prior = bind(KernelInducing(**options)).double()
    for side in "rc":
        setattr(prior, f"Z_{side}", getattr(prior, f"E_{side}").detach())
    V = torch.eye(20, dtype=torch.float64).reshape(20, 1, 4, 5).expand(-1, N, -1, -1)
    update = pyro.poutine.condition(prior, data={prior.site("V"): V})()
    dW = torch.stack([layer.weight() for layer in update.layers()])  # n x 20 x 4 x 5
    for i in range(N):
        found = dW[i].reshape(20, 20).mT @ dW[i].reshape(20, 20)
        lengthscale = torch.nn.functional.softplus(torch.zeros(())).item()  # GPyTorch's own start
        K_r = rbf(prior.E_r[i], prior.E_r[i], lengthscale)
        K_c = rbf(prior.E_c[i], prior.E_c[i], lengthscale)
        torch.testing.assert_close(found, torch.kron(K_r, K_c), atol=1e-3, rtol=0)


def test_the_linear_kernel_over_one_hot_embeddings_is_the_kronecker_prior():
    kernel = LinearKernel()
    kernel.variance = 1.0
    given = bind(
        KernelInducing(rank=RANK, row_kernel=kernel, col_kernel=kernel, embedding="one-hot")
    )
    default = bind(KroneckerInducing(rank=RANK, sigma=given.sigma))
    state = {k: v for k, v in given.state_dict().items() if not k.startswith("kernel")}
    default.load_state_dict(state)
    V = torch.randn(N, *RANK)
    torch.testing.assert_close(weights(given, V), weights(default, V))
    for side in "rc":
        for a, b in zip(given._whitened(side), default._whitened(side), strict=True):
            torch.testing.assert_close(a, b)  # the covariance's factor, and the directions


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kernel", ["rbf", "matern", "linear", RBFKernel() + LinearKernel()])
def test_kernels_are_trained(kernel, local):
    own = MaternKernel(nu=1.5)
    with pyro.settings.context(module_local_params=local):
        prior = KernelInducing(rank=2, row_kernel=kernel, col_kernel=own)
        blora, batch = tiny.adapted(prior=prior), tiny.sequences(8)
        before = tiny.trained(blora)
        svi = SVI(blora.model, blora.guide, pyro.optim.Adam({"lr": 1e-2}), tiny.elbo())
        for _ in range(3):
            svi.step(batch)
    after = tiny.trained(blora)
    kernels = [name for name in after if "kernel" in name]
    assert len(kernels) >= 4  # two sides of two groups
    assert not [name for name in kernels if torch.equal(after[name], before[name])]
    assert tiny.equal(own.state_dict(), MaternKernel(nu=1.5).state_dict())  # the user's own stays


def test_hyperpriors_enter_the_elbo():
    kernel = RBFKernel(lengthscale_prior=GammaPrior(3.0, 6.0))
    prior = bind(KernelInducing(rank=RANK, row_kernel=kernel))
    trace = pyro.poutine.trace(prior).get_trace()
    lengthscale = torch.tensor(kernel.lengthscale.item())
    expected = dist.Gamma(3.0, 6.0).log_prob(lengthscale)
    found = trace.nodes[prior.site("hyperprior_r")]["fn"].log_factor
    torch.testing.assert_close(found, expected)
    assert prior.site("hyperprior_c") not in trace.nodes
