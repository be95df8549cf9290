r"""Posterior draws of the updates, and their mean, :math:`\mathbb{E}_q[\Delta W]`.

The update at the centre of q is another one where a scale is random: the centre of a log-normal is
its median, :math:`e^\mu`, and its mean :math:`e^{\mu + s^2/2}`.
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_blora.guides._site_guide import Site
from pyro_blora.posterior.amortised_context import DRAWS_PLATE
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.structured_guide import StructuredGuide, draws_apart, start_guide
from pyro_blora.updates.low_rank_update import LowRankUpdate

__all__ = ["mean_updates", "sample_updates"]

_PASSES, _DRAWS = 16, 64  # few at once, for the memory


def sample_updates(
    model: BayesianLoRAModel,
    guide: nn.Module,
    num_samples: int,
    batch: Mapping[str, Any] | None = None,
) -> dict[str, LowRankUpdate]:
    """Posterior draws of the updates by group, without gradient.

    Args:
        model: the model.
        guide: its guide.
        num_samples: number of draws ``S``; 0 takes the mean of the update, see
            :func:`mean_updates`.
        batch: what the guide is called with, where it reads its argument.

    Returns:
        Updates whose factors have a leading dimension ``S``, or none for ``S = 0``.

    Raises:
        ConfigurationError: an AutoGuide has not run yet, and ``batch`` has no labels.
    """
    start_guide(guide, batch)
    if num_samples == 0:
        return mean_updates(model, guide, batch)
    draws = pyro.plate(DRAWS_PLATE, num_samples, dim=-1 - model.max_plate_nesting)
    with torch.no_grad(), draws:
        trace = pyro.poutine.trace(guide).get_trace(batch)
        return pyro.poutine.replay(model.updates, trace=trace)()


@torch.no_grad()
def mean_updates(
    model: BayesianLoRAModel, guide: nn.Module, batch: Mapping[str, Any] | None = None
) -> dict[str, LowRankUpdate]:
    r"""The mean of each factor of the updates, without the noise of a conditional.

    .. math::

        \mathbb{E}_q[\Delta W] = \mathbb{E}_q[B]\, \mathbb{E}_q[C]\, \mathbb{E}_q[A]

    where one factor alone is random, as with all inducing priors of one ``U``, or the factors are
    uncorrelated under q. If the factors are linear in all sites, they are those at q's mean, to the
    last digit. If a site has a constrained support or is marked ``infer={"nonlinear": True}``, they
    are averages over 1,024 draws of it, the same every time, the other sites still at their means:
    off by about a thirtieth of the spread of that scale. Where q may correlate the sites (any
    AutoGuide, ``Ensemble``) or does not know its mean (``AutoIAFNormal``), all sites are drawn.

    Args:
        model: the model.
        guide: its guide, which has its parameters.
        batch: what the guide is called with. An amortised guide has a mean for each example.

    Returns:
        Updates by group, of factors ``(n, ...)``, or ``(B, n, ...)`` where they are amortised.
    """
    held = Trace()
    lead: tuple[int, ...] = ()
    if batch is not None and getattr(guide, "reads_context", False):
        lead = (model.likelihood.examples(batch),)
    centre = _centre(guide, batch)
    if centre is not None:
        at_centre = pyro.poutine.condition(model.updates, data=centre)
        nodes = pyro.poutine.trace(at_centre).get_trace().nodes
        centre = {name: value for name, value in centre.items() if name in nodes}
        linear = {name: nodes[name] for name in centre if _is_linear(name, nodes[name])}
        if len(linear) == len(centre):
            updates: dict[str, LowRankUpdate] = nodes["_RETURN"]["value"]
            return {name: update.without_noise() for name, update in updates.items()}
        if isinstance(guide, StructuredGuide) and not guide.couples_sites:
            for name, node in linear.items():  # independent of what is drawn
                value = centre[name]
                value = value.repeat(_DRAWS, *(1,) * (value.dim() - 1)) if lead else value
                held.add_node(name, **{**node, "value": value, "is_observed": False})
    means: dict[str, list[LowRankUpdate]] = {}
    with draws_apart(guide, model.groups[0].device), pyro.poutine.replay(trace=held):
        for _ in range(_PASSES):
            drawn_updates = sample_updates(model, guide, _DRAWS * math.prod(lead), batch)
            for name, update in drawn_updates.items():
                drawn = update.without_noise()
                core = None if drawn.core is None else _mean(drawn.core, lead)
                mean = LowRankUpdate(_mean(drawn.A, lead), _mean(drawn.B, lead), core)
                means.setdefault(name, []).append(mean)
    return {name: _average(passes) for name, passes in means.items()}


def _centre(guide: nn.Module, batch: Mapping[str, Any] | None) -> dict[str, Tensor] | None:
    """The value at the centre of q for each site, or ``None`` where q does not know it."""
    if isinstance(guide, StructuredGuide):
        return guide.center(batch)
    try:
        values: dict[str, Tensor] = guide.median(batch)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return values


def _is_linear(name: str, node: dict[str, Any]) -> bool:
    return Site(name, node["fn"], ()).is_real and not node["infer"].get("nonlinear")


def _mean(factor: Tensor, lead: tuple[int, ...]) -> Tensor:
    if factor.dim() == 3:  # the same in every draw
        return factor
    return factor.reshape(-1, *lead, *factor.shape[-3:]).mean(0)


def _average(updates: list[LowRankUpdate]) -> LowRankUpdate:
    cores = [update.core for update in updates if update.core is not None]
    return LowRankUpdate(
        A=torch.stack([update.A for update in updates]).mean(0),
        B=torch.stack([update.B for update in updates]).mean(0),
        core=torch.stack(cores).mean(0) if cores else None,
    )
