"""The language-model likelihoods against the network's own full logits."""

import pyro
import pytest
import tiny
import torch

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice

NETS = [tiny.llama, tiny.gpt2, tiny.qwen2]


def on_the_left(batch):
    """The same rows, padded on the left."""
    moved = {}
    for key in ("input_ids", "attention_mask", "labels")[: 2 + (batch["labels"].dim() > 1)]:
        rows = [
            torch.roll(row, int((mask == 0).sum()))
            for row, mask in zip(batch[key], batch["attention_mask"], strict=True)
        ]
        moved[key] = torch.stack(rows)
    return {**batch, **moved}


def scored(blora, batch):
    return pyro.poutine.trace(blora.model).get_trace(batch)


@pytest.mark.parametrize("build", NETS)
def test_label_tokens_are_the_last_logits(build):
    net, batch = build(), tiny.sequences()
    logits = LabelTokens(token_ids=tiny.ANSWERS).logits(net, batch)
    full = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = batch["attention_mask"].sum(-1) - 1
    expected = full[torch.arange(4), last][:, list(tiny.ANSWERS)]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("build", NETS)
@pytest.mark.parametrize("likelihood", [LabelTokens(token_ids=tiny.ANSWERS), CausalLM()])
def test_rows_are_padded_on_either_side(build, likelihood):
    net = build()
    batch = tiny.texts() if isinstance(likelihood, CausalLM) else tiny.sequences()
    left = on_the_left(batch)
    assert (left["attention_mask"] != batch["attention_mask"]).any()
    torch.testing.assert_close(
        likelihood.logits(net, left), likelihood.logits(net, batch), atol=1e-5, rtol=1e-5
    )


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


def by_hand(net, batch, score):
    """The options' scores, each option in a row of its own."""
    items, options, _ = batch["input_ids"].shape
    totals = torch.zeros(items, options)
    for item in range(items):
        for option in range(options):
            length = int(batch["attention_mask"][item, option].sum())
            ids = batch["input_ids"][item, option, :length]
            logp = net(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            each = logp.gather(-1, ids[1:, None])[:, 0]
            kept = batch["option_mask"][item, option, 1:length]
            totals[item, option] = each[kept].mean() if score == "mean" else each[kept].sum()
    return totals


@pytest.mark.parametrize("score", ["mean", "sum"])
@pytest.mark.parametrize("pack", [False, True, None])
@pytest.mark.parametrize("build", [*NETS, lambda: tiny.llama(attn_implementation="eager")])
@torch.no_grad()
def test_multiple_choice_is_the_options_log_likelihood(build, pack, score):
    net, batch = build(), tiny.choices()
    logits = MultipleChoice(score=score, pack=pack).logits(net, batch)
    torch.testing.assert_close(logits, by_hand(net, batch, score), atol=1e-5, rtol=1e-5)


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
    trace = scored(blora, batch)
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
