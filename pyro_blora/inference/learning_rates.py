"""What is trained at which rate: by a parameter's role, and by its group's prior."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.guides import SiteGuide
from pyro_blora.methods import METHODS, method_of
from pyro_blora.models import UpdateModel

__all__ = ["optim_args", "parameter_groups", "rates_by_group"]


def rates_by_group(
    blora: BayesianLoRA, given: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The two arguments that :func:`parameter_groups` takes beside a module.

    Args:
        blora: its method says the rates; with a prior for each group and no method of its own, that
            of the group's prior.
        given: rates by role that win over these.

    Returns:
        Rates by role of what belongs to no group (a likelihood, a head, an AutoGuide), and of each
        group, by its name.
    """
    usual, rates = METHODS["bayesian-lora"].learning_rates, {}
    for group in blora.model.groups:
        prior = getattr(blora.model, group.name)
        mixed = isinstance(blora.prior, Mapping) and blora.method == METHODS["bayesian-lora"]
        own = method_of(type(prior)) if mixed else blora.method
        rates[group.name] = {**usual, **own.learning_rates, **given}
    return {**usual, **blora.method.learning_rates, **given}, rates


def optim_args(blora: BayesianLoRA) -> Callable[[str], dict[str, float]]:
    """What an optimizer of Pyro asks for the rate of a parameter: the method's, by its role.

    Example::

        svi = SVI(blora.model, blora.guide, ClippedAdam(optim_args(blora)), elbo)
    """

    def of(name: str) -> dict[str, float]:
        by_role, by_group = rates_by_group(blora, {})
        named = {n.removesuffix("_unconstrained"): p for n, p in blora.named_parameters()}
        if name not in named:  # of a guide of one's own, by pyro.param
            return {"lr": by_role["scale" if "scale" in name else "mean"]}
        groups = parameter_groups(blora, by_role, by_group)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        return {"lr": rates.get(id(named[name]), 0.0)}  # zero where it is held

    return of


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
