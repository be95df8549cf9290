"""Temperatures: of the average of draws, from held-out labels, and of one pass, from draws."""

import functools
import math
from collections.abc import Iterable, Sequence

import pyro
import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_blora.errors import BatchError, ConfigurationError, check_count
from pyro_blora.likelihoods import Batch, Likelihood
from pyro_blora.posterior.guide import draws_apart
from pyro_blora.posterior.posterior import Posterior

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


def temperature_of_draws(likelihood: Likelihood, parts: Sequence[tuple[Tensor, Tensor]]) -> float:
    r"""The temperature of the average of draws, fitted to labels, of which each part has some.

    .. math::

        \hat T = \arg\max_T \sum_i \log \tfrac1S \sum_s
        p(y_i \mid z_{si}, T) + \log \mathcal{N}(\log T; 0, 1),

    between 0.01 and 100, where :math:`p` is a softmax of :math:`z / T`, or what the likelihood
    makes of it. The prior of its logarithm keeps a few labels from moving it far. A part is
    logits, ``(S, n, ...)``, and their labels, ``(n, ...)``. Raises ValueError if no temperature
    gives the labels a finite loss.
    """
    parts = [(z.double(), y.expand(len(z), *y.shape)) for z, y in parts]

    def loss(log_temperature: float) -> float:
        temperature, nll = torch.tensor(log_temperature).double().exp(), 0.0
        for logits, labels in parts:
            tempered = likelihood.tempered(logits, temperature)
            logp = likelihood.distribution(tempered, labels).log_prob(labels)
            nll += math.log(len(logp)) * logp.shape[1] - float(logp.logsumexp(0).sum())
        return nll + 0.5 * log_temperature**2

    with pyro.validation_enabled(False):
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
def calibrate(posterior: Posterior, batches: Iterable[Batch], num_samples: int | None) -> float:
    """Fits both temperatures to the labels of batches; see :meth:`BayesianLoRA.calibrate`."""
    model, draws = posterior.model, posterior.method.draws(num_samples)
    likelihood = model.likelihood
    if not (likelihood.has_temperature and model.enabled):
        raise ConfigurationError(
            f"calibrate must have a likelihood of labels and an adapter that is on, got "
            f"{type(likelihood).__name__}; call it outside of disable_adapter(), not for text, and "
            "for a likelihood without classes if it defines tempered()."
        )
    by_mean: list[tuple[Tensor, Tensor]] = []
    by_draws: list[tuple[Tensor, Tensor]] = []
    with draws_apart(posterior.guide, model.groups[0].device):
        for given in batches:
            batch = model.prepared(given)
            labels = likelihood.labels(batch)
            if labels is None:
                raise BatchError("A batch must have labels to calibrate by, got none; add them.")
            mean = next(posterior.logits(batch, 0, tempered=False))
            likelihood.check_labels(labels, mean[0])
            drawn = torch.cat([*posterior.logits(batch, draws, tempered=False)]) if draws else mean
            by_mean.append((mean.cpu(), labels.cpu()))
            by_draws.append((drawn.cpu(), labels.cpu()))
    both = [temperature_of_draws(likelihood, each) for each in (by_draws, by_mean)]
    model.temperature.fill_(both[0])
    model.mean_temperature.fill_(both[1])
    return float(model.temperature)


@torch.no_grad()
def distill(
    posterior: Posterior, batches: Iterable[Batch], num_samples: int, max_examples: int
) -> float:
    """Fits the temperature of the mean to the draws; see :meth:`BayesianLoRA.distill`."""
    check_count("num_samples", num_samples, 2)
    model, seen = posterior.model, 0
    if not (model.likelihood.is_categorical and model.enabled):
        raise ConfigurationError(
            "distill must have a likelihood of classes or text and an adapter that is on, got "
            f"{type(model.likelihood).__name__}; call it outside of disable_adapter()."
        )
    excess: list[Tensor] = []
    with draws_apart(posterior.guide, model.groups[0].device):
        for given in batches:
            batch = model.prepared(given)
            if not excess and posterior.is_point(num_samples):
                raise ConfigurationError(
                    "distill must have draws that differ, got a posterior whose draws are all "
                    "alike; take a guide with a width, such as MatrixNormal(), or call finish."
                )
            (scores,) = next(posterior.logits(batch, 0, linearized=False, tempered=False))
            drawn = posterior.logits(batch, num_samples)
            scores = scores.flatten(0, -2)
            some = slice(None, None, math.ceil(len(scores) / _ROWS))
            parts = (d.flatten(1, -2)[:, some].double().softmax(-1).sum(0) for d in drawn)
            scores, probs = scores[some].double(), functools.reduce(torch.add, parts) / num_samples
            mean = (probs * scores.masked_fill(scores.isneginf(), 0)).sum(-1, keepdim=True)
            excess.append((scores - mean).cpu())
            if (seen := seen + batch.examples) >= max_examples:
                break
    most = max(part.shape[-1] for part in excess)  # choices, of which some items have fewer
    excess = [pad(part, (0, most - part.shape[-1]), value=-torch.inf) for part in excess]
    model.mean_temperature.fill_(best_temperature(torch.cat(excess)))
    return float(model.mean_temperature)
