"""Preferences between texts by a head of one output, the reward."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyro_blora.errors import BatchError, DataError
from pyro_blora.labels import A_TEXT, Kind, check_rows
from pyro_blora.likelihoods._likelihood import Batch, Collate, Likelihood
from pyro_blora.likelihoods._prompts import PromptCollator
from pyro_blora.likelihoods.packing import check_noise
from pyro_blora.likelihoods.reading import check_head, head_logits
from pyro_blora.network.targets import NUMBER

_SPOKEN: Kind = ("a text with words", lambda value: isinstance(value, str) and bool(value.strip()))
_MESSAGES: Kind = ("a list of messages", lambda value: isinstance(value, list) and bool(value))


class Preference(Likelihood):
    r"""The Bradley-Terry model of which of two texts was chosen, given their rewards.

    .. math::

        p(\text{chosen} \succ \text{rejected} \mid U) = \sigma(r_U(\text{chosen}) -
        r_U(\text{rejected}))

    with the one output :math:`r` of an ``AutoModelForSequenceClassification``. Both texts run under
    the same draw of U. ``fit`` holds out an eighth of the pairs for a temperature, since rewards
    that separate the training pairs claim too much. The head is trained as a point estimate.
    :meth:`BayesianLoRA.rewards <pyro_blora.BayesianLoRA.rewards>` gives the rewards of texts.

    Args:
        num_data: number of training pairs.

    A batch has ``input_ids`` and ``attention_mask`` (``B x 2 x T``, the chosen text first), and
    ``labels`` (``B``), the place of the chosen text. Rows have ``chosen`` and ``rejected``, and
    ``prompt`` if both continue one, as in TRL. They need no label: it is always 0, so the
    prediction's ``probs[:, 0]`` is the probability of the text that a row calls chosen.

    Raises:
        ConfigurationError: the updates have conditional noise, which two texts cannot share.

    Example::

        blora = BayesianLoRA(net, likelihood=Preference(), tokenizer=tokenizer)
        fit(blora, [{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}, ...])
        blora.predict([{"chosen": "I can help.", "rejected": "No."}]).probs[:, 0]
    """

    row_dims = 3
    head = NUMBER
    new_head = True
    task_type = "SEQ_CLS"
    held_out = 1 / 8

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError unless ``net`` has one output for each row."""
        check_head(net, self.head)

    def collator(self, tokenizer: Any, row: Any) -> Collate:
        """A :class:`PreferenceCollator`."""
        return PreferenceCollator(tokenizer)

    def examples(self, batch: Batch) -> int:
        """Number of examples ``B``; each text must have a token."""
        count = super().examples(batch)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if ids.shape != mask.shape or (mask.is_cpu and (~mask.any(-1)).any()):
            raise BatchError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, and a real "
                f"token of each text, got {tuple(mask.shape)} or padding alone; check the collator."
            )
        return count

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The rewards, ``(B, K)``, of the ``K`` texts of each example."""
        check_noise(net, "the two texts of a pair, which are never packed")
        texts = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() == 3}
        rewards = head_logits(net, {key: value.flatten(0, 1) for key, value in texts.items()})
        return rewards.reshape(batch["input_ids"].shape[:2])


class PreferenceCollator(PromptCollator):
    """Makes a row from each text of every pair, after the prompt that both continue.

    As in TRL the prompt and a text are joined as they are, and the end-of-text token follows. Lists
    of messages are joined, too, and written by the tokenizer's chat template. Where TRL leaves out
    a pair that is too long, here each text loses what follows its special tokens at the start,
    with a warning, because answers differ at their ends.

    Takes the tokenizer and ``max_length`` of :class:`MultipleChoiceCollator`. Called on B
    dictionaries with ``chosen``, ``rejected`` and perhaps ``prompt``, it returns ``input_ids`` and
    ``attention_mask``, long, ``(B, 2, T)``, padded on the right, and ``labels``, zeros, ``(B,)``.
    Of dictionaries with ``text`` in place of a pair it returns ``(B, 1, T)`` without labels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> None:
        super().__init__(tokenizer, max_length=min(max_length, tokenizer.model_max_length))

    def check(self, rows: Any, labeled: bool) -> None:
        """Checks that each row is a pair of different texts."""
        rows = rows if isinstance(rows[0], Mapping) else [vars(rows[0])]  # an item has no pair
        self._check_texts(rows, "chosen", "rejected")
        for k in range(len(rows)):
            if (text := rows[k]["chosen"]) == rows[k]["rejected"]:
                raise DataError(
                    f"The texts of a pair must differ, got {text!r:.80} twice in row {k}; leave "
                    "the row out."
                )

    def _check_texts(self, rows: Any, *columns: str) -> None:
        """Checks that these columns and a prompt all have texts, or all have messages."""
        some = rows[0].get(columns[0]) if len(rows) else None
        kind = _MESSAGES if isinstance(some, list) else _SPOKEN
        kinds = dict.fromkeys(columns, kind) | {"prompt": A_TEXT if kind is _SPOKEN else kind}
        check_rows(rows, *columns, optional=("prompt",), kinds=kinds)

    def rows_of(self, texts: Sequence[Any]) -> list[dict[str, Any]]:
        """Rows of single texts, or of pairs of a prompt and a text, which it checks."""
        pairs = (text if isinstance(text, tuple) else (None, text) for text in texts)
        rows = [{"prompt": prompt, "text": text} for prompt, text in pairs]
        self._check_texts(rows, "text")
        return rows

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of a list of rows."""
        pairs = "chosen" in rows[0]
        names = ("chosen", "rejected") if pairs else ("text",)
        texts = [self._text(row.get("prompt"), row[name]) for row in rows for name in names]
        ids, mask = (each.unflatten(0, (len(rows), len(names))) for each in self._pad(texts))
        batch = {"input_ids": ids, "attention_mask": mask}
        return {**batch, "labels": torch.zeros(len(rows)).long()} if pairs else batch

    def _text(self, prompt: Any, text: Any) -> list[int]:
        """The ids of a prompt and a text, without the start of what is too long."""
        text = prompt + text if isinstance(prompt, str | list) else text  # a data frame has NaN
        if isinstance(text, list):
            ids = list(self.tokenizer.apply_chat_template(text, return_dict=True)["input_ids"])
        else:
            ids, end = self._ids(text, special=True), self.tokenizer.eos_token_id
            ids += [] if end is None or ids[-1:] == [end] else [end]
        if (over := len(ids) - self.max_length) > 0:
            warnings.warn(
                f"A text of more than {self.max_length} tokens loses its start; pass collate="
                "PreferenceCollator(tokenizer, max_length=...) to keep more.",
                stacklevel=3,
            )
            special = self.tokenizer.all_special_ids
            start = next((k for k, token in enumerate(ids) if token not in special), 0)
            ids = ids[:start] + ids[start + over :]
        return ids
