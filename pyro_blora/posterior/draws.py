"""Logits of the wrapped network under posterior draws."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from pyro_blora.adapted import Adapted
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.network.fast_path import all_rows_seen
from pyro_blora.network.kept_prefix import KeptPrefix, can_keep
from pyro_blora.network.modes import in_mode
from pyro_blora.network.shared_prefix import (
    can_share,
    frozen_blocks,
    shared_prefix,
    whole_if_frozen,
)
from pyro_blora.posterior.bayesian_lora_model import repeat_batch
from pyro_blora.posterior.linearised import logit_jacobian
from pyro_blora.posterior.structured_guide import StructuredGuide

__all__ = ["linearised_logits", "log_predictive", "logits_of_draws", "rows_of_a_pass"]

_ROWS, _TOKENS_ON_CPU = 256, 1024


def rows_of_a_pass(blora: Adapted, batch: Batch) -> int:
    """How many rows a pass has best: 256, or on a CPU as many as have about 1,024 tokens.

    A processor is at its best with so few already, and what a block puts out stays in its caches
    (ten draws of 8 x 64 tokens took a tenth less time). Where blocks below the adapters run once a
    pass, because what they put out cannot be kept for the next one, a large pass shares them among
    more draws.
    """
    if blora.model.groups[0].device.type != "cpu" or "input_ids" not in batch:
        return _ROWS
    frozen = frozen_blocks(blora.net, [adapter.name for adapter in blora.model.adapters])
    if frozen and not can_keep(blora.net, frozen) and can_share(blora.net, frozen):
        return _ROWS
    ids, scored = batch["input_ids"], batch.get("option_mask")
    tokens = int(ids.numel()) // len(ids)
    if scored is not None:  # packed, most often: what options share is run once
        tokens = ids.shape[-1] + (ids.shape[1] - 1) * int(scored.sum(-1).max())
    return max(1, min(_ROWS, _TOKENS_ON_CPU // tokens))


def logits_of_draws(
    blora: Adapted, batch: Batch, num_samples: int, max_rows: int | None = None
) -> Iterator[Tensor]:
    """The logits of a batch under each posterior draw, several draws in one pass.

    Args:
        blora: the adapted network; evaluated with dropout off, left in the mode it was in.
        batch: what the likelihood takes.
        num_samples: number of draws ``S``; 0 for the posterior mean, without conditional noise.
        max_rows: as many draws share a pass as keep ``draws x B`` within this, at least one.
            Default: see :func:`rows_of_a_pass`.

    Yields:
        ``(draws, B, ..., C)``.

    Raises:
        ConfigurationError: ``num_samples`` is negative.
        BatchError: the batch is not what the likelihood takes.
    """
    if num_samples < 0:
        raise ConfigurationError(
            f"num_samples={num_samples} must be 0 (posterior mean) or a number of draws."
        )
    likelihood, model = blora.likelihood, blora.model
    examples = likelihood.examples(batch)
    if num_samples == 0:
        with (
            in_mode(blora.net, training=False),
            model.applied(blora.sample_updates(0, batch)) as net,
        ):
            logits = likelihood.logits(net, batch)
        yield logits.unsqueeze(0)
        return
    if max_rows is None:
        max_rows = rows_of_a_pass(blora, batch)
    # An amortised posterior has a draw for each example, others one for all of them.
    each = examples if getattr(blora.guide, "reads_context", False) else 1
    most = max(1, min(num_samples, max_rows // examples))
    names = [adapter.name for adapter in model.adapters]
    frozen = frozen_blocks(blora.net, names)
    alone = all_rows_seen(blora.net, frozen, batch)
    kept = KeptPrefix(
        frozen if num_samples > most and not alone and can_keep(blora.net, frozen) else []
    )
    for start in range(0, num_samples, most):
        draws = min(most, num_samples - start)
        with in_mode(blora.net, training=False):  # between two passes the network is the caller's
            updates = blora.sample_updates(draws * each, batch)
            with (
                model.applied(updates) as net,
                nullcontext() if alone else shared_prefix(net, model.adapters, draws),
                kept.in_place(),
                whole_if_frozen(net, names) if kept.blocks else nullcontext(),
            ):
                logits = likelihood.logits(net, repeat_batch(batch, draws))
        yield logits.unflatten(0, (draws, examples))


@torch.no_grad()
def linearised_logits(blora: Adapted, batch: Batch, num_samples: int) -> Tensor:
    r"""Draws of the logits by their first-order expansion in the sites at the guide's centre.

    .. math::

        f(U_s) \approx f(\bar U) + J (U_s - \bar U), \qquad U_s \sim q,

    for any guide family, in unconstrained coordinates. The network runs forward once and backward
    once for each class but the first; a draw costs one product with :math:`J`.

    Args:
        blora: the adapted network; evaluated with dropout off, left in the mode it was in.
        batch: what the likelihood takes.
        num_samples: number of draws ``S``.

    Returns:
        ``(S, B, C)``.

    Raises:
        ConfigurationError: ``num_samples`` is below 1, the guide is none of this library, or the
            likelihood has more than one choice for each example.
    """
    if num_samples < 1:
        raise ConfigurationError(f"num_samples={num_samples} must be at least 1 to linearise.")
    if any(update.is_noisy for update in blora.sample_updates(1, batch).values()):
        raise ConfigurationError(
            "A linearisation has no place for the noise of a conditional; use num_samples draws, "
            "or a prior with conditional='deterministic'."
        )
    with in_mode(blora.net, training=False):
        logits, jacobian = logit_jacobian(blora, batch)
    assert isinstance(blora.guide, StructuredGuide)
    blora.guide.center(batch)  # an amortised family sees every example by itself again
    with torch.autocast(logits.device.type, enabled=False):
        return logits + _shift(blora.guide, logits, jacobian, num_samples)


def _shift(
    guide: StructuredGuide, logits: Tensor, jacobian: dict[str, Tensor], num_samples: int
) -> Tensor:
    shift = torch.zeros(num_samples, *logits.shape, dtype=logits.dtype, device=logits.device)
    for name, family in guide.families().items():
        site, law = family.site, family.distribution()
        centre = family.center()
        centre = centre if site.is_real else site.transform.inv(centre)
        # draws x [B or one for all] x numbers
        moved = law.sample(torch.Size([num_samples])) - centre
        size = site.shape.numel()
        J = jacobian[name].reshape(*logits.shape, size).to(moved.dtype)
        moved = moved.reshape(num_samples, -1, size).expand(-1, len(logits), -1)
        shift += torch.einsum("bck,sbk->sbc", J, moved)
    return shift


def log_predictive(
    blora: Adapted, batch: Batch, num_samples: int, max_rows: int | None = None
) -> Tensor:
    r"""``log 1/S sum_s p(labels | U_s)`` of each example in nats, ``(B,)``.

    Raises:
        BatchError: the batch has no labels.
    """
    likelihood = blora.likelihood
    likelihood.examples(batch)
    labels = likelihood.labels(batch)
    if labels is None:
        raise BatchError("The batch has no labels to take the probability of.")
    parts = []
    for logits in logits_of_draws(blora, batch, num_samples, max_rows):
        observed = labels.expand(len(logits), *labels.shape)
        likelihood.check_labels(observed, logits)
        parts.append(likelihood.distribution(logits, observed).log_prob(observed))
    joined = torch.cat(parts)
    return joined.logsumexp(0) - torch.tensor(float(len(joined))).log()
