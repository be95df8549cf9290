"""Logits of the adapted network under posterior draws."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.network.adapter import in_mode
from pyro_blora.network.shortcuts import FrozenPrefix
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel, repeat_batch
from pyro_blora.posterior.given_draws import Samples, draws_given
from pyro_blora.posterior.sample_updates import draws_in_pairs, sample_updates

__all__ = ["log_predictive", "logits_of_draws", "rows_of_a_pass"]

_ROWS, _TOKENS_ON_CPU = 256, 1024


def rows_of_a_pass(model: BayesianLoRAModel, batch: Batch) -> int:
    """How many rows a pass has best: 256, or on a CPU as many as have about 1,024 tokens.

    A processor is at its best with so few already, and what a block puts out stays in its caches
    (ten draws of 8 x 64 tokens took a tenth less time).
    """
    if model.groups[0].device.type != "cpu" or "input_ids" not in batch:
        return _ROWS
    ids, scored = batch["input_ids"], batch.get("option_mask")
    tokens = int(ids.numel()) // len(ids)
    if scored is not None:  # packed, most often: what options share is run once
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
    """The logits of a batch under each posterior draw, in pairs, several draws in one pass.

    Where there are ``samples``, under each of them instead, in their order.

    The network is evaluated with dropout off, and left in the mode it was in. Arguments are those
    of :meth:`BayesianLoRA.predict <pyro_blora.BayesianLoRA.predict>`.

    Yields:
        ``(draws, B, ..., C)``.
    """
    if num_samples < 0:
        raise ConfigurationError(
            f"num_samples={num_samples} must be 0 (posterior mean) or a number of draws."
        )
    model.check_on_network()
    examples = model.likelihood.examples(batch)
    # An amortised posterior has a draw for each example, others one for all of them.
    each = examples if getattr(guide, "reads_context", False) else 1
    if samples is None:
        draw = draws_in_pairs(model, guide, batch, each)
    else:
        num_samples, draw = draws_given(model, samples)
    if max_rows is None:
        max_rows = rows_of_a_pass(model, batch)
    shows = batch.get("output_hidden_states") or batch.get("output_attentions")
    plain = num_samples < 2 or shows or torch.is_grad_enabled()
    blocks = [] if plain else model.skippable_blocks()
    prefix = FrozenPrefix(blocks, model.shortcuts)
    most = max(1, min(num_samples, max_rows // examples))
    done = 0
    while done < max(1, num_samples):
        # what the frozen blocks put out is recorded from one draw alone
        draws = 1 if (blocks and not done) or not num_samples else min(most, num_samples - done)
        with in_mode(model.net, training=False):  # between two passes the network is the caller's
            updates = draw(draws) if num_samples else sample_updates(model, guide, 0, batch)
            with prefix.copies(draws), model.applied(updates) as net:
                logits = model.likelihood.logits(net, repeat_batch(batch, draws))
        yield logits.unflatten(0, (draws, examples))
        done += draws


def log_predictive(
    model: BayesianLoRAModel,
    guide: nn.Module,
    batch: Batch,
    num_samples: int,
    max_rows: int | None = None,
    samples: Samples | None = None,
) -> Tensor:
    """``log 1/S sum_s p(labels | U_s)`` of each example in nats, ``(B,)``."""
    likelihood = model.likelihood
    likelihood.examples(batch)
    labels = likelihood.labels(batch)
    if labels is None:
        raise BatchError("The batch has no labels to take the probability of.")
    parts = []
    for logits in logits_of_draws(model, guide, batch, num_samples, max_rows, samples):
        observed = labels.expand(len(logits), *labels.shape)
        likelihood.check_labels(observed, logits)
        parts.append(likelihood.distribution(logits, observed).log_prob(observed))
    joined = torch.cat(parts)
    return joined.logsumexp(0) - math.log(len(joined))
