"""The next-token likelihood for fine-tuning on text."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from pyro_blora.errors import ConfigurationError
from pyro_blora.labels import check_rows
from pyro_blora.likelihoods._likelihood import Batch, Collate, Prepared
from pyro_blora.likelihoods._prompts import PromptCollator
from pyro_blora.likelihoods._token_labels import TokenLabels
from pyro_blora.likelihoods.reading import check_causal, compact, logits_at


class CausalLM(TokenLabels):
    r"""The next-token likelihood, :math:`\sum_t \log p(y_t \mid y_{<t})` for each sequence.

    Args:
        num_data: number of training sequences.

    A batch has ``input_ids``, ``attention_mask`` and ``labels``, each ``B x T`` and padded on
    either side. Labels are at their tokens' own positions, as in transformers, and labels of -100
    (prompts, padding) are not scored. Without labels the model samples every real token.

    Example::

        likelihood = CausalLM(num_data=len(train))
        likelihood.logits(net, batch).shape  # B x S x V, S = most scored tokens in a sequence
    """

    padding = DataCollatorForSeq2Seq
    predicts = False

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError if ``net`` is a classifier or an encoder-decoder."""
        check_causal(net)

    def collator(self, tokenizer: Any, row: Any) -> Collate:
        """A :class:`TextCollator`, of the column ``text`` or of ``prompt`` and ``completion``."""
        columns = dict(row) if isinstance(row, Mapping) else vars(row)
        pair = {"prompt", "completion"} <= columns.keys()
        if "label" in columns or pair == ("text" in columns):
            raise ConfigurationError(
                "CausalLM must read the column text, or prompt and completion, got "
                f"{', '.join(map(str, columns))}; rename or drop columns. For classes load a "
                "classifier with num_labels=, for options pass likelihood=MultipleChoice()."
            )
        return TextCollator(tokenizer)

    def prepare(self, batch: Batch) -> Prepared:
        """The batch, checked, with its scored tokens, which synchronizes the device."""
        prepared = super().prepare(batch)
        prepared |= self._scored(batch)
        return prepared

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """Logits that predict the scored tokens, ``(B, S, V)``, zero past a row's last one."""
        scored = self._scored(batch)
        mask, counts = scored["scored_tokens"] != -100, scored["scored_counts"]
        count = sum(counts) * (len(mask) // len(counts))  # rows are repeated for several draws
        inputs, positions = self.inputs(batch), scored["scored_positions"]
        flat = logits_at(net, inputs, positions, mask, count=count, narrow=self.fast)
        logits = flat.new_zeros(*mask.shape, flat.shape[-1])
        return logits.masked_scatter(mask.unsqueeze(-1), flat)

    def labels(self, batch: Batch) -> Tensor | None:
        """The scored tokens, ``(B, S)``, padded with -100."""
        if batch.get("labels") is None:
            return None
        return self._scored(batch)["scored_tokens"]

    def _scored(self, batch: Batch) -> Batch:
        """The scored tokens, padded with -100, their predecessors' positions, and rows' counts."""
        if "scored_counts" in batch:
            return batch
        real = batch["attention_mask"].bool()
        labels = self.per_token(batch)
        if labels is None:
            labels = batch["input_ids"].masked_fill(~real, -100)
        index = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)
        # A token is predicted at its predecessor, so one without a real predecessor is not scored
        before = torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], -1)
        keep = (labels != -100) & before
        counts = tuple(keep.sum(-1).tolist())
        mask, (positions, targets) = compact(keep, max(*counts, 1), index - 1, labels)
        tokens, positions = targets.masked_fill(~mask, -100), positions.clamp_min(0)
        return {"scored_tokens": tokens, "scored_positions": positions, "scored_counts": counts}


class TextCollator(PromptCollator):
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

    def check(self, rows: Any, labeled: bool) -> None:
        """Checks that each row has a text, or a prompt and a completion."""
        check_rows(rows, *(("prompt", "completion") if "completion" in rows[0] else ("text",)))

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of a list of rows."""
        texts, starts, longest = [], [], 0
        end = self.tokenizer.eos_token_id
        for row in rows:
            if "completion" in row:
                plain, prompt = (self._ids(row["prompt"], special) for special in (False, True))
                scored = self._answer(row["completion"])
            else:
                plain, scored = (self._ids(row["text"], special) for special in (False, True))
                if plain[-1:] == [end] and scored[-len(plain) - 1 :] == [*plain, end]:
                    scored.pop()  # added by the tokenizer to a text that has an end
                prompt = []
            while len(prompt) > 1 and prompt[-1] == end and prompt[-len(plain) :] != plain:
                prompt.pop()  # added by the tokenizer, but the completion follows; BOS stays
            if end is not None and scored[-1:] != [end]:
                scored.append(end)
            longest = max(longest, len(prompt) + len(scored))
            scored = scored[: max(self.max_length - len(prompt), self.max_length // 2)]
            bos = int(prompt[:1] == [self.tokenizer.bos_token_id])
            over = max(0, len(prompt) + len(scored) - self.max_length)
            kept = prompt[:bos] + prompt[bos + over :]
            texts.append(kept + scored)
            starts.append(len(kept))
        if longest > self.max_length:
            warnings.warn(
                f"A text of {longest} tokens is cut to max_length={self.max_length}; pass collate="
                "TextCollator(tokenizer, max_length=...) of pyro_blora.likelihoods to keep more.",
                stacklevel=2,
            )
        input_ids, attention_mask = self._pad(texts)
        scored_at = torch.arange(input_ids.shape[-1]) >= torch.tensor(starts).unsqueeze(-1)
        labels = input_ids.masked_fill(~(scored_at & attention_mask.bool()), -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
