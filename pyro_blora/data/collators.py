"""Collators, which make batches of token ids from lists of items or rows."""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from pyro_blora.data.items import QUESTION, Item, Template, item_of
from pyro_blora.data.tables import (
    are_numbers,
    check_rows,
    classes_of,
    features_of,
    label_of,
    names_of,
    place_of,
    read_table,
    without_subsets,
)
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.likelihoods import CausalLM, Likelihood, MultipleChoice, SequenceClassification
from pyro_blora.network.targets import own_names, without_peft

Collate = Callable[[list[Any]], Mapping[str, Any]]


def _has_label(row: Any) -> bool:
    return isinstance(row, Item) or "label" in row


def _items(rows: Any, labeled: bool) -> list[Item]:
    """The items of rows; without labels they have one of no meaning."""
    some: dict[str, Any] = {} if labeled else {"label": 0}
    every = [rows[k] for k in range(len(rows))]
    if not labeled and any(map(_has_label, every)):
        raise DataError("All rows must have a label, or none, got none in row 0; add it.")
    return [item_of(row, {"id": f"row {k}", **some}) for k, row in enumerate(every)]


class _Collator:
    """Turns texts into token ids, and rows of ids into padded tensors."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = QUESTION,
        max_length: int = 512,
    ) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self._before = self._ids(":")  # stands for the text before an answer

    def __call__(self, rows: Sequence[Item | dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of a list of items, or of dictionaries with their fields except the id."""
        batch = self._batch(_items(rows, labeled := _has_label(rows[0])))
        return batch if labeled else {key: batch[key] for key in batch if key != "labels"}

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _ids(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text; a chat template has written BOS already, and none is added to it."""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not special or (ids and ids[0] == self.tokenizer.bos_token_id):
            return ids
        return list(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])

    def _answer(self, text: str) -> list[int]:
        """The ids of a text that continues another, perhaps other than those of a text's start."""
        both, count = self._ids(":" + text), len(self._before)
        return both[count:] if both[:count] == self._before else self._ids(text)

    def _prompt(self, item: Item, answer: int = 0) -> list[int]:
        """The ids of an item's prompt, cut on the left to leave room for ``answer`` more.

        Leading special tokens (BOS) are kept; trailing ones (EOS) are dropped, because the answer
        follows.
        """
        text = self.template.format(item)
        plain, full = self._ids(text), self._ids(text, special=True)
        starts = range(len(full) - len(plain) + 1) if plain else ()
        found = [k for k in starts if full[k : k + len(plain)] == plain]
        if not found:
            raise DataError(f"item {item.id!r}: the tokenizer makes no tokens of the prompt")
        start = full[: found[0]]
        if plain[0] == self.tokenizer.bos_token_id:  # of a chat template
            start, plain = plain[:1], plain[1:]
        room = self.max_length - len(start) - answer
        if room < 1:
            raise DataError(
                f"item {item.id!r}: {len(start)} special tokens and an option of {answer} leave no "
                f"room for the question at max_length={self.max_length}: raise max_length"
            )
        return start + plain[-room:]

    def _pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, ``(rows, T)``, padded on the right."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        value = next(token for token in known if isinstance(token, int))
        tensors = [torch.tensor(row) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=value)
        return ids, pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)


