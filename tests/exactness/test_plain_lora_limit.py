"""A collapsed posterior and no conditional noise leave exactly a plain LoRA, trained by MAP."""

import copy
import math

import pyro
import pytest
import tiny
import torch
from dense_algebra import psi
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from tiny import adapted, llama, sequences
from torch.nn import functional

from pyro_blora.guides import Delta

peft = pytest.importorskip("peft")

RANK, NUM_DATA = 2, 30


@pytest.fixture
def pair():
    """The library's network at a random V, and PEFT's copy of the same network."""
    net = llama()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
    lora = peft.inject_adapter_in_model(config, copy.deepcopy(net)).eval()
    blora = adapted(net, num_data=NUM_DATA, rank=RANK, guide=Delta())
    return tiny.shaken(blora, 0.3), lora


def lora_weights(blora, leaves):
    """A and B of every layer, from the leaves by the paper's formula, and ``-log p(V)``."""
    weights, penalty = {}, 0.0
    for group in blora.model.groups:
        # PyroParams; the positive ones are stored as logarithms.
        Z_r, Z_c, D_r, D_c, sigma = (
            leaves[f"model.{group.name}.{name}_unconstrained"]
            for name in ("Z_r", "Z_c", "D_r", "D_c", "sigma_")
        )
        D_r, D_c, sigma = D_r.exp(), D_c.exp(), sigma.exp()
        V = leaves[f"guide.{group.name}_V.loc_unconstrained"]
        penalty = penalty + 0.5 * (V**2 + math.log(2 * math.pi)).sum()
        Q_r = torch.linalg.inv(torch.linalg.cholesky(psi(Z_r, D_r))) @ Z_r
        Q_c = torch.linalg.inv(torch.linalg.cholesky(psi(Z_c, D_c))) @ Z_c
        B = sigma[:, None, None] * Q_r.mT @ V
        for layer, name in enumerate(group.module_names):
            weights[f"{name}.lora_A.default.weight"] = Q_c[layer]
            weights[f"{name}.lora_B.default.weight"] = B[layer]
    return weights, penalty


def map_loss(blora, lora, batch, leaves):
    """``-N/B log p(y | V) - log p(V)``, with PEFT's own forward and no Pyro."""
    weights, penalty = lora_weights(blora, leaves)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = torch.func.functional_call(lora, weights, (), inputs).logits
    logits = tiny.answers(logits, batch)
    nll = functional.cross_entropy(logits, batch["labels"], reduction="sum")
    return nll * NUM_DATA / len(logits) + penalty


def test_logits_are_plain_lora_s(pair):
    blora, lora = pair
    weights, _ = lora_weights(blora, dict(blora.named_parameters()))
    assert set(weights) == {n for n, p in lora.named_parameters() if p.requires_grad}
    ids = torch.randint(8, 32, (3, 6))
    with torch.no_grad():
        state = dict(lora.named_parameters())
        for name, value in weights.items():
            state[name].copy_(value)
        expected = lora(input_ids=ids).logits
        base = blora.net(input_ids=ids).logits
        with blora.posterior() as net:
            torch.testing.assert_close(net(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
        with blora.posterior(2) as net:  # draws of a point mass are all the same
            twice = net(input_ids=ids.repeat(2, 1)).logits
        torch.testing.assert_close(twice, expected.repeat(2, 1, 1), rtol=0, atol=1e-10)
    assert (base - expected).abs().max() > 1e-2


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("particles", [1, 3])
def test_svi_is_map_training_of_plain_lora(pair, elbo, particles):
    """Loss and every gradient; a step of SGD at rate 1 moves a parameter by its gradient."""
    blora, lora = pair
    batch = sequences(6)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in blora.named_parameters()}
    expected = map_loss(blora, lora, batch, leaves)
    gradients = torch.autograd.grad(expected, list(leaves.values()))

    svi = SVI(
        blora.model,
        blora.guide,
        pyro.optim.SGD({"lr": 1.0}),
        elbo(num_particles=particles, vectorize_particles=True, max_plate_nesting=1),
    )
    assert svi.step(batch) == pytest.approx(expected.item(), rel=1e-10)
    after = dict(blora.named_parameters())
    for (name, before), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.abs().max() > 1e-6, name
        message = f"gradient of {name}"
        moved = before.detach() - after[name].detach()
        torch.testing.assert_close(moved, gradient, rtol=1e-7, atol=1e-9, msg=message)
