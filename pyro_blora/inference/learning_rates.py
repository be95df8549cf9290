"""What is trained at which rate: by a parameter's role, and by its group's prior."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_blora.guides import SiteGuide
from pyro_blora.models import UpdateModel
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel

__all__ = ["LEARNING_RATES", "parameter_groups", "rates_by_group"]

LEARNING_RATES = {
    "mean": 2e-2,
    "scale": 1e-2,
    "direction": 5e-3,
    "likelihood": 5e-2,
    "head": 1e-3,
}


def rates_by_group(
    model: BayesianLoRAModel, given: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The two arguments that :func:`parameter_groups` takes beside a module.

    Args:
        model: has a prior for each group of layers, with its ``learning_rates``.
        given: rates by role that win over these, which win over ``LEARNING_RATES``.

    Returns:
        Rates by role of what belongs to no group (a likelihood, a head, an AutoGuide), which are
        the priors' where all agree, and of each group, by its name.
    """
    own = {g.name: getattr(model, g.name).learning_rates for g in model.groups}
    first, *others = own.values()
    common = {r: rate for r, rate in first.items() if all(o.get(r) == rate for o in others)}
    rates = {name: {**LEARNING_RATES, **each, **given} for name, each in own.items()}
    return {**LEARNING_RATES, **common, **given}, rates


def parameter_groups(
    module: nn.Module,
    rates: Mapping[str, float],
    by_group: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: means, scales, directions and heads, each with its rate.

    Args:
        module: a model, a guide or both; its parts declare ``roles``. A parameter of no declared
            role (an AutoGuide's) is a scale if its name says so, and a mean otherwise.
        rates: learning rates by role.
        by_group: those of the prior and the guide of a group of layers, by its name, where they
            are others.

    Returns:
        One group for each role that occurs, or for each rate of it.
    """
    found: dict[str, dict[float, list[nn.Parameter]]] = {role: {} for role in rates}
    for path, parameter in module.named_parameters():
        *parents, name = path.removesuffix("_unconstrained").split(".")
        # AutoNormal keeps its scales under "scales", by the names of the sites
        is_scale = "scale" in name or name == "cov_factor" or "scales" in parents
        roles = getattr(module.get_submodule(".".join(parents)), "roles", {})
        role = roles.get(name, "scale" if is_scale else "mean")
        rate = (by_group or {}).get(_group_of(module, parents), rates)[role]
        if parameter.requires_grad:
            found[role].setdefault(rate, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "name": role}
        for role, by_rate in found.items()
        for rate, parameters in by_rate.items()
    ]


def _group_of(module: nn.Module, parents: list[str]) -> str:
    """The group of layers of the prior or guide family that a part of a module lies in."""
    for depth in range(len(parents), -1, -1):
        owner = module.get_submodule(".".join(parents[:depth]))
        if isinstance(owner, UpdateModel):
            return owner.group.name
        if isinstance(owner, SiteGuide):
            return owner.site.group
    return ""
