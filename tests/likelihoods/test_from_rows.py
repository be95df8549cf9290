"""Each likelihood of a head from rows on disk to PEFT, and in a comparison."""

import json
import math
from contextlib import nullcontext

import peft
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset
from kinds import FEW, GOOD, NAMES, NETS, PASSED, ROWS, TAGS, TOKENIZER, adapter, outputs
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from pyro_blora import BayesianLoRA, compare, fit
from pyro_blora.data import load_task
from pyro_blora.errors import DataError
from pyro_blora.likelihoods import (
    ClassificationCollator,
    MultiLabel,
    MultipleChoice,
    MultipleChoiceCollator,
    NumberCollator,
    PreferenceCollator,
    TagCollator,
    TokenClassification,
)


def of_labels(net, rows, numbers):
    yes = outputs(net, rows).sigmoid()
    return torch.stack([1 - yes, yes], -1)


def of_order(net, rows, numbers):
    below = (torch.tensor(numbers["cuts"]) - outputs(net, rows)).sigmoid()
    probs = pad(below, (1, 0)).diff(dim=-1, append=torch.ones(len(rows), 1))
    return (probs.log() / numbers["temperature"]).softmax(-1)


def of_pairs(net, rows, numbers):
    batch = PreferenceCollator(TOKENIZER)(rows)
    ids, mask = (batch[key].flatten(0, 1) for key in ("input_ids", "attention_mask"))
    return net(input_ids=ids, attention_mask=mask).logits.view(-1, 2).softmax(-1)


def of_tags(net, rows, numbers):
    return TokenClassification().logits(net, TagCollator(TOKENIZER, TAGS)(rows)).softmax(-1)


def of_numbers(net, rows, numbers):
    return outputs(net, rows)[:, 0]


EXPORTS = [of_labels, of_order, of_pairs, of_tags, of_numbers]


@pytest.mark.parametrize("exported", EXPORTS, ids=ROWS)
def test_it_learns_from_a_file_is_saved_and_exported(exported, tmp_path):
    kind = exported.__name__.removeprefix("of_")
    (path := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[kind])))
    blora, rows = adapter(kind), ROWS[kind]
    before = blora.evaluate(rows, num_samples=4).nll
    fit(blora, path, num_steps=40, precision="float32", progress=False)
    assert blora.evaluate(rows, num_samples=4).nll < before
    if kind != "numbers":
        assert blora.calibrate(rows) != blora.distill(rows)
    blora.save_pretrained(tmp_path / "saved")
    blora.export_peft(tmp_path / "peft")
    mean = blora.predict_dataset(rows, num_samples=0, precision="float32")[0].mean
    net = blora.unwrap()
    again = BayesianLoRA.from_pretrained(net, tmp_path / "saved", tokenizer=TOKENIZER)
    found = again.predict_dataset(rows, num_samples=0, precision="float32")[0].mean
    assert torch.equal(found, mean)
    assert again.model.temperature == blora.model.temperature
    numbers = json.loads((tmp_path / "peft" / "one_pass.json").read_text())
    lora = peft.PeftModel.from_pretrained(again.unwrap(), str(tmp_path / "peft")).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(lora, rows, numbers), mean, atol=1e-5, rtol=1e-5)


BAD = {
    "labels": [{"text": "a", "label": bad} for bad in ("warm", None, ["hot"], [1, 0], ["wet", 1])],
    "order": [{"text": "a", "label": bad} for bad in (4, -1, 1.5, "2", True, None, math.nan)],
    "pairs": [{"chosen": GOOD, **other} for other in ({}, {"rejected": GOOD}, {"rejected": " "})],
    "tags": [{"tokens": bad, "tags": ["O", "O"]} for bad in ([], ["a", 1], "ab")],
    "numbers": [{"text": "a", "label": bad} for bad in ("good", math.nan, None)],
}
BAD["labels"] += [{"text": "a", "label": bad} for bad in ([0, 2, 0], [0.5, 0, 0])]
BAD["pairs"].append({"prompt": 3, "chosen": GOOD, "rejected": "bad"})
for tags in (["O"], ["O"] * 3, ["O", None], ["O", 3], ["O", "X"]):
    BAD["tags"].append({"tokens": ["a", "film"], "tags": tags})
CLASSES = {"labels": MultiLabel(classes=NAMES), "tags": TokenClassification(classes=TAGS)}


@pytest.mark.parametrize(("kind", "bad"), [(kind, row) for kind in BAD for row in BAD[kind]])
def test_a_bad_row_is_named_in_one_line_before_a_step(kind, bad):
    options = {"likelihood": CLASSES[kind]} if kind in CLASSES else {}
    blora, rows = adapter(kind, **options), ROWS[kind]
    before = tiny.trained(blora)
    with pytest.raises(DataError, match=rf"in row {len(rows)}|must all be texts or n") as raised:
        fit(blora, [*rows, bad], **FEW)
    assert "\n" not in str(raised.value)
    assert tiny.equal(tiny.trained(blora), before)
    assert getattr(blora.likelihood, "loc", None) is None


