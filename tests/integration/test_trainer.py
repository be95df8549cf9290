"""The Hugging Face ``Trainer`` on the ELBO."""

import pyro
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file

from pyro_blora import BayesianLoRA, guides
from pyro_blora.errors import DataError
from pyro_blora.inference import RATES

ROWS = tiny.examples(12)


def trainer(folder, blora=None, *, rows=ROWS, **options):
    blora = tiny.adapted() if blora is None else blora
    return tiny.trainer(folder, blora, rows, **{"max_steps": 4, "logging_steps": 1, **options})


def test_the_parts_of_the_loss_are_logged_and_rates_are_taken(tmp_path):
    run = trainer(tmp_path, learning_rates={"mean": 0.1, "scale": 0.05})
    run.train()
    for entry in run.state.log_history[:4]:
        assert entry["loss"] == pytest.approx(entry["nll"] + entry["kl"] / len(ROWS), rel=1e-4)
    found = {g["name"]: g["initial_lr"] for g in run.optimizer.param_groups}
    assert found == {"direction": RATES["direction"], "mean": 0.1, "scale": 0.05}


def test_a_batch_may_be_accumulated(tmp_path):
    """The point draws nothing, so that two half batches are one whole batch."""
    ends = []
    for parts in (1, 2):
        pyro.set_rng_seed(0)
        sizes = {"per_device_train_batch_size": 12 // parts, "gradient_accumulation_steps": parts}
        run = trainer(tmp_path, tiny.adapted(guide=guides.Delta()), **sizes)
        run.train()
        ends.append((tiny.trained(run.blora), run.state.log_history[3]["loss"]))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_has_the_adapter_alone(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-4"
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    adapter = {"README.md", "bayesian_lora.safetensors", "bayesian_lora_config.json"}
    assert tiny.written(folder) == state | adapter
    saved = load_file(folder / "bayesian_lora.safetensors")
    saved = {name: t for name, t in saved.items() if not name.startswith("base.")}  # four numbers
    assert set(saved) == set(run.blora.state_dict())
    trained = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert len(trained) == len(tiny.trained(run.blora))
    read = BayesianLoRA.from_pretrained(run.blora.unwrap(), folder)
    assert tiny.equal(read.state_dict(), run.blora.state_dict())


@pytest.mark.usefixtures("parameter_store")
def test_it_resumes_where_it_stopped(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, tiny.adapted(guide=guides.Ensemble()), **options)
    whole.train()
    pyro.set_rng_seed(7)
    net = tiny.llama()
    net.load_state_dict(whole.blora.net.state_dict())
    resumed = trainer(tmp_path, tiny.adapted(net, guide=guides.Ensemble()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert tiny.equal(tiny.trained(resumed.blora), tiny.trained(whole.blora))
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_it_ends_with_the_best_evaluation(tmp_path):
    torch.manual_seed(0)
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    each |= {"load_best_model_at_end": True, "eval_dataset": tiny.examples(10, seed=5)}
    run = trainer(tmp_path, max_steps=6, eval_samples=0, learning_rates={"mean": 10.0}, **each)
    run.train()
    losses = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    assert min(losses) < losses[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("replaced", [False, True])
def test_an_autoguide_is_trained_and_its_checkpoint_read(replaced, tmp_path):
    blora = tiny.adapted(guide=None if replaced else AutoNormal)
    run = trainer(tmp_path, blora, save_strategy="steps", save_steps=4)
    if replaced:
        blora.guide = AutoNormal(blora.model)
    run.train()
    assert blora.guide.locs.q_proj.V.abs().max() > 1e-3
    expected = blora.predict(tiny.collate(ROWS), 0).probs
    read = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path / "checkpoint-4")
    assert torch.equal(read.predict(tiny.collate(ROWS), 0).probs, expected)


@pytest.mark.parametrize("is_second", [False, True])
def test_a_refused_training_leaves_nothing_to_the_next_one(is_second, tmp_path):
    """An optimizer of the parameters that are there now, with the moments of steps that count."""
    ends = []
    for is_refused in (False, True):
        pyro.set_rng_seed(0)
        run = trainer(tmp_path, tiny.adapted(guide=AutoNormal))
        usual = run.data_collator

        if is_second:
            run.train()
            if is_refused:
                run.args.lr_scheduler_type = "cosine_with_min_lr"
                with pytest.raises(ValueError, match="min_lr"):  # which it needs
                    run.train()
                run.args.lr_scheduler_type = "linear"
        if is_refused:
            run.data_collator = tiny.raising(DataError("a bad row"), 3)
            with pytest.raises(DataError):
                run.train()
            run.data_collator = usual
        pyro.set_rng_seed(0)  # the refused one has drawn
        run.train()
        ends.append(tiny.trained(run.blora))
    assert tiny.equal(*ends)


def test_evaluation_leaves_no_trace_in_training(tmp_path):
    net, found = tiny.llama(), []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        pyro.set_rng_seed(0)
        blora = tiny.adapted(net, guide=guides.Ensemble())
        trainer(tmp_path, blora, eval_dataset=ROWS[:5], **options).train()
        found.append({k: v.clone() for k, v in blora.state_dict().items()})
        blora.unwrap()
    assert tiny.equal(*found)
