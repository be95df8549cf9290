"""A wrong input is told in one line, at the place that knows, and before anything is done."""

import json
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from pyro_blora import BayesianLoRA, checkpoints, fit, guides, models
from pyro_blora.checkpoints.checkpoint import read_tensors, write_tensors
from pyro_blora.errors import BatchError, CheckpointError, ConfigurationError
from pyro_blora.inference.trainer import BayesianLoRATrainer
from pyro_blora.likelihoods import LabelTokens, MultipleChoice, SequenceClassification

ROWS = tiny.examples(10)
BATCH = tiny.sequences()


@pytest.fixture(scope="module")
def blora():
    return tiny.adapted(num_data=10)


def fitted(blora, rows=ROWS, **options):
    options = {"collate": tiny.collate, "num_steps": 1, "progress": False, **options}
    return fit(blora, rows, **options)


def of_trainer(folder, blora):
    how = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    args = TrainingArguments(folder, max_steps=1, **how)
    return BayesianLoRATrainer(blora, args, train_dataset=ROWS, data_collator=tiny.collate)


@pytest.mark.parametrize("way", ["loader", "Trainer"])
def test_another_size_than_that_of_the_data_is_told(way, tmp_path):
    blora = tiny.adapted(num_data=5000)
    train = {
        "loader": lambda: fitted(blora, DataLoader(ROWS, 5, collate_fn=tiny.collate)),
        "Trainer": lambda: of_trainer(tmp_path, blora).train(),
    }
    with pytest.warns(UserWarning, match="=5000, but train has 10 .* so the KL weighs 0.002 times"):
        train[way]()


@pytest.mark.filterwarnings("error:The likelihood has num_data")
def test_the_right_size_and_a_loader_of_whole_batches_are_no_reason_to_warn(blora):
    for rows in (ROWS, DataLoader([tiny.collate(ROWS)], batch_size=None)):
        fitted(blora, rows)


WHOLE = "must be a whole number"
NUMBERS = [
    (lambda b: fitted(b, learning_rates={"mean": -0.05}), "rate of 'mean' must be .*-0.05"),
    (lambda b: fitted(b, num_steps=None, num_epochs=torch.nan), "num_epochs must .* got nan"),
    (lambda b: fitted(b, batch_size=2.5), f"batch_size {WHOLE}"),
    (lambda b: tiny.adapted(num_data=12.5), f"num_data {WHOLE}"),
    (lambda b: b.predict(BATCH, True), f"num_samples {WHOLE}.* got True"),
    (lambda b: b.export_peft("x", 2.5), f"num_samples {WHOLE}"),
    (lambda b: b.distill(ROWS, tiny.collate, num_samples=2.5), f"num_samples {WHOLE}"),
    (lambda b: models.Subspace(rank="8"), "rank must be positive and finite, got '8'"),
    (lambda b: models.KroneckerInducing(rank=(2, 2.5)), f"rank {WHOLE}"),
    (lambda b: BayesianLoRA(tiny.llama(), rank=2.5), f"rank {WHOLE}, 1 or more, got 2.5"),
    (lambda b: guides.LowRank(rank=2.5), f"rank {WHOLE}"),
]


@pytest.mark.parametrize(("ask", "told"), NUMBERS)
def test_a_number_out_of_range(ask, told, blora):
    before = tiny.trained(blora)
    with pytest.raises(ConfigurationError, match=told) as error:
        ask(blora)
    assert "\n" not in str(error.value)
    assert tiny.equal(tiny.trained(blora), before)
    assert not Path("x").exists()


def test_an_adapter_that_is_off_is_not_trained(tmp_path):
    blora = tiny.adapted(num_data=10)
    before = tiny.trained(blora)
    for train in (lambda: fitted(blora), of_trainer(tmp_path, blora).train):
        with blora.disable_adapter(), pytest.raises(ConfigurationError, match="adapter is off"):
            train()
    assert tiny.equal(tiny.trained(blora), before)


def test_a_weight_that_is_not_finite_is_named():
    net = tiny.llama()
    net.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ConfigurationError, match=r"weight of model\.layers\.1.*q_proj must be fin"):
        BayesianLoRA(net)
    assert not any(module._forward_hooks for module in net.modules())


def test_answers_beyond_the_vocabulary():
    with pytest.raises(ConfigurationError, match=r"token_ids must be below 32.*got \[5, 32\]"):
        tiny.adapted(likelihood=LabelTokens(token_ids=(5, 32)))


