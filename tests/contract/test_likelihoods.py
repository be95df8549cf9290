"""What a likelihood computes and refuses, and how the data and the KL are weighed."""

import math
from functools import partial

import pyro
import pytest
import tiny
import torch

from pyro_blora import likelihoods
from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import (
    CausalLM,
    MultiLabel,
    MultipleChoice,
    Preference,
    SequenceClassification,
)
from pyro_blora.testing import LikelihoodContract

CASES = tiny.LIKELIHOODS
ANSWERS = CASES["LabelTokens"][0]
for name, (make, net, batch) in CASES.items():
    members = {"net": lambda self, net=net: net(), "batch": lambda self, n, batch=batch: batch(n)}
    members |= {"wrong": (math.nan, math.inf)} if name == "Regression" else {}  # no classes
    tiny.contract(globals(), LikelihoodContract, name, make=make(num_data=12), **members)


def test_every_likelihood_is_tested():
    others = {"Batch", "Collate", "Likelihood"}
    found = {name for name in likelihoods.__all__ if not name.endswith("Collator")}
    assert {*CASES, *others} == found


NETS = {make: net for make, net, _ in CASES.values()}
ROWS, CHOICES = tiny.sequences(), tiny.choices()
PADDED, GONE = ROWS["attention_mask"].clone(), CHOICES["option_mask"].clone()
EMPTY = GONE.clone()
PADDED[2] = GONE[1, 2] = EMPTY[1] = 0
LEFT = {k: v.flip(-1) if v.dim() == 3 else v for k, v in CHOICES.items()}
LEFT["option_mask"] &= torch.arange(8) > 0
UNSCORED = tiny.texts()
UNSCORED["labels"][2] = -100  # it would count as an example and teach nothing
FLAT = {**CHOICES, "option_mask": CHOICES["option_mask"].any(-1)}
PAIRS = tiny.pairs()
PAIRS["attention_mask"][1, 1] = 0
PACKED, APART = (partial(MultipleChoice, pack=pack) for pack in (True, False))
CALLS = ["model", "log_predictive", "predict"]  # the last of which reads no labels
LABELS = [
    (ANSWERS, {**ROWS, "labels": torch.zeros(4, 2).long()}),
    (ANSWERS, {**ROWS, "labels": ROWS["labels"] / 2}),
    (CausalLM, ROWS),
    (CausalLM, UNSCORED),
    (MultiLabel, ROWS),
    (MultiLabel, {**ROWS, "labels": torch.full((4, 3), 0.5)}),
    (MultipleChoice, {**CHOICES, "option_mask": GONE, "labels": torch.tensor([0, 2, 1])}),
]
INPUTS = [(make, {**ROWS, "attention_mask": PADDED}) for make in (ANSWERS, SequenceClassification)]
for batch in ({**CHOICES, "option_mask": EMPTY}, LEFT, FLAT):
    INPUTS += [(make, batch) for make in (PACKED, APART)]
INPUTS.append((Preference, PAIRS))
WRONG = [(*case, CALLS[:2]) for case in LABELS] + [(*case, CALLS) for case in INPUTS]
for make, _, batch in CASES.values():
    right = batch(4)
    missing = [{k: v for k, v in right.items() if k != key} for key in make().keys]
    WRONG += [(make, short, CALLS[:2]) for short in missing]
    WRONG.append((make, {k: v[:0] for k, v in right.items()}, ["log_predictive"]))


@pytest.mark.parametrize(("make", "batch", "calls"), WRONG)
def test_a_batch_that_means_nothing(make, batch, calls):
    net = NETS.get(make, tiny.llama)()
    blora = tiny.adapted(net, target_modules=None, likelihood=make(num_data=12))
    for call in calls:
        with pytest.raises(BatchError):
            getattr(blora, call)(batch)


def test_a_likelihood_without_num_data_warns():
    blora = tiny.adapted(likelihood=ANSWERS())
    with pytest.warns(UserWarning, match=r"num_data.*num_data=len\(train\)"):
        trace = pyro.poutine.trace(blora.model).get_trace(tiny.sequences())
    assert trace.nodes["labels"]["scale"] == 1
