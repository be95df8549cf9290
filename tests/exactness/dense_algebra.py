"""The prior's algebra the slow way: dense inverses, products and Kronecker products."""

import tiny
import torch
from torch import nn

from pyro_blora import updates as conditional
from pyro_blora.network.targets import group_layers

N, D_OUT, D_IN, M_R, M_C = 2, 4, 5, 2, 3


def at_start(prior, n=N, d_out=D_OUT, d_in=D_IN):
    """``prior`` for a group ``q`` of ``n`` equal layers."""
    layers = {f"{i}.q": nn.Linear(d_in, d_out) for i in range(n)}
    return prior.bind(group_layers(layers)[0])


def bind(prior):
    """The same with every trainable tensor moved off its start."""
    return tiny.shaken(at_start(prior), 0.4)


def psi(Z, D):
    return Z @ Z.mT + torch.diag_embed(D**2)


class Dense:
    """One layer of a bound ``KroneckerInducing`` with linear kernels, densely."""

    def __init__(self, prior, layer, lam=1.0):
        Z_r, Z_c = prior.Z_r[layer], prior.Z_c[layer]
        Psi_r, Psi_c = psi(Z_r, prior.D_r[layer]), psi(Z_c, prior.D_c[layer])
        self.sigma, self.lam = prior.layer_scale()[layer], lam
        self.T_r = Z_r.mT @ torch.linalg.inv(Psi_r)
        self.T_c = torch.linalg.inv(Psi_c) @ Z_c
        self.L_r, self.L_c = torch.linalg.cholesky(Psi_r), torch.linalg.cholesky(Psi_c)
        self.P_r, self.P_c = self.T_r @ Z_r, Z_c.mT @ self.T_c

    def mean(self, V):
        """``sigma T_r U T_c`` with ``U = L_r V L_c^T``."""
        return self.sigma * self.T_r @ (self.L_r @ V @ self.L_c.mT) @ self.T_c

    def covariance(self):
        """The conditional covariance of row-major ``vec dW``."""
        kron = torch.kron(self.P_r, self.P_c)
        return (self.sigma * self.lam) ** 2 * (torch.eye(len(kron)) - kron)

    def output_covariance(self, x):
        """The same of ``dW x`` at all positions: ``N d_out`` squared, positions outermost."""
        d_out = len(self.P_r)
        push = torch.stack([torch.kron(torch.eye(d_out), row[None]) for row in x]).flatten(0, 1)
        return push @ self.covariance() @ push.mT


def assert_mean(draws, expected, errors=4):
    """The mean of ``draws`` (S x ...) is ``expected`` within that many standard errors."""
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= errors * error).all()


def assert_covariance(draws, expected, errors=4):
    """So is the covariance of Gaussian draws (S x k) of mean zero."""
    S = len(draws)
    variance = expected.diagonal()
    # Of a Gaussian, Var(a b) = Var a Var b + Cov(a, b)^2.
    error = ((variance[:, None] * variance + expected**2) / S).sqrt()
    assert ((draws.mT @ draws / S - expected).abs() <= errors * error).all()


def noise_covariance(monkeypatch, draw):
    """The exact covariance of a linear function of standard normal numbers.

    ``draw()`` runs once for every number it asks ``pyro_blora.updates`` for,
    with that number one and the others zero: the columns of its matrix, and no Monte Carlo.
    """
    state = {"hot": -1, "drawn": 0}

    def normal(like, *shape):
        values = torch.zeros(torch.Size(shape).numel())
        if 0 <= state["hot"] - state["drawn"] < len(values):
            values[state["hot"] - state["drawn"]] = 1.0
        state["drawn"] += len(values)
        return values.reshape(shape)

    def column(hot):
        state.update(hot=hot, drawn=0)
        return draw().flatten()

    with monkeypatch.context() as patch:
        patch.setattr(conditional, "_randn", normal)
        assert column(-1).abs().max() == 0  # no numbers, no noise: the function is homogeneous
        root = torch.stack([column(hot) for hot in range(state["drawn"])], -1)
    return root @ root.mT
