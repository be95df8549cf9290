"""Classes in an order, by a head of one output."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from pyro_blora.labels import Kind
from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods.reading import head_logits
from pyro_blora.likelihoods.sequence_classification import ClassificationCollator
from pyro_blora.network.targets import NUMBER
from pyro_blora.options import check_count


class Ordinal(Likelihood):
    r"""Cumulative logits of classes in an order, such as one to five stars.

    .. math::

        p(y \le k) = \sigma(c_k - f(x)), \qquad c_0 < \dots < c_{K-2}

    with the one output :math:`f` of an ``AutoModelForSequenceClassification`` and learned
    ``cuts`` :math:`c`. The head is trained as a point estimate.

    Args:
        num_classes: the number K of classes.
        num_data: number of training examples.
        data_names: the names that the labels have in the data set, in order, which ``fit`` keeps
            so that a data set of another order is refused.

    Batches and rows are those of :class:`SequenceClassification`, with labels from 0 to ``K - 1``.

    Example::

        blora = BayesianLoRA(net, likelihood=Ordinal(num_classes=5), tokenizer=tokenizer)
    """

    heads = (NUMBER,)
    new_head = True
    task_type = "SEQ_CLS"
    roles: ClassVar[dict[str, str]] = {"cuts": "likelihood"}
    usual_collator = ClassificationCollator
    labels_count = True

    def __init__(
        self, *, num_classes: int, num_data: int | None = None, data_names: Sequence[str] = ()
    ) -> None:
        super().__init__(num_data=num_data)
        self.data_names = tuple(data_names)
        check_count("num_classes", num_classes, 2)
        even = (torch.arange(1, num_classes) / num_classes).logit()  # equal probabilities at f = 0
        self.cuts = PyroParam(even, constraints.ordered_vector)

    @property
    def label_kind(self) -> Kind:
        """Whole numbers of classes."""
        classes, words = range(self.num_classes), f"a whole number below {self.num_classes}"
        return words, lambda label: not isinstance(label, bool) and label in classes

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The logarithms of the probabilities, ``(B, K)``."""
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), without cancellation
        below = self.cuts - head_logits(net, batch)
        logits = pad(logsigmoid(below), (0, 1)) + pad(logsigmoid(-below), (1, 0))
        between = (-self.cuts.diff().clamp_min(1e-6)).expm1().neg().log()
        return logits + pad(between, (1, 1))

    def unit(self, temperature: float) -> tuple[float, float]:
        """An exported head stays as it is, because the temperature scales the classes' logits."""
        return 1.0, 0.0
