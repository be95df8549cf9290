"""Two ways of asking one thing give one answer, or one of them says no.

Run as a program, this file reads in a process of its own what the test of AutoGuides has saved.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import subprocess

import own_classes
import pyro
import pytest
import tiny
import torch
from pyro.infer import Predictive, autoguide
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from pyro_blora import BayesianLoRA, effective_ranks, fit, guides, models
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.evaluation.lm_eval import HFLM, PosteriorLM
from pyro_blora.inference import finish
from pyro_blora.inference.trainer import BayesianLoRATrainer
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice
from pyro_blora.likelihoods.multiple_choice import _apart
from pyro_blora.methods import METHODS

BATCH = tiny.sequences()
ROWS = tiny.examples(4)
UNLABELED = {key: value for key, value in BATCH.items() if key != "labels"}


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
    batch = tiny.collate(ROWS)
    expected = seeded(method.predict, batch, 4000)
    labels = batch["labels"].unsqueeze(-1)
    logp = expected.probs.gather(-1, labels).log().squeeze(-1)
    found = seeded(method.log_predictive, batch, 4000)
    torch.testing.assert_close(found, logp, atol=1e-5, rtol=1e-4)
    found, _ = seeded(method.predict_dataset, ROWS, tiny.collate, 4000, progress=False)
    torch.testing.assert_close(found.samples, expected.samples)
    args = TrainingArguments(tmp_path, report_to=[], disable_tqdm=True, use_cpu=True)
    how = {"eval_dataset": ROWS, "data_collator": tiny.collate, "eval_samples": 4000}
    trainer = BayesianLoRATrainer(method, args, **how)  # whose loaders draw a number, too
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-float(logp.mean()), abs=0.015)
    scores = torch.tensor(trainer.predict(ROWS).predictions)
    torch.testing.assert_close(scores.softmax(-1), expected.probs, atol=0.02, rtol=0)
    if method.method.linearized:  # the tolerance tells the two apart
        apart = seeded(method.log_predictive, batch, 4000, linearized=False).mean()
        assert abs(apart - logp.mean()) > 0.03


@pytest.mark.parametrize("samples", [None, 0, 3])
def test_a_validation_is_the_trainers_evaluation(samples, tmp_path):
    """Of as many draws as a prediction has, unless another number is told."""
    blora = tiny.adapted(num_data=4)
    how = {"collate": tiny.collate, "num_steps": 2, "progress": False, "eval_samples": samples}
    (_, nll), *others = fit(blora, ROWS, validation=ROWS, **how).validation
    assert not others
    expected = -seeded(blora.log_predictive, tiny.collate(ROWS), samples).mean()
    assert nll == pytest.approx(float(expected), rel=1e-5)
    args = TrainingArguments(tmp_path, report_to=[], disable_tqdm=True, use_cpu=True)
    how = {"eval_dataset": ROWS, "data_collator": tiny.collate, "eval_samples": samples}
    found = BayesianLoRATrainer(blora, args, **how).evaluate()["eval_loss"]
    assert found == pytest.approx(nll, abs=1e-6 if samples == 0 else 0.1)


def test_what_samples_networks_says_no_to_a_method_that_linearizes(tmp_path):
    parts = METHODS_OF["linearized"]
    blora = tiny.adapted(num_data=4, **parts)
    finish(blora, ROWS, collate=tiny.collate, progress=False)
    calls = [
        lambda: blora.export_peft(tmp_path / "x", num_samples=2),
        lambda: blora.generate(BATCH["input_ids"], max_new_tokens=1),
        *([lambda: PosteriorLM(blora, None)] if HFLM else []),
    ]
    for call in calls:
        with pytest.raises(
            ConfigurationError, match=r"'laplace-lora' averages draws of linearized"
        ):
            call()
    assert not (tmp_path / "x").exists()
    blora.export_peft(tmp_path / "x")
    blora.generate(BATCH["input_ids"], num_samples=0, max_new_tokens=1)


# What is trained can be saved and read


def listed(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, hide=["v_proj.V"])))
    guide.append(AutoMultivariateNormal(pyro.poutine.block(model, hide=["q_proj.V"])))
    return guide


def autoguides():
    """All of Pyro's that work on the model, by name; base classes and such are no guides."""
    no = {"Guide", "Callable", "Continuous", "DiscreteParallel", "GuideList", "Messenger"}
    names = [n for n in autoguide.__all__ if n.startswith("Auto") and n[4:] not in no]
    flow = partial(pyro.distributions.transforms.iterated, 1, pyro.distributions.transforms.planar)
    made = {name: getattr(autoguide, name) for name in names}
    made["AutoNormalizingFlow"] = partial(autoguide.AutoNormalizingFlow, init_transform_fn=flow)
    made["mvn"] = partial(autoguide.AutoStructured, conditionals="mvn", dependencies="linear")
    return {**made, "listed": listed}