@pytest.mark.parametrize("kind", ROWS)
def test_metrics_of_a_trainer_are_computed_of_what_is_predicted(kind, tmp_path):
    """Words in batches of other lengths, too, each in its place."""
    blora, rows, seen = adapter(kind), ROWS[kind], []

    def compute_metrics(found):
        seen.append((torch.tensor(found.predictions), torch.tensor(found.label_ids)))
        return {}

    options = {"max_steps": 4, "data_collator": None, "eval_samples": 0, "eval_dataset": rows}
    options |= {"per_device_eval_batch_size": 2, "compute_metrics": compute_metrics}
    trainer = tiny.trainer(tmp_path, blora, rows, **options)
    trainer.train()
    trainer.evaluate()
    prediction, labels = blora.predict_dataset(rows, None, 0, progress=False)
    expected = prediction.mean
    if kind == "labels":
        expected = expected.logit()[..., -1]
    elif kind != "numbers":
        expected = expected.log()
    found, truth = seen[-1]
    assert torch.equal(truth, labels)
    real = labels >= 0
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ROWS)
def test_methods_are_compared(kind, tmp_path):
    likelihood = PASSED["order"]() if kind == "order" else None  # others follow from the rows
    pair, methods = (NETS[kind](), TOKENIZER), ["lora", "mean:bayesian-lora"]
    options = {"likelihood": likelihood, "seeds": [0], "out": tmp_path, **FEW}
    table, again = (compare(pair, ROWS[kind], methods, **options) for _ in range(2))
    assert str(again) == str(table)  # read from the folder
    a, b = (row.metrics.nll for row in table.rows)
    assert table.differences()[methods[1]]["nll"][0] == pytest.approx(b - a, abs=1e-5)
    expected = {"RMSE", "CRPS", "90 % interval covers %"} if kind == "numbers" else {"ECE %"}
    assert expected <= set(table.columns())


@pytest.mark.parametrize("kind", ["numbers", "order"])
def test_numbers_whose_names_are_other_numbers_are_refused(kind):
    """``class_encode_column`` sorts numbers as texts, and closes gaps."""
    stars = [{"text": f"film {k}", "label": 1 + k % 3} for k in range(12)]
    plain = Dataset.from_list([{**row, "label": row["label"] - 1} for row in stars])
    collate = NumberCollator(TOKENIZER) if kind == "numbers" else ClassificationCollator(TOKENIZER)
    encoded = Dataset.from_list(stars).class_encode_column("label")
    for data in (encoded, DataLoader(encoded, 4, collate_fn=collate)):
        with pytest.raises(DataError, match="got a ClassLabel that has 0 for '1'"):
            fit(blora := adapter(kind), data, **FEW)
    fit(blora, plain, **FEW)
    with pytest.raises(DataError, match="got a ClassLabel that has 0 for '1'"):
        blora.evaluate(encoded, num_samples=0)
    blora.evaluate(plain.class_encode_column("label"), num_samples=0)  # 0 to 2, which are as named


def test_classes_in_an_order_keep_it_in_loaders_that_name_them():
    grades = ("bad", "ok", "good")
    rows = [{"text": f"film {k}", "label": grades[k % 3]} for k in range(12)]
    loader, turned = (
        DataLoader(rows, 4, collate_fn=ClassificationCollator(TOKENIZER, names))
        for names in (grades, grades[::-1])
    )
    fit(blora := adapter("order"), loader, **FEW)
    blora.evaluate(loader, num_samples=0)
    with pytest.raises(DataError, match="must number the classes as"):
        blora.evaluate(turned, num_samples=0)


@pytest.mark.parametrize(
    ("names", "is_right"), [(("no", "yes"), True), (("yes", "no"), False), ("AB", True)]
)
def test_names_of_the_numbers_of_choices_are_these_in_their_order(names, is_right):
    rows = [{"question": f"{k} ?", "choices": ["no", "yes"], "label": k % 2} for k in range(9)]
    named = Dataset.from_list(rows).cast_column("label", ClassLabel(names=[*names]))
    collate, mine = MultipleChoiceCollator(TOKENIZER), MultipleChoice()
    for call in (
        lambda: load_task({"train": named, "test": named.select([])}),
        lambda: mine.read(named, collate, None, labeled=True, training=True),
        lambda: mine.check_loader(named, collate, None, training=True),
    ):
        with nullcontext() if is_right else pytest.raises(DataError, match="must number the cl"):
            call()


def test_a_column_that_a_likelihood_does_not_read_may_have_any_names():
    data = Dataset.from_list([{**row, "label": k % 2} for k, row in enumerate(ROWS["pairs"])])
    fit(adapter("pairs"), data.cast_column("label", ClassLabel(names=["1", "2"])), **FEW)