CHOICES = tiny.choices()
GONE, EMPTY = (CHOICES["option_mask"].clone() for _ in range(2))
GONE[1, 2] = EMPTY[1] = False
ABSENT = {**CHOICES, "option_mask": GONE, "labels": torch.tensor([0, 2, 1])}
PADDED = BATCH["attention_mask"].clone()
PADDED[2] = 0
PADDED = {**BATCH, "attention_mask": PADDED}


@pytest.mark.parametrize(
    ("likelihood", "batch", "told"),
    [
        (MultipleChoice, ABSENT, "labels must name an option that the item has"),
        (MultipleChoice, {**CHOICES, "option_mask": EMPTY}, "an option with a token to score"),
        (LabelTokens, PADDED, "attention_mask must have"),
        (SequenceClassification, PADDED, "attention_mask must have"),
    ],
)
def test_a_batch_that_means_nothing(likelihood, batch, told):
    words = {"token_ids": tiny.ANSWERS} if likelihood is LabelTokens else {}
    net = tiny.bert() if likelihood is SequenceClassification else tiny.llama()
    likelihood = likelihood(num_data=4, **words)
    blora = tiny.adapted(net, target_modules=None, likelihood=likelihood)
    asks = (blora.log_predictive, blora.model, *(() if batch is ABSENT else (blora.predict,)))
    for ask in asks:  # a prediction reads no labels
        with pytest.raises(BatchError, match=told):
            ask(batch)


def test_an_edited_configuration_is_one_line(tmp_path):
    blora = tiny.adapted(num_data=10)
    blora.net.config.name_or_path = "me/base"
    blora.save_pretrained(tmp_path)
    base = blora.unwrap()
    header, tensors = read_tensors(tmp_path / checkpoints.WEIGHTS)
    (name,) = header.keys() - {"format"}
    right = json.loads(header[name])
    unknown = {**right["prior"], "options": {**right["prior"]["options"], "lengths": 3}}
    newer = {**right["method"], "schedule": "new"}
    wrong = [[right], {**right, "prior": unknown}, {**right, "method": newer}]
    needed = ["base", "base_model", "layers", "modules_to_save"]
    needed += ["method", "prior", "guide", "likelihood"]
    wrong += [{k: v for k, v in right.items() if k != key} for key in needed]
    for text in ("{", *map(json.dumps, wrong)):
        write_tensors(tmp_path / checkpoints.WEIGHTS, tensors, {name: text})
        with pytest.raises(CheckpointError, match=r"safetensors cannot be used") as error:
            BayesianLoRA.from_pretrained(base, tmp_path)
        assert "\n" not in str(error.value)
        assert not any(module._forward_hooks for module in base.modules())


def test_an_edited_lora_is_one_line(tmp_path):
    pytest.importorskip("peft")
    blora = tiny.adapted(num_data=10)
    blora.export_peft(tmp_path)
    base = blora.unwrap()
    config, weights = (tmp_path / n for n in (checkpoints.PEFT_CONFIG, checkpoints.PEFT_WEIGHTS))
    kept = {n: t for n, t in read_tensors(weights)[1].items() if "lora_B" not in n}
    right = config.read_text()
    for text in ("{", "[1]", right):
        config.write_text(text)
        if text is right:
            save_file(kept, weights)
        with pytest.raises(CheckpointError, match="cannot be used"):
            BayesianLoRA.from_peft(base, tmp_path)


class Weighed(LabelTokens):
    """A likelihood with a buffer of the name of its argument."""

    def __init__(self, *, token_ids, weights, kind: "Literal['a', 'b']" = "a", num_data=None):
        super().__init__(token_ids=token_ids, num_data=num_data)
        self.register_buffer("weights", torch.as_tensor(weights))


def test_an_argument_may_be_a_buffer_and_a_choice_a_string():
    made = Weighed(token_ids=(5, 6), weights=[1.0, 2.0])
    assert torch.equal(made.state_dict()["weights"], torch.tensor([1.0, 2.0]))
    assert made.weights is made.state_dict(keep_vars=True)["weights"]
    with pytest.raises(ConfigurationError, match=r"kind must be one of \('a', 'b'\), got 'c'"):
        Weighed(token_ids=(5, 6), weights=[1.0], kind="c")
