"""What is done with predictions: errors of differences, temperatures, thresholds and rankings."""

import math
import warnings
from statistics import NormalDist

import torch
from scipy.special import stdtrit
from scipy.stats import binom
from torch import Tensor

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.generation.generate import Generation
from pyro_blora.posterior.temperature import best_temperature
from pyro_blora.prediction import Prediction
from pyro_blora.scores import Metrics, auroc
from pyro_blora.updates import LowRankUpdate

CRITERIA = ("mutual_information", "entropy", "random")


def error_of(gaps: Tensor) -> Tensor:
    r"""The error of the mean of paired differences ``(S, ..., n)``, of seeds and items.

    .. math::
        (2 e)^2 = t_{n-1}^2 \, v_n / n + t_{S-1}^2 \, v_S / S

    :math:`v_n` is the variance over items of their means over seeds, :math:`v_S` that over seeds of
    their means over items, and :math:`t_d` the quantile of Student's distribution, with :math:`d`
    degrees of freedom, at which a normal's is 2. Then two errors to each side cover at least 95 %
    for normal means (S. K. Banerjee, 1960). For one seed the error is of the items alone.
    """
    level, (seeds, *_, items) = NormalDist().cdf(2), gaps.shape
    square = gaps.mean(0).var(-1) / items * stdtrit(items - 1, level) ** 2
    if seeds > 1:
        square += gaps.mean(-1).var(0) / seeds * stdtrit(seeds - 1, level) ** 2
    return square.sqrt() / 2


def doubts(prediction: Prediction | Generation) -> dict[str, Tensor]:
    """Scores that should be large where an answer is wrong, ``(n,)`` or of the labels' shape."""
    if isinstance(prediction, Generation):
        return {"entropy": prediction.mean_entropy, "mutual_information": prediction.epistemic}
    if prediction.family is not None:
        several = prediction.num_samples > 1
        adapter = {"adapter_stddev": prediction.adapter_stddev} if several else {}
        return {"stddev": prediction.stddev, **adapter}
    scores = {"confidence": 1 - prediction.confidence, "entropy": prediction.entropy}
    if prediction.num_samples > 1:
        scores["mutual_information"] = prediction.mutual_information
    return scores


def _doubt(prediction: Prediction | Generation, by: str) -> Tensor:
    known = doubts(prediction)
    if by not in known:
        raise ConfigurationError(
            f"by must be one of {', '.join(known)}, got {by!r}; mutual information needs two draws "
            "or more."
        )
    return known[by]


def risk_coverage(doubt: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor, float]:
    r"""The error rate of a classifier that answers only the items it is most certain about.

    .. math::
        \mathrm{coverage}(t) = \tfrac1n \textstyle\sum_i [d_i \le t], \qquad
        \mathrm{risk}(t) = \frac{\sum_i [d_i \le t] [\hat y_i \ne y_i]}{\sum_i [d_i \le t]}

    Returns the coverage and the risk at each distinct ``doubt`` as the threshold ``t``, ``(m,)``
    each, and the mean risk over all coverages, the area under the curve (AURC). ``doubt`` and the
    boolean ``wrong`` are ``(n,)``.

    Reference: Y. Geifman, R. El-Yaniv (2017), "Selective Classification for Deep Neural Networks",
    arXiv:1705.08500.
    """
    _, kept, errors = _at_thresholds(doubt, wrong)
    risk, coverage = errors.double() / kept, kept.double() / len(doubt)
    width = coverage.diff(prepend=coverage.new_zeros(1))
    return coverage, risk, float((risk * width).sum())