def predicted(blora):
    return torch.cat([seeded(blora.predict, BATCH, n).samples for n in (0, 3)])


def base():
    torch.manual_seed(0)
    return tiny.llama(1)


@pytest.mark.slow
def test_every_autoguide_that_trains_is_read_in_another_process(tmp_path):
    for name, kind in autoguides().items():
        pyro.clear_param_store()
        torch.manual_seed(1)
        blora = tiny.adapted(base(), guide=kind)
        rows = tiny.examples(12)
        how = {"batch_size": 4, "num_steps": 3, "precision": "float32", "progress": False}
        fit(blora, rows, collate=tiny.collate, checkpoint_dir=tmp_path / f"{name}-run", **how)
        blora.save_pretrained(tmp_path / name)
        save_file({"expected": predicted(blora)}, tmp_path / name / "expected")
    script = [sys.executable, "-W", "ignore", __file__, str(tmp_path)]
    subprocess.run(script, check=True, timeout=300)
    for name in autoguides():
        expected, found = (load_file(tmp_path / name / n) for n in ("expected", "found"))
        torch.testing.assert_close(found["found"], expected["expected"], msg=name)


def read_all(folder):
    for name, kind in autoguides().items():
        torch.manual_seed(2)
        given = {"guide": kind} if name in ("AutoNormalizingFlow", "listed") else {}
        blora = BayesianLoRA.from_pretrained(base(), folder / name, **given)
        save_file({"found": predicted(blora)}, folder / name / "found")


def test_an_autoguide_that_never_ran_is_saved_as_it_starts(tmp_path):
    blora = tiny.adapted(base(), guide=AutoNormal)
    blora.save_pretrained(tmp_path)
    expected = predicted(blora)
    blora.unwrap()
    read = BayesianLoRA.from_pretrained(blora.net, tmp_path)
    assert torch.equal(predicted(read), expected)


class Lazy(torch.nn.Module):
    """A guide of one's own, which reads its batch and has its parameters in Pyro's store."""

    def __init__(self, model):
        super().__init__()
        self.sites = [(site.name, site.prior) for site in model.sites]

    def forward(self, batch=None):
        rows = len(batch["input_ids"])
        for name, prior in self.sites:
            loc = pyro.param(f"lazy.{name}", torch.zeros(prior.shape()))
            law = pyro.distributions.Normal(loc, 1.0 / rows).to_event(prior.event_dim)
            with pyro.plate(f"{name.split('.')[0]}.layers", len(loc), dim=-1):
                pyro.sample(name, law)


def test_a_guide_of_ones_own_is_called_with_batches_alone(tmp_path):
    blora = tiny.adapted(guide=Lazy)
    assert blora.predict(UNLABELED, 2).samples.shape == (2, 4, 3)
    blora.save_pretrained(tmp_path)


def test_a_second_training_of_a_post_hoc_guide_validates_a_point_again(monkeypatch):
    blora, asked = tiny.adapted(num_data=4, guide=guides.Isotropic()), []
    own = BayesianLoRA.log_predictive
    note = lambda blora, batch, samples: asked.append(samples) or own(blora, batch, samples)  # noqa: E731
    monkeypatch.setattr(BayesianLoRA, "log_predictive", note)
    for _ in range(2):
        fit(blora, ROWS, validation=ROWS, collate=tiny.collate, num_steps=1, progress=False)
    assert asked == [0, 0]


# A state from Pyro's store

