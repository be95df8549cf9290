"""Classification of whole sequences by a classification head, and the order of its classes."""

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.labels import (
    A_CLASS,
    Item,
    are_numbers,
    check_places,
    checked_labels,
    classes_of,
    first_rows,
    in_order,
    is_transformed,
    label_of,
    names_of,
    place_of,
)
from pyro_blora.likelihoods._likelihood import Batch, Collate, Likelihood
from pyro_blora.likelihoods._prompts import NumberCollator, is_from
from pyro_blora.likelihoods.reading import head_logits
from pyro_blora.network.targets import CLASS, logit_names


class ClassificationCollator(NumberCollator):
    """Makes a row from every text, for a network with a classification head.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token.
        classes: the names of the classes, in the order of the logits, if labels are texts.
        max_length: the longest row T, cut at its end, at most the tokenizer's. Default: 512.

    Called on B items, or dictionaries with ``text``, ``text_pair`` where there is one, and
    ``label`` (a name or a number), it returns the tokenizer's tensors, ``(B, T)``, and ``labels``,
    long, ``(B,)``, unless the first row has none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str] = (), max_length: int = 512
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.classes = tuple(classes)
        self.data_names: tuple[str, ...] = ()  # that numbers have in the data set

    def named(self, classes: Sequence[str] | None, names: Sequence[str] = ()) -> Self:
        """A copy with these names of the classes and of the numbers in the data set."""
        named = copy.copy(self)  # with what a subclass has added
        named.classes, named.data_names = tuple(classes or ()), tuple(names)
        return named

    def likelihood(self, num_data: int | None) -> "SequenceClassification":
        """The likelihood of its batches, with its names of the classes."""
        return SequenceClassification(num_data=num_data, classes=self.classes or None)

    def __call__(self, rows: Sequence[Item | Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of a list of rows."""
        return super().__call__([_row_of(r) if isinstance(r, Item) else r for r in rows])

    def labels(self, rows: Sequence[Any]) -> Tensor:
        """The places of the rows' classes, ``(B,)``."""
        return torch.tensor([label_of(row["label"], self.classes, self.data_names) for row in rows])


