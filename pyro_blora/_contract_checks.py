"""What the contracts of :mod:`pyro_blora.testing` share."""

from math import inf
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.guides import Site

__all__ = ["PARAMS", "check_support", "latents", "train"]

PARAMS = "setup() must register what is learned as a PyroParam, and other tensors as buffers"


def train(blora: BayesianLoRA, batch: dict[str, Any], steps: int = 3, *, svi: bool) -> float:
    """The last loss of some steps, by ``SVI`` or by the ELBO as a module, in nats."""
    elbo = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True)
    if svi:
        loop = SVI(blora.model, blora.guide, ClippedAdam({"lr": 1e-2}), elbo)
        return [float(loop.step(batch)) for _ in range(steps)][-1]
    loss_of = elbo(blora.model, blora.guide)
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
    norms = {n: p.grad.norm() if p.grad is not None else 0 for n, p in blora.named_parameters()}
    wrong = {name: float(norm) for name, norm in norms.items() if not 0 < norm < inf}
    assert not wrong, f"After {steps} steps gradients have the norms {wrong}: {PARAMS}."
    return float(loss.detach())


def latents(trace: poutine.Trace) -> list[str]:
    """The names of the sites that are not observed."""
    return list(prune_subsample_sites(trace).stochastic_nodes)


def check_support(name: str, law: Any, *values: Tensor) -> None:
    """Asserts that a law has the values in its support."""
    for value in values:
        assert Site(name, law, ()).support.check(value).all(), f"{name}: {law} excludes {value}."
