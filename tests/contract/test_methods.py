"""Named methods: each trains and predicts, and a prior brings its rates."""

from dataclasses import replace
from itertools import islice
from typing import ClassVar

import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA, fit, guides, models
from pyro_blora.data.batches import endless_batches
from pyro_blora.errors import ConfigurationError
from pyro_blora.inference import RATES, parameter_groups
from pyro_blora.inference.loop import rate
from pyro_blora.likelihoods import LabelTokens
from pyro_blora.methods import METHODS, get_method


def made(name, net=None, **options):
    likelihood = LabelTokens(token_ids=tiny.ANSWERS, num_data=10)
    net = tiny.llama() if net is None else net
    return BayesianLoRA(net, method=name, rank=2, likelihood=likelihood, **options)


@pytest.mark.parametrize("name", [*METHODS, "Hierarchical+Flow"])
def test_a_method_trains_and_predicts(name):
    blora, known = made(name), get_method(name)
    assert blora.prior.rank == 2
    result = fit(blora, tiny.examples(10), collate=tiny.collate, num_steps=2, progress=False)
    assert torch.tensor([step["nll"] for step in result.history]).isfinite().all()
    batch, found = tiny.collate(tiny.examples(4)), []
    draws = known.draws()
    for options in ({}, {"num_samples": draws, "linearized": known.linearized}):
        torch.manual_seed(0)
        found.append(blora.predict(batch, **options).samples.sort(0).values)  # members take turns
    assert found[0].isfinite().all()
    assert found[0].shape == (draws or 1, 4, 3)
    assert torch.equal(*found)


def rates_of(blora, **given):
    groups = parameter_groups(blora, tiny.sequences(), given)
    by_id = {id(p): g["lr"] for g in groups for p in g["params"]}
    return {n.removesuffix("_unconstrained"): by_id[id(p)] for n, p in blora.named_parameters()}


def test_a_prior_brings_the_rates_that_suit_it_and_its_guide(tmp_path):
    class Mine(models.GaussianFactors):
        pass

    for prior in (models.GaussianFactors, Mine):
        blora = tiny.adapted(prior=prior(rank=2), guide=guides.MeanField())
        assert set(rates_of(blora).values()) == {*prior.learning_rates.values()}
        assert blora.predict(tiny.sequences()).num_samples == 10
        point = tiny.adapted(prior=prior(rank=2), guide=guides.Delta())
        assert point.predict(tiny.sequences()).num_samples == 1
    mixed = {"q_proj": models.Subspace(rank=2), "v_proj": models.KernelInducing(rank=2)}
    blora = tiny.adapted(prior=mixed, guide=guides.MeanField())
    rates = rates_of(blora, scale=0.5)
    assert rates["guide.q_proj_s.loc"] == models.Subspace.learning_rates["mean"] == 2e-2
    assert rates["guide.v_proj_V.loc"] == RATES["mean"] == 5e-2
    assert rates["guide.q_proj_s.scale"] == rates["guide.v_proj_V.scale"] == 0.5
    blora.save_pretrained(tmp_path)
    read = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path)
    assert rates_of(read, scale=0.5) == rates


def test_a_role_of_the_user_must_have_a_rate():
    class Widths(models.KroneckerInducing):
        roles: ClassVar[dict[str, str]] = {**models.KroneckerInducing.roles, "sigma_": "width"}

    blora = tiny.adapted(prior=Widths(rank=2))
    with pytest.raises(ConfigurationError, match=r"sigma_.*'width'"):
        parameter_groups(blora, tiny.sequences())
    assert rates_of(blora, width=0.25)["model.q_proj.sigma_"] == 0.25
    Widths.learning_rates = {"width": 0.125}
    assert rates_of(blora)["model.q_proj.sigma_"] == 0.125


def test_a_method_is_saved(tmp_path):
    own = replace(METHODS["blob"], name="mine", learning_rates={"mean": 0.5}, linearized=True)
    blora = made(own)
    rates = {**models.GaussianFactors.learning_rates, "mean": 0.5}
    assert set(rates_of(blora).values()) == {*rates.values()}
    blora.save_pretrained(tmp_path)
    read = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path).method
    assert repr(read) == repr(own.with_rank(2))


def test_lora_is_peft_s():
    peft = pytest.importorskip("peft")
    rows = tiny.examples(10)
    likelihood = LabelTokens(token_ids=tiny.ANSWERS, num_data=10)
    net, batch = tiny.llama(), tiny.collate(tiny.examples(6, seed=1))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    lora = peft.LoraModel(net, config, "default")
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    start = {n.replace(".default", ""): p.detach().clone() for n, p in trained.items()}
    full = METHODS["lora"].learning_rates["mean"]
    optimizer = torch.optim.AdamW(trained.values(), lr=full, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate(i, 15))
    for rows_now in islice(endless_batches(rows, tiny.collate, batch_size=4, seed=3), 15):
        optimizer.zero_grad()
        logits = likelihood.logits(net, rows_now)
        torch.nn.functional.cross_entropy(logits, rows_now["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        expected = likelihood.logits(net, batch).softmax(-1)
        lora.unload()
        assert (expected - likelihood.logits(net, batch).softmax(-1)).abs().max() > 1e-3  # learned
    blora = made("lora", net)
    with torch.no_grad():
        for group in blora.model.groups:
            family = blora.guide.families()[f"{group.name}.A"]
            (place,) = [n for n, _ in family.named_parameters()]
            A = [start[f"{name}.lora_A.weight"] for name in group.module_names]
            family.get_parameter(place).copy_(torch.stack(A))
    fit(blora, rows, collate=tiny.collate, num_steps=15, batch_size=4, seed=3)
    torch.testing.assert_close(blora.predict(batch, 0).probs, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["blobb", "split:lora", "Subspace+Site"])
def test_unknown_names(name):
    with pytest.raises(ConfigurationError):
        get_method(name)


def test_the_rank_is_that_of_the_prior_of_the_method():
    assert repr(BayesianLoRA(tiny.llama(), rank=3).prior) == "KroneckerInducing(rank=3)"
    with pytest.raises(ConfigurationError, match="rank must be None"):
        BayesianLoRA(tiny.llama(), rank=3, prior=models.Subspace())
