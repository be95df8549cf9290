"""Likelihoods: distributions of a batch's labels given the logits of the wrapped transformer."""

from pyro_blora.likelihoods._likelihood import Batch, Collate, Likelihood
from pyro_blora.likelihoods.causal_lm import CausalLM, TextCollator
from pyro_blora.likelihoods.label_tokens import LabelTokens, LabelTokensCollator
from pyro_blora.likelihoods.multiple_choice import MultipleChoice, MultipleChoiceCollator
from pyro_blora.likelihoods.sequence_classification import (
    ClassificationCollator,
    SequenceClassification,
)

__all__ = [
    "Batch",
    "CausalLM",
    "ClassificationCollator",
    "Collate",
    "LabelTokens",
    "LabelTokensCollator",
    "Likelihood",
    "MultipleChoice",
    "MultipleChoiceCollator",
    "SequenceClassification",
    "TextCollator",
]
