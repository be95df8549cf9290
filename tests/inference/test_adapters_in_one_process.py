"""Each adapter is its own, whatever other adapters there are, were, and were asked."""

import itertools
import json
import subprocess
import sys

import five_adapters as five
import pyro
import pytest
import tiny
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

from pyro_blora import fit
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import MultipleChoice


@pytest.mark.slow
def test_five_adapters_answer_as_they_do_alone(tmp_path):
    """Whatever was asked before: every pair of questions, one after the other."""
    maker = five.adapted(4, five.net())
    maker.save_pretrained(tmp_path / "saved")
    maker.export_peft(tmp_path / "lora")
    script = [sys.executable, "-W", "ignore", five.__file__, str(tmp_path)]
    subprocess.run(script, check=True, timeout=300)
    made = five.together(tmp_path)
    expected = {kind: json.loads((tmp_path / kind / "answers.json").read_text()) for kind in made}
    asked = list(itertools.product(made, five.QUESTIONS))
    for pair in itertools.product(asked, asked):
        for kind, question in pair:
            if kind in ("trained", "added") and question not in ("kl", "export"):
                made["trained"].set_adapter("added" if kind == "added" else "default")
            found = five.answer(made[kind], question, tmp_path)
            assert found == pytest.approx(expected[kind][question], rel=1e-5, abs=1e-6), (
                pair,
                kind,
            )


@pytest.mark.parametrize("local", [False, True])
def test_two_loops_take_turns_in_either_store(local):
    """With rates by name, which Pyro's optimizers look up in the global store."""

    def loop(seed, names):
        torch.manual_seed(seed)
        blora = tiny.adapted(num_data=10)

        def by_name(name):
            names.add(name)
            return {"lr": 1e-3 if ".Z_" in name else 1e-1}

        elbo = TraceMeanField_ELBO(4, blora.max_plate_nesting, vectorize_particles=True)
        return blora, SVI(blora.model, blora.guide, ClippedAdam(by_name), elbo)

    def steps(*loops):
        for turn in range(3):
            for _, svi in loops:
                torch.manual_seed(turn)
                svi.step(tiny.sequences(8))

    with pyro.settings.context(module_local_params=local):
        names = set()
        alone, svi = loop(0, names)
        steps((alone, svi))
        one, other = loop(0, set()), loop(1, set())
        steps(one, other)
    assert tiny.equal(tiny.trained(one[0]), tiny.trained(alone))
    assert names == {n.removesuffix("_unconstrained") for n in tiny.trained(alone)}


@pytest.mark.parametrize(
    "ask",
    [
        lambda blora: blora.predict(tiny.sequences(), 2),
        lambda blora: blora.predict(tiny.sequences(), 2, linearised=True),
        lambda blora: blora.log_predictive(tiny.sequences(), 2),
        lambda blora: blora.generate(tiny.sequences()["input_ids"], max_new_tokens=1),
        lambda blora: blora.model(tiny.sequences()),
        lambda blora: blora(**{k: v for k, v in tiny.sequences().items() if k != "labels"}),
        lambda blora: fit(blora, tiny.examples(), collate=tiny.collate, num_steps=1),
    ],
)
def test_one_that_is_off_its_network_is_refused_before_anything_runs(ask):
    blora = tiny.adapted(num_data=10)
    other = blora.add_adapter("other", likelihood=five.likelihood())
    blora.set_adapter("other")
    state, before = torch.get_rng_state(), tiny.trained(blora)
    with pytest.raises(ConfigurationError, match="has another adapter on"):
        ask(blora)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny.equal(tiny.trained(blora), before)
    assert other.active_adapter == "other"


def test_the_likelihood_that_is_given_is_the_one_that_learns(run):
    likelihood = MultipleChoice(num_data=10)
    blora = tiny.adapted(likelihood=likelihood)
    rows = [tiny.choices(10, seed=3)] * 10
    fit(blora, rows, collate=lambda rows: rows[0], num_steps=2, progress=False)
    assert likelihood is blora.likelihood
    assert likelihood.score_slope != 1
    with pytest.warns(UserWarning, match="is another adapter's.*Make one for each adapter"):
        other = tiny.adapted(likelihood=likelihood)
    assert other.likelihood.score_slope == 1
    fresh = MultipleChoice(num_data=10)
    for wrong in ({"rank": 64}, {"guide": MatrixNormal}):
        with pytest.raises(ConfigurationError):
            tiny.adapted(likelihood=fresh, **wrong)
    assert tiny.adapted(likelihood=fresh).likelihood is fresh  # the failure did not use it up


def test_what_pyro_loads_into_its_store_is_taken(run, tmp_path):
    blora, store = tiny.adapted(num_data=10), pyro.get_param_store()
    run(blora)
    expected = five.drawn(blora)
    store.save(tmp_path / "store")
    run(blora)
    run(tiny.adapted(num_data=10))
    store.load(tmp_path / "store")
    assert torch.equal(five.drawn(blora), expected)


def test_one_that_is_off_leaves_the_network_to_the_one_that_is_on(run):
    older = tiny.adapted(num_data=10)
    net = older.unwrap()
    newer = tiny.adapted(net, num_data=10, fast=False)
    before = newer.predict(tiny.sequences(), 0).probs
    older.half().train()
    older.unwrap()
    with pytest.raises(ConfigurationError, match="has another adapter on"):
        older.merge_and_unload()
    assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, False)}
    assert not net.training
    assert torch.equal(newer.predict(tiny.sequences(), 0).probs, before)
