"""One pass that gives nearly what draws give: a temperature of the posterior mean's scores."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.options import check_count
from pyro_blora.posterior.batches import Collate, batches_of, to_device
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import draws_apart, posteriors_of
from pyro_blora.posterior.linearized import linearized_logits
from pyro_blora.posterior.predictive import logits_of_draws, sample_updates

_ROWS = 128  # distributions of a batch that are read, for one number needs no more


def best_temperature(excess: Tensor) -> float:
    r"""The ``T`` that minimizes :math:`\sum_i \log \sum_k e^{z_{ik} / T}`, between 0.01 and 100.

    ``excess`` are logits less their mean under the target, ``(n, K)``: of a label less its logit.
    The sum is convex in ``1 / T``. It is 1 if every T is as good.
    """
    if not bool((excess < math.inf).all()):
        raise ValueError(
            "Logits must be finite, or -inf at an absent choice that is no label: look for NaN."
        )
    present = excess.masked_fill(excess.isneginf(), 0)  # where the probability is 0 as well
    if not present.any():
        return 1.0
    low, high = 0.01, 100.0
    for _ in range(48):
        middle = (low * high) ** 0.5
        if float(((excess / middle).softmax(-1) * present).sum()) <= 0:
            high = middle
        else:
            low = middle
    return (low * high) ** 0.5


@torch.no_grad()
def distill(
    model: BayesianLoRAModel,
    guide: nn.Module,
    data: Sequence[Any] | DataLoader[Any],
    *,
    linearized: bool,
    collate: Collate | None = None,
    length: Callable[[Any], int] | None = None,
    num_samples: int = 16,
    max_examples: int = 64,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> float:
    """Sets the temperature of ``model``, and gives it; see ``BayesianLoRA.distill``."""
    model.check_on_network()
    check_count("num_samples", num_samples, 2)
    if not model.enabled:
        raise ConfigurationError(
            "distill must have an adapter that is on; call it outside of disable_adapter()."
        )
    if not isinstance(data, DataLoader):
        chosen = random.Random(0).sample(range(len(data)), min(max_examples, len(data)))
        data = [data[i] for i in chosen]
    hide = None if progress is None else not progress
    batches = batches_of(data, collate, length, batch_size)
    device, seen = model.groups[0].device, 0
    excess: list[Tensor] = []
    with draws_apart(guide, device), model.autocast(precision):
        for batch in tqdm(batches, desc="distill", disable=hide, unit="batch"):
            batch = to_device(batch, device)
            if not excess and _is_point(model, guide, batch, num_samples):
                raise ConfigurationError(
                    "distill must have draws that differ, got a posterior whose draws are all "
                    "alike; take a guide that has a width, such as MatrixNormal(), or call finish."
                )
            (scores,) = next(logits_of_draws(model, guide, batch, 0)) * model.temperature
            drawn = logits_of_draws(model, guide, batch, num_samples)
            if linearized:
                drawn = iter([linearized_logits(model, guide, batch, num_samples)])
            scores = scores.flatten(0, -2)
            some = slice(None, None, math.ceil(len(scores) / _ROWS))
            parts = (d.flatten(1, -2)[:, some].double().softmax(-1).sum(0) for d in drawn)
            scores, probs = scores[some].double(), functools.reduce(torch.add, parts) / num_samples
            mean = (probs * scores.masked_fill(scores.isneginf(), 0)).sum(-1, keepdim=True)
            excess.append((scores - mean).cpu())
            if (seen := seen + model.likelihood.examples(batch)) >= max_examples:
                break
    most = max(rows.shape[-1] for rows in excess)  # a choice that an item does not have is absent
    rows = [pad(rows, (0, most - rows.shape[-1]), value=-torch.inf) for rows in excess]
    model.temperature.fill_(best_temperature(torch.cat(rows)))
    return float(model.temperature)


def _is_point(model: BayesianLoRAModel, guide: nn.Module, batch: Batch, count: int) -> bool:
    """Whether all draws of a posterior are alike."""
    drawn = sample_updates(model, guide, count * posteriors_of(guide, batch), batch).values()
    factors = [f for u in drawn for f in (u.A, u.B, u.core) if f is not None and f.dim() > 3]
    alike = all(bool((f == f[:1]).all()) for f in factors)
    return alike and not any(update.is_noisy for update in drawn)
