"""Preference beside dense algebra."""

from functools import partial

import kinds
import pytest
import tiny
import torch
from kinds import BAD, GOOD, TOKENIZER
from torch.nn.functional import logsigmoid

from pyro_blora import fit, guides, models
from pyro_blora.likelihoods import PreferenceCollator
from pyro_blora.posterior.guide import draws_apart
from pyro_blora.prediction import Prediction
from pyro_blora.scores import evaluate

ROWS, adapter = kinds.ROWS["pairs"], partial(kinds.adapter, "pairs")


def test_loss_and_gradients_are_those_of_bradley_and_terry():
    blora, batch = tiny.shaken(adapter(), 0.2), tiny.pairs()
    heads = list(blora.model.trained_heads.parameters())
    with blora.posterior(0) as net:
        one, other = (net(batch["input_ids"][:, k], batch["attention_mask"][:, k]) for k in (0, 1))
        expected = logsigmoid((one.logits - other.logits)[:, 0] * torch.tensor([1, -1, 1, -1]))
        found = blora.likelihood.logits(net, batch).log_softmax(-1)[range(4), batch["labels"]]
        both = [torch.autograd.grad(each.sum(), heads) for each in (found, expected)]
    torch.testing.assert_close(blora.log_predictive(batch, 0), expected.detach())
    torch.testing.assert_close(*both)


def test_rewards_have_the_same_draws_whatever_else_is_read():
    blora = tiny.shaken(adapter(guide=guides.MatrixNormal(init_scale=0.5)), 0.1)
    blora.model.temperature.fill_(2.0)
    texts = [("film: ", GOOD), ("film: ", BAD), *((f"{k} " * (k % 9), BAD) for k in range(60))]
    rewards = blora.rewards(texts, 8)  # 32 texts a pass
    for k in (0, 1, 40):
        torch.testing.assert_close(blora.rewards([texts[k]], 8)[:, 0], rewards[:, k])
    ids = TOKENIZER("".join(texts[1]), return_tensors="pt")["input_ids"]
    with draws_apart(blora.guide, blora.device), torch.no_grad():
        draw = blora.posterior.pairs()
        for reward in rewards[:, 1]:
            with blora.model.applied(draw(1)) as net:
                torch.testing.assert_close(net(ids).logits[0, 0] / 2, reward)
    ((one, other),) = blora.rewards(["".join(texts[0]), texts[1]], 0)
    probs = blora.predict([{"prompt": "film: ", "chosen": GOOD, "rejected": BAD}], 0).probs
    torch.testing.assert_close((one - other).sigmoid(), probs[0, 0])


def test_texts_continue_their_prompt_and_lose_their_start():
    row, text = {"prompt": "film: ", "chosen": GOOD, "rejected": BAD}, f"film: {BAD}"
    whole, cut = TOKENIZER(text)["input_ids"], PreferenceCollator(TOKENIZER, max_length=6)
    batch = PreferenceCollator(TOKENIZER)([row, ROWS[3]])
    assert batch["input_ids"][0, 1][batch["attention_mask"][0, 1].bool()].tolist() == whole
    with pytest.warns(UserWarning, match="more than 6 tokens loses its start"):
        assert cut([row])["input_ids"][0, 1].tolist() == [whole[0], *whole[-5:]]


def test_a_pair_may_have_a_text_that_it_is_about():
    blora, about = adapter(), [{**row, "text": "a film"} for row in ROWS[:4]]
    torch.testing.assert_close(blora.predict(about, 0).probs, blora.predict(ROWS[:4], 0).probs)


NOISY = models.KroneckerInducing(conditional="scaled")
REFUSED = [
    (lambda: fit(adapter(likelihood=None), ROWS), r"pass likelihood=Preference\(\)"),
    (lambda: adapter(prior=NOISY).rewards(["a"]), "which are never packed"),
    (lambda: adapter(method="laplace-lora").rewards(["a"]), "linearized"),
    (lambda: adapter(likelihood=None).rewards(["a"]), "must have the likelihood Preference"),
    (lambda: adapter().rewards(["a", ""]), "got '' in row 1"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_it_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equal_rewards_are_right_by_half_in_both_orders_of_a_pair():
    """In half precision they are common, and the chosen text is always the first."""
    probs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    likelihood, chosen = kinds.Preference(), torch.zeros(4).long()
    one = likelihood.metrics(Prediction(probs[None]), chosen)
    other = likelihood.metrics(Prediction(probs.flip(-1)[None]), chosen)
    assert (one.acc, one.n) == (0.5, 4)
    assert one.acc + other.acc == 1
    assert one.gap == pytest.approx((0.5 + 0.5 + 0.9 + 0.8) / 4 - 0.5)
    plain = evaluate(probs[2:], chosen[2:])
    for name, value in likelihood.metrics(Prediction(probs[None, 2:]), chosen[2:]).items():
        assert value == pytest.approx(plain[name]), name
