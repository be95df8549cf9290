r"""Posterior draws of the updates, and their mean, :math:`\mathbb{E}_q[\Delta W]`.

The update at the centre of q is another one where a scale is random: the centre of a log-normal is
its median, :math:`e^\mu`, and its mean :math:`e^{\mu + s^2/2}`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
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

__all__ = ["draws_in_pairs", "mean_updates", "sample_updates", "updates_at"]

_PASSES, _DRAWS = 16, 64  # few at once, for the memory


def sample_updates(
    model: BayesianLoRAModel,
    guide: nn.Module,
    num_samples: int,
    batch: Mapping[str, Any] | None = None,
) -> dict[str, LowRankUpdate]:
    """Posterior draws of the updates by group, without gradient.

    Their factors have a leading dimension ``S = num_samples``, or none for ``S = 0``, which takes
    :func:`mean_updates`. The guide is called with ``batch``, which an AutoGuide that has not run
    yet needs, with labels.
    """
    start_guide(guide, batch)
    if num_samples == 0:
        return mean_updates(model, guide, batch)
    with torch.no_grad(), _plate(model, num_samples):
        trace = pyro.poutine.trace(guide).get_trace(batch)
        return pyro.poutine.replay(model.updates, trace=trace)()


def draws_in_pairs(
    model: BayesianLoRAModel, guide: nn.Module, batch: Mapping[str, Any], each: int = 1
) -> Callable[[int], dict[str, LowRankUpdate]]:
    """What gives the next few posterior draws of the updates, antithetic where that can be.

    Every second draw is the mirror image of the one before it, ``2 E[U] - U`` in unconstrained
    coordinates. It has the same law where q is symmetric (:attr:`SiteGuide.symmetric`), and what is
    linear in ``U`` cancels from the error of an average.

    ``each`` draws belong together: one for each example of an amortised guide. The function made
    takes a number of draws ``S``, and gives updates of ``S each`` leading draws.
    """
    if not isinstance(guide, StructuredGuide) or not guide.is_symmetric:
        return lambda count: sample_updates(model, guide, count * each, batch)
    waiting: dict[str, Tensor] = {}  # the mirror image of the last draw

    def mirrored(fresh: int) -> dict[str, Tensor]:
        """Draws, each followed by its mirror image: ``(2 fresh, each, ...)``."""
        with _plate(model, fresh * each):
            values = guide(batch)
        pairs = {}
        for name, family in guide.families().items():
            value, transform = values[name], family.site.transform
            image = transform(2 * transform.inv(family.center()) - transform.inv(value))
            both = (v.unflatten(0, (fresh, each)) for v in (value, image))
            pairs[name] = torch.stack(list(both), 1).flatten(0, 1)
        return pairs

    @torch.no_grad()
    def draw(count: int) -> dict[str, LowRankUpdate]:
        nonlocal waiting
        found = [waiting] if waiting else []
        if missing := count - len(found):
            found.append(mirrored(math.ceil(missing / 2)))
        values = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        waiting = {name: v[count:] for name, v in values.items() if len(v) > count}
        data = {name: v[:count].flatten(0, 1) for name, v in values.items()}
        return updates_at(model, data, count * each)

    return draw


def updates_at(
    model: BayesianLoRAModel, values: Mapping[str, Tensor], size: int
) -> dict[str, LowRankUpdate]:
    """The updates at ``size`` values of each site, which stand outside of the prior's plates."""
    with _plate(model, size):
        updates: dict[str, LowRankUpdate] = pyro.poutine.condition(model.updates, dict(values))()
    return updates


def _plate(model: BayesianLoRAModel, size: int) -> pyro.plate:
    return pyro.plate(DRAWS_PLATE, size, dim=-1 - model.max_plate_nesting)


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

    Factors are ``(n, ...)``, or ``(B, n, ...)`` of an amortised guide and the examples of a batch.
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
            at_mean: dict[str, LowRankUpdate] = nodes["_RETURN"]["value"]
            return {name: update.without_noise() for name, update in at_mean.items()}
        if isinstance(guide, StructuredGuide) and not guide.couples_sites:
            for name, node in linear.items():  # independent of what is drawn
                value = centre[name]
                if guide.families()[name].reads_context:  # it has one for each example
                    value = value.repeat(_DRAWS, *(1,) * (value.dim() - 1))
                held.add_node(name, **{**node, "value": value, "is_observed": False})
    means: dict[str, list[list[Tensor]]] = defaultdict(list)
    with draws_apart(guide, model.groups[0].device), pyro.poutine.replay(trace=held):
        for _ in range(_PASSES):
            drawn = sample_updates(model, guide, _DRAWS * math.prod(lead), batch)
            for name, update in drawn.items():
                means[name].append([_mean(factor, lead) for factor in _factors(update)])
    updates = {}
    for name, passes in means.items():
        A, B, *core = (torch.stack(factor).mean(0) for factor in zip(*passes, strict=True))
        updates[name] = LowRankUpdate(A, B, core[0] if core else None)
    return updates


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


def _factors(update: LowRankUpdate) -> list[Tensor]:
    mean = update.without_noise()
    return [factor for factor in (mean.A, mean.B, mean.core) if factor is not None]
