"""Bayesian-LoRA in a hundred lines of plain Pyro: one linear layer, one inducing matrix.

Read this before the library. It trains the update of a frozen linear layer by SVI; the library
does the same for every layer of a transformer, in groups, with other priors and guides. A test
shows that this file and the library give the same losses under the same seed.

    W = W0 + dW,   dW = sigma Q_r^T V Q_c,   V ~ N(0, I)   (m x m)

Run: python tutorials/minimal.py
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import constraints

D_OUT, D_IN, RANK, NUM_DATA = 6, 10, 2, 64
SIGMA, NOISE_INIT, INIT_SCALE = 0.5, 0.1, 0.1


def make_data() -> tuple[Tensor, Tensor, Tensor]:
    """A pretrained weight W0 (D_OUT x D_IN), inputs x (N x D_IN), outputs y of a rank-2 update."""
    torch.manual_seed(0)
    W0 = torch.randn(D_OUT, D_IN) / D_IN**0.5
    truth = W0 + 0.5 * torch.randn(D_OUT, 2) @ torch.randn(2, D_IN) / D_IN**0.5
    x = torch.randn(NUM_DATA, D_IN)
    return W0, x, x @ truth.T + 0.1 * torch.randn(NUM_DATA, D_OUT)


def directions(side: str, d: int) -> Tensor:
    """Whitened inducing directions Q = L^-1 Z (RANK x d), with L L^T = Psi = Z Z^T + D^2.

    Z and D are the trained tensors of one side. Inducing variables U = Z_r W Z_c^T + noise look at
    W along the rows of Z; whitening makes their prior covariance Psi the identity.
    """
    Z = pyro.param(f"Z_{side}", lambda: torch.randn(RANK, d) * d**-0.5)
    D = pyro.param(f"D_{side}", NOISE_INIT * torch.ones(RANK), constraints.positive)
    L = torch.linalg.cholesky(Z @ Z.T + torch.diag(D**2))
    return torch.linalg.solve_triangular(L, Z, upper=False)


def model(W0: Tensor, x: Tensor, y: Tensor) -> None:
    """p(y, V | x): the prior of the core, the update, the likelihood."""
    Q_r, Q_c = directions("r", D_OUT), directions("c", D_IN)
    sigma = pyro.param("sigma", torch.tensor(SIGMA), constraints.positive)
    V = pyro.sample("V", dist.Normal(0.0, 1.0).expand([RANK, RANK]).to_event(2))
    # LoRA's B A, with A = Q_c and B = sigma Q_r^T V; never a D_OUT x D_IN product.
    mean = x @ W0.T + ((x @ Q_c.T) @ (sigma * V).T) @ Q_r
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)


def guide(W0: Tensor, x: Tensor, y: Tensor) -> None:
    """q(V): independent normals that start at the prior's mean, so dW starts at zero."""
    loc = pyro.param("loc", torch.zeros(RANK, RANK))
    scale = pyro.param("scale", INIT_SCALE * torch.ones(RANK, RANK), constraints.positive)
    pyro.sample("V", dist.Normal(loc, scale).to_event(2))


def train(num_steps: int = 500) -> list[float]:
    """The losses, minus ELBO, of every step."""
    data = make_data()
    pyro.clear_param_store()
    torch.manual_seed(1)
    svi = SVI(model, guide, Adam({"lr": 0.02}), TraceMeanField_ELBO())
    return [svi.step(*data) for _ in range(num_steps)]


def main() -> None:
    """Trains and prints what happened."""
    losses = train()
    W0, x, y = make_data()
    print(f"-ELBO: {losses[0]:.0f} at the start, {sum(losses[-20:]) / 20:.0f} at the end")
    print(f"residual of the pretrained layer: {(y - x @ W0.T).std():.3f}; noise in the data: 0.1")
    print(f"posterior of V: mean {pyro.param('loc').detach()}, sd {pyro.param('scale').detach()}")


if __name__ == "__main__":
    main()
