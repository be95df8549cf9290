"""The learned scale of an option's score, and its exponent of the length."""

import json

import pyro
import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import CheckpointError
from pyro_blora.likelihoods import MultipleChoice


def adapted(net, **options):
    return tiny.adapted(net, likelihood=MultipleChoice(num_data=12, **options))


def set_scale(blora, scale, exponent):
    with torch.no_grad():
        blora.likelihood.score_slope.fill_(scale)
        blora.likelihood.length_exponent.fill_(exponent)


def items(count=6):
    """Items of one option fewer each, so that batches have absent options."""
    batch = tiny.choices(count, 3)
    batch["labels"] = torch.zeros_like(batch["labels"])
    for i in range(0, count, 2):
        for key in ("input_ids", "attention_mask", "option_mask"):
            batch[key][i, -1] = 0
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


@pytest.mark.parametrize("scale", ["relative", "learned"])
@pytest.mark.parametrize("score", ["mean", "sum"])
def test_the_score_is_scaled_by_a_power_of_the_length(score, scale):
    net, batch = tiny.llama(), tiny.choices(3)
    blora = adapted(net, score=score, scale=scale)
    plain = MultipleChoice(score=score, scale="fixed").logits(net, batch)
    assert torch.equal(blora.likelihood.logits(net, batch), plain)  # 1 and 0 at the start
    set_scale(blora, 0.5, 0.3)
    length = batch["option_mask"].sum(-1).float()
    if scale == "relative":
        length /= length.mean(-1, keepdim=True)  # of the item's options
    found = blora.likelihood.logits(net, batch)
    torch.testing.assert_close(found, 0.5 * length**0.3 * plain)


def test_a_slope_alone_is_a_factor_that_fit_trains():
    net, batch = tiny.llama(), tiny.choices(3)
    plain = MultipleChoice(scale="fixed").logits(net, batch)
    blora = adapted(net, scale="slope")
    fit(blora, items(), collate=torch.utils.data.default_collate, num_steps=3, batch_size=3)
    assert [name for name, _ in blora.likelihood.named_pyro_params()] == ["score_slope"]
    slope = blora.likelihood.score_slope
    assert slope.item() != 1
    blora.unwrap()
    torch.testing.assert_close(blora.likelihood.logits(net, batch), slope * plain)


def test_an_absent_option_has_no_length():
    net, batch = tiny.llama(), tiny.choices(2, 3)
    blora = adapted(net)
    set_scale(blora, 0.5, 0.3)
    keys = MultipleChoice.keys
    two = blora.likelihood.logits(net, {key: batch[key][:, :2] for key in keys})
    for key in keys:
        batch[key][:, 2] = 0
    torch.testing.assert_close(blora.likelihood.logits(net, batch)[:, :2], two)


def test_fit_trains_both_past_absent_options():
    net = tiny.llama()
    blora = adapted(net)
    fit(blora, items(), collate=torch.utils.data.default_collate, num_steps=3, batch_size=3)
    assert blora.likelihood.score_slope.item() != 1
    assert blora.likelihood.length_exponent.item() != 0
    assert all(bool(p.isfinite().all()) for p in blora.parameters())


def test_the_slope_passes_even_odds_where_the_likely_options_are_wrong():
    net, batch = tiny.llama(), tiny.choices(12, 3)
    plain = MultipleChoice(scale="fixed").logits(net, batch)
    data = [{k: v[i] for k, v in batch.items()} | {"labels": plain[i].argmin()} for i in range(12)]
    blora = adapted(net)
    rates = {"lr_mean": 1e-9, "lr_scale": 1e-9, "lr_direction": 1e-9, "lr_likelihood": 0.05}
    fit(blora, data, collate=torch.utils.data.default_collate, num_steps=60, **rates)
    assert blora.likelihood.score_slope.item() < 0


def test_each_adapter_has_its_own():
    likelihood = MultipleChoice(num_data=12)
    with pyro.settings.context(module_local_params=True):
        first = tiny.adapted(tiny.llama(), likelihood=likelihood)
        second = tiny.adapted(tiny.llama(), likelihood=likelihood)
        set_scale(first, 0.5, 0.3)
        assert second.likelihood.score_slope.item() == 1
    assert likelihood.score_slope.item() == 1


def test_it_is_saved_and_one_from_before_is_read_as_fixed(tmp_path):
    net, batch = tiny.llama(), tiny.choices(3)
    blora = adapted(net)
    set_scale(blora, 0.5, 0.3)
    expected = blora.predict(batch, 0).probs
    blora.save_pretrained(tmp_path / "new")
    blora.unwrap()
    pyro.clear_param_store()
    read = BayesianLoRA.from_pretrained(net, tmp_path / "new")
    torch.testing.assert_close(read.predict(batch, 0).probs, expected)
    read.unwrap()
    pyro.clear_param_store()

    old = adapted(net, scale="fixed")
    expected = old.predict(batch, 0).probs
    old.save_pretrained(tmp_path / "old")
    old.unwrap()
    pyro.clear_param_store()
    path = tmp_path / "old" / "bayesian_lora_config.json"
    config = json.loads(path.read_text())
    del config["likelihood"]["options"]["scale"], config["sha256"]
    path.write_text(json.dumps(config))
    read = BayesianLoRA.from_pretrained(net, tmp_path / "old")
    torch.testing.assert_close(read.predict(batch, 0).probs, expected)
    read.unwrap()
    pyro.clear_param_store()
    with pytest.raises(CheckpointError, match=r"differ in .*score_slope.*MultipleChoice scale="):
        BayesianLoRA.from_pretrained(
            net, tmp_path / "new", likelihood=MultipleChoice(scale="fixed", num_data=12)
        )
