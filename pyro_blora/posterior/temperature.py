"""Temperatures: of the average of draws, from held-out labels, and of one pass, from draws."""

import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods import Batch
from pyro_blora.methods import Method
from pyro_blora.options import check_count
from pyro_blora.posterior.batches import Collate, batches_of
from pyro_blora.posterior.bayesian_lora_model import BayesianLoRAModel
from pyro_blora.posterior.guide import draws_apart, posteriors_of
from pyro_blora.posterior.linearized import predictive_logits, untempered_logits
from pyro_blora.posterior.predictive import logits_of_draws, sample_updates

_NOT_FINITE = (
    "Logits must be finite, or -inf at an absent choice that is not the label, got others; look "
    "for NaN."
)
_ROWS = 128  # distributions used of each batch, which is enough to fit a single number


def best_temperature(excess: Tensor) -> float:
    r"""The ``T`` that minimizes :math:`\sum_i \log \sum_k e^{z_{ik} / T}`, between 0.01 and 100.

    ``excess``, ``(n, K)``, are logits minus their mean under the target; for a label as the target
    that mean is its logit. The sum is convex in ``1 / T``. If every T is equally good, T is 1.
    """
    if not bool((excess < math.inf).all()):
        raise ValueError(_NOT_FINITE)
    present = excess.masked_fill(excess.isneginf(), 0)  # the probability is 0 there
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


def temperature_of_draws(logits: Tensor, labels: Tensor) -> float:
    r"""The temperature of the average of draws, ``(S, n, K)``, fitted to labels, ``(n,)``.

    .. math::

        \hat T = \arg\max_T \sum_i \log \tfrac1S \sum_s
        \mathrm{softmax}(z_{si} / T)_{y_i} + \log \mathcal{N}(\log T; 0, 1),

    between 0.01 and 100. The prior of its logarithm keeps a few labels from moving it far. Raises
    ValueError if no temperature gives the labels a finite loss.
    """
    logits = logits.double()
    chosen = labels.long().expand(len(logits), -1).unsqueeze(-1)

    def loss(log_temperature: float) -> float:
        logp = (logits / math.exp(log_temperature)).log_softmax(-1).gather(-1, chosen).squeeze(-1)
        nll = math.log(len(logp)) * logp.shape[1] - float(logp.logsumexp(0).sum())
        return nll + 0.5 * log_temperature**2

    if not math.isfinite(loss(0.0)):
        raise ValueError(_NOT_FINITE)
    # the sum may have several minima, so the best of a grid is refined
    step, best = 0.25, 0.0
    grid = [step * k for k in range(-18, 19)]
    while step > 1e-3:
        best = min(grid, key=loss)
        grid = [best + step * k / 4 for k in range(-4, 5)]
        step /= 4
    return min(max(math.exp(best), 0.01), 100.0)


