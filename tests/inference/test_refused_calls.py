"""A call that is refused changes nothing: no parameter, no buffer, no random number, no file."""

import hashlib
import random

import numpy as np
import peft
import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer
from pyro.infer.autoguide import AutoNormal
from transformers import TrainingArguments

from pyro_blora import BayesianLoRA, compare, fit, load_task
from pyro_blora.guides import Laplace
from pyro_blora.inference import RATES, bayesianize, finish
from pyro_blora.inference.trainer import BayesianLoRATrainer
from pyro_blora.likelihoods import LabelTokens

BAD = [{**row, "label": 99} for row in tiny.examples()]
GOOD = {"collate": tiny.collate, "progress": False}
LAST = [{"input_ids": torch.ones(20, dtype=torch.long), "label": 99, "index": 0}]


def of_unknown_tokens(rows):
    batch = tiny.collate(rows)
    return {**batch, "input_ids": batch["input_ids"] + 40 * (batch["index"] == 9)[:, None]}


@pytest.fixture
def blora(tmp_path):
    """An adapter with a width after training, with temperatures, saved and exported."""
    likelihood = LabelTokens(token_ids=tiny.ANSWERS)
    made = tiny.adapted(guide=Laplace(), likelihood=likelihood)
    tiny.train(made, held_out=0.3)
    made.save_pretrained(tmp_path / "mine")
    made.export_peft(tmp_path / "lora")
    (tmp_path / "theirs").mkdir()
    for name in ("bayesian_lora.safetensors", "adapter_config.json", "results.json"):
        (tmp_path / "theirs" / name).write_text("somebody else's")
    (tmp_path / "a.csv").write_text("text,stars\na,1\n")
    return made


