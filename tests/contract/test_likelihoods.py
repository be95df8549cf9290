"""What a likelihood computes and refuses, and how the data and the KL are weighed."""

from functools import partial

import pyro
import pytest
import tiny
import torch
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from pyro_blora import BayesianLoRA, fit, likelihoods
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice, SequenceClassification
from pyro_blora.testing import LikelihoodContract

CASES = {
    "CausalLM": (CausalLM, tiny.llama, tiny.texts),
    "LabelTokens": (partial(LabelTokens, token_ids=tiny.ANSWERS), tiny.llama, tiny.sequences),
    "MultipleChoice": (MultipleChoice, tiny.llama, tiny.choices),
    "SequenceClassification": (SequenceClassification, tiny.bert, tiny.sequences),
}


for name, (make, net, batch) in CASES.items():
    tiny.contract(
        globals(),
        LikelihoodContract,
        name,
        make=make(num_data=12),
        net=lambda self, net=net: net(),
        batch=lambda self, rows, batch=batch: batch(rows),
    )


def test_every_likelihood_is_tested():
    others = {"Batch", "Collate", "Likelihood"}
    found = {name for name in likelihoods.__all__ if not name.endswith("Collator")}
    assert {*CASES, *others} == found


@pytest.mark.parametrize(("make", "net", "batch"), CASES.values(), ids=CASES)
def test_a_missing_key_and_an_empty_batch(make, net, batch):
    blora = tiny.adapted(net(), target_modules=None, likelihood=make(num_data=12))
    batch = batch(4)
    for key in blora.likelihood.keys:
        short = {k: v for k, v in batch.items() if k != key}
        for ask in (blora.model, blora.log_predictive):
            with pytest.raises(BatchError, match=rf"{key}.* got .*labels"):
                ask(short)
    with pytest.raises(BatchError, match="empty"):
        blora.log_predictive({key: value[:0] for key, value in batch.items()})


def test_labels_of_a_wrong_shape_or_kind():
    blora, batch = tiny.adapted(), tiny.sequences()
    wrong = {**batch, "labels": batch["labels"].unsqueeze(-1).expand(-1, 2)}
    with pytest.raises(BatchError, match=r"shape \(4,\), got \(4, 2\)"):
        blora.model(wrong)
    examples = [{key: value[i] for key, value in wrong.items()} for i in range(4)]
    with pytest.raises(BatchError, match=r"got \(4, 2\)"):  # not as particles see them
        fit(blora, examples, num_steps=1, batch_size=4)
    with pytest.raises(BatchError, match=r"float32.*labels\.long"):
        blora.model({**batch, "labels": batch["labels"] / 2})
    with pytest.raises(BatchError, match=r"labels must be .* got \(4,\).*LabelT"):
        tiny.adapted(likelihood=CausalLM()).log_predictive(batch)


def test_a_likelihood_without_num_data_warns():
    blora = tiny.adapted(likelihood=LabelTokens(token_ids=tiny.ANSWERS))
    with pytest.warns(UserWarning, match=r"num_data.*num_data=len\(train\)"):
        trace = pyro.poutine.trace(blora.model).get_trace(tiny.sequences())
    assert trace.nodes["labels"]["scale"] == 1


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (CausalLM, {"num_data": 0}, "num_data must be .* got 0"),
        (LabelTokens, {"token_ids": [5, 6, 5]}, "two different tokens"),
        (LabelTokens, {"token_ids": [-1, 5]}, r"token_ids must be .* got \[-1, 5\]"),
        (MultipleChoice, {"score": "median"}, "'median'"),
    ],
)
def test_options_out_of_range(make, options, told):
    with pytest.raises(ConfigurationError, match=told):
        make(**options)


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **sizes)).eval()


def no_class(**options):
    config = tiny.bert(1).config
    config.update(options)
    return BertForSequenceClassification(config)


CLASSES = SequenceClassification()


@pytest.mark.parametrize(
    ("likelihood", "build", "told"),
    [
        (CLASSES, tiny.llama, "num_labels="),
        (CLASSES, partial(no_class, num_labels=1), "num_labels="),
        (CLASSES, partial(no_class, problem_type="regression"), "classes"),
        (CLASSES, t5, "LabelTokens or CausalLM"),
        (LabelTokens(token_ids=[5, 31]), t5, "encoder-decoder"),
        (CausalLM(), tiny.bert, r"BertFor.*no language-model head"),
    ],
)
def test_a_network_of_another_kind(likelihood, build, told):
    net = build()
    with pytest.raises(ConfigurationError, match=told) as error:
        tiny.adapted(net, target_modules="all-linear", likelihood=likelihood)
    assert "\n" not in str(error.value)
    assert not any(module._forward_hooks for module in net.modules())


def test_the_usual_likelihood_is_of_the_network_s_kind():
    assert isinstance(BayesianLoRA(tiny.llama()).likelihood, CausalLM)
    assert isinstance(BayesianLoRA(tiny.bert()).likelihood, SequenceClassification)


def test_causal_lm_is_the_loss_of_transformers():
    batch = tiny.texts()
    count = (batch["labels"] != -100).sum()
    blora = tiny.adapted(likelihood=CausalLM(num_data=4))
    with blora.posterior(0) as net:
        expected = net(**batch).loss * count
    center = pyro.condition(blora.model, data=blora.guide.center())
    torch.testing.assert_close(tiny.scored(center, batch)[1], expected.detach() / 4)
    del batch["labels"]  # the first token has no predecessor
    assert blora.likelihood.logits(blora.net, batch).shape == (4, 6, tiny.VOCABULARY)


@pytest.mark.parametrize("pack", [False, True])
def test_an_absent_option_has_probability_zero(pack):
    batch = tiny.choices()
    for key in ("input_ids", "attention_mask", "option_mask"):
        batch[key] = batch[key].clone()
        batch[key][0, 2] = 0
    blora = tiny.adapted(likelihood=MultipleChoice(num_data=3, pack=pack))
    samples = blora.predict(batch, 3).samples
    assert (samples[:, 0, 2] == 0).all()
    assert (samples[:, 1:] > 0).all()
    trace = pyro.poutine.trace(blora.model).get_trace(batch)
    assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize("pack", [False, True])
def test_multiple_choice_wants_three_dimensions_and_padding_on_the_right(pack):
    batch = tiny.choices()
    left = {k: v.flip(-1) if v.dim() == 3 else v for k, v in batch.items()}
    left["option_mask"] = left["option_mask"] & (torch.arange(8) > 0)
    with pytest.raises(BatchError, match="padding_side"):
        MultipleChoice(pack=pack).logits(tiny.llama(), left)
    flat = {**batch, "option_mask": batch["option_mask"].any(-1)}
    with pytest.raises(BatchError, match=r"B x K x T.*\(3, 3\)"):
        tiny.adapted(likelihood=MultipleChoice(num_data=3, pack=pack)).predict(flat, 0)
