"""Preferences between texts by a head of one output, the reward."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyro_blora.errors import DataError
from pyro_blora.labels import Kind, check_rows
from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods._prompts import PromptCollator
from pyro_blora.likelihoods.packing import check_noise
from pyro_blora.likelihoods.reading import head_logits
from pyro_blora.network.targets import NUMBER
from pyro_blora.prediction import Prediction
from pyro_blora.scores import Metrics, evaluate

_SPOKEN: Kind = ("a text with words", lambda value: isinstance(value, str) and bool(value.strip()))
_KINDS = dict.fromkeys(("text", "chosen", "rejected"), _SPOKEN)


class PreferenceCollator(PromptCollator):
    """Makes a row from each text of every pair, after the prompt that both continue.

    As in TRL the prompt and a text are joined as they are, and the end-of-text token follows. Where
    TRL leaves out a pair that is too long, here each text loses what follows its special tokens at
    the start, with a warning, because answers differ at their ends.

    Takes the tokenizer and ``max_length`` of :class:`MultipleChoiceCollator`. Called on B
    dictionaries with ``chosen``, ``rejected`` and perhaps ``prompt``, it returns ``input_ids`` and
    ``attention_mask``, long, ``(B, 2, T)``, padded on the right, and ``labels``, zeros, ``(B,)``.
    Of dictionaries with ``text`` in place of a pair it returns ``(B, 1, T)`` without labels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 512) -> None:
        super().__init__(tokenizer, max_length=min(max_length, tokenizer.model_max_length))

    def check(self, rows: Any, labeled: bool) -> None:
        """Checks that each row is a pair of different texts."""
        check_rows(rows, "chosen", "rejected", optional=("prompt",), kinds=_KINDS)
        for k in range(len(rows)):
            if (text := rows[k]["chosen"]) == rows[k]["rejected"]:
                raise DataError(
                    f"The texts of a pair must differ, got {text!r:.80} twice in row {k}; leave "
                    "the row out."
                )

    def rows_of(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """Rows of single texts, or of pairs of a prompt and a text, which it checks."""
        pairs = (text if isinstance(text, tuple) else (None, text) for text in texts)
        rows = [{"prompt": prompt, "text": text} for prompt, text in pairs]
        check_rows(rows, "text", optional=("prompt",), kinds=_KINDS)
        return rows

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of a list of rows."""
        names = ("chosen", "rejected") if "chosen" in rows[0] else ("text",)
        texts = [self._text(row.get("prompt"), row[name]) for row in rows for name in names]
        ids, mask = (each.unflatten(0, (len(rows), len(names))) for each in self._pad(texts))
        batch = {"input_ids": ids, "attention_mask": mask}
        return batch if len(names) == 1 else {**batch, "labels": torch.zeros(len(rows)).long()}

    def _text(self, prompt: Any, text: str) -> list[int]:
        """The ids of a prompt and a text, without the start of what is too long."""
        joined = prompt + text if isinstance(prompt, str) else text  # a data frame has NaN
        ids, end = self._ids(joined, special=True), self.tokenizer.eos_token_id
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
    heads = (NUMBER,)
    new_head = True
    task_type = "SEQ_CLS"
    held_out = 1 / 8
    usual_collator = PreferenceCollator

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The rewards, ``(B, K)``, of the ``K`` texts of each example."""
        check_noise(net, "the two texts of a pair, which are never packed")
        texts = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() == 3}
        rewards = head_logits(net, {key: value.flatten(0, 1) for key, value in texts.items()})
        return rewards.reshape(batch["input_ids"].shape[:2])

    def metrics(self, prediction: Prediction, labels: Tensor) -> Metrics:
        """The scores of each pair in both orders, because the first of equal texts would be right.

        In half precision many rewards are equal.
        """
        both = torch.cat([prediction.probs, prediction.probs.flip(-1)])
        return Metrics({**evaluate(both, torch.cat([labels, 1 - labels])), "n": len(labels)})