def _at_thresholds(doubt: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each distinct ``doubt`` in order, how many items it keeps, and how many of them are wrong."""
    values, order = doubt.double().sort()
    distinct, counts = values.unique_consecutive(return_counts=True)
    kept = counts.cumsum(0)
    return distinct, kept, wrong[order].long().cumsum(0)[kept - 1]


def threshold_for(
    prediction: Prediction | Generation,
    labels: Tensor,
    *,
    risk: float = 0.05,
    confidence: float = 0.95,
    by: str = "entropy",
) -> float:
    r"""The score above which to abstain, so that few of the remaining answers are wrong.

    .. math::
        \Pr\bigl(\Pr(\hat y \ne y \mid d \le \hat t) \le r\bigr) \ge 1 - \delta

    An answer is given if its score :math:`d` is at most the threshold :math:`\hat t`, as in
    ``generate(abstain_above=)``. The outer probability is over the labeled items, which must
    resemble future ones, and be used neither for training nor to choose ``risk`` and ``by``. The
    bound is proven if scores are distinct and errors do not become rarer as scores grow; in
    simulations it also holds with ties and other errors.

    Thresholds are tested from the strictest to the laxest, and the last that passes is returned:
    ``e`` errors in ``k`` answers pass if :math:`\Pr(\mathrm{Bin}(k, r) \le e)` is at most the
    level. The level starts at 0 and grows by :math:`\delta / m` at ``m`` points: first where zero
    errors would pass, then each time the answers have doubled. A failed test resets it to 0.

    Args:
        prediction: of ``n`` labeled items, or the texts that ``n`` prompts gave.
        labels: classes, ``(n,)``, or with several labels of each item ``(n, L)``, where -100 stands
            for a missing one; for texts, whether each is right, boolean.
        risk: the largest share :math:`r` of wrong answers among those given. Default: 0.05.
        confidence: :math:`1 - \delta`. Default: 0.95.
        by: ``"entropy"`` or ``"mutual_information"``, for texts the mean over their tokens, or for
            classes ``"confidence"``, which is 1 minus the largest probability. Default:
            ``"entropy"``.

    Returns:
        The threshold, in nats unless ``by="confidence"``. If none passes, it is ``-inf`` (always
        abstain), with a warning; by default at least 59 answers without an error are needed.

    Raises:
        ConfigurationError: if ``risk`` or ``confidence`` is not between 0 and 1, ``by`` is unknown,
            or ``labels`` are not of the kind of ``prediction``.

    References:
        A. Angelopoulos et al. (2021), "Learn then Test", arXiv:2110.01052. Y. Geifman, R. El-Yaniv
        (2017), "Selective Classification for Deep Neural Networks", arXiv:1705.08500. B. Wiens, A.
        Dmitrienko (2005), "The Fallback Procedure for Evaluating a Single Family of Hypotheses".

    Example::

        >>> prediction = Prediction(torch.tensor([[[0.9, 0.1]] * 60 + [[0.5, 0.5]] * 40]))
        >>> round(threshold_for(prediction, torch.tensor([0] * 60 + [0, 1] * 20)), 3)
        0.325
    """
    if not (0 < risk < 1 and 0 < confidence < 1):
        raise ConfigurationError(
            f"risk and confidence must be between 0 and 1, got {risk} and {confidence}."
        )
    doubt = _doubt(prediction, by)
    if labels.shape != doubt.shape:
        raise ConfigurationError(
            f"labels must be one for each of {len(doubt)} answers, got {tuple(labels.shape)}."
        )
    texts = isinstance(prediction, Generation)
    if texts != (labels.dtype == torch.bool):
        raise ConfigurationError(
            "labels must be boolean (is the text right?) for a Generation alone, got "
            f"{labels.dtype} for a {type(prediction).__name__}."
        )
    right = labels.cpu() if texts else prediction.predictions.cpu() == labels.cpu()
    given = right.new_ones(right.shape) if texts or labels.dim() == 1 else labels.cpu() >= 0
    wrong, doubt, delta = ~right[given], doubt.cpu()[given], 1 - confidence

    def fewest(m: int) -> int:  # (1 - risk)^k is the p-value of no error in k answers
        return math.ceil(math.log(delta / m) / math.log1p(-risk))

    m = max((m for m in range(2, 64) if fewest(m) << m - 1 <= len(wrong)), default=1)
    begins = [fewest(m) << i for i in range(m)]
    threshold, level, before = -math.inf, 0.0, 0
    values, kept, errors = _at_thresholds(doubt, wrong)
    p_values = binom.cdf(errors.numpy(), kept.numpy(), risk)
    for value, count, p_value in zip(values.tolist(), kept.tolist(), p_values, strict=True):
        level += delta / m * sum(before < begin <= count for begin in begins)
        before = count
        if level:
            threshold, level = (value, level) if p_value <= level else (threshold, 0.0)
    if threshold == -math.inf:
        warnings.warn(
            f"No threshold has a risk of at most {risk} at confidence {confidence}: that takes at "
            f"least {begins[0]} answers without an error, got {int(wrong.sum())} errors in "
            f"{len(wrong)}; label more items, or allow a greater risk.",
            stacklevel=2,
        )
    return threshold


def out_of_scope(
    inside: Prediction, outside: Prediction, *, by: str = "entropy", recall: float = 0.95
) -> Metrics:
    """Scores how well doubt separates the questions of a task from others.

    The ``auroc`` is the probability that a question from outside has the higher doubt. The
    ``threshold`` is the doubt up to which the share ``recall`` of the inside is answered; no
    question from outside is needed to set it. The ``false_positive_rate`` is the share of the
    outside that is answered, too. For a bound on the share of wrong answers among those given, pass
    ``Prediction.cat([inside, outside])`` to :func:`threshold_for`, with label -1 for the outside.

    Args:
        inside: of questions of the task.
        outside: of others.
        by: ``"entropy"``, ``"mutual_information"`` or ``"confidence"``, as in ``threshold_for``, or
            for numbers ``"stddev"`` or ``"adapter_stddev"``.
        recall: the share of the inside to answer.

    Reference:
        D. Hendrycks, K. Gimpel (2017), "A Baseline for Detecting Misclassified and
        Out-of-Distribution Examples in Neural Networks", arXiv:1610.02136.

    Example::

        print(out_of_scope(blora.predict(questions), blora.predict(others)))
    """
    if not 0 < recall <= 1:
        raise ConfigurationError(f"recall must be a share in (0, 1], got {recall}.")
    known, unknown = (_doubt(each, by).double().cpu() for each in (inside, outside))
    if known.dim() > 1:
        raise ConfigurationError(
            f"out_of_scope must have one label of each item, got {tuple(known.shape)}."
        )
    answered = math.ceil(recall * len(known) - 1e-9)
    threshold = known.sort().values[answered - 1]
    rate = float((unknown <= threshold).double().mean())
    scores = {"auroc": auroc(known, unknown), "false_positive_rate": rate}
    return Metrics(scores, threshold=float(threshold))


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""Finds the temperature that minimizes the negative log-likelihood.

    .. math::
        \hat T = \arg\min_{T > 0} -\sum_i \log \mathrm{softmax}(z_i / T)_{y_i}

    Divide logits by it, and fit it on data held out from both training and test. The objective is
    convex in :math:`1/T`, so bisection finds the minimum in [0.01, 100]; it is 1 if all T are
    equally good. If it is 0.01, a warning says that the items are probably too few. ``logits`` is
    ``(n, K)``, with ``-inf`` for an absent choice.

    Reference: C. Guo et al. (2017), "On Calibration of Modern Neural Networks", arXiv:1706.04599.

    Example::

        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 4)  # 2 / log 3
        1.8205
    """
    temperature = best_temperature(
        logits.double() - logits.double().gather(1, labels.long()[:, None])
    )
    if temperature < 0.0101:
        warnings.warn(
            f"The temperature must be above 0.01, got {temperature:.3g} (a scale of 100): the "
            "scores are right on all items, or far too small; fit it on more of them.",
            stacklevel=3,
        )
    return temperature


def evaluate_text(log_probs: Tensor, num_tokens: Tensor) -> Metrics:
    r"""Scores texts by their log probabilities, as ``blora.log_predictive_dataset`` gives them.

    .. math::
        \mathrm{NLL}_{\text{token}} = -\frac{\sum_i \log p_i}{\sum_i n_i}, \quad
        \mathrm{perplexity} = \exp \mathrm{NLL}_{\text{token}}, \quad
        \mathrm{NLL}_{\text{text}} = -\tfrac1n \textstyle\sum_i \log p_i

    Args:
        log_probs: log probability of all scored tokens of each text, in nats, ``(n,)``.
        num_tokens: number of scored tokens of each text, ``(n,)``.

    Example::

        print(evaluate_text(*blora.log_predictive_dataset(answers)))
    """
    if not num_tokens.all():
        raise BatchError(
            f"{int((num_tokens == 0).sum())} texts have no scored token; is a completion empty?"
        )
    total = -float(log_probs.double().sum())
    per_token, per_text = total / int(num_tokens.sum()), total / len(log_probs)
    scores = {"nll_per_token": per_token, "nll_per_text": per_text, "n": len(log_probs)}
    return Metrics(scores, perplexity=math.exp(min(per_token, 700.0)))


def rank(prediction: Prediction, by: str = "mutual_information", *, seed: int = 0) -> Tensor:
    """Orders the items of a pool, the one most worth a label first, for active learning.

    ``by`` is one of ``CRITERIA``, or a doubt as in :func:`threshold_for`. The mutual information,
    known as BALD, asks for the labels that say most about the weights; entropy also asks for items
    that are ambiguous whatever the weights are. Returns indices, ``(N,)``; among equal items the
    earlier comes first.
    """
    if by == "random":
        return torch.randperm(len(prediction), generator=torch.Generator().manual_seed(seed))
    scores = _doubt(prediction, by).reshape(len(prediction), -1).sum(-1)  # of several labels
    return scores.argsort(descending=True, stable=True)


def effective_rank(update: LowRankUpdate) -> Tensor:
    r"""The effective rank of each layer's update, ``(..., n)``.

    .. math::

        \exp H(p), \qquad p_i = s_i^2 / \textstyle\sum_j s_j^2,

    with the singular values :math:`s` of :math:`\Delta W` and the entropy :math:`H` in nats. It is
    ``k`` for ``k`` equal singular values, and 0 for no update.

    Reference: O. Roy, M. Vetterli (2007), "The Effective Rank".

    Example::

        >>> A, B = torch.eye(3, 5)[None], torch.eye(4, 3)[None]
        >>> effective_rank(LowRankUpdate(A=A, B=B)).round()
        tensor([3.])
    """
    B = update.B if update.core is None else update.B @ update.core
    # B A has the singular values of the product of the triangular factors of B and A
    R_b, R_a = torch.linalg.qr(B).R, torch.linalg.qr(update.A.mT).R
    square = torch.linalg.svdvals(R_b @ R_a.mT).square()
    total = square.sum(-1, keepdim=True)
    p = square / total.clamp_min(torch.finfo(square.dtype).tiny)
    return torch.special.entr(p).sum(-1).exp() * (total.squeeze(-1) > 0)


@torch.no_grad()
def effective_ranks(blora: BayesianLoRA) -> dict[str, float]:
    """The effective rank of every adapted layer's posterior mean, by the layer's full name."""
    updates = blora.posterior.draws(0)
    return {
        name: float(rank)
        for group in blora.model.groups
        for name, rank in zip(group.module_names, effective_rank(updates[group.name]), strict=True)
    }
