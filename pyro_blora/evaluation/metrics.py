"""Accuracy, calibration and proper scores of class probabilities."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

from pyro_blora.posterior.prediction import check_probabilities

__all__ = ["Metrics", "ReliabilityBins", "check_labels", "evaluate", "reliability"]

# The largest float32 below 1
_BELOW_ONE = 1 - 2**-24


@dataclass(frozen=True)
class Metrics:
    """Scores of a classifier on ``n`` items; see :func:`evaluate`.

    Attributes:
        acc: accuracy of the most probable class, a fraction.
        ece: expected calibration error, a fraction.
        nll: mean negative log-likelihood of the labels, in nats.
        brier: Brier score, between 0 and 2.
        n: number of items.

    Example::

        >>> print(Metrics(acc=0.71, ece=0.057, nll=0.791, brier=0.409, n=300))
        ACC 71.0  ECE 5.7  NLL 0.791  Brier 0.409
    """

    acc: float
    ece: float
    nll: float
    brier: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name, in the units above."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"ACC {100 * self.acc:.1f}  ECE {100 * self.ece:.1f}  "
            f"NLL {self.nll:.3f}  Brier {self.brier:.3f}"
        )


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Accuracy against confidence in bins of equal width; see :func:`reliability`.

    Attributes:
        edges: edges of the bins, of shape ``(num_bins + 1,)``, from 0 to 1.
        count: number of items in each bin, int64 of shape ``(num_bins,)``.
        confidence: mean confidence in each bin, of shape ``(num_bins,)``; NaN in an empty bin.
        accuracy: accuracy in each bin, of shape ``(num_bins,)``; NaN in an empty bin.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor


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
    _check(probs, labels, num_bins)
    top = _for_top_class(probs)
    probs = probs.double()
    one_hot = torch.nn.functional.one_hot(labels.long(), probs.shape[1])
    log_probs = probs.clamp(min=torch.finfo(torch.float32).tiny).log()
    k = probs.shape[1]
    return Metrics(
        acc=float(multiclass_accuracy(top, labels, num_classes=k, average="micro")),
        ece=float(multiclass_calibration_error(top, labels, num_classes=k, n_bins=num_bins)),
        nll=float(torch.nn.functional.nll_loss(log_probs, labels.long())),
        brier=float((probs - one_hot).square().sum(-1).mean()),
        n=len(labels),
    )


def reliability(probs: Tensor, labels: Tensor, *, num_bins: int = 15) -> ReliabilityBins:
    r"""Compute what a reliability diagram shows, in the bins of :func:`evaluate`'s ECE.

    Args:
        probs: probabilities of shape ``(n, K)``.
        labels: classes of shape ``(n,)``.
        num_bins: number of bins.

    Returns:
        The bins, on the CPU and in float64, with
        ``ECE = sum(count / n * abs(accuracy - confidence))`` over the bins that are not empty.

    Raises:
        ValueError: as :func:`evaluate` does.

    Example::

        >>> bins = reliability(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> bins.edges.shape, bins.count.shape
        (torch.Size([16]), torch.Size([15]))
    """
    _check(probs, labels, num_bins)
    confidence, predicted = _for_top_class(probs).cpu().max(-1)
    correct = predicted == labels.cpu()
    edges = torch.linspace(0, 1, num_bins + 1)
    index = torch.bucketize(confidence, edges, right=True) - 1
    count = torch.bincount(index, minlength=num_bins)
    # 0 / 0 marks an empty bin
    return ReliabilityBins(
        edges=edges.double(),
        count=count,
        confidence=torch.bincount(index, confidence.double(), num_bins) / count,
        accuracy=torch.bincount(index, correct.double(), num_bins) / count,
    )


def _for_top_class(probs: Tensor) -> Tensor:
    """Return ``probs`` as torchmetrics needs them.

    It takes anything above 1, if by rounding, for logits; and it has a bin of its own for a
    confidence of exactly 1.
    """
    return probs.float().clamp(0, _BELOW_ONE)


def _check(probs: Tensor, labels: Tensor, num_bins: int) -> None:
    given = f"probs {tuple(probs.shape)}, labels {tuple(labels.shape)}"
    if probs.dim() != 2 or labels.dim() != 1 or len(probs) != len(labels):
        raise ValueError(f"Expected probs of shape (n, K) and labels of shape (n,), got {given}.")
    if not len(labels) or probs.shape[1] < 2:
        raise ValueError(f"Expected one item and two classes at least, got {given}.")
    if num_bins < 1:
        raise ValueError(f"num_bins must be 1 or more, got {num_bins}.")
    check_probabilities(probs, name="probs")
    check_labels(labels, probs.shape[1])


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check that ``labels``, of any shape, are integers from 0 to ``num_classes - 1``.

    Raises:
        ValueError: they are not.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}: convert with .long().")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie between 0 and {num_classes - 1}, they span {low} to {high}: drop "
            "unlabelled items (-100) first."
        )
