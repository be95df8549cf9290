"""Predictions: averages over posterior samples, and the uncertainties they imply."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Distribution, OneHotCategorical
from torch.nn.functional import pad

from pyro_blora.errors import ConfigurationError

_TOLERANCE = 1e-3
_BISECTIONS = 60


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    r"""The predictive distribution of B items: the average of S distributions, one per sample.

    Of classes its entropy, the *total* uncertainty, is the sum of the *aleatoric* uncertainty,
    which more training data would not remove, and the *epistemic* one, which measures how much the
    samples disagree; of numbers the variance is such a sum:

    .. math::
        \underbrace{H\Bigl[\tfrac1S\textstyle\sum_s p_s\Bigr]}_{\texttt{entropy}}
        &= \underbrace{\tfrac1S\textstyle\sum_s H[p_s]}_{\texttt{expected\_entropy}}
        + \underbrace{I[y; s]}_{\texttt{mutual\_information}},
        \qquad H[p] = -\sum_k p_k \log p_k, \quad 0 \log 0 = 0 \\
        \underbrace{\operatorname{Var}[y]}_{\texttt{stddev}^2}
        &= \underbrace{\operatorname{E}_s \operatorname{Var}[y \mid s]}_{\texttt{noise\_stddev}^2}
        + \underbrace{\operatorname{Var}_s \operatorname{E}[y \mid s]}_{\texttt{adapter\_stddev}^2}

    Entropies are in nats, between 0 and :math:`\log K`. Active learning knows the mutual
    information as BALD.

    Attributes:
        samples: probabilities of classes, ``(S, B, ..., K)``; each row of K sums to 1 within 1e-3.
            If an item has fewer choices, the missing ones have probability 0; where it has fewer
            labels, the first class has probability 1. With a ``family`` they are its parameters,
            ``(S, B, ...)``.
        family: makes the distributions of labels that are not classes, of batch shape ``(S, B)``,
            from the samples. Default: classes.

    Reference:
        N. Houlsby et al. (2011), "Bayesian Active Learning for Classification and Preference
        Learning", arXiv:1112.5745.

    Example::

        >>> from torch.distributions import Normal
        >>> prediction = Prediction(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]))
        >>> prediction
        Prediction(samples=(2, 1, 2), confidence=0.500, mutual_information=0.368)
        >>> prediction.probs.shape, prediction.mutual_information.shape
        (torch.Size([1, 2]), torch.Size([1]))
        >>> rating = Prediction(torch.tensor([[2.0], [4.0]]), lambda m: Normal(m, 1.0))
        >>> rating.mean, rating.noise_stddev, rating.adapter_stddev
        (tensor([3.]), tensor([1.]), tensor([1.]))
    """

    samples: Tensor
    family: Callable[[Tensor], Distribution] | None = None

    def __post_init__(self) -> None:
        if self.family is not None:
            return
        if self.samples.dim() < 3 or 0 in (self.samples.shape[0], self.samples.shape[-1]):
            raise ValueError(
                "samples must have the shape (samples, items, choices), with at least one sample "
                f"and one choice, got {tuple(self.samples.shape)}."
            )
        check_probabilities(self.samples, name="samples")

    @property
    def num_samples(self) -> int:
        """The number S of posterior samples."""
        return self.samples.shape[0]

    def __len__(self) -> int:
        return self.samples.shape[1]

    @property
    def distribution(self) -> Distribution:
        """The distribution of the labels under each sample, of batch shape ``(S, B, ...)``."""
        if self.family is None:
            return OneHotCategorical(probs=self.samples, validate_args=False)
        return self.family(self.samples)

    @property
    def mean(self) -> Tensor:
        """The mean of the labels, ``(B, ...)``; of classes these are :attr:`probs`."""
        return self.samples.mean(0) if self.family is None else self.distribution.mean.mean(0)

    @property
    def stddev(self) -> Tensor:
        """The standard deviation of the labels, ``(B, ...)``."""
        return (self.noise_stddev.square() + self.adapter_stddev.square()).sqrt()

    @property
    def noise_stddev(self) -> Tensor:
        """The part of :attr:`stddev` that labels have under each sample."""
        return self.distribution.variance.mean(0).sqrt()

    @property
    def adapter_stddev(self) -> Tensor:
        """The part of :attr:`stddev` by which the samples disagree."""
        return self.distribution.mean.std(0, correction=0)

    def quantile(self, level: float) -> Tensor:
        """The label below which the share ``level`` of the distribution lies, ``(B, ...)``.

        Raises NotImplementedError if the distribution has no ``cdf``, such as a Poisson one; the
        likelihood may return a subclass that defines it.
        """
        if not 0 < level < 1:
            raise ConfigurationError(f"level must be between 0 and 1, got {level}.")
        distribution, mean = self.distribution, self.mean
        # by Cantelli's inequality no quantile is farther from the mean
        reach = self.stddev * max(level / (1 - level), (1 - level) / level) ** 0.5
        low, high = mean - reach, mean + reach
        if (bound := getattr(distribution.support, "lower_bound", None)) is not None:
            low = low.clamp_min(bound)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = distribution.cdf(middle).mean(0) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        found = (low + high) / 2
        return found.round() if getattr(distribution.support, "is_discrete", False) else found

    def interval(self, share: float = 0.9) -> tuple[Tensor, Tensor]:
        """The quantiles between which the middle ``share`` of the distribution lies."""
        return self.quantile((1 - share) / 2), self.quantile((1 + share) / 2)

    def log_prob(self, labels: Tensor) -> Tensor:
        """The log probability or density of labels, ``(B, ...)``, in nats.

        A probability of 0 counts as the smallest normal float32, 87.3 nats, and a class of -100,
        which stands for a missing label, has a probability of 1.
        """
        if self.family is None:
            probs = self.probs.double().clamp_min(torch.finfo(torch.float32).tiny)
            places = labels.long().clamp_min(0).unsqueeze(-1)
            return probs.log().gather(-1, places).squeeze(-1).masked_fill(labels < 0, 0.0)
        logp = self.distribution.log_prob(labels.expand(self.num_samples, *labels.shape))
        return logp.double().logsumexp(0) - math.log(self.num_samples)

    @property
    def probs(self) -> Tensor:
        """The predictive probabilities of classes: the mean over samples, ``(B, ..., K)``."""
        return self._classes.mean(0)

    @property
    def predictions(self) -> Tensor:
        """The most probable class of each item, of shape ``(B, ...)`` and dtype int64."""
        return self.probs.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """The probability of the most probable class, of shape ``(B, ...)``."""
        return self.probs.amax(-1)

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty: the entropy of :attr:`probs` in nats, of shape ``(B, ...)``."""
        return _entropy(self.probs)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric uncertainty: the mean of the samples' entropies in nats, ``(B, ...)``."""
        return _entropy(self._classes).mean(0)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty: ``entropy - expected_entropy``, in nats, ``(B, ...)``."""
        # Jensen's inequality makes it nonnegative up to rounding
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def _classes(self) -> Tensor:
        if self.family is None:
            return self.samples
        raise ConfigurationError(
            "A prediction must be of classes to have probs, confidence or entropy, got numbers; "
            "use mean, stddev, quantile or interval."
        )

    @classmethod
    def cat(cls, predictions: Sequence["Prediction"]) -> "Prediction":
        """Concatenates over items; what fewer choices or labels leave out is padded."""
        parts = [prediction.samples for prediction in predictions]
        shape = [max(sizes) for sizes in zip(*(part.shape[2:] for part in parts), strict=True)]
        for k, part in enumerate(parts):
            missing = [most - size for most, size in zip(shape, part.shape[2:], strict=True)]
            parts[k] = pad(part, [n for more in reversed(missing) for n in (0, more)])
            if predictions[k].family is None and any(missing[:-1]):
                parts[k][..., 0].masked_fill_(parts[k].sum(-1) == 0, 1)  # where no label is
        return replace(predictions[0], samples=torch.cat(parts, dim=1))

    def __repr__(self) -> str:
        text = f"samples={tuple(self.samples.shape)}"
        if len(self) and self.family is None:
            text += f", confidence={self.confidence.mean():.3f}"
            text += f", mutual_information={self.mutual_information.mean():.3f}"
        elif len(self):
            text += f", noise_stddev={self.noise_stddev.mean():.3g}"
            text += f", adapter_stddev={self.adapter_stddev.mean():.3g}"
        return f"Prediction({text})"


def check_probabilities(probs: Tensor, *, name: str) -> None:
    """Raises ValueError unless ``probs`` sum to 1 over the last dimension."""
    error = (probs.sum(-1, dtype=torch.float64) - 1).abs()
    if probs.numel() and not (float(probs.min()) >= 0 and float(error.max()) <= _TOLERANCE):
        raise ValueError(
            f"The rows of {name} must be probabilities that sum to 1, got a smallest entry of "
            f"{float(probs.min()):.4g} and a sum that is off by {float(error.max()):.4g}. Take the "
            "softmax of logits first, in float32."
        )


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs).sum(-1)
