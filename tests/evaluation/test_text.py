"""Measures of text, against transformers' own loss and the average of single draws."""

import math

import pytest
import tiny
import torch

from pyro_blora import BayesianLoRA
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.metrics import evaluate_text
from pyro_blora.guides import MatrixNormal


def rows(count=7):
    ids = torch.randint(8, 32, (count, 9))
    made = []
    for k, row in enumerate(ids.tolist()):
        row = row[: 9 - k % 4]
        labels = [-100] * (1 + k % 3) + row[1 + k % 3 :]
        made.append({"input_ids": row, "attention_mask": [1] * len(row), "labels": labels})
    return made


def collate(part):
    return {
        key: torch.tensor([row[key] + [pad] * (9 - len(row[key])) for row in part])
        for key, pad in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }


def test_the_mean_is_transformers_loss_and_draws_are_averaged_as_probabilities():
    net, data = tiny.llama(), rows()
    blora = BayesianLoRA(net, target_modules=["q_proj"], guide=MatrixNormal(init_scale=1.0))
    how = {"batch_size": 3, "progress": False}
    logp, count = blora.log_predictive_dataset(data, collate, 0, **how)
    assert count.tolist() == [sum(k >= 0 for k in row["labels"]) for row in data]
    for row, found, n in zip(data, logp, count, strict=True):
        with torch.no_grad():  # the update's mean is zero
            loss = net(**{k: torch.tensor([v]) for k, v in row.items()}).loss
        assert math.isclose(float(found), -float(loss * n), rel_tol=1e-4)
    metrics = evaluate_text(logp, count)
    assert math.isclose(metrics.nll_per_token, -float(logp.sum() / count.sum()), rel_tol=1e-6)
    assert math.isclose(metrics.perplexity, math.exp(metrics.nll_per_token), rel_tol=1e-6)
    assert math.isclose(metrics.nll_per_text, -float(logp.mean()), rel_tol=1e-6)
    torch.manual_seed(1)
    drawn, _ = blora.log_predictive_dataset(data[:3], collate, 5, batch_size=3, progress=False)
    torch.manual_seed(1)
    expected = blora.log_predictive(collate(data[:3]), 5)
    torch.testing.assert_close(drawn, expected)
    assert not torch.allclose(drawn, logp[:3], atol=1e-3)


def test_a_classifier_has_one_token_an_item_and_text_has_no_classes():
    blora = tiny.adapted()
    logp, count = blora.log_predictive_dataset(tiny.examples(5), tiny.collate, 0, progress=False)
    prediction, labels = blora.predict_dataset(tiny.examples(5), tiny.collate, 0, progress=False)
    torch.testing.assert_close(logp, prediction.probs.gather(1, labels[:, None])[:, 0].log())
    assert count.tolist() == [1] * 5
    text = BayesianLoRA(tiny.llama(), target_modules=["q_proj"])
    with pytest.raises(ConfigurationError, match=r"log_predictive_dataset"):
        text.predict_dataset(rows(), collate, progress=False)
