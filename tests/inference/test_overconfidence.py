"""Small worlds whose labels can be learned, and such where LoRA is over-confident of a coin."""

import math

import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, fit
from pyro_blora.likelihoods import LabelTokens, MultipleChoice


def coin_flips(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, tiny.VOCABULARY, (rows, 5), generator=generator)
    labels = torch.randint(2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def held_out(method, seed):
    """The NLL and the confidence on new coin flips, after training on 32."""
    torch.manual_seed(seed)
    likelihood = LabelTokens(token_ids=(5, 6), num_data=32)
    blora = BayesianLoRA(
        tiny.llama(), target_modules="all-linear", method=method, likelihood=likelihood
    )
    new, options = coin_flips(400, 2), {"num_steps": 200, "batch_size": 16, "seed": seed}
    fit(blora, tiny.rows_of(coin_flips(32, 1)), **options, progress=False)
    nll = -float(blora.log_predictive(new).mean())
    return nll, float(blora.predict(new).confidence.mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_is_less_confident_than_lora_of_coin_flips(seed):
    lora, default = held_out("lora", seed), held_out("bayesian-lora", seed)
    assert lora[1] > 0.7
    assert default[0] < lora[0] - 0.05
    assert default[1] < lora[1] - 0.05


def questions(rows, seed, *, known):
    """Three options of a token each, of which the right one is token 9 if it can be known."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, tiny.VOCABULARY, (rows, 3, 4), generator=generator)
    ids[..., :3] = ids[:, :1, :3]  # the question
    labels = torch.randint(3, (rows,), generator=generator)
    if known:
        ids[torch.arange(rows), labels, 3] = 9
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[..., 3] = True
    masks = {"attention_mask": torch.ones_like(ids), "option_mask": scored}
    return {"input_ids": ids, **masks, "labels": labels}


@pytest.mark.parametrize("seed", range(10))
def test_options_are_even_only_where_nothing_can_be_known(seed):
    net, nll, likelihood = tiny.llama(), {}, MultipleChoice(num_data=160)
    options = {"num_steps": 80, "batch_size": 8, "seed": seed, "progress": False}
    for known in (True, False):
        torch.manual_seed(seed)
        blora = BayesianLoRA(net, target_modules="all-linear", likelihood=likelihood)
        fit(blora, tiny.rows_of(questions(160, seed, known=known)), **options)
        new = questions(300, 100 + seed, known=known)
        nll[known] = -float(blora.log_predictive(new).mean())
        prediction = blora.predict(new)
        if known:
            assert (prediction.predictions == new["labels"]).float().mean() > 0.9
        blora.unwrap()
    assert nll[True] < 0.5
    assert nll[False] < math.log(3) + 0.15  # by a temperature of some twenty coin flips