STORED = {
    "MatrixNormal": {},
    "AutoNormal": {"guide": AutoNormal},
    "AutoDiagonalNormal": {"guide": autoguide.AutoDiagonalNormal},
    "AutoMultivariateNormal": {"guide": AutoMultivariateNormal},
    "AutoLowRank": {"guide": partial(autoguide.AutoLowRankMultivariateNormal, rank=3)},
}


def with_head(parts, seed):
    torch.manual_seed(seed)
    blora = tiny.adapted(base(), num_data=4, modules_to_save=["lm_head"], **parts)
    blora.guide(BATCH), blora.model(BATCH)  # as a training step does
    return tiny.shaken(blora, 0.1 * seed)


QUESTIONS = {
    "draws": lambda blora: seeded(blora.predict, BATCH, 3).samples,
    "mean": lambda blora: blora.predict(BATCH, 0).samples,
    "log": lambda blora: blora.log_predictive(BATCH, 0),
    "generate": lambda blora: seeded(
        blora.generate, BATCH["input_ids"], max_new_tokens=2, do_sample=False, num_samples=2
    ).log_probs.nan_to_num(),
    "generate the mean": lambda blora: blora.generate(
        BATCH["input_ids"], max_new_tokens=2, do_sample=False, num_samples=0
    ).log_probs.nan_to_num(),
}


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("parts", STORED)
def test_a_state_from_the_store_is_taken_whole(parts, question, local, tmp_path):
    ask = QUESTIONS[question]
    with pyro.settings.context(module_local_params=local):
        blora = with_head(STORED[parts], 1)
        expected = ask(blora)
        pyro.get_param_store().save(tmp_path / "store")
        pyro.clear_param_store()
        other = with_head(STORED[parts], 2)
        assert not torch.allclose(ask(other), expected, atol=1e-3)
        held = {n: id(p) for n, p in other.named_parameters()}
        pyro.get_param_store().load(tmp_path / "store")
        torch.testing.assert_close(ask(other), expected)
        assert {n: id(p) for n, p in other.named_parameters()} == held  # an optimizer has these
        torch.testing.assert_close(ask(other), expected)


def test_directions_that_the_store_does_not_hold_are_told(tmp_path):
    prior = models.FisherInducing(rank=2)
    blora = tiny.adapted(prior=prior, num_data=4)
    fit(blora, ROWS, collate=tiny.collate, num_steps=2, progress=False)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    other = tiny.adapted(prior=tiny.anew(prior), num_data=4)
    pyro.get_param_store().load(tmp_path / "store")
    for ask in QUESTIONS.values():
        with pytest.warns(UserWarning, match=r"are random as yet.*store does not hold them"):
            ask(other)


# Draws that are given

PRIORS = {**tiny.priors(), "shared": own_classes.RandomScale()}
PRIORS["horseshoe"] = models.KroneckerInducing(rank=2, core="horseshoe")


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_draws_of_predictive_are_taken(prior, parallel):
    guide = guides.MeanField(init_scale=0.3)
    blora = tiny.shaken(tiny.adapted(prior=PRIORS[prior], guide=guide), 0.1)
    samples = Predictive(blora.guide, num_samples=3, parallel=parallel)(BATCH)
    found = blora.predict(BATCH, samples=samples)
    for k, expected in enumerate(found.samples):  # of the conditioned model, one at a time
        shapes = {site.name: site.prior.shape() for site in blora.model.sites}
        one = {name: samples[name][k].reshape(shape) for name, shape in shapes.items()}
        updates = pyro.poutine.condition(blora.model.updates, data=one)()
        with torch.no_grad(), blora.model.applied(updates) as net:
            logits = blora.likelihood.logits(net, BATCH)
        torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=1e-4)
    lists = {name: samples[name].tolist() for name in shapes}
    torch.testing.assert_close(blora.predict(BATCH, samples=lists).samples, found.samples)
    arrays = {name: samples[name].numpy() for name in shapes}
    assert torch.equal(blora.predict(BATCH, samples=arrays).samples, found.samples)


# A posterior that depends on the input

WIDE = {"MeanField": None, "Hierarchical": PRIORS["Hierarchical"], "horseshoe": PRIORS["horseshoe"]}


