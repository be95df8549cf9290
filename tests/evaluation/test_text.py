"""Measures of text, against transformers' own loss and the average of single draws."""

import pytest
import tiny
import torch
from torch.utils.data import default_collate as collate

from pyro_blora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.evaluation.metrics import evaluate_text
from pyro_blora.guides import MatrixNormal

BATCH = tiny.texts(7, 9)
ROWS = tiny.rows_of(BATCH)
QUIET = {"batch_size": 3, "progress": False}


def test_the_mean_is_transformers_loss_and_draws_average_probabilities():
    net = tiny.llama()
    blora = BayesianLoRA(net, target_modules=["q_proj"], guide=MatrixNormal(init_scale=1.0))
    logp, count = blora.log_predictive_dataset(ROWS, collate, 0, **QUIET)
    assert count.equal((BATCH["labels"] >= 0).sum(-1))
    for row, found, n in zip(ROWS, logp, count, strict=True):
        with torch.no_grad():  # the update's mean is zero
            loss = net(**collate([row])).loss
        assert float(found) == pytest.approx(-float(loss * n), rel=1e-4)
    metrics = evaluate_text(logp, count)
    assert metrics.nll_per_token == pytest.approx(-float(logp.sum() / count.sum()))
    assert metrics.perplexity == pytest.approx(float(torch.tensor(metrics.nll_per_token).exp()))
    assert metrics.nll_per_text == pytest.approx(-float(logp.mean()))
    torch.manual_seed(1)
    drawn, _ = blora.log_predictive_dataset(ROWS[:3], collate, 5, **QUIET)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, blora.log_predictive(collate(ROWS[:3]), 5))
    assert not torch.allclose(drawn, logp[:3], atol=1e-3)
    with pytest.raises(ConfigurationError):  # text has no classes
        blora.predict_dataset(ROWS, collate, **QUIET)
    with pytest.raises(BatchError):  # a text without a token
        evaluate_text(logp, 0 * count)
