"""The low-rank update on the layers' hot path against the dense weight."""

import pytest
import torch

from pyro_blora.updates import LowRankUpdate

N, ROWS, LENGTH = 3, 6, 4  # layers, rows of the batch, positions


def update(d_out, d_in, *, core_particles=(), factor_particles=(), with_core=True):
    A, B = torch.randn(*factor_particles, N, 2, d_in), torch.randn(*factor_particles, N, d_out, 3)
    core = torch.randn(*core_particles, N, 3, 2)
    if with_core:
        return LowRankUpdate(A=A, B=B, core=core)
    return LowRankUpdate(A=A, B=B @ core)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)], ids=["wide", "tall"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"core_particles": (3,)},
        {"factor_particles": (3,)},
        {"core_particles": (3,), "factor_particles": (3,)},
        {"core_particles": (1,)},
        {"core_particles": (2, 3)},
        {"with_core": False},
        {"with_core": False, "factor_particles": (6,)},
    ],
    ids=str,
)
def test_a_layer_adds_the_dense_weight(shape, options):
    given = update(*shape, **options)
    x, base = torch.randn(ROWS, LENGTH, shape[1]), torch.randn(ROWS, LENGTH, shape[0])
    for layer in given.layers():
        weight = layer.weight()
        stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
        weights = stacked.repeat_interleave(ROWS // len(stacked), 0)
        expected = base + torch.einsum("roi,rti->rto", weights, x)
        before = base.clone()
        torch.testing.assert_close(layer(x, base), expected)
        assert torch.equal(base, before)  # others may have kept the layer's output for backward
        with torch.no_grad():
            torch.testing.assert_close(layer(x, base), expected)
            assert torch.equal(base, before)  # or in a hook
            torch.testing.assert_close(layer(x, base.mT.contiguous().mT), expected)
