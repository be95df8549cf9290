"""Classification of whole sequences by a classification head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods.reading import positions_of
from pyro_blora.network.targets import head_of


class SequenceClassification(Likelihood):
    """A softmax over the logits of an ``AutoModelForSequenceClassification``.

    :class:`~pyro_blora.BayesianLoRA` trains the classification head as a point estimate, since it
    may be randomly initialized, unless it is in ``target_modules`` or ``modules_to_save`` is given.
    As a target it is trained only through its low-rank update.

    Args:
        num_data: number of training examples.
        classes: the names of the classes, in the order of the logits. Default: ``fit`` takes those
            of the network or of the rows, if labels are texts.

    A batch has ``input_ids`` and ``attention_mask`` (``B x T``), any other arguments of the
    network, and ``labels`` (``B``).

    Example::

        likelihood = SequenceClassification(num_data=len(train))
        likelihood.logits(net, batch).shape  # B x C
    """

    new_head = True

    def __init__(
        self, *, num_data: int | None = None, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(num_data=num_data)
        self.classes = None if classes is None else tuple(classes)

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError unless ``net`` is a classifier with one class per row."""
        config = getattr(net, "config", None)
        kind, classes = (getattr(config, name, None) for name in ("problem_type", "num_labels"))
        single = kind in (None, "single_label_classification") and classes != 1
        if head_of(net) is not None or not single:
            raise ConfigurationError(
                f"{type(net).__name__} must give one of several classes for each row, got "
                f"problem_type={kind!r} and num_labels={classes}; load it with "
                "AutoModelForSequenceClassification and num_labels= of 2 or more, or take "
                "LabelTokens or CausalLM."
            )

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The network's logits, ``(B, C)``."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if "position_ids" not in inputs:
            inputs.update(positions_of(net, inputs.get("attention_mask")))
        logits: Tensor = net(**inputs).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
