"""The posterior: draws of the updates, their mean, and the network's logits under them."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.guides._site_guide import Site
from pyro_blora.likelihoods import Batch
from pyro_blora.likelihoods._likelihood import Prepared
from pyro_blora.likelihoods.reading import in_single_precision
from pyro_blora.methods import Method
from pyro_blora.models import LowRankUpdate
from pyro_blora.network.adapter import in_mode
from pyro_blora.posterior.bayesian_lora_model import (
    LOCK,
    BayesianLoRAModel,
    one_at_a_time,
    repeat_batch,
)
from pyro_blora.posterior.guide import (
    DRAWS_PLATE,
    StructuredGuide,
    draws_apart,
    ensembles_from_start,
    start_guide,
    warn_of_a_point,
)
from pyro_blora.posterior.linearized import linearized_logits
from pyro_blora.posterior.store import read_store

_PASSES, _DRAWS = 16, 64  # in several passes, to limit the memory
_ROWS, _TOKENS_ON_CPU = 256, 1024

Samples = Mapping[str, Tensor]  # (S, *shape) by site, as MCMC.get_samples returns them


@dataclass(frozen=True)
class Posterior:
    """q(U) of an adapter: its draws, its mean, and what the network predicts under them.

    Called, it is a context in which the network runs under draws of U, or under their mean for 0.
    The rows of any batch are divided evenly among the ``num_samples`` draws, whereas :meth:`logits`
    runs every row under every draw. Conditional noise is drawn anew at every call of a layer; the
    mean has none. Other threads wait.

    Example::

        with blora.posterior(), torch.no_grad():
            net(**batch).logits  # under the posterior mean
        blora.posterior.draws(10)["q_proj"].core  # 10 x n x r x r
    """

    model: BayesianLoRAModel  #: with the network and the likelihood
    guide: nn.Module  #: q
    method: Method  #: how many draws a prediction takes, and whether they are linearized

    @contextmanager
    def __call__(self, num_samples: int = 0) -> Iterator[nn.Module]:
        """Yields the network under draws of U, or under their mean for 0."""
        with LOCK:
            self.model.check_attached()
            with self.model.applied(self.draws(num_samples)) as net:
                yield net

    @one_at_a_time
    def draws(self, num_samples: int = 0) -> dict[str, LowRankUpdate]:
        """Draws of the updates by group, without gradient, or :meth:`mean` for 0.

        Factors have a leading dimension ``num_samples``.
        """
        if num_samples == 0:
            return self.mean()
        start_guide(self.guide)
        read_store(self.model)
        with torch.no_grad(), self._plate(num_samples):
            trace = pyro.poutine.trace(self.guide).get_trace(None)
            return pyro.poutine.replay(self.model.updates, trace=trace)()

    @one_at_a_time
    @torch.no_grad()
    def mean(self) -> dict[str, LowRankUpdate]:
        """The mean of each factor, ``(n, ...)``.

        It is exact if the factors are linear in all sites. Sites that are constrained or marked
        ``infer={"nonlinear": True}`` are averaged over 1,024 draws with fixed seeds, which is off
        by about a thirtieth of the spread; all sites are if q may correlate them, or has no mean.
        """
        model, guide, held = self.model, self.guide, Trace()
        start_guide(guide)
        read_store(model)
        center = self._center()
        if center is not None:
            at_center = pyro.poutine.condition(model.updates, data=center)
            nodes = pyro.poutine.trace(at_center).get_trace().nodes
            center = {name: value for name, value in center.items() if name in nodes}
            linear = {name: nodes[name] for name in center if is_linear(nodes[name])}
            if len(linear) == len(center):
                updates = nodes["_RETURN"]["value"].items()
                return {name: update.without_noise() for name, update in updates}
            if isinstance(guide, StructuredGuide) and not guide.couples_sites:
                for name, node in linear.items():  # independent of the sites that are drawn
                    held.add_node(name, **{**node, "value": center[name], "is_observed": False})
        means: dict[str, list[list[Tensor]]] = defaultdict(list)
        with draws_apart(guide, model.groups[0].device), pyro.poutine.replay(trace=held):
            for _ in range(_PASSES):
                for name, update in self.draws(_DRAWS).items():
                    factors = update.without_noise().factors
                    means[name].append([f if f.dim() == 3 else f.mean(0) for f in factors])
        return {
            name: LowRankUpdate(*(torch.stack(f).mean(0) for f in zip(*passes, strict=True)))
            for name, passes in means.items()
        }

    def pairs(self) -> Callable[[int], dict[str, LowRankUpdate]]:
        """A function that returns the updates at the next draws.

        If q is symmetric, every second draw is the one before it mirrored at the center of each
        site, unconstrained, so that the error of an average has no part that is linear in it.
        """
        guide = self.guide
        if not isinstance(guide, StructuredGuide) or not guide.is_symmetric:
            return self.draws
        waiting: dict[str, Tensor] = {}  # the mirror image of the last draw

        def mirrored(fresh: int) -> dict[str, Tensor]:
            """Draws, each followed by its mirror image, of shape ``(2 fresh, ...)``."""
            with self._plate(fresh):
                values = guide()
            pairs = {}
            for name, family in guide.families().items():
                value, transform = values[name], family.site.transform
                image = transform(2 * transform.inv(family.center()) - transform.inv(value))
                pairs[name] = torch.stack([value, image], 1).flatten(0, 1)
            return pairs

        @torch.no_grad()
        def draw(count: int) -> dict[str, LowRankUpdate]:
            nonlocal waiting
            parts = [waiting] if waiting else []
            if missing := count - len(parts):
                parts.append(mirrored(math.ceil(missing / 2)))
            values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            waiting = {name: v[count:] for name, v in values.items() if len(v) > count}
            return self._updates_at({name: v[:count] for name, v in values.items()}, count)

        return draw

    def given(self, samples: Samples) -> tuple[int, Callable[[int], dict[str, LowRankUpdate]]]:
        """The number of draws in ``samples``, and a function that returns the next few updates."""
        values, done = _checked(self.model, samples), 0

        @torch.no_grad()
        def draw(count: int) -> dict[str, LowRankUpdate]:
            nonlocal done
            part = {name: value[done : done + count] for name, value in values.items()}
            done += count
            return self._updates_at(part, count)

        return len(next(iter(values.values()))), draw

    def logits(
        self,
        batch: Batch,
        num_samples: int | None = None,
        *,
        linearized: bool | None = None,
        max_rows: int | None = None,
        samples: Samples | None = None,
        tempered: bool = True,
    ) -> Iterator[Tensor]:
        """The logits whose softmax a prediction averages, ``(draws, B, ..., C)`` per pass.

        They are divided by the temperature if they are ``tempered``. The other arguments are those
        of :meth:`BayesianLoRA.predict <pyro_blora.BayesianLoRA.predict>`.
        """
        draws = self.method.draws(num_samples)
        if linearized is None:
            linearized = self.method.linearized and samples is None and draws > 0
        if samples is None:
            warn_of_a_point(self.guide, draws)
        elif linearized:
            raise ConfigurationError(
                "linearized must be False with samples=, got True; leave one of them out."
            )
        batch = self.model.prepared(batch)
        if linearized and not self.model.likelihood.is_categorical:
            raise ConfigurationError(
                f"A linearization must have classes, got {type(self.model.likelihood).__name__}, "
                "whose logits are not all relative to the first; pass linearized=False."
            )
        if linearized and any(u.is_noisy for u in self.draws(1).values()):
            raise ConfigurationError(
                "A linearization must have a deterministic update, got one with the noise of a "
                "conditional; pass linearized=False, or a prior with conditional='deterministic'."
            )
        if linearized:
            passes = iter([linearized_logits(self.model, self.guide, batch, draws)])
        else:
            passes = self._passes(batch, draws, max_rows, samples)
        # It was fitted to the draws of this guide, not to samples or to the bare network
        if not tempered or samples is not None or not self.model.enabled:
            return passes
        temperature = self.model.temperature if draws else self.model.mean_temperature
        return (self.model.likelihood.tempered(logits, temperature) for logits in passes)

    def log_predictive(
        self, batch: Batch, num_samples: int | None = None, **options: Any
    ) -> Tensor:
        """``log 1/S sum_s p(labels | U_s)`` of each example in nats, ``(B,)``."""
        batch = self.model.prepared(batch)
        labels = self.model.likelihood.labels(batch)
        if labels is None:
            raise BatchError("A batch must have labels for a log predictive, got none; add them.")
        return self.log_prob(labels, self.logits(batch, num_samples, **options))

    def log_prob(self, labels: Tensor, passes: Iterable[Tensor]) -> Tensor:
        """The log predictive of labels by the logits of draws, ``(S, B, ...)``, pass by pass."""
        likelihood, parts = self.model.likelihood, []
        for logits in passes:
            observed = labels.expand(len(logits), *labels.shape)
            likelihood.check_labels(observed, logits)
            parts.append(likelihood.distribution(logits, observed).log_prob(observed))
        joined = torch.cat(parts)
        return joined.logsumexp(0) - math.log(len(joined))

    def is_point(self, num_samples: int) -> bool:
        """Whether so many draws are all equal."""
        drawn = self.draws(num_samples).values()
        factors = [factor for update in drawn for factor in update.factors]
        alike = all(bool((f == f[:1]).all()) for f in factors if f.dim() > 3)
        return alike and not any(update.is_noisy for update in drawn)

    def _passes(
        self, batch: Prepared, num_samples: int, max_rows: int | None, samples: Samples | None
    ) -> Iterator[Tensor]:
        model, guide, examples = self.model, self.guide, batch.examples
        model.check_attached()
        if samples is None:
            draw = self.pairs()
        else:
            num_samples, draw = self.given(samples)
        read_store(model)
        if max_rows is None:
            max_rows = rows_of_a_pass(model, batch)
        total = max(1, num_samples)
        most = max(1, min(total, max_rows // examples))
        most = most if most == 1 or model.keeps_rows(batch) else 1
        with ensembles_from_start(guide):  # so that a seed fixes the prediction
            for done in range(0, total, most):
                draws = min(most, total - done)
                # per pass, because the caller has its own mode between them
                with LOCK, in_mode(model.net, training=False):
                    updates = draw(draws) if num_samples else self.mean()
                    with model.applied(updates) as net:
                        logits = model.likelihood.logits(net, repeat_batch(batch, draws))
                        logits = in_single_precision(logits)
                yield logits.unflatten(0, (draws, examples))

    def _updates_at(self, values: Mapping[str, Tensor], size: int) -> dict[str, LowRankUpdate]:
        with self._plate(size):
            return pyro.poutine.condition(self.model.updates, dict(values))()

    def _plate(self, size: int) -> pyro.plate:
        return pyro.plate(DRAWS_PLATE, size, dim=-1 - self.model.max_plate_nesting)

    def _center(self) -> dict[str, Tensor] | None:
        """The center of q for each site, or ``None`` if the guide cannot compute it."""
        if isinstance(self.guide, StructuredGuide):
            return self.guide.center()
        with suppress(NotImplementedError):
            if hasattr(self.guide, "median"):
                return self.guide.median(None)  # type: ignore[operator]
        return None


def _checked(model: BayesianLoRAModel, samples: Samples) -> dict[str, Tensor]:
    """The values of each site with a dimension for each plate, on the model's device."""
    priors = {site.name: site.prior for site in model.sites}
    if not set(samples) >= set(priors):  # Predictive adds labels and deterministic sites
        raise ConfigurationError(
            f"samples must have values of the sites {', '.join(sorted(priors))}, got those of "
            f"{', '.join(sorted(map(str, samples))) or 'none'}."
        )
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    given = {name: torch.as_tensor(samples[name]) for name in priors}
    count, values = next(iter(given.values())).shape[:1].numel(), {}
    for name, prior in priors.items():
        value, shape = given[name], (count, *prior.shape())
        # Predictive's draws have a dimension of size 1 for each plate that a site is outside of
        if (more := value.dim() - len(shape)) > 0 and {*value.shape[1 : 1 + more]} == {1}:
            value = value.flatten(0, more)
        if tuple(value.shape) != shape or not count:
            raise ConfigurationError(
                f"samples[{name!r}] must be S draws of shape {shape[1:]}, S alike for all sites, "
                f"got {tuple(value.shape)}; pass one draw as value[None], without group_by_chain."
            )
        values[name] = value.to(model.groups[0].device, dtype)
        if not prior.support.check(values[name]).all():
            raise ConfigurationError(
                f"samples[{name!r}] must be in the support of the site, {prior.support}, got "
                "values outside of it; pass constrained and finite values."
            )
        outside = (1,) * (model.max_plate_nesting - len(prior.batch_shape))
        values[name] = values[name].reshape(count, *outside, *prior.shape())
    return values


def is_linear(node: Mapping[str, Any]) -> bool:
    """Whether the update is linear in a site of a trace: a real one that is not marked."""
    return Site(node["name"], node["fn"], ()).is_real and not node["infer"].get("nonlinear")


def rows_of_a_pass(model: BayesianLoRAModel, batch: Batch) -> int:
    """The best number of rows in a pass: 256, or on a CPU those of 1,024 tokens, for its caches."""
    if model.groups[0].device.type != "cpu" or "input_ids" not in batch:
        return _ROWS
    ids, scored = batch["input_ids"], batch.get("option_mask")
    tokens = int(ids.numel()) // len(ids)
    if scored is not None:  # packed, so that the options' common question is run once
        tokens = ids.shape[-1] + (ids.shape[1] - 1) * int(scored.sum(-1).max())
    return max(1, min(_ROWS, _TOKENS_ON_CPU // tokens))
