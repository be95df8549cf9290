"""Posterior draws of the updates, their mean, and the logits of the adapted network under them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoMessenger
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.guides._site_guide import Site
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.network.adapter import in_mode
from pyro_blora.network.shortcuts import FrozenPrefix
from pyro_blora.posterior.batches import repeat_batch
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import (
    DRAWS_PLATE,
    StructuredGuide,
    context_of_particles,
    draws_apart,
    ensembles_from_start,
    posteriors_of,
    start_guide,
)
from pyro_blora.posterior.store import read_store
from pyro_blora.updates import LowRankUpdate

_PASSES, _DRAWS = 16, 64  # in several passes, to limit the memory
_ROWS, _TOKENS_ON_CPU = 256, 1024

Samples = Mapping[str, Tensor]  # (S, *shape) by site, as MCMC.get_samples returns them


def sample_updates(
    model: BayesianLoRAModel,
    guide: nn.Module,
    num_samples: int,
    batch: Mapping[str, Any] | None = None,
) -> dict[str, LowRankUpdate]:
    """Posterior draws of the updates by group, without gradient.

    Factors have a leading dimension ``num_samples``; 0 gives :func:`mean_updates`, without it.
    """
    posteriors_of(guide, batch)
    start_guide(guide)
    read_store(model)
    if num_samples == 0:
        return mean_updates(model, guide, batch)
    given = None if isinstance(guide, AutoMessenger) else batch  # it would run the network
    with torch.no_grad(), _plate(model, num_samples):
        trace = pyro.poutine.trace(guide).get_trace(given)
        return pyro.poutine.replay(model.updates, trace=trace)()


def draws_in_pairs(
    model: BayesianLoRAModel,
    guide: nn.Module,
    batch: Mapping[str, Any] | None = None,
    each: int | None = None,
) -> Callable[[int], dict[str, LowRankUpdate]]:
    """A function that returns the updates at the next ``S`` draws of each of ``each`` posteriors.

    ``each`` is 1, except for an amortized guide, which has a posterior for each example of a batch.
    If q is symmetric, every second draw is the mirror image ``2 E[U] - U`` of the draw before it,
    so that the error of an average has no part that is linear in ``U``.
    """
    each = posteriors_of(guide, batch) if each is None else each
    if not isinstance(guide, StructuredGuide) or not guide.is_symmetric:
        return lambda count: sample_updates(model, guide, count * each, batch)
    waiting: dict[str, Tensor] = {}  # the mirror image of the last draw

    def mirrored(fresh: int) -> dict[str, Tensor]:
        """Draws, each followed by its mirror image, of shape ``(2 fresh, each, ...)``."""
        with _plate(model, fresh * each):
            values, context = guide(batch), guide.context(batch, context_of_particles)
        pairs = {}
        for name, family in guide.families().items():
            value, transform = values[name], family.site.transform
            image = transform(2 * transform.inv(family.center(context)) - transform.inv(value))
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
        return _updates_at(model, data, count * each)

    return draw


def draws_given(
    model: BayesianLoRAModel, samples: Samples
) -> tuple[int, Callable[[int], dict[str, LowRankUpdate]]]:
    """The number of draws in ``samples``, and a function that returns the next few updates."""
    values = _checked(model, samples)
    for site in model.sites:
        value = values[site.name]
        outside = (1,) * (model.max_plate_nesting - len(site.batch_shape))
        values[site.name] = value.reshape(len(value), *outside, *value.shape[1:])
    done = 0

    @torch.no_grad()
    def draw(count: int) -> dict[str, LowRankUpdate]:
        nonlocal done
        part = {name: value[done : done + count] for name, value in values.items()}
        done += count
        return _updates_at(model, part, count)

    return len(next(iter(values.values()))), draw


def _checked(model: BayesianLoRAModel, samples: Samples) -> dict[str, Tensor]:
    """The values of each site, on the model's device and in its parameters' dtype."""
    priors = {site.name: site.prior for site in model.sites}
    if not set(samples) >= set(priors):  # Predictive adds labels and deterministic sites
        raise ConfigurationError(
            f"samples must have values of the sites {', '.join(sorted(priors))}, got those of "
            f"{', '.join(sorted(map(str, samples))) or 'none'}."
        )
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    given = {name: torch.as_tensor(samples[name]) for name in priors}
    count, values = len(given[next(iter(priors))]), {}
    for name, prior in priors.items():
        value, shape = given[name], (count, *prior.shape())
        # Predictive's draws have a dimension of size 1 for each plate that a site is outside of
        if (more := value.dim() - len(shape)) > 0 and {*value.shape[1 : 1 + more]} == {1}:
            value = value.flatten(0, more)
        if tuple(value.shape) != shape or not count:
            raise ConfigurationError(
                f"samples[{name!r}] must be S draws of shape {shape[1:]}, with the same S for all "
                f"sites, got {tuple(value.shape)}; pass a single draw as value[None], and leave "
                "group_by_chain out."
            )
        values[name] = value.to(model.groups[0].device, dtype)
        if not prior.support.check(values[name]).all():
            raise ConfigurationError(
                f"samples[{name!r}] must be in the support of the site, {prior.support}, got "
                "values outside of it; pass constrained and finite values."
            )
    return values


@torch.no_grad()
def mean_updates(
    model: BayesianLoRAModel, guide: nn.Module, batch: Mapping[str, Any] | None = None
) -> dict[str, LowRankUpdate]:
    """The mean of each factor, ``(n, ...)``, or ``(B, n, ...)`` for an amortized guide and a batch.

    If the factors are linear in all sites, the mean is their value at q's mean. If a site is
    constrained or marked ``infer={"nonlinear": True}``, the mean is an average over 1,024 draws of
    it, with fixed seeds and the other sites at their means, which is off by about a thirtieth of
    the spread. If q may correlate the sites or its mean is not known, all sites are drawn.
    """
    held = Trace()
    lead: tuple[int, ...] = ()
    if batch is not None and getattr(guide, "reads_context", False):
        lead = (posteriors_of(guide, batch),)
    center = _center(guide, batch)
    if center is not None:
        at_center = pyro.poutine.condition(model.updates, data=center)
        nodes = pyro.poutine.trace(at_center).get_trace().nodes
        center = {name: value for name, value in center.items() if name in nodes}
        linear = {name: nodes[name] for name in center if _is_linear(name, nodes[name])}
        if len(linear) == len(center):
            return {n: update.without_noise() for n, update in nodes["_RETURN"]["value"].items()}
        if isinstance(guide, StructuredGuide) and not guide.couples_sites:
            for name, node in linear.items():  # independent of the sites that are drawn
                value = center[name]
                if guide.families()[name].reads_context:  # one mean per example
                    value = value.repeat(_DRAWS, *(1,) * (value.dim() - 1))
                held.add_node(name, **{**node, "value": value, "is_observed": False})
    means: dict[str, list[list[Tensor]]] = defaultdict(list)
    with draws_apart(guide, model.groups[0].device), pyro.poutine.replay(trace=held):
        for _ in range(_PASSES):
            drawn = sample_updates(model, guide, _DRAWS * math.prod(lead), batch)
            for name, update in drawn.items():
                mean = update.without_noise()
                factors = (f for f in (mean.A, mean.B, mean.core) if f is not None)
                means[name].append([_mean(factor, lead) for factor in factors])
    updates = {}
    for name, passes in means.items():
        A, B, *core = (torch.stack(factor).mean(0) for factor in zip(*passes, strict=True))
        updates[name] = LowRankUpdate(A, B, core[0] if core else None)
    return updates


def _updates_at(
    model: BayesianLoRAModel, values: Mapping[str, Tensor], size: int
) -> dict[str, LowRankUpdate]:
    with _plate(model, size):
        return pyro.poutine.condition(model.updates, dict(values))()


def _plate(model: BayesianLoRAModel, size: int) -> pyro.plate:
    return pyro.plate(DRAWS_PLATE, size, dim=-1 - model.max_plate_nesting)


def _center(guide: nn.Module, batch: Mapping[str, Any] | None) -> dict[str, Tensor] | None:
    """The center of q for each site, or ``None`` if the guide cannot compute it."""
    if isinstance(guide, StructuredGuide):
        return guide.center(batch)
    with suppress(AttributeError, NotImplementedError):
        return guide.median(batch)  # type: ignore[operator]
    return None


def _is_linear(name: str, node: dict[str, Any]) -> bool:
    return Site(name, node["fn"], ()).is_real and not node["infer"].get("nonlinear")


def _mean(factor: Tensor, lead: tuple[int, ...]) -> Tensor:
    if factor.dim() == 3:  # every draw has the same
        return factor
    return factor.reshape(-1, *lead, *factor.shape[-3:]).mean(0)


def rows_of_a_pass(model: BayesianLoRAModel, batch: Batch) -> int:
    """The best number of rows in a pass: 256, or on a CPU those of 1,024 tokens, for its caches."""
    if model.groups[0].device.type != "cpu" or "input_ids" not in batch:
        return _ROWS
    ids, scored = batch["input_ids"], batch.get("option_mask")
    tokens = int(ids.numel()) // len(ids)
    if scored is not None:  # packed, so that the options' common question is run once
        tokens = ids.shape[-1] + (ids.shape[1] - 1) * int(scored.sum(-1).max())
    return max(1, min(_ROWS, _TOKENS_ON_CPU // tokens))


def logits_of_draws(
    model: BayesianLoRAModel,
    guide: nn.Module,
    batch: Batch,
    num_samples: int,
    max_rows: int | None = None,
    samples: Samples | None = None,
) -> Iterator[Tensor]:
    """The logits of a batch under posterior draws, ``(draws, B, ..., C)`` per pass."""
    model.check_attached()
    batch = model.prepared(batch)
    examples = batch.examples
    if samples is None:
        draw = draws_in_pairs(model, guide, batch)
    else:
        num_samples, draw = draws_given(model, samples)
    read_store(model)
    if max_rows is None:
        max_rows = rows_of_a_pass(model, batch)
    shows = batch.get("output_hidden_states") or batch.get("output_attentions")
    plain = num_samples < 2 or shows or torch.is_grad_enabled()
    blocks = [] if plain else model.skippable_blocks()
    prefix = FrozenPrefix(blocks, model.likelihood.shortcuts)
    most = max(1, min(num_samples, max_rows // examples))
    done = 0
    with ensembles_from_start(guide):  # so that a seed fixes the prediction
        while done < max(1, num_samples):
            # the first pass has one draw, because it records the output of the frozen blocks
            draws = 1 if (blocks and not done) or not num_samples else min(most, num_samples - done)
            with in_mode(model.net, training=False):  # per pass, as the caller has its own mode
                updates = draw(draws) if num_samples else sample_updates(model, guide, 0, batch)
                with prefix.copies(draws), model.applied(updates) as net:
                    logits = model.likelihood.logits(net, repeat_batch(batch, draws))
            yield logits.unflatten(0, (draws, examples))
            done += draws


def log_predictive(likelihood: Likelihood, batch: Batch, passes: Iterator[Tensor]) -> Tensor:
    """``log 1/S sum_s p(labels | U_s)`` of each example in nats, ``(B,)``, from draws' logits."""
    labels = likelihood.labels(batch)
    if labels is None:
        raise BatchError("A batch must have labels for a log predictive, got none; add them.")
    parts = []
    for logits in passes:
        observed = labels.expand(len(logits), *labels.shape)
        likelihood.check_labels(observed, logits)
        parts.append(likelihood.distribution(logits, observed).log_prob(observed))
    joined = torch.cat(parts)
    return joined.logsumexp(0) - math.log(len(joined))