class MultipleChoiceCollator(_Collator):
    r"""Makes a row for every option of every item: the prompt, then ``" " + choice``.

    The prompt is tokenized once, so the options of an item share its ids exactly. Rows are padded
    on the right. An item with fewer than K options is filled up with rows of the prompt alone.

    Args:
        tokenizer: a Hugging Face tokenizer; it needs no pad token.
        template: the prompt. Default: ``"Question: {q}\nAnswer:"``.
        max_length: the longest row T. Longer rows lose the start of the question (leading special
            tokens are kept), by the same amount for all options of an item.

    Called on B items, or dictionaries with their fields (no id needed), it returns a dict with

    - ``input_ids``, long, shape (B, K, T);
    - ``attention_mask``, long, shape (B, K, T), 1 at tokens and 0 at padding;
    - ``option_mask``, bool, shape (B, K, T), true at the tokens of the option, and false
      throughout a row that fills up K;
    - ``labels``, long, shape (B,).
    """

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        num_options = max(len(item.choices) for item in items)
        rows: list[list[int]] = []
        starts: list[int] = []  # where the option of each row begins
        for item in items:
            options = [self._answer(" " + choice) for choice in item.choices]
            if not all(options):
                raise DataError(f"item {item.id!r}: an option has no tokens: write it as text")
            prompt = self._prompt(item, answer=max(map(len, options)))
            fillers: list[list[int]] = [[]] * (num_options - len(options))
            rows += [prompt + option for option in options + fillers]
            starts += [len(prompt)] * num_options
        input_ids, attention_mask = self._pad(rows)
        positions = torch.arange(input_ids.shape[-1])
        option_mask = (positions >= torch.tensor(starts)[:, None]) & attention_mask.bool()
        shape = (len(items), num_options, -1)
        return {
            "input_ids": input_ids.reshape(shape),
            "attention_mask": attention_mask.reshape(shape),
            "option_mask": option_mask.reshape(shape),
            "labels": torch.tensor([item.label for item in items]),
        }


