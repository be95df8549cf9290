"""Each adapter is its own, whatever other adapters there are, were, and were asked.

Run as a program, this file asks each of five adapters in a process of its own.
"""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import LabelTokens, MultipleChoice, SequenceClassification
from pyro_blora.models import KroneckerInducing

BATCH = tiny.sequences()


def net():
    torch.manual_seed(0)
    return tiny.llama()


def likelihood():
    return LabelTokens(token_ids=tiny.ANSWERS, num_data=10)


def trained_on(blora, steps):
    rows = tiny.examples()
    fit(blora, rows, collate=tiny.collate, num_steps=steps, progress=False, precision="float32")
    return blora


def adapted(seed, base, steps=5):
    torch.manual_seed(seed)
    return trained_on(tiny.adapted(base, likelihood=likelihood()), steps)


def alone(folder):
    """Each adapter by its kind, without any other."""
    return {
        "trained": lambda: adapted(1, net()),
        "loaded": lambda: BayesianLoRA.from_pretrained(net(), folder / "saved"),
        "peft": lambda: trained_on(
            BayesianLoRA.from_peft(net(), folder / "lora", likelihood=likelihood()), 2
        ),
        "copied": lambda: trained_on(adapted(1, net()), 3),
        "added": lambda: adapted(2, net()),
    }


def together(folder):
    """The same five in one process; two of them share a network."""
    kinds = ("trained", "loaded", "peft")
    made = {kind: alone(folder)[kind]() for kind in kinds}
    made["copied"] = trained_on(copy.deepcopy(made["trained"]), 3)
    torch.manual_seed(2)
    parts = {"prior": KroneckerInducing(rank=2, sigma=1.0), "guide": MatrixNormal(init_scale=0.1)}
    made["trained"].model.detach()
    made["added"] = trained_on(
        tiny.adapted(made["trained"].net, likelihood=likelihood(), **parts), 5
    )
    return made


def drawn(blora):
    torch.manual_seed(3)
    return blora.predict(BATCH, 4).samples


def exported(blora, folder):
    blora.export_peft(folder / "export")
    tensors = load_file(folder / "export" / "adapter_model.safetensors")
    return sum(t.double().square().sum() for t in tensors.values())


# The first two need no network, the others need theirs
QUESTIONS = {
    "kl": lambda blora, folder: blora.kl(),
    "export": exported,
    "mean": lambda blora, folder: blora.predict(BATCH, 0).samples,
    "draws": lambda blora, folder: drawn(blora),
}


def answer(blora, question, folder):
    return QUESTIONS[question](blora, folder).double().flatten().tolist()


@pytest.mark.slow
def test_five_adapters_answer_as_they_do_alone(tmp_path):
    """Whatever was asked before: every pair of questions, one after the other."""
    maker = adapted(4, net())
    maker.save_pretrained(tmp_path / "saved")
    maker.export_peft(tmp_path / "lora")
    script = [sys.executable, "-W", "ignore", __file__, str(tmp_path)]
    subprocess.run(script, check=True, timeout=300)
    made = together(tmp_path)
    expected = {kind: json.loads((tmp_path / kind / "answers.json").read_text()) for kind in made}
    asked = list(itertools.product(made, QUESTIONS))
    for pair in itertools.product(asked, asked):
        for kind, question in pair:
            if kind in ("trained", "added") and question not in ("kl", "export"):
                for name in ("trained", "added"):
                    made[name].model.detach()
                made[kind].model.attach()
            found = answer(made[kind], question, tmp_path)
            told = (pair, kind)
            assert found == pytest.approx(expected[kind][question], rel=1e-5, abs=1e-6), told


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
        lambda blora: blora.predict(tiny.sequences(), 2, linearized=True),
        lambda blora: blora.log_predictive(tiny.sequences(), 2),
        lambda blora: blora.generate(tiny.sequences()["input_ids"], max_new_tokens=1),
        lambda blora: blora.model(tiny.sequences()),
        lambda blora: blora(**{k: v for k, v in tiny.sequences().items() if k != "labels"}),
        lambda blora: fit(blora, tiny.examples(), collate=tiny.collate, num_steps=1),
    ],
)
def test_one_that_is_off_its_network_is_refused_before_anything_runs(ask):
    blora = tiny.adapted(num_data=10)
    other = tiny.adapted(blora.unwrap())
    state, before = torch.get_rng_state(), tiny.trained(blora)
    with pytest.raises(ConfigurationError, match="may have another adapter on"):
        ask(blora)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny.equal(tiny.trained(blora), before)
    assert other.model.adapters


def test_a_likelihood_is_a_template_as_prior_and_guide_are(run):
    likelihood = MultipleChoice(num_data=10)
    blora = tiny.adapted(likelihood=likelihood)
    rows = [tiny.choices(10, seed=3)] * 10
    fit(blora, rows, collate=lambda rows: rows[0], num_steps=2, progress=False)
    assert blora.likelihood.score_slope != 1
    assert likelihood.score_slope == 1
    assert tiny.adapted(likelihood=likelihood).likelihood.score_slope == 1
    other = tiny.adapted(likelihood=blora.likelihood)  # from where it is
    assert other.likelihood.score_slope == blora.likelihood.score_slope
    assert other.likelihood is not blora.likelihood


def saved(blora, folder):
    blora.save_pretrained(folder)
    tensors = load_file(folder / "bayesian_lora.safetensors")
    return torch.cat([t.flatten() for t in tensors.values()])


def refitted(blora, folder):
    """It trains on from the state, all that is to be trained."""
    options = {"collate": tiny.collate, "num_steps": 5, "progress": False}
    losses = [figures["loss"] for figures in fit(blora, tiny.examples(), **options).history]
    return torch.tensor([*losses, *drawn(blora).flatten()])


@pytest.mark.parametrize(
    "ask",
    [
        lambda blora, folder: drawn(blora),
        lambda blora, folder: blora.predict(tiny.sequences(), 0).probs,
        refitted,
        saved,
    ],
)
def test_what_pyro_loads_into_its_store_is_taken(run, tmp_path, ask):
    """The guide's, the prior's, and a head's."""
    options = {"target_modules": None, "likelihood": SequenceClassification(num_data=10)}
    blora, store = tiny.adapted(tiny.bert(), **options), pyro.get_param_store()
    run(blora)
    store.save(tmp_path / "store")
    expected = ask(blora, tmp_path)
    run(blora)
    run(tiny.adapted(num_data=10))
    store.load(tmp_path / "store")
    assert torch.equal(ask(blora, tmp_path), expected)


def test_one_that_is_off_leaves_the_network_to_the_one_that_is_on(run):
    older = tiny.adapted(num_data=10)
    net = older.unwrap()
    newer = tiny.adapted(net, num_data=10, fast=False)
    before = newer.predict(tiny.sequences(), 0).probs
    older.half().train()
    older.unwrap()
    with pytest.raises(ConfigurationError, match="may have another adapter on"):
        older.merge_and_unload()
    assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.float32, False)}
    assert not net.training
    assert torch.equal(newer.predict(tiny.sequences(), 0).probs, before)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for kind, make in alone(place).items():
        if not os.fork():  # nothing of the library has run in this process
            own = place / kind
            own.mkdir()
            blora = make()
            found = {question: answer(blora, question, own) for question in QUESTIONS}
            (own / "answers.json").write_text(json.dumps(found))
            os._exit(0)
        _, status = os.wait()
        assert not status, kind
