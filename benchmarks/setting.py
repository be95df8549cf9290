"""What the benchmarks run: a random Llama of some shape, its batches, an adapter, its step."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.inference import parameter_groups
from pyro_blora.likelihoods import Likelihood
from pyro_blora.methods import get_method

__all__ = ["adapted", "batches", "bayesian_step", "network", "optimise"]

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers")
NAMES += ("num_attention_heads", "num_key_value_heads", "vocab_size")
SIZES = {
    "tiny": (64, 128, 4, 4, 4, 512),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "llama-1b": (2048, 8192, 4, 32, 8, 128256),
}
RANK, TARGETS, ANSWERS = 8, ["q_proj", "v_proj"], (5, 6, 7)
RATES = {"mean": 1e-3, "scale": 1e-3, "direction": 1e-3}

Step = Callable[[dict[str, Tensor]], float]


def network(size: str, layers: int | None) -> nn.Module:
    """A random Llama of the given shape."""
    torch.manual_seed(0)
    options = dict(zip(NAMES, SIZES[size], strict=True))
    if layers is not None:
        options["num_hidden_layers"] = layers
    return LlamaForCausalLM(LlamaConfig(**options, tie_word_embeddings=True))


def batches(count: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """Random token rows with a class each."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, length)
    return [
        {
            "input_ids": torch.randint(8, 512, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "labels": torch.randint(len(ANSWERS), (rows,), generator=generator),
        }
        for _ in range(count)
    ]


def optimise(loss_of: Callable[[dict[str, Tensor]], Tensor], groups: list[dict[str, Any]]) -> Step:
    """A step of AdamW on a loss, its gradient clipped; returns the loss."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]

    def step(batch: dict[str, Tensor]) -> float:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def adapted(
    net: nn.Module,
    method: str,
    likelihood: Likelihood,
    *,
    top: int | None = None,
) -> BayesianLoRA:
    """This library's adapter by a method's name, ``:scaled`` for its prior's conditional noise.

    Args:
        net: the network.
        method: name or PRIOR+GUIDE.
        likelihood: how its logits explain a batch.
        top: the top blocks alone, this many.
    """
    name, _, conditional = method.partition(":")
    made = get_method(name)
    prior = made.prior_of(RANK)
    if conditional:
        prior = type(prior)(**{**prior.options(), "conditional": conditional})
    depth = int(net.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    return BayesianLoRA(
        net,
        target_modules=TARGETS,
        prior=prior,
        guide=made.guide_of(),
        likelihood=likelihood,
        layers_to_transform=None if top is None else list(range(depth - top, depth)),
    )


def bayesian_step(blora: BayesianLoRA, particles: int) -> Step:
    """The training step of :func:`pyro_blora.inference.fit`, without its loop."""
    elbo = TraceMeanField_ELBO(
        num_particles=particles,
        vectorize_particles=True,
        max_plate_nesting=blora.max_plate_nesting,
    )(blora.model, blora.guide)
    both = nn.ModuleList([blora.model, blora.guide])
    return optimise(lambda batch: elbo(batch) / 1000, parameter_groups(both, RATES))
