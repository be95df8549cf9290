"""Pyro's global parameter store, which knows tensors by name: what an adapter leaves there."""

import warnings
from collections.abc import Mapping

import pyro
from torch import nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel

__all__ = ["check_aliases", "leave_store"]


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


def check_aliases(model: BayesianLoRAModel) -> None:
    """Pyro's global parameter store identifies tensors by name: two adapters would share them.

    Raises:
        ConfigurationError: the store has a tensor of another shape under one of the names.
    """
    if pyro.settings.get("module_local_params"):
        return
    own = {f"model.{n}".removesuffix("_unconstrained"): p for n, p in model.named_parameters()}
    held = dict(pyro.get_param_store().named_parameters())
    taken = sorted(set(own) & set(held))
    if not taken:
        return
    advice = (
        "Call .unwrap() on the older one, or pyro.clear_param_store(), if it is not used any more; "
        "or pyro.settings.set(module_local_params=True) before both are made."
    )
    for name in taken:
        shapes = [tuple(of[name].shape) for of in (held, own)]
        if shapes[0] != shapes[1]:
            raise ConfigurationError(
                f"Pyro's parameter store already holds {name} of an older adapter, of shape "
                f"{shapes[0]}, where this one has {shapes[1]}. {advice}"
            )
    warnings.warn(
        f"Pyro's parameter store already holds {taken[0]} and {len(taken) - 1} more of this "
        f"adapter's names; the new adapter shares an older one's tensors. {advice}",
        stacklevel=3,
    )