@torch.no_grad()
def calibrate(
    model: BayesianLoRAModel,
    guide: nn.Module,
    method: Method,
    data: Sequence[Any] | DataLoader[Any],
    *,
    collate: Collate | None = None,
    num_samples: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> float:
    """Fits the temperatures of predictions to labels that the adapter has not learned from.

    One is for the average of draws, as ``predict`` makes it, and one for the posterior mean (see
    :func:`temperature_of_draws`). ``fit`` calls this at its end with the examples that it holds
    out; call it yourself after your own training loop. Another ``fit`` resets both to 1.

    Args:
        model: the model of the adapter.
        guide: its guide.
        method: its method, which says how draws are made.
        data: labeled examples, or a ``DataLoader`` of batches, that were not in the training.
        collate: makes a batch from a list of examples; by default torch's.
        num_samples: number of posterior draws. Default: as in ``predict``.
        batch_size: as in ``fit``.
        precision: as in ``fit``.
        progress: as in ``fit``.

    Returns:
        The temperature of the draws; above 1 if they were over-confident.

    Raises:
        ConfigurationError: the likelihood has no classes, or the adapter is off.
    """
    likelihood, draws = model.likelihood, method.draws(num_samples)
    if not (likelihood.has_classes and model.enabled):
        raise ConfigurationError(
            f"calibrate must have a likelihood with classes and an adapter that is on, got "
            f"{type(likelihood).__name__}; call it outside of disable_adapter(), and not for text."
        )
    hide = None if progress is None else not progress
    batches = batches_of(data, collate, batch_size)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with draws_apart(guide, model.groups[0].device), model.autocast(precision):
        for given in tqdm(batches, desc="calibrate", disable=hide, unit="batch"):
            batch = model.prepared(given)
            labels = likelihood.labels(batch)
            if labels is None:
                raise BatchError("A batch must have labels to calibrate by, got none; add them.")
            mean = next(logits_of_draws(model, guide, batch, 0))
            likelihood.check_labels(labels, mean[0])
            drawn = mean  # of a point, which needs no second pass
            if draws:
                drawn = torch.cat([*untempered_logits(model, guide, method, batch, draws)])
            found.append((mean.cpu(), drawn.cpu(), labels.cpu()))
    by_mean, by_draws, of = zip(*found, strict=True)
    both = [temperature_of_draws(_joined(logits), torch.cat(of)) for logits in (by_draws, by_mean)]
    model.temperature.fill_(both[0])
    model.mean_temperature.fill_(both[1])
    return float(model.temperature)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Logits of all batches, ``(S, n, K)``; items with fewer choices are padded."""
    most = max(part.shape[-1] for part in parts)
    return torch.cat([pad(z, (0, most - z.shape[-1]), value=-torch.inf) for z in parts], -2)


@torch.no_grad()
def distill(
    model: BayesianLoRAModel,
    guide: nn.Module,
    method: Method,
    data: Sequence[Any] | DataLoader[Any],
    *,
    collate: Collate | None = None,
    num_samples: int = 16,
    max_examples: int = 64,
    batch_size: int = 8,
    precision: str = "auto",
    progress: bool | None = None,
) -> float:
    r"""Makes one pass nearly as calibrated as the average of draws, without a label.

    The temperature of the posterior mean's scores becomes the one that minimizes

    .. math::
        \sum_i \mathrm{KL}\Bigl[\tfrac1S \textstyle\sum_s p(y \mid x_i, U_s) \,\Big\|\,
        \mathrm{softmax}\bigl(z(x_i) / T\bigr)\Bigr].

    ``predict(batch, 0)``, ``generate(num_samples=0)``, the saved adapter and its export use it from
    then on, in place of the one that ``calibrate`` found for the mean; the network under
    ``posterior()`` does not. Another ``fit`` resets it to 1. For text each ``x_i`` is the text
    before a token.

    Args:
        model: the model of the adapter.
        guide: its guide.
        method: its method, which says how draws are made.
        data: inputs, such as the training set: examples, or a ``DataLoader``. Labels are ignored,
            except that for text they say which tokens are scored.
        collate: makes a batch from a list of examples; by default torch's.
        num_samples: number of posterior draws ``S``.
        max_examples: number of examples to read: a fixed random choice, or the first ones of a
            ``DataLoader``.
        batch_size: as in ``fit``.
        precision: as in ``fit``.
        progress: as in ``fit``.

    Returns:
        The temperature, between 0.01 and 100; above 1 if the mean was more confident than the
        draws.

    Raises:
        ConfigurationError: all draws are equal, as those of ``Delta()`` are.

    Reference:
        H. Vejendla et al. (2025), arXiv:2505.11731, which trains a student on this divergence.
    """
    model.check_attached()
    check_count("num_samples", num_samples, 2)
    if not model.enabled:
        raise ConfigurationError(
            "distill must have an adapter that is on; call it outside of disable_adapter()."
        )
    if not isinstance(data, DataLoader):
        chosen = random.Random(0).sample(range(len(data)), min(max_examples, len(data)))
        data = [data[i] for i in chosen]
    hide = None if progress is None else not progress
    batches = batches_of(data, collate, batch_size)
    device, seen = model.groups[0].device, 0
    excess: list[Tensor] = []
    with draws_apart(guide, device), model.autocast(precision):
        for given in tqdm(batches, desc="distill", disable=hide, unit="batch"):
            batch = model.prepared(given)
            if not excess and _is_point(model, guide, batch, num_samples):
                raise ConfigurationError(
                    "distill must have draws that differ, got a posterior whose draws are all "
                    "alike; take a guide with a width, such as MatrixNormal(), or call finish."
                )
            (scores,) = next(logits_of_draws(model, guide, batch, 0))
            drawn = predictive_logits(model, guide, method, batch, num_samples)
            scores = scores.flatten(0, -2)
            some = slice(None, None, math.ceil(len(scores) / _ROWS))
            parts = (d.flatten(1, -2)[:, some].double().softmax(-1).sum(0) for d in drawn)
            scores, probs = scores[some].double(), functools.reduce(torch.add, parts) / num_samples
            mean = (probs * scores.masked_fill(scores.isneginf(), 0)).sum(-1, keepdim=True)
            excess.append((scores - mean).cpu())
            if (seen := seen + batch.examples) >= max_examples:
                break
    model.mean_temperature.fill_(best_temperature(_joined(excess)))
    return float(model.mean_temperature)


def _is_point(model: BayesianLoRAModel, guide: nn.Module, batch: Batch, count: int) -> bool:
    """Whether all draws of a posterior are equal."""
    drawn = sample_updates(model, guide, count * posteriors_of(guide, batch), batch).values()
    factors = [f for u in drawn for f in (u.A, u.B, u.core) if f is not None and f.dim() > 3]
    alike = all(bool((f == f[:1]).all()) for f in factors)
    return alike and not any(update.is_noisy for update in drawn)
