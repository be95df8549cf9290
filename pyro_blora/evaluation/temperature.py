"""Temperature scaling, the calibration by one parameter that other methods must beat."""

import torch
from torch import Tensor

from pyro_blora.evaluation.metrics import check_labels

__all__ = ["fit_temperature"]

_MIN, _MAX = 0.01, 100.0


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
        ValueError: there are no items, shapes do not fit, logits contain NaN or ``+inf``, or a
            label is out of range or an absent choice.

    Reference:
        C. Guo et al. (2017), "On Calibration of Modern Neural Networks", arXiv:1706.04599.

    Example::

        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # 2 / log 3
        1.8205
    """
    check_labels(labels, logits)
    chosen = logits.double().gather(1, labels.long()[:, None])
    if not bool((logits < float("inf")).all() & chosen.isfinite().all()):
        raise ValueError(
            "Logits must be finite, or -inf at an absent choice that is no label: look for NaN."
        )
    excess = logits.double() - chosen  # of each choice over the label
    present = excess.masked_fill(excess.isneginf(), 0)  # where the probability is 0 as well
    if not present.any():
        return 1.0
    low, high = _MIN, _MAX
    for _ in range(64):
        middle = (low * high) ** 0.5
        if float(((excess / middle).softmax(-1) * present).sum()) <= 0:
            high = middle
        else:
            low = middle
    return (low * high) ** 0.5
