"""Adapters on a network's shapes alone, so that options are refused before its weights are read."""

import pyro
import torch
from torch import nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.methods import BASELINES, trained_for
from pyro_blora.likelihoods import CausalLM
from pyro_blora.network.targets import find_targets
from pyro_blora.recipes import recipe

__all__ = ["adapter_on", "check_method_on", "top_blocks"]


def adapter_on(
    net: nn.Module,
    method: str,
    target_modules: tuple[str, ...],
    rank: int,
    layers: list[int] | None = None,
) -> BayesianLoRA:
    """A recipe's adapter on a network without weights.

    Raises:
        ConfigurationError: no layer is matched, or the rank is too large for one.
    """
    made = recipe(method)
    # The store's names and the draws are for the adapter that is made afterwards, with weights
    with torch.random.fork_rng(devices=[]), pyro.settings.context(module_local_params=True):
        return BayesianLoRA(
            net,
            target_modules=target_modules,
            prior=made.prior(rank),
            guide=made.guide(),
            likelihood=CausalLM(),
            layers_to_transform=layers,
        )


def check_method_on(
    net: nn.Module, method: str, target_modules: tuple[str, ...], rank: int
) -> None:
    """Raises ConfigurationError where a method of ``compare`` cannot adapt the network."""
    base = trained_for(method)
    if base in BASELINES:
        find_targets(net, target_modules)
    else:
        adapter_on(net, base, target_modules, rank).unwrap()


def top_blocks(net: nn.Module, count: int) -> list[int]:
    """The indices of the last ``count`` blocks."""
    depth = int(net.config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]
    if count >= depth:
        raise ConfigurationError(
            f"--top {count} is not below the network's {depth} blocks; leave it out to adapt all."
        )
    return list(range(depth - count, depth))
