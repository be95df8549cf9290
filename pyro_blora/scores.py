"""Scores of predictions against labels: of classes, of several labels at once, and of numbers."""

from contextlib import suppress

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import one_hot

from pyro_blora.prediction import Prediction, check_probabilities

#: The title of each score, by what it is multiplied there, and its format.
SHOWN: dict[str, tuple[str, float, str]] = {
    "acc": ("ACC %", 100, ".1f"),
    "f1": ("F1 %", 100, ".1f"),
    "ece": ("ECE %", 100, ".1f"),
    "gap": ("gap %", 100, "+.1f"),
    "auroc": ("AUROC %", 100, ".1f"),
    "false_positive_rate": ("false positives %", 100, ".1f"),
    "threshold": ("threshold", 1, ".3f"),
    "rmse": ("RMSE", 1, ".3f"),
    "crps": ("CRPS", 1, ".3f"),
    "coverage": ("90 % interval covers %", 100, ".1f"),
    "nll": ("NLL", 1, ".3f"),
    "nll_per_token": ("NLL per token", 1, ".3f"),
    "nll_per_text": ("NLL per text", 1, ".3f"),
    "perplexity": ("perplexity", 1, ".2f"),
    "brier": ("Brier", 1, ".3f"),
}

SURE = 0.95  # the confidence of answers that are counted apart


class Metrics(dict[str, float]):
    """Scores by name, which are attributes, too; ``n`` is the number of items; NLL in nats."""

    def __getattr__(self, name: str) -> float:
        if name in self:
            return self[name]
        raise AttributeError(f"The scores are {', '.join(self)}, got {name!r}.")

    def __str__(self) -> str:
        others = {name: (name, 1, ".3f") for name in self if name not in SHOWN and name != "n"}
        parts = (
            f"{title.removesuffix(' %')} {factor * self[name]:{form}}"
            for name, (title, factor, form) in {**SHOWN, **others}.items()
            if name in self
        )
        return "  ".join(parts)


