"""The language-model likelihoods against the network's own full logits."""

import pyro
import pytest
import tiny
import torch

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice

NETS = [tiny.llama, tiny.gpt2, tiny.qwen2]


@pytest.mark.parametrize("build", NETS)
def test_label_tokens_are_the_last_logits(build):
    net, batch = build(), tiny.sequences()
    logits = LabelTokens(token_ids=tiny.ANSWERS).logits(net, batch)
    full = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, tiny.answers(full, batch))


@pytest.mark.parametrize("build", NETS)
def test_causal_lm_is_the_loss_of_transformers(build):
    batch = tiny.texts()
    count = (batch["labels"] != -100).sum()
    blora = tiny.adapted(
        build(), target_modules=None, likelihood=CausalLM(num_data=len(batch["labels"]))
    )
    with blora.posterior(0) as net:
        expected = net(**batch).loss * count
    centre = pyro.condition(blora.model, data=blora.guide.center())
    torch.testing.assert_close(tiny.scored(centre, batch)[1], expected.detach() / 4)


def test_causal_lm_ignores_unscored_tokens():
    batch = tiny.texts()
    blora = tiny.adapted(likelihood=CausalLM(num_data=4))
    padded = {
        key: torch.nn.functional.pad(batch[key], (0, 3), value=-100 if key == "labels" else 0)
        for key in batch
    }
    centre = pyro.condition(blora.model, data=blora.guide.center())
    fewer = batch["labels"].clone()
    fewer[0, 2] = -100
    cases = (batch, padded, {**batch, "labels": fewer})
    nll, same, less = (tiny.scored(centre, case)[1] for case in cases)
    torch.testing.assert_close(nll, same)
    assert less < nll - 0.1  # and sees those that are scored


def test_causal_lm_scores_every_real_token_without_labels():
    batch = tiny.texts()
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    logits = CausalLM().logits(tiny.llama(), unlabelled)
    assert logits.shape == (4, 6, tiny.VOCABULARY)  # the first token has no predecessor


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
    with pytest.raises(BatchError, match=r"names an option with no token"):
        blora.model({**batch, "labels": torch.tensor([2, 0, 0])})


@pytest.mark.parametrize("pack", [False, True])
def test_multiple_choice_pads_on_the_right(pack):
    batch = tiny.choices()
    left = {k: v.flip(-1) if v.dim() == 3 else v for k, v in batch.items()}
    left["option_mask"] = left["option_mask"] & (torch.arange(8) > 0)
    with pytest.raises(BatchError, match="padding_side"):
        MultipleChoice(pack=pack).logits(tiny.llama(), left)


def test_multiple_choice_wants_three_dimensions():
    blora = tiny.adapted(likelihood=MultipleChoice(num_data=3))
    batch = tiny.choices()
    with pytest.raises(BatchError, match=r"B x K x T.*\(3, 3\)"):
        blora.predict({**batch, "option_mask": batch["option_mask"].any(-1)}, 0)
    with pytest.raises(BatchError, match="B x K x T"):
        blora.predict({key: value[0] for key, value in batch.items()})
