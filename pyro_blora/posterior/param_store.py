"""Pyro's global parameter store, which knows tensors by name: what an adapter leaves there."""

import warnings
from collections.abc import Mapping

import pyro
from torch import nn

from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel

__all__ = ["leave_store", "warn_of_aliases"]


def leave_store(parts: Mapping[str, nn.Module]) -> None:
    """Takes the tensors of modules, named as in Pyro's global store, out of it; they keep them.

    A name that stays there would win over what is loaded into a module, and over the start of the
    next adapter of that name.
    """
    store = pyro.get_param_store()
    for prefix, part in parts.items():
        for name, _ in part.named_parameters():
            full = f"{prefix}.{name}".removesuffix("_unconstrained")
            if full in store:
                del store[full]


def warn_of_aliases(model: BayesianLoRAModel) -> None:
    """Pyro's global parameter store identifies tensors by name: two adapters would share them."""
    if pyro.settings.get("module_local_params"):
        return
    names = {f"model.{name}".removesuffix("_unconstrained") for name, _ in model.named_parameters()}
    taken = sorted(names & set(pyro.get_param_store().keys()))
    if taken:
        warnings.warn(
            f"Pyro's parameter store already holds {taken[0]} and {len(taken) - 1} more of this "
            "adapter's names; the new adapter shares an older one's tensors. Call "
            "pyro.clear_param_store() first if the older one is not used any more, or "
            "pyro.settings.set(module_local_params=True) before both are made.",
            stacklevel=3,
        )
