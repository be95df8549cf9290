"""Accuracy, calibration and proper scores of class probabilities."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

from pyro_blora.posterior.prediction import Prediction, check_probabilities

__all__ = [
    "Metrics",
    "auroc",
    "check_labels",
    "confidence_bins",
    "doubts",
    "ece_by_chance",
    "evaluate",
    "risk_coverage",
]


@dataclass(frozen=True)
class Metrics:
    """Scores of a classifier on ``n`` items; see :func:`evaluate`.

    Accuracy and expected calibration error are fractions, the mean negative log-likelihood is in
    nats, and the Brier score between 0 and 2.

    Example::

        >>> print(Metrics(acc=0.71, ece=0.057, nll=0.791, brier=0.409, n=300))
        ACC 71.0  ECE 5.7  NLL 0.791  Brier 0.409
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

    Raises:
        ValueError: there are no items, shapes do not fit, ``probs`` are not probabilities, a label
            is out of range, or ``num_bins`` is below 1.

    Reference:
        M. P. Naeini et al. (2015), "Obtaining Well Calibrated Probabilities Using Bayesian
        Binning"; G. W. Brier (1950), "Verification of Forecasts Expressed in Terms of Probability".

    Example::

        >>> metrics = evaluate(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> print(metrics)
        ACC 50.0  ECE 37.5  NLL 0.490  Brier 0.312
    """
    check_labels(labels, probs)
    _check_binned(probs, num_bins)
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

    Raises:
        ValueError: there are no items, ``probs`` are no such probabilities, or ``num_bins`` is
            below 1.

    Reference:
        J. Broecker, L. A. Smith (2007), "Increasing the Reliability of Reliability Diagrams";
        R. Roelofs et al. (2022), "Mitigating Bias in Calibration Error Estimation",
        arXiv:2012.08668.

    Example::

        >>> round(ece_by_chance(torch.full((300, 2), 0.5)), 2)
        0.02
    """
    if probs.dim() != 2 or not len(probs):
        raise ValueError(f"Expected the shape (n, K) with n >= 1, got {tuple(probs.shape)}.")
    _check_binned(probs, num_bins)
    confidence = probs.detach().float().cpu().amax(-1)
    index = confidence_bins(confidence, num_bins)
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(10):
        right = torch.bernoulli(confidence.expand(100, -1), generator=generator)
        gaps = confidence.new_zeros(100, num_bins).index_add(1, index, right - confidence)
        total += float(gaps.abs().sum(1).mean())
    return total / 10 / len(confidence)


def confidence_bins(confidence: Tensor, num_bins: int) -> Tensor:
    """The bin that the ECE of :func:`evaluate` has each confidence in, ``(n,)``.

    Args:
        confidence: probabilities of the answers, ``(n,)``.
        num_bins: number of bins of equal width; they count from 0.

    Example::

        >>> confidence_bins(torch.tensor([0.3, 0.5, 1.0]), 2)
        tensor([0, 1, 1])
    """
    confidence = confidence.float()  # as evaluate has it and torchmetrics its edges
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float32, device=confidence.device)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=num_bins - 1)


def _check_binned(probs: Tensor, num_bins: int) -> None:
    check_probabilities(probs, name="probs")
    if probs.shape[1] < 2 or num_bins < 1:
        raise ValueError(
            f"Expected two classes and one bin at least, got {probs.shape[1]} and {num_bins}."
        )


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

    Raises:
        ValueError: there are no items, shapes differ, or a doubt is NaN.

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
    if doubt.dim() != 1 or doubt.shape != wrong.shape or not len(doubt):
        raise ValueError(
            f"Expected the shapes (n,) and (n,) with n >= 1, got {tuple(doubt.shape)} and "
            f"{tuple(wrong.shape)}."
        )
    if bool(doubt.isnan().any()):
        raise ValueError("doubt is NaN somewhere.")
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

    Raises:
        ValueError: a set is empty.

    Example::

        >>> round(auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.15, 0.3, 0.4])), 3)
        0.833
    """
    if not len(inside) or not len(outside):
        raise ValueError(f"Expected scores on both sides, got {len(inside)} and {len(outside)}.")
    truth = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    scores = torch.cat([inside, outside])
    _, ranks = scores.unique(return_inverse=True)  # binary_auroc would squash what leaves [0, 1]
    return float(binary_auroc(ranks.float() / max(1, int(ranks.max())), truth.to(scores.device)))


def check_labels(labels: Tensor, scores: Tensor) -> None:
    """Check that ``labels``, of shape ``(n,)``, are classes of ``scores``, of shape ``(n, K)``.

    Raises:
        ValueError: they are not, or there are none.
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"Expected the shapes (n, K) and (n,) with n >= 1, got {tuple(scores.shape)} and "
            f"labels {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}: convert with .long().")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(
            f"labels must lie between 0 and {scores.shape[1] - 1}, they span {low} to {high}: drop "
            "unlabelled items (-100) first."
        )
