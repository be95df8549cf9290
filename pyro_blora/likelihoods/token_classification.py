"""Classification of words by a head with a tag for each token."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForTokenClassification

from pyro_blora.errors import ConfigurationError
from pyro_blora.labels import classes_of, first_tags, in_order, label_of
from pyro_blora.likelihoods._likelihood import Batch, Collate, Prepared
from pyro_blora.likelihoods._token_labels import TokenLabels
from pyro_blora.likelihoods.reading import compact, head_logits
from pyro_blora.likelihoods.sequence_classification import (
    ClassificationCollator,
    SequenceClassification,
)
from pyro_blora.network.targets import TAGS
from pyro_blora.prediction import Prediction
from pyro_blora.scores import Metrics, evaluate


class TagCollator(ClassificationCollator):
    """Makes a row from every list of words, for a network with a tag for each token.

    Takes the arguments of :class:`ClassificationCollator`. Called on B dictionaries with
    ``tokens``, and ``tags`` unless the first row has none, it returns the tokenizer's tensors,
    ``word_mask``, bool, and ``labels``, long, all ``(B, T)``. A row that is too long loses its last
    words, with a warning. A word of which the tokenizer makes nothing becomes its unknown token.
    """

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The batch of a list of rows."""
        if self.tokenizer.truncation_side != "right":  # word k would be another one
            raise ConfigurationError(
                "tokenizer.truncation_side must be 'right' for words, whose first ones a long row "
                f"keeps, got {self.tokenizer.truncation_side!r}; set it so."
            )
        options = {"padding": True, "truncation": True, "max_length": self.max_length}
        split, blank = self.tokenizer.tokenize, self.tokenizer.unk_token or "?"
        words = [[w if split(w) else blank for w in row["tokens"]] for row in rows]
        encoded = self.tokenizer(words, is_split_into_words=True, return_tensors="pt", **options)
        owners = [[-1 if w is None else w for w in encoded.word_ids(k)] for k in range(len(rows))]
        owner = torch.tensor(owners)
        first = (owner >= 0) & (owner != pad(owner, (1, -1), value=-1))
        batch = {**encoded, "word_mask": first}
        kept = first.sum(-1).tolist()
        if cut := [k for k, row in enumerate(words) if kept[k] < len(row)]:
            warnings.warn(
                f"A row of {len(words[cut[0]])} words keeps its first {kept[cut[0]]}, and the "
                "others are not read; split it, or pass collate=TagCollator(tokenizer, "
                "max_length=...) to keep more.",
                stacklevel=2,
            )
        if "tags" in rows[0]:
            known = self.classes, self.data_names
            every = [[label_of(t, *known) for t in row["tags"]] for row in rows]
            tags = pad_sequence([*map(torch.tensor, every)], batch_first=True)
            batch["labels"] = tags.gather(1, owner.clamp_min(0)).masked_fill(~first, -100)
        return batch


class TokenClassification(TokenLabels, SequenceClassification):
    """A softmax for each word over the logits of an ``AutoModelForTokenClassification``.

    The network reads a word by its first token. Predictions have the words in order,
    ``S x B x W x K``; where a row has fewer words, its first class has probability 1, so that
    entropies are 0 there. The head is trained as a point estimate.

    Args:
        num_data: number of training examples, which are rows, not words.
        classes: the names of the tags, in the order of the logits; an empty tuple if they are
            numbers. Default: ``fit`` takes those of the network or of the rows, sorted.

    A batch has ``input_ids``, ``attention_mask`` and ``labels`` (``B x T``), -100 where a token is
    not scored, and any other arguments of the network; ``word_mask`` (``B x T``) is true at the
    first token of each word. Without it, as transformers' collator makes batches, the words are the
    tokens with labels, or all tokens if there are none. Rows have ``tokens``, a list of words, and
    ``tags``, one for each: names, or numbers of logits.

    Example::

        blora = BayesianLoRA(net, likelihood=TokenClassification(), tokenizer=tokenizer)
        fit(blora, [{"tokens": ["Ada", "won"], "tags": ["B-person", "O"]}, ...], num_epochs=6)
        blora.predict([{"tokens": ["Grace", "won", "too"]}]).mutual_information  # 1 x 3
    """

    heads = (TAGS,)
    task_type = "TOKEN_CLS"
    padding = DataCollatorForTokenClassification
    usual_collator = TagCollator
    label_columns = ("tags", "label", "labels")

    def output_names(self, rows: Any) -> Sequence[str]:
        """``classes``, or the tags in the rows, sorted."""
        names = self.classes or classes_of(rows, "tags") or in_order(first_tags(rows, True))
        return [*map(str, names if isinstance(names[0], str) else range(int(names[-1]) + 1))]

    def read(
        self, rows: Any, collate: Collate | None, net: nn.Module, *, labeled: bool, training: bool
    ) -> Collate | None:
        """The collator, which numbers the tags as the logits do; it checks the rows, too."""
        if type(collate) is not TagCollator:  # the labels are read as they are
            self.check_loader(rows, collate, net, training=training)
            return collate
        tags, names = first_tags(rows, labeled), classes_of(rows, "tags")
        classes, _ = self.outputs(net, collate.classes, tags, names, training=training)
        return collate.named(classes, names)

    def prepare(self, batch: Batch) -> Prepared:
        """The batch, checked, with its words, whose count synchronizes the device."""
        prepared = super().prepare(batch)
        prepared["word_mask"], prepared["word_count"] = self._words(batch)
        return prepared

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The logits of the words in order, ``(B, W, K)``."""
        inputs = {key: value for key, value in batch.items() if not key.startswith("word_")}
        logits, (words, count) = head_logits(net, inputs), self._words(batch)
        index = torch.arange(words.shape[-1], device=words.device).expand_as(words)
        real, (places,) = compact(words, count, index)
        absent = torch.full_like(logits[0, 0], -torch.inf)
        absent[0] = 0  # which is certain of the first class
        logits = logits.take_along_dim(places.to(logits.device).unsqueeze(-1), 1)
        return torch.where(real.to(logits.device).unsqueeze(-1), logits, absent)

    def labels(self, batch: Batch) -> Tensor | None:
        """The tags of the words in order, ``(B, W)``, padded with -100."""
        if (labels := batch.get("labels")) is None:
            return None
        real, (tags,) = compact(*self._words(batch), labels)
        return tags.masked_fill(~real, -100)

    def metrics(self, prediction: Prediction, labels: Tensor) -> Metrics:
        """The scores of all words, and F1 of the spans that tags mark, if ``seqeval`` is there."""
        known, names, both = labels >= 0, self.classes or (), (labels, prediction.predictions)
        scores = evaluate(prediction.probs[known], labels[known])
        if names and {name[:2] for name in names} <= {"B-", "I-", "E-", "S-", "O"}:
            with suppress(ImportError):
                from seqeval.metrics import f1_score

                spans = [[[names[k] for k in x[b, w]] for b, w in enumerate(known)] for x in both]
                scores["f1"] = float(f1_score(*spans, zero_division=0))
        return scores

    def _words(self, batch: Batch) -> tuple[Tensor, int]:
        """Where words start, ``(B, T)``, and the most in a row."""
        if "word_count" in batch:
            return batch["word_mask"], batch["word_count"]
        labels = self.per_token(batch)
        usual = batch["attention_mask"] if labels is None else labels != -100
        words: Tensor = batch.get("word_mask", usual).bool()
        return words, max(int(words.sum(-1).max()), 1)
