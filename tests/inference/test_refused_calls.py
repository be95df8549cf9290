"""A call that is refused changes nothing: no parameter, no buffer, no file."""

import math

import peft
import pytest
import tiny
import torch
from neighbors import tree
from own_tokenizer import build_tokenizer
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader

from pyro_blora import BayesianLoRA, compare, fit, load_task
from pyro_blora.errors import BatchError, CheckpointError, ConfigurationError, DataError
from pyro_blora.guides import Laplace, MeanField
from pyro_blora.inference import bayesianize, finish
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
    parts = {**blora.state_dict(), **{f"net {n}": t for n, t in blora.net.state_dict().items()}}
    found = {name: value.clone() for name, value in parts.items()}
    modes = [blora.training, blora.net.training, blora.model.enabled]
    modes += [p.requires_grad for p in blora.parameters()]
    others = blora.likelihood.options(), blora.tokenizer, vars(blora.method)
    return found, tree(folder), modes, others


ROWS = tiny.examples()


BATCHES = DataLoader([tiny.sequences()], collate_fn=lambda batches: batches[0])
UNLABELED = DataLoader([tiny.unlabeled(tiny.sequences())], batch_size=None)
FIT = [
    {"num_steps": 0}, {"num_epochs": 1},
    {"kl_weight": -1}, {"kl_weight": math.nan}, {"learning_rates": {"x": 1}}, {"keep_best": True},
    {"num_particles": 0}, {"precision": "float8"}, {"train": []},
    {"train": DataLoader([])}, {"train": "no.csv"}, {"train": (r for r in ROWS)}, {"patience": 3},
    {"train": tiny.Stream(ROWS)}, {"train": BATCHES}, {"train": UNLABELED}, {"held_out": 1.5},
    {"train": [(1, 2)], "collate": None}, {"validation": []}, {"collate": tuple},
    {"learning_rates": {"mean": -0.05}}, {"num_steps": None, "num_epochs": math.nan},
    {"batch_size": 2.5}, {"train": ROWS + LAST, "num_steps": 99}, {"eval_samples": -1},
    {"patience": 0, "validation": ROWS}, {"train": UNLABELED, "validation": [1], "collate": None},
]  # fmt: skip


def fitted(options):
    return lambda b, d: fit(b, **{"train": ROWS, "num_steps": 2, **GOOD, **options})


def with_trainer(call=lambda run, folder: None, **options):
    return lambda b, d: call(tiny.trainer(d / "t", b, ROWS, max_steps=1, **options), d)


def compared(method, out, tokenizer=None, **options):
    task = load_task("facts", max_test=3)
    return lambda b, d: compare((b.net, tokenizer), task, [method], out=d / out, **options)


CALLS = {
    **{f"fit, {index}": fitted(options) for index, options in enumerate(FIT)},
    "fit, columns": lambda b, d: fit(b, d / "a.csv", num_steps=2),
    "finish, data": lambda b, d: finish(b, d / "no.csv"),
    "finish, batch": lambda b, d: finish(b, ROWS, collate=tuple, progress=False),
    "finish, late": lambda b, d: finish(b, ROWS, collate=of_unknown_tokens, progress=False),
    "calibrate, labels": lambda b, d: b.calibrate(BAD, tiny.collate),
    "calibrate, late": lambda b, d: b.calibrate(ROWS + LAST, tiny.collate),
    "distill, draws": lambda b, d: b.distill(ROWS, tiny.collate, num_samples=1),
    "distill, half a draw": lambda b, d: b.distill(ROWS, tiny.collate, num_samples=2.5),
    "predict, draws": lambda b, d: b.predict(tiny.sequences(), True),
    "predict, batch": lambda b, d: b.predict({"input_ids": [[1]]}),
    "predict, sites": lambda b, d: b.predict(tiny.sequences(), samples={}),
    "predict, texts": lambda b, d: b.predict(["a"]),
    "predict_dataset, size": lambda b, d: b.predict_dataset(ROWS, tiny.collate, batch_size=0),
    "log_predictive, labels": lambda b, d: b.log_predictive(tiny.unlabeled(tiny.sequences())),
    "predict_dataset, stream": lambda b, d: b.predict_dataset(tiny.Stream(ROWS), tiny.collate),
    "predict_dataset, late": lambda b, d: b.predict_dataset(
        ROWS, tiny.raising(DataError("a"), 3), batch_size=4
    ),
    "log_predictive, classes": lambda b, d: b.log_predictive_dataset(BAD, tiny.collate),
    "generate, prompt": lambda b, d: b.generate(None, num_samples=-1),
    "export, theirs": lambda b, d: b.export_peft(d / "theirs"),
    "export, draws": lambda b, d: b.export_peft(d / "lora", num_samples=-2),
    "export, half a draw": lambda b, d: b.export_peft(d / "lora", 2.5),
    "wrapped twice": lambda b, d: BayesianLoRA(b.net, target_modules=["q_proj"]),
    "no layer": lambda b, d: BayesianLoRA(b.net, target_modules=["nothing"]),
    "from_pretrained": lambda b, d: BayesianLoRA.from_pretrained(b.net, d / "theirs"),
    "from_peft": lambda b, d: BayesianLoRA.from_peft(b.net, d / "theirs"),
    "bayesianize": lambda b, d: bayesianize(b.net, d / "lora", data=ROWS, collate=tiny.collate),
    "Trainer, rates": with_trainer(learning_rates={"x": 1.0}),
    "Trainer, rate": with_trainer(learning_rate=0.1),
    "Trainer.train": with_trainer(lambda run, d: run.train(resume_from_checkpoint=str(d / "no"))),
    "Trainer.evaluate": with_trainer(lambda run, d: run.evaluate(d / "no.csv")),
    "compare, method": compared("no-such", "out", seeds=[0]),
    "compare, theirs": compared("lora", "theirs", build_tokenizer(["a"])),
    "compare, steps": compared("lora", "out", seeds=[], num_steps=0),
}
ERRORS = (BatchError, CheckpointError, ConfigurationError, DataError)


