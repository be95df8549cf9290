"""Guides that contain the exact posterior reach it, and no ELBO exceeds the log evidence."""

import pyro
import pytest
import tiny
import torch
from linear_gaussian import Toy, divergence
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_blora.guides import Delta, MatrixNormal, MeanField
from pyro_blora.posterior.bayesian_lora_model import repeat_batch

# Settings whose posterior precision I + a (Q_r Q_r^T) (x) (sum h h^T) is a Kronecker product.
KRONECKER = {
    "orthogonal inputs": {"inputs": "orthogonal"},
    "orthogonal rows": {"rows": "orthogonal"},
    "one row": {"ranks": (1, 3)},
    "one column": {"ranks": (2, 1)},
}
DIAGONAL = {"inputs": "orthogonal", "rows": "orthogonal"}
GUIDES = [Delta, MeanField, MatrixNormal]


def estimates(toy, kind, particles, repeats):
    """ELBO estimates, each an average over particles that all see all of the data."""
    elbo, batch = tiny.elbo(particles, kind), repeat_batch(toy.batch, particles)
    with torch.no_grad():
        losses = [elbo.loss(toy.blora.model, toy.blora.guide, batch) for _ in range(repeats)]
    return -torch.tensor(losses)


@pytest.mark.parametrize("setting", KRONECKER)
def test_matrix_normal_reaches_a_kronecker_posterior(setting):
    toy = Toy(MatrixNormal(), **KRONECKER[setting])
    assert divergence(toy) > 1
    off_diagonal = toy.precision - toy.precision.diagonal().diag()
    assert off_diagonal.abs().max() > 0.5  # a correlated posterior
    toy.fit().assert_reached(1e-5, of_elbo=1e-8)


def test_mean_field_reaches_a_diagonal_posterior():
    Toy(MeanField(), **DIAGONAL).fit().assert_reached(1e-5, of_elbo=1e-8)


def test_mean_field_reports_conditional_variances():
    toy = Toy(MeanField()).fit()
    mean, covariance = toy.moments()
    torch.testing.assert_close(mean, toy.posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        covariance.diagonal(), 1 / toy.precision.diagonal(), rtol=0, atol=1e-5
    )
    assert (covariance.diagonal() < 0.9 * toy.posterior.variance).any()
    torch.testing.assert_close(toy.log_evidence - toy.elbo(), divergence(toy), rtol=0, atol=1e-8)


def test_matrix_normal_is_closer_than_mean_field_to_a_general_posterior():
    gaps = {}
    for family in (MeanField, MatrixNormal):
        torch.manual_seed(0)
        toy = Toy(family(), ranks=(3, 3)).fit()
        gap = gaps[family] = (toy.log_evidence - toy.elbo()).item()
        assert divergence(toy).item() == pytest.approx(gap, abs=1e-8)
    assert 1e-3 < gaps[MatrixNormal] < 0.8 * gaps[MeanField]


@pytest.mark.parametrize("family", [MeanField, MatrixNormal])
def test_what_the_variance_of_draws_at_the_training_inputs_is(family):
    for weight in (1.0, 0.3):
        torch.manual_seed(0)
        toy = Toy(family(), ranks=(3, 3)).fit(weight)
        S, size = toy.moments()[1].detach(), len(toy.precision)
        H = toy.precision - torch.eye(size)
        at_inputs, exact = (S @ H).trace(), (toy.posterior.covariance_matrix @ H).trace()
        torch.testing.assert_close(at_inputs, weight * (size - S.trace()), rtol=0, atol=1e-5)
        if family is MeanField:
            assert S.trace() < 0.95 * toy.posterior.variance.sum()
            assert at_inputs > 1.05 * exact if weight == 1 else at_inputs < 0.5 * exact


def test_delta_reaches_the_mode():
    toy = Toy(Delta()).fit()
    torch.testing.assert_close(toy.q.center().flatten(), toy.posterior.mean, rtol=0, atol=1e-6)
    updates = toy.blora.posterior.draws(0)[toy.blora.model.groups[0].name].layers()[0]
    fitted = toy.batch["x"] @ updates.weight().mT
    expected = (toy.design @ toy.posterior.mean).reshape(fitted.shape)
    torch.testing.assert_close(fitted, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", KRONECKER)
def test_at_the_posterior_every_draw_gives_the_log_evidence(setting):
    toy = Toy(MatrixNormal(), **KRONECKER[setting]).fit()
    values = estimates(toy, Trace_ELBO, 3, 5)
    torch.testing.assert_close(values, toy.log_evidence.expand(5), rtol=0, atol=1e-3)
    values = estimates(toy, TraceMeanField_ELBO, 200, 25)
    error = values.std() / len(values) ** 0.5
    assert (values.mean() - toy.log_evidence).abs() < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("family", GUIDES)
@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyro_s_elbo_is_the_exact_one_and_below_the_log_evidence(family, kind):
    """At the start, at the guide's best, and in between.

    A point mass is no density to compare with: for it the "ELBO" is the MAP objective, no bound.
    """
    toy = Toy(family())
    best = [p.detach().clone() for p in toy.fit().blora.guide.parameters()]
    for share in (0.0, 0.7, 1.0):
        with torch.no_grad():
            for parameter, b in zip(toy.blora.guide.parameters(), best, strict=True):
                parameter.copy_(share * b)
        exact = toy.elbo()
        assert exact < toy.log_evidence or family is Delta
        values = estimates(toy, kind, 200, 20)
        error = values.std() / len(values) ** 0.5
        assert (values.mean() - exact).abs() < 4 * error + 1e-9  # a Delta has no error


@pytest.mark.parametrize("family", [MeanField, MatrixNormal])
def test_gradients_of_pyro_s_elbo_are_the_exact_ones_in_expectation(family):
    toy = Toy(family())
    parameters = list(toy.blora.guide.parameters())
    exact = torch.autograd.grad(-toy.elbo(), parameters)
    elbo, batch = tiny.elbo(200), repeat_batch(toy.batch, 200)
    draws = []
    for _ in range(40):
        loss = elbo.differentiable_loss(toy.blora.model, toy.blora.guide, batch)
        draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    draws, exact = torch.stack(draws), torch.cat([g.flatten() for g in exact])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 4 * error + 1e-9).all()
    assert exact.abs().max() > 20 * error.max()


@pytest.mark.slow
def test_svi_itself_reaches_the_posterior():
    toy = Toy(MatrixNormal(init_scale=1.0), ranks=(1, 3))
    decay = {"lr": 0.1, "lrd": 0.05 ** (1 / 400)}
    svi = SVI(toy.blora.model, toy.blora.guide, pyro.optim.ClippedAdam(decay), tiny.elbo(32))
    batch, before = repeat_batch(toy.batch, 32), divergence(toy)
    for _ in range(400):
        svi.step(batch)
    assert before > 10
    assert divergence(toy) < 0.02
