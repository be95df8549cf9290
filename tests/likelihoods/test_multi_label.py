"""Several labels at once, beside transformers and dense algebra, from rows to PEFT."""

import pytest
import tiny
import torch
from kinds import NAMES, NETS, ROWS, SETS, TOKENIZER, adapter
from sklearn.metrics import f1_score, roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from pyro_blora import compare, fit
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.likelihoods import MultiLabel, MultiLabelCollator

ROWS = ROWS["labels"]
HOT = [{**row, "label": [int(name in row["label"]) for name in NAMES]} for row in ROWS]
QUIET = {"progress": False}
STEP = {"num_steps": 1, **QUIET}


def test_losses_and_temperatures_are_those_of_transformers_and_dense_algebra():
    batch, likelihood = tiny.several(16), MultiLabel(num_data=16)
    blora = tiny.adapted(tiny.labeler(), target_modules=None, likelihood=likelihood)
    tiny.shaken(blora, 0.3)
    with blora.posterior(0) as net:
        dense = 3 * net(**batch).loss  # transformers' is a mean over labels, too
        logits, labels = likelihood.logits(net, batch), likelihood.labels(batch)
        ours = -likelihood.distribution(logits, labels).log_prob(labels).mean()
        tensors = [*blora.model.trained_heads.tensors().values()]
        torch.testing.assert_close(*(torch.autograd.grad(x, tensors) for x in (ours, dense)))
    torch.testing.assert_close(-blora.log_predictive(batch, 0).mean(), dense.detach())
    grid, loader = torch.logspace(-2, 2, 2001).double(), DataLoader([batch], batch_size=None)

    def best(target, prior):
        z = logits[..., 1].detach().double() / grid.view(-1, 1, 1)
        loss = bce(z, target.double().expand_as(z), reduction="none").sum((1, 2))
        return pytest.approx(float(grid[(loss + prior * grid.log() ** 2 / 2).argmin()]), rel=0.05)

    blora.calibrate(loader, num_samples=0, **QUIET)
    assert float(blora.model.mean_temperature) == best(batch["labels"], 1)
    blora.model.temperature.fill_(1)
    probs = blora.predict(batch, 1000).probs[..., 1]
    assert blora.distill(loader, num_samples=300, **QUIET) == best(probs, 0)


def test_scores_are_those_of_scikit_learn():
    blora, classes = adapter("labels"), tuple(sorted(NAMES))
    fit(blora, ROWS, num_steps=4, **QUIET)
    prediction, labels = blora.predict_dataset(ROWS, **QUIET)
    assert [[name in s for name in classes] for s in SETS] == labels.bool().tolist()
    probs, scores = prediction.probs[..., 1], blora.likelihood.metrics(prediction, labels)
    dense = {"nll": 3 * float(bce(probs.logit(), labels.float())), "ece": scores.ece, "n": 48}
    dense["f1"] = f1_score(labels, probs > 0.5, average="macro", zero_division=0)
    dense["auroc"] = roc_auc_score(labels, probs)
    assert dict(scores) == pytest.approx(dense, abs=1e-6)
    with pytest.raises(ConfigurationError, match="must have one choice per example"):
        blora.predict(["warm"], linearized=True)
    assert tuple(blora.merge_and_unload().config.id2label.values()) == classes


def test_a_network_given_by_name_gets_a_head_of_the_labels(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    NETS["labels"]().bert.save_pretrained(tmp_path)
    for rows in (ROWS, HOT):
        table = compare(str(tmp_path), rows, ["lora"], num_steps=2, seeds=[0], **QUIET)
        assert table.plot().axes


@pytest.mark.parametrize("column", ["label", "labels"])
def test_token_ids_go_through_a_collator_of_transformers(column, tmp_path):
    rows = [{**TOKENIZER(row["text"]), column: row["label"]} for row in HOT]
    blora, collate = adapter("labels"), DataCollatorWithPadding(TOKENIZER)
    tiny.trainer(tmp_path, blora, rows, max_steps=1, data_collator=collate).train()
    assert blora.predict_dataset(rows, **QUIET)[1].tolist() == [row["label"] for row in HOT]


def test_names_are_sorted_as_python_sorts_them():
    names = {"warm": "food", "cold": "food quality", "wet": "R&B"}
    rows = [{**row, "label": [names[n] for n in row["label"]]} for row in ROWS]
    blora = adapter("labels")
    fit(blora, rows, **STEP)
    assert blora.likelihood.classes == tuple(sorted(names.values()))


def test_names_have_the_order_of_the_outputs():
    mine = MultiLabelCollator(TOKENIZER, ("wet", "warm", "cold"))
    of_net = adapter("labels", net=NETS["labels"](id2label=dict(enumerate(NAMES))))
    of_user = adapter(
        "labels", net=NETS["labels"](problem_type=None), likelihood=MultiLabel(classes=NAMES)
    )
    for blora, collate in (adapter("labels"), mine), (of_net, None), (of_user, None):
        fit(blora, ROWS, collate=collate, **STEP)
        expected = collate.classes if collate else NAMES
        batch = blora.reading(ROWS[1:4], collate, training=False)[1](ROWS[1:4])
        assert batch["labels"].tolist() == [[name in s for name in expected] for s in SETS[1:4]]
        assert blora.likelihood.classes == expected
    with pytest.raises(DataError, match="must number the classes as"):
        blora.predict_dataset(ROWS, mine)
    bools = [{**row, "label": [*map(bool, row["label"])]} for row in HOT]
    fit(blora := adapter("labels"), bools, **STEP)
    assert blora.likelihood.classes == ()


REFUSED = [
    ([{"text": "a", "labels": []}], "columns text and label", {}),
    (ROWS, "got 2", {"net": NETS["labels"](num_labels=2)}),
    (ROWS, "with classes", {"method": "laplace-lora"}),
]


@pytest.mark.parametrize(("rows", "match", "options"), REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(rows, match, options):
    with pytest.raises((ConfigurationError, DataError), match=match) as raised:
        fit(adapter("labels", **{"likelihood": MultiLabel(classes=NAMES), **options}), rows, **STEP)
    assert "\n" not in str(raised.value)
