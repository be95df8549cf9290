"""Regression beside dense algebra."""

import kinds
import pytest
import torch
from kinds import TOKENIZER
from torch.distributions import Exponential, Normal
from torch.utils.data import DataLoader

from pyro_blora import BayesianLoRA, compare, fit
from pyro_blora.errors import BatchError, ConfigurationError, DataError
from pyro_blora.inference import parameter_groups
from pyro_blora.likelihoods import NumberCollator, Regression
from pyro_blora.prediction import Prediction
from pyro_blora.scores import evaluate_numbers

ROWS = kinds.ROWS["numbers"]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    blora = kinds.adapter("numbers")
    fit(blora, ROWS, num_steps=60, precision="float32", progress=False)
    return blora


def test_rows_are_learned_in_their_unit(trained):
    likelihood = trained.likelihood
    labels = torch.tensor([row["label"] for row in ROWS], dtype=torch.float64)
    assert likelihood.loc == pytest.approx(float(labels.mean()))
    assert likelihood.scale == pytest.approx(float(labels.std(correction=0)))
    prediction, given = trained.predict_dataset(ROWS, num_samples=8, precision="float32")
    assert given.tolist() == labels.tolist()
    normal = Normal(prediction.samples[..., 0], prediction.samples[..., 1].exp())
    means = likelihood.loc + likelihood.scale * normal.loc
    torch.testing.assert_close(prediction.mean, means.mean(0))
    torch.testing.assert_close(prediction.adapter_stddev, means.std(0, correction=0))
    noise = likelihood.scale * likelihood.noise.detach() * trained.model.temperature
    torch.testing.assert_close(prediction.noise_stddev, noise.expand(len(ROWS)))
    scores = trained.evaluate(ROWS, num_samples=8, precision="float32")
    assert 0 < scores.rmse < float(labels.std())


def test_widths_open_at_the_rate_of_the_likelihood_unless_a_call_says_another():
    blora = kinds.adapter("numbers")
    for given, rate in (None, Regression.learning_rates["scale"]), ({"scale": 0.3}, 0.3):
        groups = parameter_groups(blora, NumberCollator(TOKENIZER)(ROWS[:4]), given)
        assert [group["lr"] for group in groups if group["name"] == "scale"] == [rate]


def test_the_log_density_is_in_the_unit_of_the_labels(trained):
    batch = NumberCollator(TOKENIZER)(ROWS[:4])
    with trained.posterior(0) as net, torch.no_grad():
        center = net(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, 0]
    likelihood, T = trained.likelihood, trained.model.mean_temperature
    normal = Normal(
        likelihood.loc + likelihood.scale * center, likelihood.scale * likelihood.noise * T
    )
    torch.testing.assert_close(trained.log_predictive(batch, 0), normal.log_prob(batch["labels"]))


def test_labels_of_another_shape_are_not_scored(trained):
    """They would be compared with the prediction of every example."""
    batch = NumberCollator(TOKENIZER)(ROWS[:4])
    batch["labels"] = batch["labels"][:, None]
    with pytest.raises(BatchError, match="one finite number per example"):
        trained.evaluate(DataLoader([batch], batch_size=None), num_samples=0)


def test_the_deviation_is_a_column_of_a_comparison_with_others():
    pair, others = (kinds.NETS["numbers"](), TOKENIZER), ["a cold night", "who are you"]
    table = compare(pair, ROWS, ["mean-field"], seeds=[0], outside=others, **kinds.FEW)
    assert 0 <= table.rows[0].auroc <= 1
    assert "out of scope, AUROC %" in table.columns()


def test_batches_whose_rows_cannot_be_read_need_a_unit():
    batches = DataLoader([NumberCollator(TOKENIZER)(ROWS)], batch_size=None)
    blora = kinds.adapter("numbers", likelihood=Regression(num_data=48))
    with pytest.raises(DataError, match=r"pass likelihood=Regression\(loc=, scale=\)"):
        fit(blora, batches, num_steps=1, held_out=0.0)


def test_quantiles_and_scores_of_an_average_of_normals():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    prediction = Prediction(mean, lambda m: Normal(m, 0.5))
    draws = Normal(mean, 0.5).sample((200_000,)).flatten(0, 1)
    for level in (0.05, 0.5, 0.95):
        exact = prediction.quantile(level)
        below = Normal(mean, 0.5).cdf(exact).mean(0)
        torch.testing.assert_close(below, torch.full_like(below, level))
    torch.testing.assert_close(prediction.stddev, draws.std(0), rtol=5e-3, atol=0)
    labels = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    scores = evaluate_numbers(prediction, labels)
    one, other = draws, draws[torch.randperm(len(draws), generator=generator)]
    far = (draws - labels).abs().mean() - (one - other).abs().mean() / 2
    assert scores.crps == pytest.approx(float(far), rel=5e-3)
    density = Normal(mean, 0.5).log_prob(labels).exp().mean(0).log()
    torch.testing.assert_close(prediction.log_prob(labels), density)
    assert scores.nll == pytest.approx(-float(density.mean()))


def test_a_trained_head_keeps_its_unit_and_the_noise_gets_that_of_the_labels():
    blora = kinds.adapter("numbers")
    blora.likelihood.keep_head(blora.net)
    rows = [{**row, "label": 1000 * row["label"]} for row in kinds.ROWS["numbers"]]
    spread = torch.tensor([row["label"] for row in rows]).std(correction=0)
    fit(blora, rows, num_steps=1, progress=False)
    assert (blora.likelihood.loc, blora.likelihood.scale) == (0, 1)
    assert blora.likelihood.noise.item() == pytest.approx(float(spread) / 2, rel=0.1)


def test_labels_that_are_all_alike_have_the_unit_1():
    blora = kinds.adapter("numbers")
    fit(blora, [{**row, "label": 0.1} for row in ROWS], num_steps=1, progress=False)
    assert blora.likelihood.scale == 1
    with pytest.raises(ConfigurationError, match="must have classes, got Regression"):
        blora.predict(kinds.ROWS["numbers"][:2], 3, linearized=True)


def test_an_interval_stays_within_the_support():
    waits = Prediction(torch.tensor([[[0.5]], [[2.0]]]), lambda rate: Exponential(rate.squeeze(-1)))
    low, high = waits.interval(0.9)
    for bound, level in ((low, 0.05), (high, 0.95)):
        below = 1 - (-torch.tensor([0.5, 2.0]) * bound).exp().mean()
        assert below.item() == pytest.approx(level, abs=1e-5)


def test_a_likelihood_without_classes_has_no_temperature_of_its_own():
    net = kinds.adapter("numbers").unwrap()
    blora = BayesianLoRA(net, likelihood=kinds.Rates(), tokenizer=TOKENIZER)
    rows = [{**row, "label": k % 5} for k, row in enumerate(kinds.ROWS["numbers"])]
    with pytest.raises(ConfigurationError, match="if it defines tempered"):
        blora.calibrate(rows)
    assert "coverage" not in blora.evaluate(rows, num_samples=2)
    with pytest.raises(DataError, match="a finite number, got 'soon' in row 0"):
        fit(blora, [{**rows[0], "label": "soon"}], num_steps=1)