def state(blora, folder):
    """Everything that a refused call may not change."""
    parts = {**blora.state_dict(), **{f"net {n}": t for n, t in blora.net.state_dict().items()}}
    found = {name: value.clone() for name, value in parts.items()}
    found |= {f"grad {n}": torch.tensor(p.requires_grad) for n, p in blora.named_parameters()}
    found["mode"] = torch.tensor([blora.training, blora.net.training, blora.model.enabled])
    found["torch"] = torch.get_rng_state()
    found["numpy"] = torch.tensor(np.random.get_state()[1].astype("int64"))  # noqa: NPY002
    found["python"] = torch.tensor(random.getstate()[1])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [(str(path), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return found, told, blora.likelihood.options(), blora.tokenizer, vars(blora.method)


def trainer(blora, folder, **options):
    arguments = TrainingArguments(
        str(folder / "trainer"), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1
    )
    usual = {"train_dataset": tiny.examples(), "data_collator": tiny.collate}
    return BayesianLoRATrainer(blora, arguments, **{**usual, **options})


ROWS = tiny.examples()
CALLS = {
    "fit, settings": lambda b, d: fit(b, ROWS, num_steps=0, **GOOD),
    "fit, weight": lambda b, d: fit(b, ROWS, num_steps=2, kl_weight=-1, **GOOD),
    "fit, rates": lambda b, d: fit(b, ROWS, num_steps=2, learning_rates={"x": 1}, **GOOD),
    "fit, particles": lambda b, d: fit(b, ROWS, num_steps=2, num_particles=0, **GOOD),
    "fit, precision": lambda b, d: fit(b, ROWS, num_steps=2, precision="float8", **GOOD),
    "fit, elbo": lambda b, d: fit(b, ROWS, num_steps=2, elbo=dict, **GOOD),
    "fit, empty": lambda b, d: fit(b, [], num_steps=2, **GOOD),
    "fit, no file": lambda b, d: fit(b, d / "no.csv", num_steps=2),
    "fit, columns": lambda b, d: fit(b, d / "a.csv", num_steps=2),
    "fit, generator": lambda b, d: fit(b, (r for r in ROWS), num_steps=2, **GOOD),
    "fit, share": lambda b, d: fit(b, ROWS, num_steps=2, held_out=1.5, **GOOD),
    "fit, validation": lambda b, d: fit(b, ROWS, num_steps=2, validation=[], **GOOD),
    "fit, best": lambda b, d: fit(b, ROWS, num_steps=2, keep_best=True, **GOOD),
    "fit, batch": lambda b, d: fit(b, ROWS, num_steps=2, collate=dict, progress=False),
    "fit, draws": lambda b, d: fit(b, ROWS, num_steps=2, eval_samples=-1, **GOOD),
    "fit, callback": lambda b, d: fit(b, ROWS, num_steps=2, callback=3, **GOOD),
    "fit, late": lambda b, d: fit(b, ROWS + LAST, num_steps=99, **GOOD),
    "fit, tuple": lambda b, d: fit(b, [(1, 2)], num_steps=2),
    "finish, data": lambda b, d: finish(b, d / "no.csv"),
    "finish, empty": lambda b, d: finish(b, [], **GOOD),
    "finish, batch": lambda b, d: finish(b, ROWS, collate=dict, progress=False),
    "finish, precision": lambda b, d: finish(b, ROWS, precision="float8", **GOOD),
    "finish, late": lambda b, d: finish(b, ROWS, collate=of_unknown_tokens, progress=False),
    "calibrate, labels": lambda b, d: b.calibrate(BAD, tiny.collate),
    "calibrate, late": lambda b, d: b.calibrate(ROWS + LAST, tiny.collate),
    "calibrate, draws": lambda b, d: b.calibrate(ROWS, tiny.collate, num_samples=-1),
    "calibrate, empty": lambda b, d: b.calibrate([], tiny.collate),
    "distill, draws": lambda b, d: b.distill(ROWS, tiny.collate, num_samples=1),
    "distill, empty": lambda b, d: b.distill([], tiny.collate),
    "predict, batch": lambda b, d: b.predict({"input_ids": [[1]]}),
    "predict, draws": lambda b, d: b.predict(tiny.sequences(), -1),
    "predict, sites": lambda b, d: b.predict(tiny.sequences(), samples={}),
    "predict, texts": lambda b, d: b.predict(["a"]),
    "predict_dataset, size": lambda b, d: b.predict_dataset(ROWS, tiny.collate, batch_size=0),
    "predict_dataset, empty": lambda b, d: b.predict_dataset([], tiny.collate),
    "log_predictive, labels": lambda b, d: b.log_predictive({**tiny.sequences(), "labels": None}),
    "log_predictive, classes": lambda b, d: b.log_predictive_dataset(BAD, tiny.collate),
    "generate, prompt": lambda b, d: b.generate(None, num_samples=-1),
    "export, theirs": lambda b, d: b.export_peft(d / "theirs"),
    "export, draws": lambda b, d: b.export_peft(d / "lora", num_samples=-2),
    "wrapped twice": lambda b, d: BayesianLoRA(b.net, target_modules=["q_proj"]),
    "no layer": lambda b, d: BayesianLoRA(b.net, target_modules=["nothing"]),
    "from_pretrained": lambda b, d: BayesianLoRA.from_pretrained(b.net, d / "theirs"),
    "from_peft": lambda b, d: BayesianLoRA.from_peft(b.net, d / "theirs"),
    "bayesianize": lambda b, d: bayesianize(b.net, d / "lora", data=ROWS, collate=tiny.collate),
    "Trainer, rate": lambda b, d: trainer(b, d, learning_rates={"x": 1.0}),
    "Trainer, share": lambda b, d: trainer(b, d, held_out=2.0),
    "Trainer, draws": lambda b, d: trainer(b, d, eval_samples=-3),
    "Trainer, elbo": lambda b, d: trainer(b, d, elbo=dict),
    "Trainer, data": lambda b, d: trainer(b, d, train_dataset=d / "no.csv"),
    "Trainer, option": lambda b, d: trainer(b, d, nothing=1),
    "Trainer.train": lambda b, d: trainer(b, d).train(resume_from_checkpoint=str(d / "nothing")),
    "Trainer.evaluate": lambda b, d: trainer(b, d).evaluate(d / "no.csv"),
    "compare, method": lambda b, d: compare(
        (b.net, None), ROWS, ["no-such"], out=d / "out", seeds=[0]
    ),
    "compare, theirs": lambda b, d: compare(
        (b.net, build_tokenizer(["a"])), load_task("facts", max_test=3), ["lora"], out=d / "theirs"
    ),
    "compare, steps": lambda b, d: compare(
        (b.net, None), load_task("facts", max_test=3), ["lora"], seeds=[], num_steps=0
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_refused_call_changes_nothing(name, blora, tmp_path):
    if name.startswith("Trainer"):  # the folder of its checkpoints is made by transformers
        (tmp_path / "trainer").mkdir()
    before = state(blora, tmp_path)
    with pytest.raises((ValueError, TypeError, OSError, IndexError)) as told:
        CALLS[name](blora, tmp_path)
    long = ("Trainer", "fit, elbo", "fit, late")  # with a trace by Pyro, or of transformers' making
    assert name.startswith(long) or "\n" not in str(told.value).strip()
    after = state(blora, tmp_path)
    changed = [n for n in before[0] | after[0] if not torch.equal(before[0][n], after[0][n])]
    if name in (
        "Trainer.train",
        "Trainer.evaluate",
        "fit, late",
    ):  # the constructor seeds, as a Trainer's does, and draws were made
        changed = [n for n in changed if n not in ("torch", "numpy", "python")]
    assert not changed
    assert before[1:] == after[1:]


def test_a_row_that_is_refused_late_puts_an_autoguide_back_to_its_start():
    likelihood = LabelTokens(token_ids=tiny.ANSWERS)
    started = tiny.adapted(guide=AutoNormal, likelihood=likelihood)
    torch.manual_seed(0)
    fit(started, ROWS, num_steps=1, learning_rates=dict.fromkeys(RATES, 0.0), **GOOD)
    blora = tiny.adapted(guide=AutoNormal, likelihood=likelihood)
    with pytest.raises(ValueError, match="labels must"):
        fit(blora, ROWS + LAST, num_steps=99, **GOOD)
    expected = {name: value for name, value in started.state_dict().items() if "guide" in name}
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(blora.state_dict()[name], value)


def test_a_refused_posterior_leaves_a_peft_model_as_it_was(tmp_path):
    net = tiny.llama()
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = tiny.sequences()["input_ids"]
    before, names = model(ids).logits, [n for n, _ in model.named_modules()]
    likelihood = LabelTokens(token_ids=tiny.ANSWERS)
    for data, options in ((BAD, GOOD), ([], GOOD), (ROWS, {**GOOD, "precision": "float8"})):
        with pytest.raises(ValueError, match=r"label|empty|precision"):
            bayesianize(model, data=data, likelihood=likelihood, **options)
        assert [n for n, _ in model.named_modules()] == names
        assert torch.equal(model(ids).logits, before)
