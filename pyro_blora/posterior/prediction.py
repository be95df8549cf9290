"""Predictions: class probabilities per posterior sample, and the uncertainties they imply."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    r"""Class probabilities of B items under S posterior samples.

    The predictive distribution is the mean over samples. Its entropy, the *total* uncertainty, is
    the sum of the *aleatoric* uncertainty, which more training data would not remove, and the
    *epistemic* one, which measures how much the samples disagree:

    .. math::
        \underbrace{H\Bigl[\tfrac1S\textstyle\sum_s p_s\Bigr]}_{\texttt{entropy}}
        = \underbrace{\tfrac1S\textstyle\sum_s H[p_s]}_{\texttt{expected\_entropy}}
        + \underbrace{I[y; s]}_{\texttt{mutual\_information}},
        \qquad H[p] = -\sum_k p_k \log p_k, \quad 0 \log 0 = 0

    Entropies are in nats, between 0 and :math:`\log K`. Active learning knows the mutual
    information as BALD.

    Attributes:
        samples: probabilities of shape ``(S, B, K)``; each row of K sums to 1 within 1e-3. If an
            item has fewer choices, the missing ones have probability 0.

    Reference:
        N. Houlsby et al. (2011), "Bayesian Active Learning for Classification and Preference
        Learning", arXiv:1112.5745.

    Example::

        >>> prediction = Prediction(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]))
        >>> prediction
        Prediction(samples=(2, 1, 2), confidence=0.500, mutual_information=0.368)
        >>> prediction.probs.shape, prediction.mutual_information.shape
        (torch.Size([1, 2]), torch.Size([1]))
    """

    samples: Tensor

    def __post_init__(self) -> None:
        if self.samples.dim() != 3 or 0 in (self.samples.shape[0], self.samples.shape[2]):
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
    def probs(self) -> Tensor:
        """The predictive probabilities: the mean over samples, of shape ``(B, K)``."""
        return self.samples.mean(0)

    @property
    def predictions(self) -> Tensor:
        """The most probable choice of each item, of shape ``(B,)`` and dtype int64."""
        return self.probs.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """The probability of the most probable choice, of shape ``(B,)``."""
        return self.probs.amax(-1)

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty: the entropy of :attr:`probs` in nats, of shape ``(B,)``."""
        return _entropy(self.probs)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric uncertainty: the mean of the samples' entropies in nats, of shape ``(B,)``."""
        return _entropy(self.samples).mean(0)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty: ``entropy - expected_entropy``, in nats, of shape ``(B,)``."""
        # Jensen's inequality makes it nonnegative up to rounding
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @classmethod
    def cat(cls, predictions: Sequence["Prediction"]) -> "Prediction":
        """Concatenates over items; where items have fewer choices, the missing ones get 0."""
        choices = max(p.samples.shape[2] for p in predictions)
        padded = [pad(p.samples, (0, choices - p.samples.shape[2])) for p in predictions]
        return cls(torch.cat(padded, dim=1))

    def __repr__(self) -> str:
        text = f"samples={tuple(self.samples.shape)}"
        if len(self):
            text += f", confidence={self.confidence.mean():.3f}"
            text += f", mutual_information={self.mutual_information.mean():.3f}"
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
