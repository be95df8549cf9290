"""Matrix normals, and the dense normals that they are tested against."""

import pyro.distributions as dist
import torch

from pyro_blora.distributions import MatrixNormal

M, N = 3, 2
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


def make(loc=(), row=(), col=(), m=M, n=N, **kwargs):
    mean = torch.randn(*loc, m, n, dtype=torch.float64)
    return MatrixNormal(mean, tril(*row, m), tril(*col, n), **kwargs)


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


def parameters(d):
    return [
        x.clone().requires_grad_()
        for x in (d._unbroadcasted_loc, d._unbroadcasted_row, d._unbroadcasted_col)
    ]
