"""Multiple choice by the log-likelihoods of the options after the question."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_blora.errors import BatchError, DataError
from pyro_blora.labels import Item
from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods._prompts import PromptCollator
from pyro_blora.likelihoods.packing import in_rows, supports_packing
from pyro_blora.likelihoods.reading import check_causal, logits_at, true_entries


class MultipleChoiceCollator(PromptCollator):
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

    def likelihood(self, num_data: int | None) -> "MultipleChoice":
        """The likelihood of its batches."""
        return MultipleChoice(num_data=num_data)

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


class MultipleChoice(Likelihood):
    r"""A softmax over the options' scores under a causal language model.

    The score of option :math:`k` with tokens :math:`t_1 \dots t_n` after question :math:`q` is

    .. math::

        s_k = \frac{1}{n} \sum_j \log p(t_j \mid q, t_{<j}),

    or without the factor :math:`\frac1n` if ``score="sum"``. Mean log-probabilities need not be on
    the scale of log-odds, so ``fit`` holds out an eighth of the examples and fits a temperature to
    them at the end (:meth:`BayesianLoRA.calibrate <pyro_blora.BayesianLoRA.calibrate>`).

    Args:
        num_data: number of training examples.
        score: ``"mean"`` over the option's tokens or their ``"sum"``. Default: mean.
        pack: whether to encode an item's question once for all of its options, which gives the
            same scores with fewer tokens. Default: if the network supports it, which is tested
            once. Rows longer than the network's attention window or chunk are never packed.

    A batch has ``input_ids``, ``attention_mask`` and ``option_mask`` (true at the tokens to
    score), each ``B x K x T`` and padded on the right, and ``labels`` (``B``). An option without
    scored tokens is absent, and its probability is zero.

    Raises:
        BatchError: the tensors' shapes differ, the first token of a row is to be scored, or a row
            is padded on the left.
        ConfigurationError: the updates have conditional noise and the rows cannot be packed (see
            :class:`~pyro_blora.models.KroneckerInducing`).

    Example::

        likelihood = MultipleChoice(num_data=len(train))
        likelihood.logits(net, batch).shape  # B x K
    """

    keys = ("input_ids", "attention_mask", "option_mask")
    row_dims = 3
    usual_collator = MultipleChoiceCollator
    held_out = 1 / 8

    def __init__(
        self,
        *,
        num_data: int | None = None,
        score: Literal["mean", "sum"] = "mean",
        pack: bool | None = None,
    ) -> None:
        super().__init__(num_data=num_data)

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError if ``net`` is a classifier or an encoder-decoder."""
        check_causal(net)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The options' scores, ``(B, K)``; minus infinity for an absent option."""
        packing = self.fast and supports_packing(net) if self.pack is None else self.pack
        rows = in_rows(net, {key: batch[key] for key in self.keys}, packing)
        logits = logits_at(
            net, rows.inputs, rows.positions, rows.mask, count=rows.count, narrow=self.fast
        )
        real = true_entries(rows.mask, rows.count)
        targets = rows.targets.flatten()[real]
        logp = -functional.cross_entropy(logits, targets, reduction="none")
        items, options, _ = batch["input_ids"].shape
        item = torch.arange(items, device=logp.device).unsqueeze(-1)
        item = item.repeat_interleave(len(rows.mask) // items, 0)  # of each row
        index = (item * options + rows.options).flatten()[real]
        total = logp.new_zeros(items * options).index_add(0, index, logp).reshape(items, options)
        count = batch["option_mask"].sum(-1)
        if self.score == "mean":
            total = total / count.clamp_min(1)
        return total.masked_fill(count == 0, -torch.inf)

    def examples(self, batch: Batch) -> int:
        """Number of examples ``B``; all tensors must share one shape."""
        count = super().examples(batch)
        if "position_ids" in batch:
            raise BatchError(
                "position_ids must be left out for MultipleChoice, which computes its own, got "
                "some; remove them from the collator."
            )
        shapes = {key: tuple(batch[key].shape) for key in self.keys}
        if len(set(shapes.values())) > 1:
            raise BatchError(
                f"MultipleChoice must have equal B x K x T shapes, got {shapes}; pad them alike."
            )
        present = batch["option_mask"].any(-1)
        if present.is_cpu and (~present.any(-1)).any():
            raise BatchError(
                "Each item must have an option with a token to score, got one without; set "
                "option_mask to true at the options' tokens."
            )
        return count

    def labels(self, batch: Batch) -> Tensor | None:
        """The right options, ``(B,)``, or ``None``; raises BatchError if one is absent."""
        labels, present = batch.get("labels"), batch["option_mask"].any(-1)
        if labels is not None and present.is_cpu and labels.shape == present.shape[:1]:
            chosen = labels.long().clamp(0, present.shape[1] - 1)  # check_labels reports the others
            if (~present.gather(1, chosen.unsqueeze(-1))).any():
                raise BatchError(
                    "labels must name an option that the item has, got one without scored tokens; "
                    "check the order of the options."
                )
        return labels