@pytest.mark.parametrize("name", CALLS)
def test_a_refused_call_changes_nothing(name, blora, tmp_path):
    (tmp_path / "t").mkdir()  # which transformers makes for its Trainer
    before = state(blora, tmp_path)
    with pytest.raises(IndexError if name == "finish, late" else ERRORS):
        CALLS[name](blora, tmp_path)
    after = state(blora, tmp_path)
    assert tiny.equal(before[0], after[0])
    assert before[1:] == after[1:]


WHOLE_BATCHES = DataLoader([tiny.sequences()], batch_size=None)  # of a number that no one knows


@pytest.mark.parametrize(("num_data", "rows"), [(3, None), (None, WHOLE_BATCHES)])
def test_a_number_of_examples_that_cannot_be_is_refused(num_data, rows):
    with pytest.raises((BatchError, ConfigurationError), match="num_data"):
        tiny.train(tiny.adapted(num_data=num_data), rows)


@pytest.mark.parametrize("guide", [None, AutoNormal, Laplace()])
@pytest.mark.parametrize(
    ("error", "calls"), [(DataError("a row"), 4), (DataError("a row"), 5), (KeyError("text"), 4)]
)
def test_an_error_that_comes_late_leaves_an_adapter_as_it_was(guide, error, calls):
    """In the last step, or when the width or the temperature is found; an AutoGuide starts anew."""
    blora = tiny.adapted(guide=guide, likelihood=LabelTokens(token_ids=tiny.ANSWERS))
    before = {name: tensor.clone() for name, tensor in blora.state_dict().items()}
    options = {"num_steps": 4, "held_out": 0.3, "batch_size": 4, "progress": False}
    with pytest.raises(type(error)):
        fit(blora, ROWS, collate=tiny.raising(error, calls), **options)
    after = blora.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert blora.likelihood.num_data is None


def test_a_guide_of_the_user_stays_after_an_error():
    blora = tiny.adapted(likelihood=LabelTokens(token_ids=tiny.ANSWERS))
    blora.guide = guide = AutoNormal(blora.model)
    with pytest.raises(DataError):
        fit(blora, ROWS, collate=tiny.raising(DataError("a row"), 4), num_steps=4, progress=False)
    assert blora.guide is guide


def test_a_refused_posterior_leaves_a_peft_model_as_it_was(tmp_path):
    net = tiny.llama()
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = tiny.sequences()["input_ids"]
    before, names = model(ids).logits, [n for n, _ in model.named_modules()]
    usual = {"data": ROWS, "likelihood": LabelTokens(token_ids=tiny.ANSWERS), **GOOD}
    wrong = [{"data": BAD}, {"data": []}, {"precision": "float8"}, {"likelihood": None}]
    for options in (*wrong, {"guide": MeanField()}):
        with pytest.raises(ValueError, match=r"label|empty|precision|classes|Laplace"):
            bayesianize(model, **usual | options)
        assert [n for n, _ in model.named_modules()] == names
        assert torch.equal(model(ids).logits, before)
