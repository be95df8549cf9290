"""What generation gives: the tokens, and how sure the posterior is of each."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

__all__ = ["Generation"]

_GIVEN: Any = None  # the default that ModelOutput wants of every field but the first


@dataclass
class Generation(ModelOutput):
    r"""Sequences whose tokens come from the average of S sampled models, with its uncertainty.

    Of the distributions :math:`p_s` of the next token under the draws, and their average
    :math:`\bar p = \tfrac1S\sum_s p_s`, as they are before temperature, penalties and the like:

    .. math::
        \texttt{entropy} = H[\bar p], \qquad
        \texttt{mutual\_information} = H[\bar p] - \tfrac1S\textstyle\sum_s H[p_s], \qquad
        \texttt{disagreement} = \tfrac1S\,\#\{s : \arg\max p_s \ne \arg\max \bar p\}

    A ``ModelOutput``, so transformers' pipelines hand on its fields. ``N`` is the number of
    prompts times ``num_return_sequences``, ``T`` that of the new tokens; where a sequence has
    ended before, its entries are NaN.

    Attributes:
        sequences: the prompts, if they were tokens, and what follows; ``(N, T_0 + T)``.
        log_probs: :math:`\log\bar p` of each new token, in nats, ``(N, T)``.
        entropy: in nats, ``(N, T)``.
        mutual_information: in nats, ``(N, T)``: what is due to the weights' posterior.
        disagreement: between 0 and 1, ``(N, T)``.
        mean_log_prob: mean of ``log_probs`` over a sequence's tokens, in nats a token, ``(N,)``.
        epistemic: mean of ``mutual_information`` over them, in nats a token, ``(N,)``.
        abstained: whether ``epistemic`` is above the threshold that was given, ``(N,)``.

    Reference:
        A. Malinin and M. Gales (2021), "Uncertainty Estimation in Autoregressive Structured
        Prediction", arXiv:2002.07650: the average of each token's distributions ("products of
        expectations"), and scores divided by the length.

    Example::

        out = blora.generate(**tokenizer("Copper", return_tensors="pt"), max_new_tokens=5)
        out.sequences.shape, out.mutual_information.shape, out.epistemic.shape
        # (1, 1 + 5), (1, 5), (1,)
    """

    sequences: Tensor
    log_probs: Tensor = _GIVEN
    entropy: Tensor = _GIVEN
    mutual_information: Tensor = _GIVEN
    disagreement: Tensor = _GIVEN
    mean_log_prob: Tensor = _GIVEN
    epistemic: Tensor = _GIVEN
    abstained: Tensor = _GIVEN
