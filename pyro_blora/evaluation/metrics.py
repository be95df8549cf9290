"""Accuracy, calibration and proper scores of class probabilities, and what to do about them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

from pyro_blora.errors import ConfigurationError
from pyro_blora.posterior.prediction import Prediction, check_probabilities

__all__ = [
    "CRITERIA",
    "Metrics",
    "auroc",
    "doubts",
    "ece_by_chance",
    "evaluate",
    "fit_temperature",
    "rank",
    "risk_coverage",
]

CRITERIA = ("mutual_information", "entropy", "random")


@dataclass(frozen=True)
class Metrics:
    """Scores of a classifier on ``n`` items; see :func:`evaluate`.

    Accuracy and expected calibration error are fractions, the mean negative log-likelihood is in
    nats, and the Brier score between 0 and 2.
    """

    acc: float
    ece: float
    nll: float
    brier: float
    n: int

    def __str__(self) -> str:
        return (
            f"ACC {100 * self.acc:.1f}  ECE {100 * self.ece:.1f}  "
            f"NLL {self.nll:.3f}  Brier {self.brier:.3f}"
        )


def evaluate(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> Metrics:
    r"""Score class probabilities against labels.

    .. math::
        \mathrm{ACC} &= \tfrac1n \textstyle\sum_i [\hat y_i = y_i], \quad
        \hat y_i = \arg\max_k p_{ik}\\
        \mathrm{ECE} &= \textstyle\sum_b \tfrac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|\\
        \mathrm{NLL} &= -\tfrac1n \textstyle\sum_i \log p_{i y_i}\\
        \mathrm{Brier} &= \tfrac1n \textstyle\sum_i \sum_k (p_{ik} - [k = y_i])^2

    The ECE is of the most probable class, with bins ``[low, high)`` of equal width, of which the
    last contains 1. A probability of 0 at a label counts as the smallest normal float32, which
    bounds an item's NLL by 87.3 nats, whatever the dtype of ``probs``.

    Args:
        probs: probabilities of shape ``(n, K)``, K >= 2; absent choices have probability 0.
        labels: classes of shape ``(n,)``, integers from 0 to K - 1.
        num_bins: number of bins of the ECE.

    Reference:
        M. P. Naeini et al. (2015), "Obtaining Well Calibrated Probabilities Using Bayesian
        Binning"; G. W. Brier (1950), "Verification of Forecasts Expressed in Terms of Probability".

    Example::

        >>> metrics = evaluate(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> print(metrics)
        ACC 50.0  ECE 37.5  NLL 0.490  Brier 0.312
    """
    check_probabilities(probs, name="probs")
    # torchmetrics takes anything above 1, if by rounding, for logits, and has a bin of its own for
    # a confidence of exactly 1
    top = probs.float().clamp(0, 1 - torch.finfo(torch.float32).eps / 2)
    k = probs.shape[1]
    probs, labels = probs.double(), labels.long()
    log_probs = probs.clamp(min=torch.finfo(torch.float32).tiny).log()
    one_hot = torch.nn.functional.one_hot(labels, k)
    return Metrics(
        acc=float(multiclass_accuracy(top, labels, num_classes=k, average="micro")),
        ece=float(multiclass_calibration_error(top, labels, num_classes=k, n_bins=num_bins)),
        nll=float(torch.nn.functional.nll_loss(log_probs, labels)),
        brier=float((probs - one_hot).square().sum(-1).mean()),
        n=len(labels),
    )


def ece_by_chance(probs: Tensor, *, num_bins: int = 15) -> float:
    r"""The expected calibration error that a calibrated classifier shows on as many items.

    .. math::
        \operatorname{E} \textstyle\sum_b \tfrac1n
        \bigl| \sum_{i \in b} (z_i - \max_k p_{ik}) \bigr|, \qquad
        z_i \sim \mathrm{Bernoulli}(\max_k p_{ik})

    An ECE is never below zero, so that a calibrated classifier, too, has one on finitely many
    items: read that of :func:`evaluate` beside this one. They are not to be subtracted, for luck
    and error do not add up. The mean of 1,000 draws of labels, always the same ones.

    Args:
        probs: probabilities of shape ``(n, K)``, K >= 2.
        num_bins: number of bins, as of the ECE.

    Reference:
        J. Broecker, L. A. Smith (2007), "Increasing the Reliability of Reliability Diagrams";
        R. Roelofs et al. (2022), "Mitigating Bias in Calibration Error Estimation",
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
    """The bin that the ECE of :func:`evaluate` has each confidence in, ``(n,)``, from 0 on."""
    confidence = confidence.float()  # as evaluate has it and torchmetrics its edges
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float32, device=confidence.device)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=num_bins - 1)


def doubts(prediction: Prediction) -> dict[str, Tensor]:
    """What may tell that an answer is wrong, large where it should be, ``(n,)`` each.

    ``confidence``, as one minus the probability of the answer; ``entropy``; and of two draws or
    more ``mutual_information``, both in nats.
    """
    found = {"confidence": 1 - prediction.confidence, "entropy": prediction.entropy}
    if prediction.num_samples > 1:
        found["mutual_information"] = prediction.mutual_information
    return found


