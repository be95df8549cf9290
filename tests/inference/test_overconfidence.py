"""A small world in which LoRA is over-confident, because its labels cannot be learned."""

import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, fit
from pyro_blora.likelihoods import LabelTokens


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
    rows, new = coin_flips(32, 1), coin_flips(400, 2)
    train = [{key: value[i] for key, value in rows.items()} for i in range(32)]
    fit(blora, train, num_steps=200, batch_size=16, seed=seed, progress=False)
    nll = -float(blora.log_predictive(new).mean())
    return nll, float(blora.predict(new).confidence.mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_is_less_confident_than_lora_where_nothing_can_be_known(seed):
    lora, default = held_out("lora", seed), held_out("bayesian-lora", seed)
    assert lora[1] > 0.7
    assert default[0] < lora[0] - 0.05
    assert default[1] < lora[1] - 0.05
