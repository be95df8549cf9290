"""Learning rates by parameter role, and the steps after which point estimates stop learning."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import SiteGuide
from pyro_blora.models import UpdateModel

#: The usual rates, which a prior (``learning_rates``), a method or a call of ``fit`` may override.
RATES: dict[str, float] = {
    "mean": 5e-2,  # of the guide, in units of a whitened core
    "scale": 2e-2,  # of the guide and of the prior, in units of their logarithm
    "direction": 5e-3,
    "likelihood": 5e-2,
    "head": 1e-3,
}
_POINT_STEPS = 300  # the least, because a new head learns nothing in fewer


def rate_overrides(
    blora: BayesianLoRA, learning_rates: float | Mapping[str, float] | None
) -> dict[str, float]:
    """The rates of a call by role; a single number is the rate of the means."""
    if learning_rates is None:
        return {}
    given = learning_rates if isinstance(learning_rates, Mapping) else {"mean": learning_rates}
    known = dict.fromkeys(RATES)
    for part in blora.modules():
        known |= dict.fromkeys(getattr(part, "roles", {}).values())
    if unknown := sorted(set(given) - set(known)):
        raise ConfigurationError(
            f"Learning rates must have roles among {list(known)}, got {unknown}."
        )
    for role, rate in given.items():
        if not 0 <= rate < math.inf:
            raise ConfigurationError(
                f"The learning rate of {role!r} must be finite and 0 or more, got {rate!r}; 0 "
                "keeps its parameters fixed."
            )
    return dict(given)


def parameter_groups(
    blora: BayesianLoRA, learning_rates: float | Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW's parameter groups of an adapter: means, scales, directions, ..., each with its rate.

    The rate of a role comes from ``learning_rates``, or else from ``blora.method``, from the prior
    of the parameter's group of layers, or from :data:`RATES`. A parameter without a declared role,
    as in an AutoGuide, is a scale if its name says so, and otherwise a mean.
    """
    given = rate_overrides(blora, learning_rates)
    found: dict[str, dict[float, list[nn.Parameter]]] = {role: {} for role in RATES}
    for path, parameter in blora.named_parameters():
        role, rate = _role_and_rate(blora, path, given)
        if parameter.requires_grad:
            found.setdefault(role, {}).setdefault(rate, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "name": role}
        for role, by_rate in found.items()
        for rate, parameters in by_rate.items()
    ]


def optim_args(
    blora: BayesianLoRA, learning_rates: float | Mapping[str, float] | None = None
) -> Callable[[str], dict[str, float]]:
    """The function by which an optimizer of Pyro asks for a parameter's rate, as in :func:`fit`.

    ``SVI(blora.model, blora.guide, ClippedAdam(optim_args(blora, {"mean": 1e-2})), elbo)``
    """
    given = rate_overrides(blora, learning_rates)

    def of(name: str) -> dict[str, float]:
        named = {n.removesuffix("_unconstrained"): p for n, p in blora.named_parameters()}
        parameter = named.get(name.removesuffix("_unconstrained"))  # torch's name, or Pyro's
        held = parameter is not None and not parameter.requires_grad
        return {"lr": 0.0 if held else _role_and_rate(blora, name, given)[1]}

    return of


def _role_and_rate(blora: BayesianLoRA, path: str, given: Mapping[str, float]) -> tuple[str, float]:
    *parents, name = path.removesuffix("_unconstrained").split(".")
    owners: list[Any] = [blora]
    for parent in parents:  # a user's guide that calls pyro.param has no such parents
        owners.append(getattr(owners[-1], parent, None))
    # AutoNormal has its scales in a submodule "scales", under the names of the sites
    is_scale = "scale" in name or name == "cov_factor" or "scales" in parents
    role = getattr(owners[-1], "roles", {}).get(name, "scale" if is_scale else "mean")
    groups = [o.group.name for o in owners if isinstance(o, UpdateModel)]
    groups += [o.site.group for o in owners if isinstance(o, SiteGuide)]
    prior = getattr(blora.model, groups[0]) if groups else None
    own = getattr(prior, "learning_rates", {})
    for rates in (given, blora.method.learning_rates, own, RATES):
        if role in rates:
            return role, rates[role]
    raise ConfigurationError(
        f"{path} must have a role with a rate, got {role!r}; pass its rate in learning_rates=."
    )


def steps_of_an_epoch(train: Any, batch_size: int) -> int | None:
    """The number of batches in a pass over the data, or ``None`` if the data have no length."""
    with suppress(TypeError):
        return math.ceil(len(train) / (1 if isinstance(train, DataLoader) else batch_size))
    return None


def point_epochs(blora: BayesianLoRA) -> float:
    """The epochs after which directions and heads stop learning, as the method or the prior says.

    If the guide is itself a point, they never stop unless the method gives a number.
    """
    if blora.method.point_epochs is not None:
        return blora.method.point_epochs
    priors = (getattr(blora.model, group.name) for group in blora.model.groups)
    found = [p.point_epochs for p in priors if p.point_epochs is not None]
    is_point = getattr(blora.guide_family, "is_point", False)
    return math.inf if is_point else max(found, default=math.inf)


def point_steps(blora: BayesianLoRA, of_an_epoch: int | None) -> int | None:
    """The steps in which point estimates learn, given the batches per epoch; ``None`` for all."""
    epochs = point_epochs(blora)
    if of_an_epoch is None or epochs == math.inf:
        return None
    return max(_POINT_STEPS, round(epochs * of_an_epoch))
