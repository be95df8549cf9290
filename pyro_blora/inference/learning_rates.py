"""Learning rates by parameter role, and the steps after which point estimates stop learning."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import nn
from torch.utils.data import DataLoader

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides._site_guide import SiteGuide, is_real
from pyro_blora.likelihoods import Batch
from pyro_blora.network.adapter import TrainedHeads, in_mode
from pyro_blora.posterior.store import constraint_of

#: The usual rates, which a prior, a likelihood, a method or a call of ``fit`` may override.
RATES: dict[str, float] = {
    "mean": 5e-2,  # of the guide, in units of a whitened core
    "scale": 2e-2,  # of the guide and of the prior, in units of their logarithm
    "direction": 5e-3,
    "likelihood": 5e-2,
    "head": 0.2,  # in units of a logit: a step of Adam moves the weight of an input h by rate/|h|_1
}
_ROLES = {"cov_factor": "scale"}  # an unconstrained width of AutoLowRankMultivariateNormal
_POINT_STEPS = 300  # the least
_SMALLEST = 1e-3  # input of a head that is worth a step
_SLOWEST = 8.0  # at 16 no fact is learned, and at 4 real texts are over-fitted


@dataclass(frozen=True)
class Sizes:
    """What rates depend on: heads' inputs, the classes, and how much slower texts are learned."""

    inputs: Mapping[str, float]
    classes: int = 2
    slower: float = 1.0


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
    blora: BayesianLoRA,
    batch: Batch | Sizes,
    learning_rates: float | Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    r"""AdamW's parameter groups of an adapter: means, scales, directions, ..., each with its rate.

    The rate of a role comes from ``learning_rates``, or else from ``blora.method``, the likelihood,
    the prior of the parameter's group of layers, or :data:`RATES`. A parameter without a declared
    role, as in an AutoGuide, is a scale if it is constrained, and otherwise a mean. A head's rate
    is multiplied by :math:`\sqrt{\log_2 K} / |h|_1` for ``K`` classes and an input ``h``; the usual
    rates of means and directions are divided by the square of the number of scored tokens of an
    example, or by 8 if that is less, unless a head is new. A ``batch`` shows all of these.
    """
    given, sizes = rate_overrides(blora, learning_rates), sizes_of(blora, batch)
    groups: dict[str, dict[float, list[nn.Parameter]]] = {role: {} for role in RATES}
    for path, parameter in blora.named_parameters():
        role, rate = _role_and_rate(blora, path, given, sizes)
        if parameter.requires_grad:
            groups.setdefault(role, {}).setdefault(rate, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "name": role}
        for role, by_rate in groups.items()
        for rate, parameters in by_rate.items()
    ]


def optim_args(
    blora: BayesianLoRA,
    batch: Batch | Sizes,
    learning_rates: float | Mapping[str, float] | None = None,
) -> Callable[[str], dict[str, float]]:
    """Options for an optimizer of Pyro: each parameter's rate, as in :func:`parameter_groups`.

    ``SVI(blora.model, blora.guide, ClippedAdam(optim_args(blora, batch, {"mean": 1e-2})), elbo)``.
    """
    given, sizes = rate_overrides(blora, learning_rates), sizes_of(blora, batch)

    def of(name: str) -> dict[str, float]:
        named = {n.removesuffix("_unconstrained"): p for n, p in blora.named_parameters()}
        parameter = named.get(name.removesuffix("_unconstrained"))  # torch's name, or Pyro's
        held = parameter is not None and not parameter.requires_grad
        return {"lr": 0.0 if held else _role_and_rate(blora, name, given, sizes)[1]}

    return of


@torch.no_grad()
def sizes_of(blora: BayesianLoRA, batch: Batch | Sizes) -> Sizes:
    """The sizes that a batch shows."""
    heads, likelihood = blora.model.trained_heads, blora.likelihood
    if isinstance(batch, Sizes):
        return batch
    prepared = blora.model.prepared(batch)
    with (
        pyro.validation_enabled(False),
        in_mode(blora.net, training=False),
        heads.input_sizes() as inputs,
        blora.posterior() as net,
    ):
        logits = likelihood.logits(net, prepared)
    labels, classes = likelihood.labels(prepared), 2
    if likelihood.is_categorical:
        classes = max(logits.shape[-1], 2)
    scored = 1.0 if labels is None else float(likelihood.num_scored(labels).double().mean())
    # a new head learns the tags of all words from the start, which text has learned before
    slower = 1.0 if likelihood.new_head else min(max(scored, 1.0) ** 2, _SLOWEST)
    return Sizes(inputs, classes, slower)


def _role_and_rate(
    blora: BayesianLoRA, path: str, given: Mapping[str, float], sizes: Sizes
) -> tuple[str, float]:
    *parents, name = path.removesuffix("_unconstrained").split(".")
    modules = dict(blora.named_modules())  # without the parents of what a guide calls pyro.param
    owner, part = (modules.get(".".join(parents[:depth])) for depth in (None, 2))
    prior = getattr(blora.model, part.site.group) if isinstance(part, SiteGuide) else part
    usual = RATES | getattr(prior, "learning_rates", {}) | blora.likelihood.learning_rates
    chosen = {**blora.method.learning_rates, **given}
    real = is_real(constraint_of(owner, name))
    role = getattr(owner, "roles", _ROLES).get(name, "mean" if real else "scale")
    if role not in usual | chosen:
        raise ConfigurationError(f"{path} has no rate for its role {role!r}; pass learning_rates=.")
    unit = 1.0
    if isinstance(owner, TrainedHeads):
        unit = max(sizes.inputs.get(name, 1.0), _SMALLEST) / math.log2(sizes.classes) ** 0.5
    elif role in ("mean", "direction") and role not in chosen:
        unit = sizes.slower
    return role, (usual | chosen)[role] / unit


def steps_of_an_epoch(train: Any, batch_size: int) -> int | None:
    """The number of batches in a pass over the data, or ``None`` if the data have no length."""
    with suppress(TypeError):
        return math.ceil(len(train) / (1 if isinstance(train, DataLoader) else batch_size))
    return None


def point_steps(blora: BayesianLoRA, of_an_epoch: int | None, sizes: Sizes) -> int | None:
    """The steps in which point estimates learn; ``None`` for all, as if the guide is a point."""
    priors = (getattr(blora.model, group.name) for group in blora.model.groups)
    epochs = [p.point_epochs for p in priors if p.point_epochs is not None]
    if of_an_epoch is None or not epochs or getattr(blora.method.guide, "is_point", False):
        return None
    return max(_POINT_STEPS, round(math.log2(sizes.classes) * max(epochs) * of_an_epoch))
