"""Multiple choice by the log-likelihood of each option after the question."""

import hashlib
from typing import ClassVar, Literal

import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.nn import functional

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods.packing import in_rows
from pyro_blora.likelihoods.reading import check_causal, logits_at, true_entries


class MultipleChoice(Likelihood):
    r"""A softmax over the options' scores under a causal language model.

    The score of option :math:`k` with tokens :math:`t_1 \dots t_n` after question :math:`q` is

    .. math::

        s_k = c\, (n / \bar n)^{b} \, \frac{1}{n} \sum_j \log p(t_j \mid q, t_{<j}),

    with ``score="sum"`` without the :math:`\frac1n`; :math:`\bar n` is the mean length of the
    item's options. Nothing says that a mean log-probability is the log-odds of an answer: its scale
    :math:`c` is an unknown like others, and so may be how it depends on the length. Lengths count
    by their ratio, so that questions with longer options elsewhere get no other scale. The scale
    ``c``, ``score_slope``, is any real number, as a slope of logistic regression is: steps of one
    size take it to zero, even odds, where a logarithm would creep.

    In training one item in eight, told by its tokens, teaches ``c`` and ``b`` alone, and the others
    all else: an adapter that learned from the same items would have memorised them, and its scores
    would seem worth more than they are on new ones.

    Args:
        num_data: number of training examples.
        score: ``"mean"`` over the option's tokens or their ``"sum"``. Default: mean.
        scale: ``"learned"``: ``c`` is a parameter, which starts at 1, or ``"fixed"``. Default:
            learned.
        learn_length_penalty: whether ``b`` is a parameter, which starts at 0. What it learns of
            lengths is of one data set: other questions are answered worse, and surely
            (docs/calibration.md). Default: no.
        pack: whether to encode an item's question once for all of its options, which gives the
            same scores for fewer tokens. Default: where the network supports it (it is asked once).
            Rows longer than a window or a chunk of attention that it declares are never packed.

    A batch has ``input_ids``, ``attention_mask`` and ``option_mask`` (true at the tokens to
    score), each ``B x K x T`` and right padded, and ``labels`` (``B``). An option with nothing to
    score counts as absent: its probability is zero.

    Raises:
        BatchError: the tensors' shapes disagree, a row's first token is to be scored, or a row is
            padded on the left.
        ConfigurationError: the updates have marginal noise, and the rows cannot be packed (see
            :class:`~pyro_blora.models.KroneckerInducing`).

    Example::

        likelihood = MultipleChoice(num_data=len(train))
        likelihood.logits(net, batch).shape  # B x K
    """

    keys = ("input_ids", "attention_mask", "option_mask")
    roles: ClassVar[dict[str, str]] = {
        "score_slope": "likelihood",
        "length_exponent": "likelihood",
    }
    row_dims = 3

    def __init__(
        self,
        *,
        num_data: int | None = None,
        score: Literal["mean", "sum"] = "mean",
        scale: Literal["learned", "fixed"] = "learned",
        learn_length_penalty: bool = False,
        pack: bool | None = None,
    ) -> None:
        super().__init__(num_data=num_data)
        self.score = score
        self.scale = scale
        self.check_choice("score", ("mean", "sum"))
        self.check_choice("scale", ("learned", "fixed"))
        self.learn_length_penalty = learn_length_penalty
        if scale == "learned":
            self.score_slope = PyroParam(torch.ones(()))
        if learn_length_penalty:
            self.length_exponent = PyroParam(torch.zeros(()))
        self.pack = pack

    def check_network(self, net: nn.Module) -> None:
        """Raises ConfigurationError where ``net`` is a classifier or an encoder-decoder."""
        check_causal(net)

    def logits(self, net: nn.Module, batch: Batch) -> Tensor:
        """The options' scores, ``(B, K)``; minus infinity for an absent option."""
        apart = None  # told before the network runs, for the device is waited for
        if self.holds_out and any(p.requires_grad for p in self.parameters()):
            apart = torch.tensor(_apart(batch)).unsqueeze(-1)
            apart = apart.to(batch["input_ids"].device, non_blocking=True)
        rows = in_rows(net, {key: batch[key] for key in self.keys}, self.pack)
        logits = logits_at(net, rows.inputs, rows.positions, rows.mask, count=rows.count)
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
        slope = self.score_slope if self.scale == "learned" else total.new_ones(())
        exponent = self.length_exponent if self.learn_length_penalty else total.new_zeros(())
        if apart is not None:
            total = torch.where(apart, total.detach(), total)
            slope, exponent = (torch.where(apart, p, p.detach()) for p in (slope, exponent))
        total = total * slope
        if self.learn_length_penalty:
            there = (count > 0).sum(-1, keepdim=True)
            length = count.clamp_min(1) * there / count.sum(-1, keepdim=True).clamp_min(1)
            total = total * length**exponent
        return total.masked_fill(count == 0, -torch.inf)

    def examples(self, batch: Batch) -> int:
        """As everywhere, of tensors of one shape."""
        count = super().examples(batch)
        shapes = {key: tuple(batch[key].shape) for key in self.keys}
        if len(set(shapes.values())) > 1:
            raise BatchError(f"MultipleChoice needs equal B x K x T shapes, got {shapes}.")
        return count


def _apart(batch: Batch) -> list[bool]:
    """Whether each example teaches the scale alone: one in eight, whatever it is batched with."""
    there = batch["attention_mask"].bool() & batch["option_mask"].any(-1, keepdim=True)
    rows = batch["input_ids"].masked_fill(~there, -1).cpu().numpy()
    digests = [hashlib.sha256(ids[ids >= 0].tobytes()).digest() for ids in rows]
    return [digest[0] % 8 == 0 for digest in digests]
