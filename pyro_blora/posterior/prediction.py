"""Predictions: class probabilities per posterior sample, and the uncertainties they imply."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import Batch
from pyro_blora.options import check_count, choose_precision
from pyro_blora.posterior.batches import Collate, batches_of, lengths_of, size_of, to_device

_TOLERANCE = 1e-3
Found = TypeVar("Found")


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


def predict_dataset(
    predict: Callable[[Batch], Prediction],
    data: Any,
    collate: Collate | None = None,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[Prediction, Tensor | None]:
    """The predictive distribution of every example, none dropped, in the order of ``data``.

    Args:
        predict: the prediction of one batch, such as ``blora.predict``.
        data: the examples, or a ``DataLoader``, whose order is kept.
        collate: makes a batch from a list of examples; torch's by default. Its ``labels`` are
            passed through.
        device: the device of the network. Default: the adapter's, if ``predict`` is a method of
            one; otherwise the accelerator if there is one, or the CPU.
        options: ``batch_size``, by default 16; ``precision`` as in ``fit``; ``progress``, by
            default on a terminal, and its ``description``.

    Returns:
        The prediction, ``S x N x K``, and the labels, ``N``, or ``None`` if the examples have none.
    """
    usual: Any = torch.accelerator.current_accelerator(True) or "cpu"
    adapter = getattr(predict, "__self__", None)
    place = torch.device(device or getattr(adapter, "device", usual))

    def predicted(batch: Batch) -> tuple[Prediction, Tensor | None]:
        return predict(batch), batch.get("labels")

    predictions, labels, back = over_dataset(predicted, data, collate, place, **options)
    return Prediction(Prediction.cat(predictions).samples.cpu()[:, back]), labels


def over_dataset(
    of_batch: Callable[[Batch], tuple[Found, Tensor | None]],
    data: Any,
    collate: Collate | None,
    device: torch.device,
    *,
    batch_size: int = 16,
    precision: str = "auto",
    progress: bool | None = None,
    description: str = "predict",
) -> tuple[list[Found], Tensor | None, Any]:
    """Results of ``of_batch`` by batch, its tensors in the data's order, and the index for that."""
    check_count("batch_size", batch_size)
    autocast = choose_precision(precision, device) == "bfloat16"
    order, total = None, None
    if not isinstance(data, DataLoader):
        order = sorted(range(len(data)), key=lengths_of(data).__getitem__)
        total = -(-len(order) // batch_size)
    elif size_of(data):
        total = len(data)
    found: list[Found] = []
    others: list[Tensor] = []
    hide = None if progress is None else not progress
    batches = batches_of(data, collate, batch_size, order)
    for given in tqdm(batches, desc=description, total=total, disable=hide, unit="batch"):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            one, other = of_batch(to_device(given, device))
        found.append(one)
        others += [] if other is None else [other.cpu()]
    if 0 < len(others) < len(found):
        raise BatchError("All batches must have labels, or none, got both; add the missing ones.")
    back: Any = slice(None) if order is None else torch.tensor(order).argsort()
    return found, torch.cat(others)[back] if others else None, back
