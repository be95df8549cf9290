"""Classification by a head on the whole sequence."""

import torch
from torch import Tensor, nn

from pyro_blora.likelihoods._likelihood import Batch, Likelihood

__all__ = ["SequenceClassification"]


class SequenceClassification(Likelihood):
    """A softmax over the logits of an ``AutoModelForSequenceClassification``.

    The network's own classification head is used as it is; where it starts from random numbers,
    train it first, or adapt it too with a rank no larger than the number of classes.

    Args:
        num_data: number of training examples.

    A batch has what the network takes, ``input_ids`` and ``attention_mask`` at least (``B x T``),
    and ``labels`` (``B``).

    Example::

        likelihood = SequenceClassification(num_data=len(train))
        likelihood.logits(net, batch).shape  # B x C
    """

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The network's logits, ``(B, C)``."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = net(**inputs).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