class LabelTokensCollator(_Collator):
    """Makes a row from the prompt of every item; the answer is predicted at its last token.

    Takes the arguments of :class:`MultipleChoiceCollator`, with a template of ``scoring="labels"``.
    ``token_ids`` has the token of each label word, in the order of the classes. A batch has
    ``input_ids`` and ``attention_mask``, long, (B, T), padded on the right, and ``labels``, long,
    (B,).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int = 512
    ) -> None:
        super().__init__(tokenizer, template, max_length)
        words = {word: self._answer(word) for word in template.label_words}
        self.token_ids: tuple[int, ...] = tuple(ids[0] for ids in words.values() if len(ids) == 1)
        if len(set(self.token_ids)) < len(template.label_words):
            raise DataError(
                f"the label words have the tokens {words}, expected a different single one each: "
                "choose other label words, or scoring='options'"
            )
        self._choices: tuple[str, ...] | None = None  # those of the first item, and so of all

    def _batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        words = tuple(word.strip().casefold() for word in self.template.label_words)
        letters = all(len(word) == 1 for word in words)  # such as A and B, for any choices
        known = self._choices
        for item in items:
            choices = tuple(choice.strip().casefold() for choice in item.choices)
            classes = [words.index(c) if c in words else k for k, c in enumerate(choices)]
            known = known or choices
            if classes != list(range(len(words))) or not (letters or choices == known):
                raise DataError(
                    f"item {item.id!r} has {len(choices)} choices, {item.choices}, expected those "
                    f"of all items, one for each of the label words {self.template.label_words!r} "
                    "and in their order: reorder the choices and labels, or use another template"
                )
        self._choices = known
        input_ids, attention_mask = self._pad([self._prompt(item) for item in items])
        labels = torch.tensor([item.label for item in items])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class ClassificationCollator:
    """Makes a row from every text, for a network with a classification head.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token.
        classes: the names of the classes, in the order of the logits, if labels are texts.
        max_length: the longest row T, cut at its end, at most the tokenizer's. Default: 512.
        own: the names that label numbers have in the rows' table, if any.

    Called on B items, or dictionaries with ``text``, ``text_pair`` where there is one, and
    ``label`` (a name or a number), it returns the tokenizer's tensors, ``(B, T)``, and ``labels``,
    long, ``(B,)``, unless the first row has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        classes: Sequence[str] = (),
        max_length: int = 512,
        own: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.classes, self.own = tokenizer, tuple(classes), tuple(own)
        self.max_length = min(max_length, tokenizer.model_max_length)
        # BOS, which the tokenizer adds, also where a chat template has written it already
        added = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
        self._start: str = tokenizer.bos_token if added else ""

    def __call__(self, rows: Sequence[Item | Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of a list of rows."""
        made = [self._row_of(row) if isinstance(row, Item) else row for row in rows]
        pairs = [row.get("text_pair") for row in made]
        firsts = [row["text"].removeprefix(self._start) for row in made]
        texts: list[Any] = [  # a data frame has NaN where a row has no second text
            (text, pair) if isinstance(pair, str) else text
            for text, pair in zip(firsts, pairs, strict=True)
        ]
        how = {"padding": True, "truncation": True, "max_length": self.max_length}
        batch = dict(self.tokenizer(texts, **how, return_tensors="pt"))
        if "label" in made[0]:
            batch["labels"] = torch.tensor([label_of(row, self.classes, self.own) for row in made])
        return batch

    def _row_of(self, item: Item) -> dict[str, Any]:
        choice = item.choices[item.label]
        named = self.classes or choice.isdecimal()
        return {"text": item.question, "label": choice if named else item.label}


class TextCollator(_Collator):
    """Makes a row from every text, for the next-token likelihood.

    Takes the tokenizer and ``max_length`` of :class:`MultipleChoiceCollator`. Called on B
    dictionaries with ``text``, or with ``prompt`` and ``completion``, it returns ``input_ids``,
    ``attention_mask`` and ``labels``, long, ``(B, T)``, padded on the right. Each row ends with the
    end-of-text token, if there is one. Prompts and padding are not scored (-100). A row that is too
    long loses its end, but a completion keeps half of ``max_length``, and its prompt then loses its
    start, though not BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> None:
        super().__init__(tokenizer, max_length=max_length)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of a list of rows."""
        made, starts, end = [], [], self.tokenizer.eos_token_id
        longest = 0
        for row in rows:
            if "completion" in row:
                plain, prompt = (self._ids(row["prompt"], special) for special in (False, True))
                scored = self._answer(row["completion"])
            else:
                plain, prompt, scored = [], [], self._ids(row["text"], special=True)
            while len(prompt) > 1 and prompt[-1] == end and prompt[-len(plain) :] != plain:
                prompt.pop()  # added by the tokenizer, but the completion follows; BOS stays
            if end is not None and scored[-1:] != [end]:
                scored.append(end)
            longest = max(longest, len(prompt) + len(scored))
            scored = scored[: max(self.max_length - len(prompt), self.max_length // 2)]
            bos = int(prompt[:1] == [self.tokenizer.bos_token_id])
            over = max(0, len(prompt) + len(scored) - self.max_length)
            kept = prompt[:bos] + prompt[bos + over :]
            made.append(kept + scored)
            starts.append(len(kept))
        if longest > self.max_length:
            warnings.warn(
                f"A text of {longest} tokens is cut to max_length={self.max_length}; pass collate="
                "TextCollator(tokenizer, max_length=...) of pyro_blora.data to keep more of it.",
                stacklevel=2,
            )
        input_ids, attention_mask = self._pad(made)
        scored_at = torch.arange(input_ids.shape[-1]) >= torch.tensor(starts).unsqueeze(-1)
        labels = input_ids.masked_fill(~(scored_at & attention_mask.bool()), -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def reading(
    data: Any,
    collate: Collate | None,
    *,
    net: nn.Module,
    likelihood: Likelihood,
    tokenizer: PreTrainedTokenizerBase | None,
    labeled: bool = True,
    training: bool = True,
    starts_at_lora: bool = False,
) -> tuple[Any, Collate | None]:
    """The examples in ``data``, and ``collate`` or the function that makes their batches instead.

    For transformers' own collators, rows of token ids lose the columns that neither the network
    nor the likelihood takes, as in its ``Trainer``; and if the data set has names for its numbers,
    those collators and a :class:`ClassificationCollator` get the numbers of the logits. For
    ``training`` a classifier's likelihood without class names takes those of the network, or else
    of the rows. Rows must have labels if they are ``labeled``; otherwise all or none have.
    """
    if isinstance(data, DataLoader | IterableDataset):
        if isinstance(likelihood, SequenceClassification):
            _check_order(data, likelihood, net, collate)
            given = getattr(data, "collate_fn", collate)
            if training and isinstance(given, ClassificationCollator) and given.classes:
                likelihood.classes = likelihood.classes or given.classes
        return data, collate
    rows = read_table(data)
    if not hasattr(rows, "__len__"):
        raise DataError(
            f"Examples must have a length, got a {type(rows).__name__}; pass a DataLoader of them."
        )
    first = rows[0] if len(rows) else None
    given = set(first) if isinstance(first, Mapping) else set()
    encoded = "input_ids" in given
    column = "labels" if {"label", "labels"} & given == {"labels"} else "label"
    if encoded and collate is None and tokenizer is not None and likelihood.row_dims == 2:
        texts = isinstance(likelihood, CausalLM)
        collate = (DataCollatorForSeq2Seq if texts else DataCollatorWithPadding)(tokenizer)
    elif encoded and collate is None and (classes_of(rows) or classes_of(rows, "labels")):
        collate = default_data_collator  # as in transformers' Trainer
    home = getattr(collate, "__module__", None) or type(collate).__module__
    theirs = encoded and home.startswith("transformers.")
    classes: tuple[str, ...] = ()
    own: list[str] = []
    if isinstance(likelihood, SequenceClassification) and first is not None:
        stored = set(features_of(without_subsets(rows)) or given)
        made = theirs and column in given - stored  # by a transform, perhaps with other numbers
        _check_order(rows if made else [], likelihood, net, collate)
        if collate is None and tokenizer is not None and isinstance(first, Mapping | Item):
            collate = ClassificationCollator(tokenizer)
        found, own = likelihood.classes, classes_of(rows, column)
        if isinstance(collate, ClassificationCollator):
            found, own = found or collate.classes or found, list(collate.own) or own
            found = class_names(net, own) if found is None and own else found
        if theirs or type(collate) is ClassificationCollator:  # a subclass may read other columns
            if found == () and starts_at_lora and not own_names(net):
                _check_places(own, [*map(str, range(len(own)))])  # of whoever trained the LoRA
            found = _classes(found, net, rows, own, column, labeled)
        if training:
            likelihood.classes = found
        classes = found or ()
        own = own if classes or _are_logits(own, net) else []
        if isinstance(collate, ClassificationCollator):
            collate = copy.copy(collate)  # with what a subclass has added
            collate.classes, collate.own = classes, tuple(own)
    if theirs:
        whole: Any = getattr(without_peft(net), "_orig_mod", without_peft(net))  # if compiled
        known = {*inspect.signature(whole.forward).parameters, *likelihood.keys}
        known |= {"labels", "label", "label_ids", "context"}

        def padded(part: list[Any]) -> Any:
            kept = [{key: row[key] for key in row if key in known} for row in part]
            if column in kept[0] and (own or (classes and column == "label")):
                read = [label_of({"label": row[column]}, classes, own) for row in kept]
                kept = [{**row, column: label} for row, label in zip(kept, read, strict=True)]
            made: Any = collate
            return made(kept)

        return rows, padded
    if collate is None and tokenizer is not None and isinstance(likelihood, MultipleChoice):
        collate = MultipleChoiceCollator(tokenizer) if isinstance(first, Mapping | Item) else None
    ours = type(collate) in (MultipleChoiceCollator, LabelTokensCollator)  # not a subclass
    if ours and isinstance(first, Mapping | Item):
        _items(rows, labeled or _has_label(first))  # now, not in the batch in which one comes
    if collate is not None or not isinstance(first, Mapping | Item):
        return rows, collate
    if tokenizer is None:
        if isinstance(first, Mapping) and not any(isinstance(v, str) for v in first.values()):
            return rows, None  # tensors, which torch collates
        raise ConfigurationError(
            "Rows of text must have a tokenizer to read them, got none; make the adapter with "
            "tokenizer=, set blora.tokenizer, or pass collate=."
        )
    columns = ", ".join(map(str, vars(first) if isinstance(first, Item) else first))
    if not isinstance(likelihood, CausalLM):
        raise ConfigurationError(
            f"{type(likelihood).__name__} must be given collate= for rows of {columns}, such as "
            "LabelTokensCollator(tokenizer, template) from pyro_blora.data."
        )
    pair = ("prompt", "completion")
    if "label" in given or (set(pair) <= given) == ("text" in given):  # neither, or both
        raise ConfigurationError(
            f"CausalLM must read the column text, or prompt and completion, got {columns}; rename "
            "or drop columns. For classes load a classifier with num_labels=, for options pass "
            "likelihood=MultipleChoice()."
        )
    check_rows(rows, *(pair if "completion" in given else ("text",)))
    return rows, TextCollator(tokenizer)


def _check_order(data: Any, likelihood: Any, net: nn.Module, collate: Any) -> None:
    """Refuses a collator or batches whose numbers mean other classes than the likelihood's."""
    whole, collate = getattr(data, "dataset", data), getattr(data, "collate_fn", collate)
    own = classes_of(whole) or classes_of(whole, "labels")
    some = whole[0] if isinstance(whole, list | tuple) and whole else None
    if isinstance(some, Item) and not getattr(collate, "classes", ()):
        own = list(some.choices)
    known = own_names(net) if likelihood.classes is None else likelihood.classes
    home = "torch." if collate is None else str(collate.__module__)
    reads = home.startswith(("transformers.", "torch.")) or getattr(collate, "own", None) == ()
    given = collate.classes if isinstance(collate, ClassificationCollator) else ()
    if _are_logits(given, net) and not likelihood.classes:
        given = ()
    if not likelihood.classes and None in [place_of(name, known) for name in given]:
        known = given if likelihood.classes is None else _names_of_numbers(net, given[0])
    numbers = not likelihood.classes and _are_logits(own, net) and not {*own} <= {*known}
    logits = tuple(map(str, range(len(own)))) if numbers else known
    for names, classes in ((given, known), (own if reads else (), logits)):
        if classes:
            _check_places(names, classes, unknown=True)
    if reads and not known:
        _check_places(own, own_names(net))


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
    if names := own_names(net):
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


def _classes(
    classes: Any, net: nn.Module, rows: Any, own: list[str], column: str, labeled: bool
) -> tuple[str, ...] | None:
    """The names of a classifier's classes for rows, which it checks; ``None`` if nobody tells."""
    if isinstance(first := rows[0], Mapping):
        columns = [column] if "input_ids" in first else ["text", "label"]
        has_label = (labeled or column in first) and (own or column == "label" or "text" in columns)
        if not has_label and any("label" in rows[k] for k in range(len(rows))):
            raise DataError("All rows must have a label, or none, got none in row 0; add it.")
        check_rows(rows, *(columns if has_label else columns[:-1]), optional=("text_pair",))
        if not has_label:
            return classes
    if classes == ():  # of a head that was trained on numbers, a number stays one
        every = [rows[k] for k in range(len(rows))]
        told = [x.choices if isinstance(x, Item) else [x[column]] for x in every]
        if all(map(are_numbers, told)):
            _check_places(own, own_names(net))
            return classes
        classes = _names_of_numbers(net, told[0][0])
    if classes is None:
        items = isinstance(first, Item)
        classes = class_names(net, list(first.choices) if items else own or names_of(rows))
    count = len(classes) or getattr(getattr(net, "config", None), "num_labels", None)
    if isinstance(first, Mapping) and count:  # now, not in the batch in which it comes
        labels = ({"label": rows[k][column]} for k in range(len(rows)))
        most = max(label_of(label, classes, own) for label in labels)
        if most >= count:
            raise DataError(
                f"The column {column!r} must number the {count} logits from 0, got {most}; name "
                f"the classes as texts, or load the network with num_labels={most + 1}."
            )
    return classes


def class_names(net: nn.Module, names: Sequence[str | int]) -> tuple[str, ...]:
    """The names of a classifier's logits in order: its own, or else ``names``; none for numbers."""
    config: Any = getattr(net, "config", None)
    if config is None:
        return () if are_numbers(names) else tuple(map(str, names))
    count, own = int(config.num_labels), own_names(net)
    given = tuple(str(config.id2label[k]) for k in range(count))  # perhaps LABEL_0, ...
    if {str(name).casefold() for name in names} <= {name.casefold() for name in given}:
        return given
    if _are_logits(names, net):
        fits = isinstance(names[0], str) and len(names) == count and not own
        return tuple(map(str, sorted(names, key=int))) if fits else ()
    if len(names) > count or (len(names) < count and not own):
        least = max(map(int, names)) + 1 if isinstance(names[0], int) else len(names)
        raise ConfigurationError(
            f"The network must have a logit for each of the classes {list(names)}, got {count}; "
            f"load it with num_labels={least}, or name all of its classes in net.config.id2label. "
            "Numbers count from 0."
        )
    return own or tuple(map(str, names))
