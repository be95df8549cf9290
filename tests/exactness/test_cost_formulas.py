"""The formulas of docs/cost.md, in its letters, against what is trained and what torch counts."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop

from pyro_blora.likelihoods import CausalLM
from pyro_blora.models import KroneckerInducing

h, f, L, v, r, B, T = 64, 96, 6, tiny.VOCABULARY, 4, 4, 32
N = B * T
read = N - B  # a language model scores all positions but each row's first


def adapted(k, top):
    net = tiny.llama(L, hidden_size=h, intermediate_size=f, num_key_value_heads=4 * k // h)
    return tiny.adapted(
        net,
        prior=KroneckerInducing(rank=r),
        likelihood=CausalLM(num_data=100),
        layers_to_transform=list(range(L - top, L)),
    )


def flops_of(run):
    """Torch's count of all but attention, with sums in place, for which it needs formulas."""
    aten = torch.ops.aten
    formulas = {
        aten.addmm_: lambda _, a, b, *rest, **options: mm_flop(a, b),
        aten.baddbmm_: lambda _, a, b, *rest, **options: bmm_flop(a, b),
        # Of the CPU's attention releases before 2.15 count nothing by themselves
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **options: 0,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **options: 0,
    }
    run()  # the network is probed once
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("k", [64, 32])
@pytest.mark.parametrize("top", [L, 2])
def test_the_formulas_are_what_is_counted(k, top):
    a, d, w = top / L, 3 * h + k, 2 * h**2 + 2 * h * k + 3 * h * f
    n = top * (r * d + 2 * (3 * r**2 + 2 * r + 1))
    F = 2 * N * L * w
    F_b = a * F - 2 * N * (h**2 + 2 * h * k)
    u, q = 2 * N * top * (r * d + 2 * r**2), 3 * top * r**2 * d
    head = 2 * v * h * read

    blora = adapted(k, top)
    assert blora.trainable_parameters == n

    batch = {"input_ids": torch.randint(8, v, (B, T)), "attention_mask": torch.ones(B, T).long()}
    batch["labels"] = batch["input_ids"].clone()
    loss_of = tiny.elbo(B)(blora.model, blora.guide)
    step = flops_of(lambda: loss_of(batch).backward())
    assert step == pytest.approx(F + F_b + 3 * u + 10 / 3 * q + 2 * head, rel=0.01)
    for S in (1, 5):
        drawn = flops_of(lambda S=S: blora.log_predictive(batch, S))
        assert drawn == pytest.approx(S * (F + u + head) + q, rel=0.01)
