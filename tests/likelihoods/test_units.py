"""The unit of labels, and what a likelihood has learned, in files and in merged networks."""

import json
import re

import peft
import pytest
import tiny
import torch
from kinds import FEW, NETS, ROWS, TOKENIZER, Rates, adapter, outputs
from pyro.distributions import Poisson
from scipy.stats import poisson
from torch.utils.data import DataLoader
from transformers import LlamaForSequenceClassification

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import CheckpointError
from pyro_blora.likelihoods import NumberCollator, Ordinal, Regression
from pyro_blora.network.pretrained import load_network
from pyro_blora.network.targets import LABELS
from pyro_blora.prediction import Prediction


def llama():
    """A decoder with a head of one output, which has no bias to hold the mean of the labels."""
    sizes = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 64}
    return LlamaForSequenceClassification(tiny.llama(num_labels=1, **sizes).config).eval()


HEADS = {"bias": NETS["numbers"], "none": llama}


@pytest.fixture(params=HEADS)
def trained(request):
    blora = adapter("numbers", net=HEADS[request.param]())
    fit(blora, ROWS["numbers"], **FEW)
    with torch.no_grad():
        blora.model.mean_temperature.fill_(1.3)
    return blora


def predicted(blora, kind="numbers"):
    return blora.predict_dataset(ROWS[kind], num_samples=0, precision="float32")[0]


@torch.no_grad()
def output(net):
    return outputs(net, ROWS["numbers"])[:, 0]


