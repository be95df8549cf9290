"""Regression by a head of one output."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_blora.errors import BatchError, ConfigurationError, DataError
from pyro_blora.labels import FINITE, checked_labels
from pyro_blora.likelihoods._likelihood import Batch, Collate, Likelihood
from pyro_blora.likelihoods._prompts import RowCollator
from pyro_blora.likelihoods.reading import check_head, head_logits
from pyro_blora.network.targets import NUMBER


class Regression(Likelihood):
    r"""A normal distribution around the output of an ``AutoModelForSequenceClassification``.

    .. math::

        y \sim \mathcal{N}(m + s f(x), (s \sigma)^2)

    with the network's one output :math:`f`, the learned noise :math:`\sigma`, and the mean
    :math:`m` and the standard deviation :math:`s` of the training labels, so that a task has no
    unit. Predictions and scores have the unit of the labels. ``fit`` holds out an eighth of the
    examples, by which the temperature scales :math:`\sigma`, since a network that fits its training
    labels closely would otherwise claim too little noise. The head is trained as a point estimate.

    Args:
        num_data: number of training examples.
        loc: :math:`m`. Default: the mean of the training labels, or 0 for a head that was trained
            before.
        scale: :math:`s`. Default: their standard deviation, or 1.

    A batch has ``input_ids`` and ``attention_mask`` (``B x T``), any other arguments of the
    network, and ``labels`` (``B``). Rows have ``text``, ``text_pair`` if there is a second one,
    and ``label``.

    Example::

        blora = BayesianLoRA(net, likelihood=Regression(), tokenizer=tokenizer)
        fit(blora, rows, num_epochs=6)
        blora.predict(["The food was cold."]).interval(0.9)  # the low ends, the high ends
    """

    head = NUMBER
    new_head = True
    task_type = "SEQ_CLS"
    held_out = 1 / 8
    roles: ClassVar[dict[str, str]] = {"noise": "likelihood"}
    settled = ("num_data", "loc", "scale")

    def __init__(
        self,
        *,
        num_data: int | None = None,
        loc: float | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(num_data=num_data)
        self.loc, self.scale = loc, scale
        if scale is not None and not 0 < scale < math.inf:
            raise ConfigurationError(f"scale must be positive and finite, got {scale}.")
        self.noise = PyroParam(torch.tensor(0.5), constraints.positive)

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError unless ``net`` has one output for each row."""
        check_head(net, self.head)

    def keep_head(self, net: nn.Module) -> None:
        """The head of a LoRA has the unit of the labels."""
        super().keep_head(net)
        self.loc, self.scale = self.loc or 0.0, self.scale or 1.0

    def collator(self, tokenizer: Any, row: Any) -> Collate:
        """A :class:`NumberCollator`; pairs of texts are for another likelihood."""
        if isinstance(row, Mapping) and "chosen" in row:
            raise ConfigurationError(
                f"{type(self).__name__} must read rows with numbers, got pairs of a chosen and a "
                "rejected text; pass likelihood=Preference()."
            )
        return NumberCollator(tokenizer)

    def read(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, labeled: bool, training: bool
    ) -> Collate | None:
        """Checks that labels are finite numbers; a training takes their mean and deviation."""
        if isinstance(first := rows[0], Mapping) and {"input_ids", "label", "labels"} & {*first}:
            columns = ["text"] if isinstance(collate, RowCollator) else []
            numbers = checked_labels(rows, labeled, FINITE, *columns)
        else:
            numbers = []
        if training:
            self._standardize(numbers)
        return collate

    def check_loader(
        self, data: Any, collate: Collate | None, net: nn.Module, *, training: bool
    ) -> None:
        """A training takes the mean and the deviation of the labels from the loader's rows."""
        rows = getattr(data, "dataset", data)
        first = rows[0] if hasattr(rows, "__len__") and len(rows) else None
        label = first.get("label", first.get("labels")) if isinstance(first, Mapping) else None
        of_rows = label is not None and getattr(label, "ndim", 0) == 0  # not of whole batches
        if training:
            self._standardize(checked_labels(rows, True, FINITE) if of_rows else [])

    def _standardize(self, numbers: list[float]) -> None:
        if self.loc is None or self.scale is None:
            if not numbers:
                raise DataError(
                    f"{type(self).__name__} must know the mean and the standard deviation of the "
                    "labels, got no rows with a column label; pass likelihood="
                    f"{type(self).__name__}(loc=, scale=)."
                )
            labels = torch.tensor([*map(float, numbers)], dtype=torch.float64)
            self.loc = float(labels.mean()) if self.loc is None else self.loc
            spread = float(labels.std(correction=0)) or 1.0  # of labels that are all alike
            self.scale = spread if self.scale is None else self.scale

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The standardized mean and the logarithm of the noise, ``(B, 2)``."""
        mean = head_logits(net, batch).squeeze(-1)
        return torch.stack([mean, self.noise.log().expand_as(mean)], -1)

    def labels(self, batch: Batch) -> Tensor | None:
        """The numbers, ``(B,)``."""
        labels: Tensor | None = batch.get("labels")
        return labels if labels is None else labels.to(torch.get_default_dtype())

    def check_labels(self, labels: Tensor, logits: Tensor) -> None:
        """Raises BatchError unless labels are finite numbers, one for each example."""
        if labels.shape != logits.shape[:-1] or (labels.is_cpu and not labels.isfinite().all()):
            raise BatchError(
                f"labels must be one finite number per example, {tuple(logits.shape[:-1])}, got "
                f"{tuple(labels.shape)}, {labels.flatten()[:4].tolist()}, ...; look for NaN."
            )

    def distribution(self, logits: Tensor, labels: Tensor | None) -> TorchDistribution:
        """The normal distribution, in the unit of the labels."""
        loc, scale = self.loc or 0.0, self.scale or 1.0
        return Normal(loc + scale * logits[..., 0], scale * logits[..., 1].exp())

    def tempered(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The logits of a noise that is multiplied by the temperature."""
        return torch.stack([logits[..., 0], logits[..., 1] + temperature.log()], -1)

    def unit(self, temperature: float) -> tuple[float, float]:
        """An exported head has the unit of the labels."""
        return self.scale or 1.0, self.loc or 0.0


class NumberCollator(RowCollator):
    """Makes a row from every text, with the number that is its label.

    Takes the arguments of :class:`ClassificationCollator` but the classes. Called on B
    dictionaries with ``text``, ``text_pair`` where there is one, and ``label``, it returns the
    tokenizer's tensors, ``(B, T)``, and ``labels``, float, ``(B,)``, unless the first row has none.
    """
