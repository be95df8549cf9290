"""Two ways of asking one thing give one answer, or one of them says no."""

from functools import partial

import pyro
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from safetensors.torch import load_file

from pyro_blora import guides
from pyro_blora.errors import ConfigurationError
from pyro_blora.inference import finish
from pyro_blora.likelihoods import CausalLM, LabelTokens
from pyro_blora.methods import METHODS

BATCH = tiny.sequences()
ROWS = tiny.examples(4)
UNLABELED = tiny.unlabeled(BATCH)


def seeded(run, *arguments, **options):
    torch.manual_seed(0)
    return run(*arguments, **options)


# One predictive of a method

METHODS_OF = {
    "draws": {},
    "linearized": {"method": METHODS["laplace-lora"], "guide": guides.Laplace()},
    "point": {"method": METHODS["map"], "guide": guides.Delta()},
}


@pytest.fixture(params=METHODS_OF)
def method(request):
    blora = tiny.shaken(tiny.adapted(num_data=4, **METHODS_OF[request.param]), 0.1)
    if request.param == "linearized":
        finish(blora, ROWS, collate=tiny.collate, progress=False)
    return blora


def test_every_way_of_asking_takes_the_predictive_of_the_method(method, tmp_path):
    batch, draws = tiny.collate(ROWS), 4000 if method.method.linearized else 300
    expected = seeded(method.predict, batch, draws)
    labels = batch["labels"].unsqueeze(-1)
    logp = expected.probs.gather(-1, labels).log().squeeze(-1)
    found = seeded(method.log_predictive, batch, draws)
    torch.testing.assert_close(found, logp, atol=1e-5, rtol=1e-4)
    found, _ = seeded(method.predict_dataset, ROWS, tiny.collate, draws, progress=False)
    torch.testing.assert_close(found.samples, expected.samples)
    # whose loaders draw a number, too
    trainer = tiny.trainer(tmp_path, method, eval_dataset=ROWS, eval_samples=draws)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-float(logp.mean()), abs=0.015)
    scores = torch.tensor(trainer.predict(ROWS).predictions)
    torch.testing.assert_close(scores.softmax(-1), expected.probs, atol=0.02, rtol=0)
    if method.method.linearized:  # the tolerance tells the two apart
        apart = seeded(method.log_predictive, batch, 300, linearized=False).mean()
        assert abs(apart - logp.mean()) > 0.03


@pytest.mark.parametrize("samples", [None, 0, 3])
def test_a_validation_is_the_trainers_evaluation(samples, tmp_path):
    blora = tiny.adapted(num_data=4)
    options = {"num_steps": 2, "eval_samples": samples}
    ((_, nll),) = tiny.train(blora, ROWS, validation=ROWS, **options).validation
    expected = -seeded(blora.log_predictive, tiny.collate(ROWS), samples).mean()
    assert nll == pytest.approx(float(expected), rel=1e-5)
    trainer = tiny.trainer(tmp_path, blora, eval_dataset=ROWS, eval_samples=samples)
    near = 1e-6 if samples == 0 else 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll, abs=near)


def test_what_samples_networks_says_no_to_a_method_that_linearizes(tmp_path):
    blora = tiny.adapted(num_data=4, **METHODS_OF["linearized"])
    finish(blora, ROWS, collate=tiny.collate, progress=False)
    for call in (
        lambda: blora.export_peft(tmp_path / "x", num_samples=2),
        lambda: blora.generate(BATCH["input_ids"], max_new_tokens=1),
    ):
        with pytest.raises(ConfigurationError, match="averages draws of linearized"):
            call()
    assert not (tmp_path / "x").exists()


# A state from Pyro's store

STORED = {
    "MatrixNormal": {},
    "AutoNormal": {"guide": AutoNormal},
    "AutoLowRank": {"guide": partial(AutoLowRankMultivariateNormal, rank=3)},
}


def with_head(parts, seed):
    torch.manual_seed(0)
    net = tiny.llama(1)
    blora = tiny.adapted(net, num_data=4, modules_to_save=["lm_head"], **parts)
    torch.manual_seed(seed)
    blora.guide(BATCH), blora.model(BATCH)  # as a training step does
    return tiny.shaken(blora, 0.1 * seed)


def generated(blora, num_samples):
    options = {"max_new_tokens": 2, "do_sample": False, "num_samples": num_samples}
    return seeded(blora.generate, BATCH["input_ids"], **options).log_probs.nan_to_num()


QUESTIONS = {
    "draws": lambda blora: seeded(blora.predict, BATCH, 3).samples,
    "mean": lambda blora: blora.predict(BATCH, 0).samples,
    "log": lambda blora: blora.log_predictive(BATCH, 0),
    "generate": lambda blora: generated(blora, 2),
    "generate the mean": lambda blora: generated(blora, 0),
}


def saved(blora, folder):
    blora.save_pretrained(folder)
    tensors = load_file(folder / "bayesian_lora.safetensors")
    return torch.cat([t.flatten() for t in tensors.values()])


def refitted(blora):
    history = tiny.train(blora, num_steps=3, precision="float32").history
    losses = [figures["loss"] for figures in history]
    return torch.tensor([*losses, *QUESTIONS["draws"](blora).flatten()])


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("parts", STORED)
def test_a_state_from_the_store_is_taken_whole(parts, local, tmp_path):
    store = pyro.get_param_store()
    asks = {**QUESTIONS, "save": partial(saved, folder=tmp_path)}
    if parts == "MatrixNormal":
        asks["fit"] = refitted  # the last, for it changes the state
    with pyro.settings.context(module_local_params=local):
        blora = with_head(STORED[parts], 1)
        store.save(tmp_path / "store")
        expected = {name: ask(blora) for name, ask in asks.items()}
        for name, ask in asks.items():
            store.clear()
            other = with_head(STORED[parts], 2)
            held = {n: id(p) for n, p in other.named_parameters()}
            assert not torch.allclose(QUESTIONS["mean"](other), expected["mean"], atol=1e-3)
            store.load(tmp_path / "store")
            torch.testing.assert_close(ask(other), expected[name], msg=name)
            assert {n: id(p) for n, p in other.named_parameters()} == held  # an optimizer has these
            if name != "fit":
                torch.testing.assert_close(ask(other), expected[name], msg=name)


# Parts of a batch


@pytest.mark.parametrize("likelihood", [LabelTokens(token_ids=tiny.ANSWERS), CausalLM()])
def test_position_ids_are_used(likelihood):
    batch = tiny.texts() if isinstance(likelihood, CausalLM) else BATCH
    blora, positions = tiny.adapted(likelihood=likelihood), torch.arange(7).expand(4, -1)
    plain, same, apart = (
        blora.log_predictive({**batch, **own}, 0)
        for own in ({}, {"position_ids": positions}, {"position_ids": 3 * positions})
    )
    torch.testing.assert_close(same, plain)
    assert (apart - plain).abs().max() > 1e-3
