"""Regression by a head of one output."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_blora.errors import BatchError, ConfigurationError, DataError
from pyro_blora.labels import FINITE, checked_labels, has_places
from pyro_blora.likelihoods._likelihood import Batch, Collate, Likelihood
from pyro_blora.likelihoods._prompts import NumberCollator, is_from
from pyro_blora.likelihoods.reading import head_logits
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

    Batches and rows are those of :class:`SequenceClassification`, with numbers as labels.

    Example::

        blora = BayesianLoRA(net, likelihood=Regression(), tokenizer=tokenizer)
        fit(blora, rows, num_epochs=6)
        blora.predict(["The food was cold."]).interval(0.9)  # the low ends, the high ends
    """

    heads = (NUMBER,)
    new_head = True
    task_type = "SEQ_CLS"
    held_out = 1 / 8
    roles: ClassVar[dict[str, str]] = {"noise": "likelihood"}
    # An error of a number tells less than a wrong class: at the usual rate draws are wide before
    # the mean has found what the texts say
    learning_rates: ClassVar[dict[str, float]] = {"scale": 1e-2}
    usual_collator = NumberCollator
    unit_options = ("loc", "scale")
    labels_count = True

    def __init__(
        self, *, num_data: int | None = None, loc: float | None = None, scale: float | None = None
    ) -> None:
        super().__init__(num_data=num_data)
        self.loc, self.scale = loc, scale
        if scale is not None and not 0 < scale < math.inf:
            raise ConfigurationError(f"scale must be positive and finite, got {scale}.")
        self.noise = PyroParam(torch.tensor(0.5), constraints.positive)

    def _examine(self, rows: Any, collate: Collate | None, training: bool) -> None:
        """A training takes the unit of the labels, unless it is known or a trained head has it."""
        super()._examine(rows, collate, training)
        if not training or None not in (self.loc, self.scale):
            return
        first = rows[0] if has_places(rows) and len(rows) else None
        label = first.get("label", first.get("labels")) if isinstance(first, Mapping) else None
        if label is None or getattr(label, "ndim", 0) > 0:  # none, or those of a whole batch
            raise DataError(
                "Regression must know the mean and the standard deviation of the labels, got no "
                "rows with a column label; pass likelihood=Regression(loc=, scale=)."
            )
        values = checked_labels(rows, True, FINITE)
        usual = type(collate) is NumberCollator or is_from(collate, "transformers.", "torch.")
        if collate is not None and not usual:  # it may scale them
            parts = (range(len(rows))[k : k + 64] for k in range(0, len(rows), 64))
            batches = (collate([rows[k] for k in part]) for part in parts)
            values = [value for batch in batches for value in batch["labels"].flatten()]
        numbers = [*map(float, values)]
        labels = torch.tensor(numbers, dtype=torch.float64)
        spread = float(labels.std(correction=0)) if min(numbers) < max(numbers) else 1.0
        if self.trained_head:  # which has the unit of the labels; the noise gets it, too
            self.noise = self.noise.detach() * spread
            self.loc, self.scale = self.loc or 0.0, self.scale or 1.0
        self.loc = float(labels.mean()) if self.loc is None else self.loc
        self.scale = self.scale or spread

    def get_extra_state(self) -> Tensor:
        """The unit, infinite where there is none, which ``state_dict`` has beside the noise."""
        unit = [math.inf if each is None else each for each in (self.loc, self.scale)]
        return torch.tensor(unit, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the unit of a ``state_dict``."""
        self.loc, self.scale = (None if math.isinf(each) else each for each in state.tolist())

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The standardized mean and the logarithm of the noise, ``(B, 2)``."""
        # in bfloat16 a trained head would round the unit of the labels away
        kind = self.noise.device.type
        # the flag is read last, because that synchronizes the device
        precise = torch.is_autocast_enabled(kind) and self.trained_head
        with torch.autocast(kind, enabled=False) if precise else nullcontext():
            mean = head_logits(net, batch).squeeze(-1)
        return torch.stack([mean, self.noise.log().expand_as(mean)], -1)

    def check_labels(self, labels: Tensor, logits: Tensor) -> None:
        """Raises BatchError unless labels are finite numbers, one for each example."""
        if labels.shape != logits.shape[:-1] or (labels.is_cpu and not labels.isfinite().all()):
            raise BatchError(
                f"labels must be one finite number per example, {tuple(logits.shape[:-1])}, got "
                f"{tuple(labels.shape)}, {labels.flatten()[:4].tolist()}, ...; look for NaN."
            )

    def distribution(self, logits: Tensor, labels: Tensor | None) -> TorchDistribution:
        """The normal distribution, in the unit of the labels."""
        scale, loc = self.unit(1.0)
        return Normal(loc + scale * logits[..., 0], scale * logits[..., 1].exp())

    def tempered(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """The logits of a noise that is multiplied by the temperature."""
        return torch.stack([logits[..., 0], logits[..., 1] + temperature.log()], -1)

    def unit(self, temperature: float) -> tuple[float, float]:
        """An exported head has the unit of the labels."""
        return self.scale or 1.0, self.loc or 0.0

    def numbers(self, *, folded: bool) -> dict[str, Any]:
        """The noise, in the unit of what the exported head gives, and that unit."""
        numbers = super().numbers(folded=folded)
        scale, loc = self.unit(1.0)
        if folded:
            return {**numbers, "loc": 0.0, "scale": 1.0, "noise": scale * numbers["noise"]}
        return {**numbers, "loc": loc, "scale": scale}
