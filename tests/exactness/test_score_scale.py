"""The learned scale of an option's score."""

from contextlib import nullcontext

import pyro
import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import CheckpointError
from pyro_blora.likelihoods import MultipleChoice
from pyro_blora.likelihoods.multiple_choice import _apart


def adapted(net, **options):
    return tiny.adapted(net, likelihood=MultipleChoice(num_data=12, **options))


def items(count=6):
    """Items of one option fewer each, so that batches have absent options."""
    batch = tiny.choices(count, 3, seed=3)
    batch["labels"] = torch.zeros_like(batch["labels"])
    for i in range(0, count, 2):
        for key in ("input_ids", "attention_mask", "option_mask"):
            batch[key][i, -1] = 0
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def test_the_slope_is_a_factor_that_fit_trains():
    net, batch = tiny.llama(), tiny.choices(3)
    for key in MultipleChoice.keys:
        batch[key][0, 2] = 0  # an absent option
    plain = MultipleChoice(scale="fixed").logits(net, batch)
    blora = adapted(net)
    assert torch.equal(blora.likelihood.logits(net, batch), plain)  # 1 at the start
    fit(blora, items(), collate=torch.utils.data.default_collate, num_steps=3, batch_size=3)
    assert [name for name, _ in blora.likelihood.named_pyro_params()] == ["score_slope"]
    slope = blora.likelihood.score_slope
    assert slope.item() != 1
    assert all(bool(p.isfinite().all()) for p in blora.parameters())  # options are absent, too
    blora.unwrap()
    torch.testing.assert_close(blora.likelihood.logits(net, batch), slope * plain)


def test_the_slope_ends_at_even_odds_if_the_likely_options_are_wrong():
    net, batch = tiny.llama(), tiny.choices(12, 3, seed=3)
    plain = MultipleChoice(scale="fixed").logits(net, batch)
    data = [{k: v[i] for k, v in batch.items()} | {"labels": plain[i].argmin()} for i in range(12)]
    blora = adapted(net)
    rates = {"mean": 1e-9, "scale": 1e-9, "direction": 1e-9, "likelihood": 0.1}
    fit(
        blora,
        data,
        collate=torch.utils.data.default_collate,
        num_epochs=20,
        batch_size=1,
        learning_rates=rates,
    )
    assert blora.likelihood.score_slope.abs() < 0.3  # it was 1
    found = []
    for slope in (2.0, -2.0):
        torch.nn.init.constant_(blora.likelihood.score_slope, slope)
        found.append(blora.likelihood.logits(net, batch))
    assert torch.equal(*found)


def test_it_is_saved(tmp_path):
    net, batch = tiny.llama(), tiny.choices(3)
    blora = adapted(net)
    torch.nn.init.constant_(blora.likelihood.score_slope, 0.5)
    expected = blora.predict(batch, 0).probs
    blora.save_pretrained(tmp_path / "new")
    blora.unwrap()
    read = BayesianLoRA.from_pretrained(net, tmp_path / "new")
    torch.testing.assert_close(read.predict(batch, 0).probs, expected)
    read.unwrap()
    with pytest.raises(
        CheckpointError, match=r"do not fit, .*score_slope.*of the same MultipleChoice scale="
    ):
        BayesianLoRA.from_pretrained(
            net, tmp_path / "new", likelihood=MultipleChoice(scale="fixed", num_data=12)
        )


def test_one_item_in_eight_teaches_the_scale_and_the_others_all_else():
    """The ELBO is the same; its gradient is that of the parts of a batch, each by itself."""
    net, batch = tiny.llama(), tiny.choices(16, seed=3)
    blora = adapted(net)
    apart = torch.tensor(_apart(batch))
    assert 0 < apart.sum() < 8

    def gradients(rows, held=nullcontext):
        blora.zero_grad()
        torch.manual_seed(0)
        draw = pyro.poutine.trace(blora.guide).get_trace()
        updates = pyro.poutine.replay(blora.model.updates, trace=draw)()
        with held(), blora.model.applied(updates) as adapted_net:
            part = {key: value[rows] for key, value in batch.items()}
            logits = blora.likelihood.logits(adapted_net, part)
        loss = torch.nn.functional.cross_entropy(logits, part["labels"], reduction="sum")
        loss.backward()
        assert not blora.likelihood.holds_out
        return loss.detach(), {n: p.grad for n, p in blora.named_parameters() if p.grad is not None}

    every = torch.ones(16, dtype=torch.bool)
    value, plain = gradients(every)
    same, found = gradients(every, blora.likelihood.holding_out)
    torch.testing.assert_close(same, value)
    (_, own), (_, others) = gradients(apart), gradients(~apart)
    assert {name.split(".")[0] for name in found} == {"model", "guide"}
    for name, slope in found.items():
        expected = (own if "likelihood." in name else others)[name]
        torch.testing.assert_close(slope, expected, atol=1e-6, rtol=1e-4, msg=name)
        assert not torch.allclose(slope, plain[name])


@pytest.mark.parametrize("options", [2, 4, 8])
def test_the_items_apart_are_the_same_in_every_batch_and_an_eighth_of_any_data(options):
    """Answers A, B, ... after a question: the tokens that differ are the question's."""
    torch.manual_seed(0)
    ids = torch.randint(5, 900, (1000, 1, 12)).expand(-1, options, -1).clone()
    ids[:, :, -1] = torch.arange(options)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["option_mask"] = torch.zeros_like(ids, dtype=torch.bool)
    batch["option_mask"][..., -1] = True
    found = _apart(batch)
    assert sum(found) == pytest.approx(125, abs=4 * (1000 * 7 / 64) ** 0.5)
    wider = {key: torch.nn.functional.pad(value, (0, 3, 0, 1)) for key, value in batch.items()}
    wider["attention_mask"][:, -1] = 1  # an option that is absent
    assert _apart(wider) == found


def test_fit_lets_the_items_apart_alone_teach_the_scale():
    net = tiny.llama()
    data = items()
    apart = _apart(torch.utils.data.default_collate(data))
    data = [item for item, alone in zip(data, apart, strict=True) if not alone]
    blora = adapted(net)
    fit(blora, data, collate=torch.utils.data.default_collate, num_steps=3, batch_size=2)
    assert blora.likelihood.score_slope.item() == 1
