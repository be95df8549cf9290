"""Classification of whole sequences by a classification head, and the order of its classes."""

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.items import Item
from pyro_blora.labels import (
    A_CLASS,
    are_numbers,
    checked_labels,
    classes_of,
    features_of,
    label_of,
    names_of,
    parts_of,
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

    def __call__(self, rows: Sequence[Item | Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of a list of rows."""
        return super().__call__([self._row_of(r) if isinstance(r, Item) else r for r in rows])

    def labels(self, rows: Sequence[Any]) -> Tensor:
        """The places of the rows' classes, ``(B,)``."""
        return torch.tensor([label_of(row, self.classes) for row in rows])

    def _row_of(self, item: Item) -> dict[str, Any]:
        choice = item.choices[item.label]
        named = self.classes or choice.isdecimal()
        return {"text": item.question, "label": choice if named else item.label}


C = TypeVar("C", bound=ClassificationCollator)


class SequenceClassification(Likelihood):
    """A softmax over the logits of an ``AutoModelForSequenceClassification``.

    :class:`~pyro_blora.BayesianLoRA` trains the classification head as a point estimate, since it
    may be randomly initialized, unless it is in ``target_modules`` or ``modules_to_save`` is given.
    As a target it is trained only through its low-rank update.

    Args:
        num_data: number of training examples.
        classes: the names of the classes, in the order of the logits; an empty tuple if they are
            numbers. Default: ``fit`` takes those of the network or of the rows, if labels are
            texts.
        data_names: names that the numbers of a head without names had in a data set. Data that
            number them otherwise are refused. Default: ``fit`` takes those of the training data.

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
        self,
        *,
        num_data: int | None = None,
        classes: Sequence[str] | None = None,
        data_names: Sequence[str] = (),
    ) -> None:
        super().__init__(num_data=num_data)
        self.classes = None if classes is None else tuple(classes)
        self.data_names = tuple(data_names)

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError unless ``net`` is a classifier with one class per row."""
        super().check_network(net)
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

    def keep_head(self, net: nn.Module) -> None:
        """The classes are those that the network names, or else numbers; their order is fixed."""
        super().keep_head(net)
        self.classes = self.classes or logit_names(net)

    def settle_classes(self) -> None:
        """From now on a head without names of its classes is one of numbers."""
        self.classes = self.classes or ()

    def read(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, labeled: bool, training: bool
    ) -> Collate | None:
        """The collator, which numbers the classes as the logits do; it checks the rows, too.

        A collator of transformers and a :class:`ClassificationCollator` get the numbers of the
        logits for names and for numbers that have names in the data set. A training on rows names
        the classes, unless they have names already: as the network does, or else as the rows do.
        """
        first, ours = rows[0], collate if isinstance(collate, ClassificationCollator) else None
        encoded = isinstance(first, Mapping) and "input_ids" in first
        if collate is None or not (
            ours or (encoded and is_from(collate, "transformers.", "torch."))
        ):
            return collate  # which reads the labels by itself
        stored = features_of(rows)
        named = {"label", "labels"} & set(first) if isinstance(first, Mapping) else set()
        column = "labels" if named == {"labels"} else "label"
        names = classes_of(rows, column)
        # a transform makes labels without names, perhaps by other numbers than those of a column
        transformed = not ours and stored and column in first and column not in stored
        doubted = classes_of(rows) or classes_of(rows, "labels") if transformed else []
        given = ours.classes if ours else ()
        self._check_order(given, doubted, net)
        classes = self.classes or given or self.classes
        if not ours or type(collate) is ClassificationCollator:  # a subclass may read other columns
            if classes == () and self.trained_head and not logit_names(net):
                _check_places(names, [*map(str, range(len(names)))])
            classes = self._named(classes, net, rows, names, column, labeled)
        elif classes is None and names:
            classes = class_names(net, names)
        if training:
            kept = names if classes == () and not _are_logits(names, net) else ()
            self.classes, self.data_names = classes, self.data_names or tuple(doubted or kept)
        classes = classes or ()
        names = names if classes or _are_logits(names, net) else []
        if ours:
            collate = ours = copy.copy(ours)  # with what a subclass has added
            ours.classes = classes if isinstance(first, Item) else ()
        texts = isinstance(first, Mapping) and isinstance(first.get(column), str)
        if isinstance(first, Item) or not (
            ours or texts or names or (classes and column == "label")
        ):
            return collate

        def numbered(part: list[Any]) -> Any:
            if column in part[0]:
                labels = [label_of({"label": row[column]}, classes, names) for row in part]
                # a second column of labels would take the place of this one
                plain = [{n: row[n] for n in row if n not in ("label", "labels")} for row in part]
                part = [{**row, column: k} for row, k in zip(plain, labels, strict=True)]
            return collate(part)

        return numbered

    def _named(
        self, classes: Any, net: nn.Module, rows: Any, names: list[str], column: str, labeled: bool
    ) -> tuple[str, ...] | None:
        """The names of the classes for rows, which it checks; ``None`` if none are known."""
        if isinstance(first := rows[0], Item):
            items = [rows[k] for k in range(len(rows))]
            labels = [item.choices[item.label] for item in items]
            given: list[Any] = [choice for item in items for choice in item.choices]
            own: list[Any] = [*first.choices]
        else:
            texts = [] if "input_ids" in first else ["text"]
            if not (texts or names or column == "label"):
                return classes
            needed, column = labeled or column in first, "label" if texts else column
            given = labels = checked_labels(rows, needed, A_CLASS, *texts, column=column)
            if not labels:
                return classes
            own = names or names_of(rows)
        if classes == ():  # of a head that was trained on numbers, a number stays one
            if are_numbers(given):
                _check_places(names, logit_names(net) or self.data_names)
            else:
                classes = _names_of_numbers(net, given[0])
        if classes is None:
            classes = class_names(net, own)
        count = len(classes) or getattr(getattr(net, "config", None), "num_labels", sys.maxsize)
        # now, not in the batch in which it comes
        if (most := max(label_of({"label": label}, classes, names) for label in labels)) >= count:
            raise DataError(
                f"The column {column!r} must number the {count} logits from 0, got {most}; name "
                f"the classes as texts, or load the network with num_labels={most + 1}."
            )
        return classes

    def with_classes(
        self, collate: C, net: nn.Module, names: Sequence[str | int], training: bool
    ) -> tuple[C, int]:
        """A copy of a collator with the names of the outputs, and the number of outputs.

        ``names`` are those in the rows; a training settles them.
        """
        collate = copy.copy(collate)  # with what a subclass has added
        self._check_order(collate.classes, [], net)
        classes = self.classes or collate.classes or self.classes
        if classes is None and names:
            classes = class_names(net, names)
        if classes:
            class_names(net, classes)  # refuses more than there are outputs
        if training:
            self.classes = classes
        collate.classes = classes or ()
        count = getattr(getattr(net, "config", None), "num_labels", sys.maxsize)
        return collate, len(collate.classes) or count

    def check_loader(
        self, data: Any, collate: Collate | None, net: nn.Module, *, training: bool
    ) -> None:
        """Refuses a loader whose batches number the classes otherwise than the logits do."""
        whole, collate = getattr(data, "dataset", data), getattr(data, "collate_fn", collate)
        rows = parts_of(whole)[0]
        ours = collate if isinstance(collate, ClassificationCollator) else None
        given = ours.classes if ours else ()
        names = next(filter(None, (classes_of(whole, name) for name in self.label_columns)), [])
        first = rows[0] if isinstance(rows, list | tuple) and rows else None
        if isinstance(first, Item) and not given:
            names = list(first.choices)
        as_they_are = collate is None or is_from(collate, "transformers.", "torch.")
        as_they_are |= bool(ours and not getattr(ours, "names", ()))  # by which it reads tags
        self._check_order(given, names if as_they_are else [], net)
        if training and given:
            self.classes = self.classes or given
        elif training and self.classes is None and as_they_are and not logit_names(net):
            self.classes = None if _are_logits(names, net) else tuple(names)
        elif training and self.classes == () and as_they_are and not _are_logits(names, net):
            self.data_names = self.data_names or tuple(names)

    def _check_order(self, given: Sequence[str], names: Sequence[str], net: nn.Module) -> None:
        """Refuses classes of a collator, or names of numbers, in another order than the logits."""
        known = logit_names(net) if self.classes is None else self.classes
        if _are_logits(given, net) and not self.classes:
            given = ()
        if not self.classes and None in [place_of(name, known) for name in given]:
            known = tuple(given) if self.classes is None else _names_of_numbers(net, given[0])
        numbers = not self.classes and _are_logits(names, net) and not {*names} <= {*known}
        logits = tuple(map(str, range(len(names)))) if numbers else known
        if known:
            _check_places(given, known, unknown=True)
        if logits:
            _check_places(names, logits, unknown=True)
        if not known:
            _check_places(names, logit_names(net) or self.data_names)


def _check_places(names: Sequence[str], classes: Sequence[str], *, unknown: bool = False) -> None:
    """Refuses names in other places than in ``classes``; with ``unknown``, also other names."""
    places = [place_of(name, tuple(classes)) for name in names]
    if any(p != k and (unknown or p is not None) for k, p in enumerate(places)):
        raise DataError(
            "A collator, or a data set whose numbers are read as they are, must number the classes "
            f"as {list(classes)}, got {list(names)}; leave them out of the collator, pass the data "
            "set itself in place of a loader, or cast its column to int if its numbers are right."
        )


def _names_of_numbers(net: nn.Module, name: Any) -> tuple[str, ...]:
    """The names that a network has for a head that was trained on numbers; ``name`` is given."""
    if names := logit_names(net):
        return names
    raise ConfigurationError(
        "The classes of a head that was trained on numbers must have names before labels can be "
        f"texts, got {name!r}; pass likelihood=SequenceClassification(classes=[...]), in the order "
        "in which the head was trained."
    )


def _are_logits(names: Sequence[str | int], net: nn.Module) -> bool:
    """Whether the names of classes are numbers of logits."""
    count = getattr(getattr(net, "config", None), "num_labels", None)
    return are_numbers(names) and (count is None or max(map(int, names), default=0) < count)


def class_names(net: nn.Module, names: Sequence[str | int]) -> tuple[str, ...]:
    """The names that a classifier has for its logits, or else ``names``; none for numbers."""
    config: Any = getattr(net, "config", None)
    if config is None:
        return () if are_numbers(names) else tuple(map(str, names))
    count, known = int(config.num_labels), logit_names(net)
    given = tuple(str(config.id2label[k]) for k in range(count))  # perhaps LABEL_0, ...
    if {str(name).casefold() for name in names} <= {name.casefold() for name in given}:
        return given
    if _are_logits(names, net):
        fits = isinstance(names[0], str) and len(names) == count and not known
        return tuple(map(str, sorted(names, key=int))) if fits else ()
    if len(names) > count or (len(names) < count and not known):
        least = max(map(int, names)) + 1 if isinstance(names[0], int) else len(names)
        raise ConfigurationError(
            f"The network must have a logit for each of the classes {list(names)}, got {count}; "
            f"load it with num_labels={least}, or name all of its classes in net.config.id2label. "
            "Numbers count from 0."
        )
    return known or tuple(map(str, names))