def test_the_numbers_of_an_export_give_the_normal_distribution(trained, tmp_path):
    expected = predicted(trained)
    trained.export_peft(tmp_path)
    lora = peft.PeftModel.from_pretrained(trained.unwrap(), str(tmp_path)).eval()
    numbers = json.loads((tmp_path / "one_pass.json").read_text())
    mean = numbers["loc"] + numbers["scale"] * output(lora)
    torch.testing.assert_close(mean, expected.mean, atol=1e-4, rtol=1e-5)
    stddev = torch.tensor(numbers["scale"] * numbers["noise"] * numbers["temperature"])
    torch.testing.assert_close(stddev.expand(len(mean)), expected.noise_stddev)
    for given in (None, Regression(num_data=48)):
        again = BayesianLoRA.from_peft(
            lora.unload(), tmp_path, likelihood=given, tokenizer=TOKENIZER
        )
        torch.testing.assert_close(predicted(again).mean, expected.mean, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(predicted(again).noise_stddev, expected.noise_stddev)
        again.unwrap()


def test_a_merged_network_predicts_in_the_unit_or_says_how(trained, recwarn):
    expected = predicted(trained).mean
    biased = trained.net.get_submodule(trained.model.trained_heads.names[0]).bias is not None
    found = output(trained.merge_and_unload())
    if not biased:
        (warning,) = [w for w in recwarn if "no trained head with a bias" in str(w.message)]
        scale, shift = re.search(r"by (\S+) and add (\S+)\.$", str(warning.message)).groups()
        found = float(scale) * found + float(shift)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


def test_a_state_has_the_unit(trained):
    expected, net = predicted(trained).mean, trained.unwrap()
    again = adapter("numbers", net=net)
    again.load_state_dict(trained.state_dict())
    assert torch.equal(predicted(again).mean, expected)


def test_a_likelihood_that_is_passed_takes_the_saved_unit(trained, tmp_path):
    expected = predicted(trained).mean
    trained.save_pretrained(tmp_path)
    options = {"likelihood": Regression(num_data=9), "tokenizer": TOKENIZER}
    again = BayesianLoRA.from_pretrained(net := trained.unwrap(), tmp_path, **options)
    assert torch.equal(predicted(again).mean, expected)
    assert (again.likelihood.num_data, options["likelihood"].loc) == (9, None)
    options["likelihood"] = Regression(loc=0.0)
    with pytest.raises(CheckpointError, match=r"saved with the loc 11\S+; leave loc= out"):
        BayesianLoRA.from_pretrained(net, tmp_path, **options)


def test_cuts_come_back_from_an_export(tmp_path):
    blora = adapter("order")
    fit(blora, ROWS["order"], **FEW)
    tiny.shaken(blora.likelihood, 0.5)
    blora.model.mean_temperature.fill_(1.3)
    expected = predicted(blora, "order").probs
    blora.export_peft(tmp_path)
    net, options = blora.unwrap(), {"tokenizer": TOKENIZER}
    another = BayesianLoRA.from_peft(net, tmp_path, likelihood=Regression())
    assert float(another.model.mean_temperature) == 1  # to which the saved one means nothing
    net = another.unwrap()
    with pytest.raises(CheckpointError, match=r"has cuts of \(3,\), but Ordinal"):
        BayesianLoRA.from_peft(net, tmp_path, likelihood=Ordinal(num_classes=5))
    for given in (Ordinal(num_classes=4), None):
        again = BayesianLoRA.from_peft(net, tmp_path, likelihood=given, **options)
        found = predicted(again, "order").probs
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        net = again.unwrap()


def test_a_head_that_was_trained_before_keeps_its_unit_when_it_was_saved(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    lora = peft.get_peft_model(net := NETS["numbers"](), config)
    lora.save_pretrained(tmp_path / "lora")
    blora = BayesianLoRA.from_peft(lora.unload(), tmp_path / "lora", tokenizer=TOKENIZER)
    blora.save_pretrained(tmp_path / "saved")
    net = blora.unwrap()
    again = BayesianLoRA.from_pretrained(net, tmp_path / "saved", tokenizer=TOKENIZER)
    fit(again, ROWS["numbers"], held_out=0.0, **FEW)
    assert (again.likelihood.loc, again.likelihood.scale) == (0.0, 1.0)
    again.unwrap()
    another = adapter("numbers", likelihood=blora.likelihood)  # a template for a new head
    fit(another, ROWS["numbers"], **FEW)
    assert another.likelihood.loc > 100


@pytest.mark.parametrize("loader", [False, True])
def test_the_unit_is_that_of_the_labels_which_a_collator_makes(loader):
    def halved(rows):
        batch = NumberCollator(TOKENIZER)(rows)
        return {**batch, "labels": batch["labels"] / 2}

    blora, rows = adapter("numbers"), ROWS["numbers"]
    data = DataLoader(rows, 4, collate_fn=halved) if loader else rows
    fit(blora, data, collate=None if loader else halved, held_out=0.0, **FEW)
    labels = torch.tensor([row["label"] for row in rows]) / 2
    unit = torch.tensor([blora.likelihood.loc, blora.likelihood.scale])
    torch.testing.assert_close(unit, torch.stack([labels.mean(), labels.std(correction=0)]))


def test_a_head_in_the_unit_of_the_labels_is_not_rounded(tmp_path):
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    lora = peft.get_peft_model(NETS["numbers"](), config)
    lora.classifier.modules_to_save["default"].bias.data.fill_(12345.0)
    lora.save_pretrained(tmp_path)
    blora = BayesianLoRA.from_peft(lora.unload(), tmp_path, tokenizer=TOKENIZER)
    every = [
        blora.predict_dataset(ROWS["numbers"], num_samples=0, precision=name)[0].mean
        for name in ("float32", "bfloat16")
    ]
    torch.testing.assert_close(*every)


def test_a_training_leaves_earlier_predictions_as_they_were():
    blora = adapter("numbers")
    before = predicted(blora)
    mean, stddev = before.mean.clone(), before.stddev.clone()
    fit(blora, ROWS["numbers"], **FEW)
    assert blora.likelihood.loc > 100
    assert torch.equal(before.mean, mean)
    assert torch.equal(before.stddev, stddev)


def test_a_run_that_is_resumed_keeps_its_unit(tmp_path):
    options = {"data_collator": None, "save_steps": 1, "save_strategy": "steps", "held_out": 0.0}
    blora = adapter("numbers")
    tiny.trainer(tmp_path, blora, ROWS["numbers"], max_steps=1, **options).train()
    unit = blora.likelihood.loc, blora.likelihood.scale
    blora = adapter("numbers", net=blora.unwrap())
    more = [*ROWS["numbers"], {"text": "it was great", "label": 900.0}]
    trainer = tiny.trainer(tmp_path, blora, more, max_steps=2, **options)
    assert blora.likelihood.loc != unit[0]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (blora.likelihood.loc, blora.likelihood.scale) == unit
    wider = adapter("numbers", net=blora.unwrap(), rank=3)  # whose tensors do not fit
    trainer = tiny.trainer(tmp_path, wider, more, max_steps=2, **options)
    own = wider.likelihood.loc
    with pytest.raises(CheckpointError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert wider.likelihood.loc == own != unit[0]


class Counted(Poisson):
    """With the cdf that torch's lacks."""

    def cdf(self, value):
        below = torch.special.gammaincc(value.floor().clamp_min(0) + 1, self.rate)
        return torch.where(value < 0, torch.zeros(()), below)


class Counts(Rates):
    """At a temperature that does not divide the logarithm of their rate."""

    task_type = "SEQ_CLS"

    def distribution(self, logits, labels):
        return Counted(logits.exp())

    def tempered(self, logits, temperature):
        return logits + 0.1 * temperature.log()


def test_an_export_keeps_a_head_that_its_likelihood_tempers_otherwise(tmp_path):
    blora = adapter("numbers", likelihood=Counts())
    fit(blora, [{**row, "label": len(row["text"]) % 5} for row in ROWS["numbers"]], **FEW)
    blora.model.mean_temperature.fill_(3.0)
    expected = predicted(blora).mean
    blora.export_peft(tmp_path)
    options = {"likelihood": Counts(), "tokenizer": TOKENIZER}
    again = BayesianLoRA.from_peft(blora.unwrap(), tmp_path, **options)
    torch.testing.assert_close(predicted(again).mean, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.01, 0.7, 3.0, 40.0])
def test_quantiles_of_counts_are_counts(rate):
    prediction = Prediction(torch.full((1, 2), rate).log(), lambda log: Counted(log.exp()))
    for level in (0.01, 0.05, 0.5, 0.95):
        assert prediction.quantile(level).tolist() == [poisson.ppf(level, rate)] * 2


def test_several_labels_come_back_from_an_export_that_names_its_base(tmp_path):
    NETS["labels"]().save_pretrained(tmp_path / "base")
    blora = adapter("labels", net=load_network(str(tmp_path / "base"), num_labels=3, head=LABELS))
    fit(blora, ROWS["labels"], **FEW)
    expected = predicted(blora, "labels").probs
    blora.export_peft(tmp_path / "lora")
    again = BayesianLoRA.from_peft(tmp_path / "lora", tokenizer=TOKENIZER)
    torch.testing.assert_close(predicted(again, "labels").probs, expected, atol=1e-5, rtol=1e-4)