class SequenceClassification(Likelihood):
    """A softmax over the logits of an ``AutoModelForSequenceClassification``.

    :class:`~pyro_blora.BayesianLoRA` trains the classification head as a point estimate, since it
    may be randomly initialized, unless it is in ``target_modules`` or ``modules_to_save`` is given.
    As a target it is trained only through its low-rank update.

    Args:
        num_data: number of training examples.
        classes: the names of the classes, in the order of the logits; an empty tuple if they are
            numbers. Default: ``fit`` takes those of the network, or of the data if its labels have
            names.

    A batch has ``input_ids`` and ``attention_mask`` (``B x T``), any other arguments of the
    network, and ``labels`` (``B``). Rows have ``text``, ``text_pair`` if there is a second one,
    and ``label``.

    Example::

        likelihood = SequenceClassification(num_data=len(train))
        likelihood.logits(net, batch).shape  # B x C
    """

    heads: ClassVar[tuple[str, ...]] = (CLASS,)
    new_head = True
    task_type = "SEQ_CLS"
    usual_collator = ClassificationCollator
    label_columns: ClassVar[tuple[str, ...]] = ("label", "labels")  # which may name the classes

    def __init__(
        self, *, num_data: int | None = None, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(num_data=num_data)
        self.classes = None if classes is None else tuple(classes)

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError unless ``net`` is a classifier with one class per row."""
        super().check_network(net)
        class_names(net, self.classes or (0,))  # which refuses another number of names
        names = logit_names(net)
        if self.classes and self.classes != names and {*self.classes} == {*names}:
            warnings.warn(
                f"The classes {list(self.classes)} have another order than the network's names of "
                f"its logits, {list(names)}, by which a pipeline answers; set net.config.id2label.",
                stacklevel=4,
            )

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The network's logits, ``(B, C)``."""
        return head_logits(net, batch)

    def output_names(self, rows: Any) -> Sequence[str]:
        """``classes``, or those of the rows in order; numbers are the places of logits."""
        names = names_of(rows)
        if self.classes is None:
            return [*map(str, names)]
        return self.classes or [*map(str, range(max(map(int, names)) + 1))]

    def keep_head(self, net: nn.Module) -> None:
        """The classes are those that the network names, or else numbers; their order is fixed."""
        super().keep_head(net)
        self.settle_classes(net)

    def settle_classes(self, net: nn.Module) -> None:
        """From now on a head without names of its classes is one of numbers of its logits."""
        self.classes = self.classes or logit_names(net)

    def read(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, labeled: bool, training: bool
    ) -> Collate | None:
        """The collator, which numbers the classes as the logits do; it checks the rows, too.

        A collator of transformers and a :class:`ClassificationCollator` get the numbers of the
        logits for names and for numbers that have names in the data set. What a transform or
        another collator numbers is read as it is.
        """
        first: Any = rows[0]
        row, is_item = first if isinstance(first, Mapping) else {}, isinstance(first, Item)
        encoded, column = "input_ids" in row, "label"
        if "labels" in row and "label" not in row:
            column = "labels"
        theirs = encoded and is_from(collate, "transformers.", "torch.")
        ours = collate if type(collate) is ClassificationCollator else None
        if collate is None or not (ours or theirs) or (classes_of(rows) and is_transformed(rows)):
            self.check_loader(rows, collate, net, training=training)
            return collate
        names, own = classes_of(rows, column), first.choices if is_item else ()
        if is_item:
            labels: list[Any] = [_row_of(rows[k])["label"] for k in range(len(rows))]
        elif ours and not encoded:
            labels = checked_labels(rows, labeled or column in row, A_CLASS, "text")
        elif column == "labels" and not names:  # which transformers reads as they are
            return collate
        else:
            labels = checked_labels(rows, labeled or column in row, A_CLASS, column=column)
        given = ours.classes if ours else ()
        classes, _ = self.outputs(net, given, first_rows(labels), names, own, training=training)
        if ours:
            return ours.named(classes, names)

        def numbered(part: list[Any]) -> Any:
            if column in part[0]:
                labels = [label_of(row[column], classes, names) for row in part]
                # a second column of labels would take the place of this one
                plain = [{n: row[n] for n in row if n not in ("label", "labels")} for row in part]
                part = [{**row, column: k} for row, k in zip(plain, labels, strict=True)]
            return collate(part)

        return numbered

    def outputs(
        self,
        net: nn.Module,
        given: tuple[str, ...],
        labels: Mapping[str | int, int],
        names: Sequence[str] = (),
        own: Sequence[str] = (),
        *,
        training: bool,
    ) -> tuple[tuple[str, ...], int]:
        """The names of the network's outputs, if they have any, and the number of outputs.

        They are those of this likelihood, or else those ``given`` by a collator, those of the
        network, or those of the rows: their ``own``, what numbers mean there (``names``), or their
        ``labels`` in order, each with a row to name. A training keeps them.
        """
        classes = self._known(net, given)
        numbered = self.classes == () or (self.by_numbers and not training)
        if numbered and not classes:
            if not are_numbers(labels):
                self._refuse_names(next(iter(labels)))
            if self.trained_head:
                check_places(names, [*map(str, range(len(names)))])
            if training and not are_numbers(names):
                classes = tuple(names)
        elif not classes and (own or names or labels):
            classes = class_names(net, own or names or in_order(labels))
        if classes:
            class_names(net, classes)  # refuses more than there are outputs
        count = len(classes) or _num_labels(net)
        for label, k in labels.items():  # now, not in the batch in which it comes
            if (place := label_of(label, classes, names, f" in row {k}")) >= count:
                raise DataError(
                    f"A label must number the {count} logits from 0, got {place} in row {k}; name "
                    f"the classes as texts, or load the network with num_labels={place + 1}."
                )
        if training:
            self.classes = classes
        return classes, count

    def check_loader(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, training: bool
    ) -> None:
        """Refuses a loader whose batches number the classes otherwise than the logits do."""
        ours = collate if isinstance(collate, ClassificationCollator) else None
        given, names = ours.classes if ours else (), list[str]()
        plain = collate is None or is_from(collate, "transformers.", "torch.")
        if plain or (ours and not ours.data_names):  # others read labels by themselves
            names = classes_of(rows, *self.label_columns)
        if given:  # the collator reads numbers as they are, or as names that are numbers
            check_places(names, [given[label_of(k, given)] for k in range(len(names))])
        known = self._known(net, given)
        numbers = _are_logits(names, net) and not {*names} <= {*known}
        places = tuple(map(str, range(len(names)))) if numbers else known
        check_places(names, places, unknown=bool(places))
        if training and (given or names):
            classes = class_names(net, given or names)  # refuses another number of them
            self.classes = known or classes or self.classes

    def _known(self, net: nn.Module, given: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the outputs by this likelihood, a collator or the network, if any."""
        known = self.classes or logit_names(net)
        if not self.classes and None in [place_of(name, known) for name in given]:
            if self.classes is not None:
                self._refuse_names(given[0])
            return given
        check_places(given, known, unknown=True)
        return known

    def _refuse_names(self, name: Any) -> None:
        raise ConfigurationError(
            "The classes of a head that was trained on numbers must have names before labels can "
            f"be texts, got {name!r}; pass likelihoods.{type(self).__name__}(classes=[...]), in "
            "the order in which the head was trained."
        )


def _row_of(item: Item) -> dict[str, Any]:
    return {"text": item.question, "label": item.choices[item.label]}


def _num_labels(net: nn.Module) -> int:
    return getattr(getattr(net, "config", None), "num_labels", sys.maxsize)


def _are_logits(names: Sequence[str | int], net: nn.Module) -> bool:
    """Whether the names of classes are numbers of logits."""
    return are_numbers(names) and max(map(int, names), default=0) < _num_labels(net)


def class_names(net: nn.Module, names: Sequence[str | int]) -> tuple[str, ...]:
    """The names that a classifier has for its logits, or else ``names``; none for numbers."""
    config: Any = getattr(net, "config", None)
    if config is None:
        return () if are_numbers(names) else tuple(map(str, names))
    count, known = int(config.num_labels), logit_names(net)
    given = tuple(str(config.id2label[k]) for k in range(count))  # perhaps LABEL_0, ...
    if None not in [place_of(str(name), given) for name in names]:
        return given
    if _are_logits(names, net):
        return ()
    if len(names) > count or (len(names) < count and not known):
        least = max(map(int, names)) + 1 if isinstance(names[0], int) else len(names)
        raise ConfigurationError(
            f"The network must have a logit for each of the classes {list(names)}, got {count}; "
            f"load it with num_labels={least}, or name all of its classes in net.config.id2label. "
            "Numbers count from 0."
        )
    return known or tuple(map(str, names))