def risk_coverage(doubt: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor, float]:
    r"""How often a classifier is wrong that answers only where it doubts little.

    .. math::
        \mathrm{coverage}(t) = \tfrac1n \textstyle\sum_i [d_i \le t], \qquad
        \mathrm{risk}(t) = \frac{\sum_i [d_i \le t] [\hat y_i \ne y_i]}{\sum_i [d_i \le t]}

    Args:
        doubt: what is not answered where it is large, ``(n,)``: ``1 - confidence``, an entropy.
        wrong: whether each prediction is wrong, ``(n,)``, boolean.

    Returns:
        Coverage and risk at each threshold ``t`` that parts the items, ``(m,)`` each, and the mean
        risk over all coverages, the area under the curve (AURC).

    Reference:
        Y. Geifman, R. El-Yaniv (2017), "Selective Classification for Deep Neural Networks",
        arXiv:1705.08500.

    Example::

        >>> coverage, risk, area = risk_coverage(
        ...     torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([False, True, False, True])
        ... )
        >>> coverage.tolist(), [round(x, 2) for x in risk.tolist()], round(area, 3)
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.33, 0.5], 0.208)
    """
    values, order = doubt.double().sort()
    errors = wrong[order].double().cumsum(0)
    parts = torch.cat([values[1:] > values[:-1], torch.ones_like(values[:1], dtype=torch.bool)])
    counts = torch.arange(1, len(values) + 1, device=values.device)[parts].double()
    risk, coverage = errors[parts] / counts, counts / len(values)
    width = coverage.diff(prepend=coverage.new_zeros(1))
    return coverage, risk, float((risk * width).sum())


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that an item of the second set scores higher than one of the first.

    The area under the receiver operating characteristic; a tie counts half. 0.5 is chance.

    Args:
        inside: scores of the known distribution, ``(n,)``, such as mutual information in nats.
        outside: scores of the other one, ``(m,)``.
    """
    truth = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    scores = torch.cat([inside, outside])
    _, ranks = scores.unique(return_inverse=True)  # binary_auroc would squash what leaves [0, 1]
    return float(binary_auroc(ranks.float() / max(1, int(ranks.max())), truth.to(scores.device)))


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""Find the temperature that minimises the negative log-likelihood.

    .. math::
        \hat T = \arg\min_{T > 0} -\sum_i \log \mathrm{softmax}(z_i / T)_{y_i}

    The objective is convex in :math:`\beta = 1/T`, so that the minimum is unique and bisection
    finds where the slope :math:`\sum_i \sum_k p_{ik} (z_{ik} - z_{i y_i})` in :math:`\beta`
    changes its sign. It lies at the end of the range when every item is classified correctly
    (:math:`T \to 0`) or when the logits say less than nothing (:math:`T \to \infty`); T is
    bounded to [0.01, 100], and the nearer bound is returned then. If each item's logits are all
    equal, every T is as good, and it is 1.

    Accuracy does not change with T. Fit on data held out from both training and test.

    Args:
        logits: of shape ``(n, K)``: log-probabilities up to a constant per row; ``-inf`` marks a
            choice that an item does not have.
        labels: classes of shape ``(n,)``, integers from 0 to K - 1.

    Returns:
        T, without a unit: divide logits by it.

    Raises:
        ValueError: logits contain NaN or ``+inf``, or a label is an absent choice.

    Reference:
        C. Guo et al. (2017), "On Calibration of Modern Neural Networks", arXiv:1706.04599.

    Example::

        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # 2 / log 3
        1.8205
    """
    chosen = logits.double().gather(1, labels.long()[:, None])
    if not bool((logits < float("inf")).all() & chosen.isfinite().all()):
        raise ValueError(
            "Logits must be finite, or -inf at an absent choice that is no label: look for NaN."
        )
    excess = logits.double() - chosen  # of each choice over the label
    present = excess.masked_fill(excess.isneginf(), 0)  # where the probability is 0 as well
    if not present.any():
        return 1.0
    low, high = 0.01, 100.0
    for _ in range(64):
        middle = (low * high) ** 0.5
        if float(((excess / middle).softmax(-1) * present).sum()) <= 0:
            high = middle
        else:
            low = middle
    return (low * high) ** 0.5


def rank(prediction: Prediction, by: str = "mutual_information", *, seed: int = 0) -> Tensor:
    r"""The items of a pool, the one most worth a label first: the acquisition of active learning.

    BALD asks for the label that tells most of the weights,

    .. math::

        \arg\max_i\, I[y_i; U] = H\Bigl[\tfrac1S \textstyle\sum_s p_{si}\Bigr]
        - \tfrac1S \textstyle\sum_s H[p_{si}],

    where entropy also asks for items that are ambiguous whatever the weights are.

    Args:
        prediction: of the pool, ``S x N x K``.
        by: ``"mutual_information"`` (BALD), ``"entropy"`` or ``"random"``.
        seed: of the random order.

    Returns:
        Indices of the items, ``(N,)``; of equal ones the earlier comes first.

    Raises:
        ConfigurationError: a single draw has no mutual information.

    Reference:
        N. Houlsby et al. (2011), "Bayesian Active Learning for Classification and Preference
        Learning", arXiv:1112.5745.

    Example::

        >>> sure, torn, open_ = [[0.9, 0.1]] * 2, [[0.9, 0.1], [0.1, 0.9]], [[0.5, 0.5]] * 2
        >>> pool = Prediction(torch.tensor([sure, torn, open_]).transpose(0, 1))
        >>> rank(pool).tolist()  # the one on which the draws disagree
        [1, 0, 2]
        >>> rank(pool, "entropy").tolist()
        [1, 2, 0]
    """
    if by == "random":
        return torch.randperm(len(prediction), generator=torch.Generator().manual_seed(seed))
    if by == "mutual_information" and prediction.num_samples < 2:
        raise ConfigurationError(
            "A single draw has no mutual information to rank by; predict with num_samples=2 or "
            "more, or rank by 'entropy'."
        )
    scores: Tensor = getattr(prediction, by)
    return scores.argsort(descending=True, stable=True)
