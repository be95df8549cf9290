"""Temperature scaling against a grid and against temperatures that are known."""

import math

import pytest
import torch

from pyro_blora.evaluation.temperature import fit_temperature


def synthetic(temperature, n=4000, k=4, seed=0):
    """Logits that are right at ``temperature``: labels are drawn from softmax(logits / T)."""
    generator = torch.Generator().manual_seed(seed)
    truth = 2 * torch.randn(n, k, generator=generator)
    labels = torch.multinomial(truth.softmax(-1), 1, generator=generator).squeeze(1)
    return temperature * truth, labels


def nll(logits, labels, temperature):
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))


@pytest.mark.parametrize("temperature", [0.02, 0.3, 1.0, 4.0, 60.0])
def test_finds_a_known_temperature(temperature):
    logits, labels = synthetic(temperature)
    # 4,000 items: the relative standard error is about 0.03
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.1)
    # Scaling logits scales T
    base = fit_temperature(synthetic(1.0)[0], labels)
    assert fit_temperature(logits, labels) == pytest.approx(temperature * base, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_beats_a_grid(seed):
    logits, labels = synthetic(2.5, n=100, seed=seed)
    best = nll(logits, labels, fit_temperature(logits, labels))
    grid = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    values = [nll(logits, labels, t) for t in grid]
    assert best <= min(values) + 1e-12
    at = float(grid[values.index(min(values))])
    assert fit_temperature(logits, labels) == pytest.approx(at, rel=5e-3)


def test_absent_choices():
    logits, labels = synthetic(3.0, n=500)
    padded = torch.nn.functional.pad(logits, (0, 2), value=-math.inf)
    assert fit_temperature(padded, labels) == pytest.approx(
        fit_temperature(logits, labels), rel=1e-9
    )


def test_bounds():
    logits, labels = torch.eye(3), torch.arange(3)
    assert fit_temperature(logits, labels) == pytest.approx(0.01)
    assert fit_temperature(-logits, labels) == pytest.approx(100)


def test_where_every_temperature_is_as_good_it_is_one():
    labels = torch.arange(3)
    logits = torch.tensor([[0.1, 0.1, -math.inf], [7.0, 7.0, 7.0], [-math.inf, 0.0, 0.0]])
    assert nll(logits, labels, 0.01) == pytest.approx(nll(logits, labels, 100), rel=1e-12)
    assert fit_temperature(logits, labels) == 1
    logits[0, 0] += 1  # one that is right
    assert fit_temperature(logits, labels) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (torch.zeros(0, 2), torch.zeros(0).long(), "n >= 1"),
        (torch.zeros(3), torch.zeros(3).long(), "the shapes"),
        (torch.zeros(3, 2), torch.zeros(2).long(), "the shapes"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "between 0 and 1"),
        (torch.full((3, 2), math.nan), torch.zeros(3).long(), "NaN"),
        (torch.full((3, 2), math.inf), torch.zeros(3).long(), "-inf at an"),
        (torch.full((3, 2), -math.inf), torch.zeros(3).long(), "no label"),
    ],
)
def test_rejects(logits, labels, match):
    with pytest.raises(ValueError, match=match):
        fit_temperature(logits, labels)
