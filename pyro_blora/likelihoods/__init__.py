"""Likelihoods: distributions of a batch's labels given the logits of the wrapped transformer."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_blora.labels import is_list
from pyro_blora.likelihoods._likelihood import Batch, Collate, Likelihood
from pyro_blora.likelihoods._prompts import NumberCollator
from pyro_blora.likelihoods.causal_lm import CausalLM, TextCollator
from pyro_blora.likelihoods.label_tokens import LabelTokens, LabelTokensCollator
from pyro_blora.likelihoods.multi_label import MultiLabel, MultiLabelCollator
from pyro_blora.likelihoods.multiple_choice import MultipleChoice, MultipleChoiceCollator
from pyro_blora.likelihoods.ordinal import Ordinal
from pyro_blora.likelihoods.preference import Preference, PreferenceCollator
from pyro_blora.likelihoods.regression import Regression
from pyro_blora.likelihoods.sequence_classification import (
    ClassificationCollator,
    SequenceClassification,
)
from pyro_blora.likelihoods.token_classification import TagCollator, TokenClassification
from pyro_blora.network.targets import TEXT, kind_of_head

__all__ = [
    "Batch",
    "CausalLM",
    "ClassificationCollator",
    "Collate",
    "LabelTokens",
    "LabelTokensCollator",
    "Likelihood",
    "MultiLabel",
    "MultiLabelCollator",
    "MultipleChoice",
    "MultipleChoiceCollator",
    "NumberCollator",
    "Ordinal",
    "Preference",
    "PreferenceCollator",
    "Regression",
    "SequenceClassification",
    "TagCollator",
    "TextCollator",
    "TokenClassification",
]


_KINDS = (SequenceClassification, Regression, MultiLabel, TokenClassification)
_OF_HEADS = {kind.heads[0]: kind for kind in _KINDS}


def usual_likelihood(net: nn.Module | None, row: Any = None) -> Likelihood:
    """The likelihood of a row's labels and of what a network's head gives, as far as known."""
    if isinstance(row, Mapping) and "chosen" in row:
        return Preference()
    if net is not None:
        head = kind_of_head(net)
        return CausalLM() if head == TEXT else _OF_HEADS[head]()
    if "tokens" in row:
        return TokenClassification()
    return MultiLabel() if is_list(row["label"]) else Regression()
