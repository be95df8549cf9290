"""Likelihoods: distributions of a batch's labels given the logits of the wrapped transformer."""

from pyro_blora.likelihoods._likelihood import Batch, Likelihood
from pyro_blora.likelihoods.causal_lm import CausalLM
from pyro_blora.likelihoods.label_tokens import LabelTokens
from pyro_blora.likelihoods.multiple_choice import MultipleChoice
from pyro_blora.likelihoods.sequence_classification import SequenceClassification

__all__ = [
    "Batch",
    "CausalLM",
    "LabelTokens",
    "Likelihood",
    "MultipleChoice",
    "SequenceClassification",
]