@pytest.mark.parametrize("prior", WIDE)
def test_an_amortized_mean_is_that_of_the_input_or_there_is_none(prior, tmp_path):
    guide = guides.Amortized(hidden=3)
    blora = tiny.shaken(
        tiny.adapted(prior=WIDE[prior] and tiny.anew(WIDE[prior]), guide=guide), 0.3
    )
    expected = blora.predict(BATCH, 0).probs
    logits = blora(**UNLABELED).logits
    torch.testing.assert_close(tiny.answers(logits, BATCH).softmax(-1), expected)
    with blora.posterior(batch=BATCH) as net:
        torch.testing.assert_close(net(**UNLABELED).logits, logits)
    for ask in (
        lambda: blora.export_peft(tmp_path / "x"),
        blora.merge_and_unload,
        lambda: blora.posterior().__enter__(),
        blora.sample_updates,
        lambda: effective_ranks(blora),
    ):
        with pytest.raises(ConfigurationError, match=r"depends on the input.* must have a batch"):
            ask()
    assert not (tmp_path / "x").exists()
    assert torch.equal(blora.predict(BATCH, 0).probs, expected)
    for labeled in (BATCH, UNLABELED):  # of Pyro, in parallel
        draws = Predictive(blora.model, guide=blora.guide, num_samples=3, parallel=True)(labeled)
        assert draws["labels"].shape == (3, 4)


@pytest.mark.parametrize("num_samples", [0, 3])
def test_an_amortized_adapter_of_options_writes_text(num_samples):
    likelihood = MultipleChoice(num_data=4)
    blora = tiny.shaken(tiny.adapted(guide=guides.Amortized(hidden=3), likelihood=likelihood), 0.3)
    prompt = {key: value[:1, :3] for key, value in UNLABELED.items()}
    how = {"num_samples": num_samples, "do_sample": False, "max_new_tokens": 1}
    found = seeded(blora.generate, **prompt, **how).log_probs
    updates = seeded(blora.sample_updates, num_samples, prompt)
    if not num_samples:  # draws come in mirror pairs
        with blora.model.applied(updates) as net, torch.no_grad():
            expected = net(**prompt).logits[:, -1].log_softmax(-1).amax(-1, keepdim=True)
        torch.testing.assert_close(found, expected)
    assert found.isfinite().all()


# Parts of a batch


@pytest.mark.parametrize("likelihood", [LabelTokens(token_ids=tiny.ANSWERS), CausalLM()])
def test_position_ids_are_used(likelihood):
    text = isinstance(likelihood, CausalLM)
    batch = tiny.texts() if text else BATCH
    blora = tiny.adapted(likelihood=likelihood)
    plain = blora.log_predictive(batch, 0)
    positions = torch.arange(7).expand(4, -1)
    same = blora.log_predictive({**batch, "position_ids": positions}, 0)
    torch.testing.assert_close(same, plain)
    apart = {**batch, "position_ids": 3 * positions}
    found = blora.log_predictive(apart, 0)
    assert (found - plain).abs().max() > 1e-3
    given = {n: t for n, t in apart.items() if n != "labels"}
    with torch.no_grad(), blora.posterior() as net:
        logits = net(**given).logits
    labels = batch["labels"]
    if text:
        scores = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp_min(0))
        expected = (scores.squeeze(-1) * (labels[:, 1:] >= 0)).sum(-1)
    else:
        expected = tiny.answers(logits, batch).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_position_ids_are_one_for_each_token():
    with pytest.raises(BatchError, match=r"position_ids must have .*\(4, 7\), got \(1, 7"):
        tiny.adapted().predict({**BATCH, "position_ids": torch.arange(7)[None]}, 3)


def test_position_ids_of_options_are_refused():
    blora = tiny.adapted(likelihood=MultipleChoice())
    batch = tiny.choices()
    batch["position_ids"] = torch.arange(8).expand(3, 3, -1)
    with pytest.raises(BatchError, match="position_ids must be left out for MultipleChoice"):
        blora.predict(batch)


def test_the_order_of_options_does_not_say_who_is_held_out():
    batch = tiny.choices(400)
    held = _apart(batch)
    assert 20 < sum(held) < 80
    for order in ([2, 0, 1], [1, 0, 2]):
        shuffled = {n: t if n == "labels" else t[:, order] for n, t in batch.items()}
        assert _apart(shuffled) == held
    assert _apart(tiny.choices(400, seed=1)) != held


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
