"""Temperature scaling, the calibration by one parameter that other methods must beat."""

import torch
from torch import Tensor

from pyro_blora.evaluation.metrics import check_labels

__all__ = ["fit_temperature"]

_MIN, _MAX = 0.01, 100.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""Find the temperature that minimises the negative log-likelihood.

    .. math::
        \hat T = \arg\min_{T > 0} -\sum_i \log \mathrm{softmax}(z_i / T)_{y_i}

    with L-BFGS on :math:`\log T` in float64. The objective is convex in :math:`1/T`, so that the
    minimum is unique. It lies at the end of the range when every item is classified correctly
    (:math:`T \to 0`) or when the logits say less than nothing (:math:`T \to \infty`); T is
    bounded to [0.01, 100], and the nearer bound is returned then.

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
    _check(logits, labels)
    logits, labels = logits.detach().double(), labels.long()
    absent = logits.isneginf()
    # -inf * 0 in the backward pass would be NaN
    present = logits.masked_fill(absent, 0)

    def nll(log_t: Tensor) -> Tensor:
        scaled = (present * torch.exp(-log_t)).masked_fill(absent, float("-inf"))
        return torch.nn.functional.cross_entropy(scaled, labels)

    def slope(t: float) -> float:
        log_t = torch.tensor(t, dtype=torch.float64, device=logits.device).log().requires_grad_()
        with torch.enable_grad():
            return float(torch.autograd.grad(nll(log_t), log_t)[0])

    # One minimum: its side of a bound is the sign of the slope there
    if slope(_MIN) >= 0:
        return _MIN
    if slope(_MAX) <= 0:
        return _MAX

    log_t = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_t],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = nll(log_t)
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    return min(max(float(log_t.detach().exp()), _MIN), _MAX)


def _check(logits: Tensor, labels: Tensor) -> None:
    given = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
    if logits.dim() != 2 or labels.dim() != 1 or len(logits) != len(labels) or not len(labels):
        raise ValueError(
            f"Expected logits of shape (n, K) and labels of shape (n,), n >= 1; got {given}."
        )
    check_labels(labels, logits.shape[1])
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise ValueError("logits contain NaN or +inf; only -inf, for an absent choice, is allowed.")
    chosen = logits.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    if bool(chosen.isneginf().any()):
        items = chosen.isneginf().nonzero().flatten().tolist()
        raise ValueError(
            f"The logits at the labels of items {items[:5]} are -inf (absent choices)."
        )
