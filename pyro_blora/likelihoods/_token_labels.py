"""What likelihoods of a label for each token share."""

import pyro
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods._likelihood import Batch, Likelihood


class TokenLabels(Likelihood):
    """Independent categoricals over the labels of a row, of which those of -100 are not scored."""

    is_categorical = True

    def distribution(self, logits: Tensor, labels: Tensor | None) -> TorchDistribution:
        """Independent categoricals over the scored tokens; a sequence is one event."""
        tokens = pyro.distributions.Categorical(logits=logits)
        if labels is None:
            return tokens.to_event(1)
        return _IgnoringCategorical(logits=logits).mask(labels >= 0).to_event(1)

    def num_scored(self, labels: Tensor) -> Tensor:
        """The number of scored tokens of each row, ``(B,)``."""
        return (labels != -100).sum(-1)

    def check_labels(self, labels: Tensor, logits: Tensor) -> None:
        """Raises BatchError for invalid labels, as the base class does, but allows -100."""
        super().check_labels(labels.clamp_min(0), logits)
        if labels.is_cpu and bool(((labels < 0) & (labels != -100)).any()):
            raise BatchError(
                "labels must be 0 or more, or -100 for tokens that are not scored, got another "
                "negative number."
            )
        if labels.is_cpu and bool((labels < 0).all(-1).any()):
            raise BatchError(
                "Each row must have a token to score, got one without, which would count as an "
                "example and teach nothing; leave it out, or raise the length at which it is cut."
            )

    def per_token(self, batch: Batch) -> Tensor | None:
        """The labels of all tokens, ``(B, T)``, or ``None``; BatchError for another shape."""
        labels, shape = batch.get("labels"), tuple(batch["attention_mask"].shape)
        if labels is not None and labels.shape != shape:
            raise BatchError(
                f"labels must be one per token, of shape {shape}, got {tuple(labels.shape)}; for "
                "one class per row use LabelTokens or SequenceClassification."
            )
        return labels


class _IgnoringCategorical(pyro.distributions.Categorical):
    """A categorical that accepts -100, whose scores are masked outside."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.clamp_min(0))

    def _validate_sample(self, value: Tensor) -> None:
        super()._validate_sample(value.clamp_min(0))