def evaluate(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> Metrics:
    r"""Scores class probabilities against labels.

    .. math::
        \mathrm{ACC} &= \tfrac1n \textstyle\sum_i [\hat y_i = y_i], \quad
        \hat y_i = \arg\max_k p_{ik}\\
        \mathrm{ECE} &= \textstyle\sum_b \tfrac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|, \quad
        \mathrm{gap} = \mathrm{conf} - \mathrm{ACC}\\
        \mathrm{NLL} &= -\tfrac1n \textstyle\sum_i \log p_{i y_i}\\
        \mathrm{Brier} &= \tfrac1n \textstyle\sum_i \sum_k (p_{ik} - [k = y_i])^2

    The ECE sorts the confidence in the most probable class into bins ``[low, high)`` of equal
    width; the last one contains 1. The gap is above 0 for over-confidence, below 0 for too little
    confidence. A probability of 0 at a label counts as the smallest normal
    float32, so the NLL of an item is at most 87.3 nats. ``probs`` is ``(n, K)``, with 0 for an
    absent choice, and ``labels`` is ``(n,)``.

    Example::

        >>> metrics = evaluate(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> print(metrics)
        ACC 50.0  ECE 37.5  gap +12.5  NLL 0.490  Brier 0.312
    """
    nll, brier, ece = item_scores(probs, labels, num_bins=num_bins).mean(1).tolist()
    acc = float((probs.argmax(1) == labels).float().mean())
    gap = float(probs.double().amax(1).mean()) - acc
    return Metrics(acc=acc, ece=ece, gap=gap, nll=nll, brier=brier, n=len(labels))


def item_scores(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> Tensor:
    """The NLL and the Brier score of each item, and its term in the ECE, ``3 x n``.

    Their means over the items are those of :func:`evaluate`. An item's term in the ECE is its
    confidence minus 1 if it is right, times the sign of the sum of these differences in its bin.
    The variance of these terms is that of the ECE as long as no sign changes.
    """
    check_probabilities(probs, name="probs")
    probs, labels = probs.double(), labels.long()
    nll = -probs.clamp_min(torch.finfo(torch.float32).tiny).log().gather(1, labels[:, None])[:, 0]
    confidence = probs.amax(1)
    gap = confidence - (probs.argmax(1) == labels).double()
    bins = confidence_bins(confidence, num_bins)
    sign = gap.new_zeros(num_bins).index_add(0, bins, gap).sign()[bins]
    return torch.stack([nll, (probs - one_hot(labels, probs.shape[1])).square().sum(1), sign * gap])


def sure_answers(probs: Tensor, labels: Tensor) -> tuple[int, int]:
    """The number of answers of 95 % confidence or more, and how many of them are wrong."""
    sure = (probs.amax(-1) >= SURE) & (labels >= 0)  # -100 stands for a missing label
    return int(sure.sum()), int((sure & (probs.argmax(-1) != labels)).sum())


def ece_by_chance(probs: Tensor, *, num_bins: int = 15) -> float:
    r"""The ECE that a perfectly calibrated classifier has on average on the same number of items.

    .. math::
        \operatorname{E} \textstyle\sum_b \tfrac1n
        \bigl| \sum_{i \in b} (z_i - \max_k p_{ik}) \bigr|, \qquad
        z_i \sim \mathrm{Bernoulli}(\max_k p_{ik})

    Compare the ECE of :func:`evaluate` with this one, but do not subtract it, because chance and
    miscalibration do not add up. It is the mean over 1,000 draws of labels with a fixed seed.

    Reference: R. Roelofs et al. (2022), "Mitigating Bias in Calibration Error Estimation",
    arXiv:2012.08668.
    """
    check_probabilities(probs, name="probs")
    confidence = probs.detach().float().cpu().amax(-1)
    index = confidence_bins(confidence, num_bins)
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(10):
        right = torch.bernoulli(confidence.expand(100, -1), generator=generator)
        gaps = confidence.new_zeros(100, num_bins).index_add(1, index, right - confidence)
        total += float(gaps.abs().sum(1).mean())
    return total / 10 / len(confidence)


def confidence_bins(confidence: Tensor, num_bins: int) -> Tensor:
    """The index of the bin in which :func:`evaluate` puts each confidence, ``(n,)``."""
    confidence = confidence.float()  # like the edges of torchmetrics
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float32, device=confidence.device)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=num_bins - 1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that an item of the second set scores higher than one of the first.

    This is the area under the receiver operating characteristic. A tie counts half; 0.5 is chance.
    """
    truth = [0] * len(inside) + [1] * len(outside)
    return float(roc_auc_score(truth, torch.cat([inside, outside]).double().cpu().numpy()))


def evaluate_numbers(prediction: Prediction, labels: Tensor) -> Metrics:
    r"""Scores predictions of numbers, such as those of ``Regression``, against labels, ``(n,)``.

    They are the NLL in nats, the root mean squared error of the mean, the share of labels within
    the 90 % interval, and for normal distributions the continuous ranked probability score,

    .. math::
        \mathrm{CRPS} = \operatorname{E} |Y - y| - \tfrac12 \operatorname{E} |Y - Y'|

    with independent draws :math:`Y, Y'` of the prediction. A count has no ``cdf`` in torch, and
    then neither interval nor CRPS.

    Reference: E. Grimit et al. (2006), "The Continuous Ranked Probability Score for Circular
    Variables and its Application to Mesoscale Forecast Ensemble Verification".

    Example::

        >>> from torch.distributions import Normal
        >>> rating = Prediction(torch.zeros(1, 3), lambda m: Normal(m, 1.0))
        >>> print(evaluate_numbers(rating, torch.tensor([0.0, 1.0, 2.0])))
        RMSE 1.291  CRPS 0.763  90 % interval covers 66.7  NLL 1.752
    """
    labels = labels.to(prediction.mean)
    scores = Metrics(
        nll=-float(prediction.log_prob(labels).mean()),
        rmse=float((prediction.mean - labels).square().mean().sqrt()),
    )
    with suppress(NotImplementedError):
        low, high = prediction.interval(0.9)
        scores["coverage"] = float(((low <= labels) & (labels <= high)).double().mean())
    if isinstance(normal := prediction.distribution, Normal):
        apart = normal.loc.unsqueeze(1) - normal.loc
        variance = normal.variance.unsqueeze(1) + normal.variance
        between = _distance(apart, variance.sqrt()).mean((0, 1))
        to_label = _distance(normal.loc - labels, normal.scale).mean(0)
        scores["crps"] = float((to_label - between / 2).mean())
    scores["n"] = len(labels)
    return scores


def _distance(mean: Tensor, scale: Tensor) -> Tensor:
    """The mean of the absolute value of a normal variable."""
    standard, z = Normal(0.0, 1.0), mean / scale
    return scale * (2 * standard.log_prob(z).exp() + z * (2 * standard.cdf(z) - 1))
