"""Classification by several labels at once, each of which applies or does not."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from sklearn.metrics import f1_score
from torch import Tensor, nn

from pyro_blora.errors import DataError
from pyro_blora.labels import Kind, checked_labels, first_rows, is_list, place_of
from pyro_blora.likelihoods._likelihood import Batch, Collate
from pyro_blora.likelihoods.sequence_classification import (
    ClassificationCollator,
    SequenceClassification,
)
from pyro_blora.network.targets import CLASS, LABELS
from pyro_blora.prediction import Prediction
from pyro_blora.scores import Metrics, auroc, item_scores


def _is_set(value: Any) -> bool:
    if not is_list(value):
        return False
    return all(isinstance(n, str) for n in value) or all(n in (0, 1) for n in value)


A_SET: Kind = ("a list of the names that apply, or of 0 and 1 for each label", _is_set)


class MultiLabelCollator(ClassificationCollator):
    """Makes a row from every text, with 0 or 1 for each label.

    Takes the arguments of :class:`ClassificationCollator`. Called on B dictionaries with ``text``,
    ``text_pair`` where there is one, and ``label`` (a list of the names that apply, or of 0 and 1),
    it returns the tokenizer's tensors, ``(B, T)``, and ``labels``, float as in transformers,
    ``(B, L)``, unless the first row has none.
    """

    def labels(self, rows: Sequence[Any]) -> Tensor:
        """Whether each label applies to each row, ``(B, L)``."""
        return torch.tensor([multi_hot(row["label"], self.classes) for row in rows])


def multi_hot(label: Any, classes: tuple[str, ...], size: int = 0, where: str = "") -> list[float]:
    """A 1 for each of ``size`` outputs that applies, else 0, of a list of names or of 0 and 1."""
    places = [place_of(name, classes) if isinstance(name, str) else -1 for name in label]
    if classes and not {None, -1} & {*places}:
        return [float(k in places) for k in range(len(classes))]
    if {*places} != {-1} or size not in (0, len(label)):
        raise DataError(
            f"The labels must be names of {list(classes)}, or 0 or 1 for each of {size} outputs, "
            f"got {list(label)!r:.80}{where}; leave the row out, or pass MultiLabel(classes=[...]) "
            "with all names, spelled alike."
        )
    return [*map(float, label)]


class MultiLabel(SequenceClassification):
    r"""A Bernoulli distribution for each output of an ``AutoModelForSequenceClassification``.

    .. math::

        p(y \mid x) = \prod_l \sigma(f_l(x))^{y_l} (1 - \sigma(f_l(x)))^{1 - y_l}

    It is the likelihood of networks with ``problem_type="multi_label_classification"``. The logits
    of a label are 0 and :math:`f_l`, so that a prediction's ``probs[:, l, 1]`` is the probability
    that label ``l`` applies, and its entropies are those of each label, ``(B, L)``. The head is
    trained as by :class:`SequenceClassification`.

    Args:
        num_data: number of training examples.
        classes: the names of the labels, in the order of the network's outputs; an empty tuple if
            they have none. Default: ``fit`` takes those of the network, or of the rows, sorted.

    Batches and rows are those of :class:`SequenceClassification`, but a batch has 0 or 1 for each
    label, ``B x L``, and the ``label`` of a row is a list of the names that apply, or of 0 and 1
    for each output.

    Example::

        blora = BayesianLoRA(net, likelihood=MultiLabel(), tokenizer=tokenizer)
        fit(blora, [{"text": "Late, but warm.", "label": ["delivery", "food"]}, ...])
        blora.predict(["The food was cold."]).probs[0, :, 1]  # of each of blora.likelihood.classes
    """

    heads = (LABELS, CLASS)
    is_categorical = True
    usual_collator = MultiLabelCollator

    def output_names(self, rows: Any) -> Sequence[str]:
        """``classes``, or the names in the rows, sorted, or of lists of 0 and 1 placeholders."""
        labels = checked_labels(rows, True, A_SET)
        outputs = range(max(map(len, labels)))
        return self.classes or list(map(str, _names_in(labels))) or [f"LABEL_{k}" for k in outputs]

    def read(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, labeled: bool, training: bool
    ) -> Collate | None:
        """The collator, which gets the names of the outputs; it checks the rows, too."""
        if type(collate) is not MultiLabelCollator:
            return collate  # which reads the labels by itself
        labels = checked_labels(rows, labeled, A_SET, "text")
        names, given = _names_in(labels), collate.classes
        classes, size = self.outputs(
            net, given, names, own=list(map(str, names)), training=training
        )
        ours = collate.named(classes)
        for k, label in enumerate(labels):
            multi_hot(label, ours.classes, size, f" in row {k}")
        return ours

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The logits of "no" and "yes" for each label, ``(B, L, 2)``, of which the first is 0."""
        logits = super().logits(net, batch)
        return torch.stack([torch.zeros_like(logits), logits], -1)

    def labels(self, batch: Batch) -> Tensor | None:
        """Whether each label applies, ``(B, L)``, 0 or 1; fractions stay, to be refused."""
        labels: Tensor | None = batch.get("labels")
        wrong = labels is None or (labels.is_cpu and bool((labels % 1 != 0).any()))
        return labels if labels is None or wrong else labels.long()

    def distribution(self, logits: Tensor, labels: Tensor | None) -> TorchDistribution:
        """Independent labels; those of an example are one event."""
        return pyro.distributions.Categorical(logits=logits).to_event(1)

    def scores(self, logits: Tensor) -> Tensor:
        """The log-odds of each label, ``(B, L)``, as the network itself gives them."""
        no, yes = super().scores(logits).unbind(-1)
        return yes - no

    def metrics(self, prediction: Prediction, labels: Tensor) -> Metrics:
        """The NLL of all labels of an example, and means over labels of ECE, F1 and AUROC.

        A label that applies to none of the examples, or to all, has no AUROC.
        """
        nll = -float(prediction.log_prob(labels).sum(-1).mean())
        each = [*zip(prediction.probs.cpu().unbind(1), labels.cpu().unbind(1), strict=True)]
        ece = mean(float(item_scores(p, y)[2].mean()) for p, y in each)
        f1 = mean(float(f1_score(y, p.argmax(-1), zero_division=0)) for p, y in each)
        areas = [auroc(p[y == 0, 1], p[y == 1, 1]) for p, y in each if 0 < y.sum() < len(y)]
        scores = {"auroc": mean(areas)} if areas else {}
        return Metrics(nll=nll, ece=ece, f1=f1, **scores, n=len(labels))


def _names_in(labels: Sequence[Any]) -> dict[str | int, int]:
    """The names in lists of labels, sorted, each with the first row that has it."""
    first = first_rows([[n for n in label if isinstance(n, str)] for label in labels])
    return {name: first[name] for name in sorted(map(str, first))}
