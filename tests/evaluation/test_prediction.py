"""Prediction: the decomposition of uncertainty, by hand."""

import math

import pytest
import torch

from pyro_blora.prediction import Prediction


def random(samples=5, items=7, choices=4):
    return Prediction((3 * torch.randn(samples, items, choices).double()).softmax(-1))


def test_by_hand():
    samples = torch.tensor([[[1, 0], [0.25, 0.75]], [[0, 1], [0.25, 0.75]]], dtype=torch.float64)
    p = Prediction(samples)
    log2, h = math.log(2), math.log(4) - 0.75 * math.log(3)
    assert p.probs.tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert p.entropy.tolist() == pytest.approx([log2, h])
    assert p.expected_entropy.tolist() == pytest.approx([0, h])
    assert p.mutual_information.tolist() == pytest.approx([log2, 0])
    assert p.confidence.tolist() == [0.5, 0.75]
    assert int(p.predictions[1]) == 1
    assert (p.num_samples, len(p)) == (2, 2)
    alike = Prediction(random(samples=1, items=200).samples.float().expand(3, -1, -1))
    assert (alike.mutual_information >= 0).all()  # whatever is rounded
    assert alike.mutual_information.max() < 1e-5


def test_cat_pads_choices():
    a, b = random(choices=2), random(items=3, choices=4)
    both = Prediction.cat([a, b])
    assert (both.samples[:, :7, 2:] == 0).all()
    torch.testing.assert_close(both.entropy, torch.cat([a.entropy, b.entropy]))
    assert both.predictions.equal(torch.cat([a.predictions, b.predictions]))


@pytest.mark.parametrize(
    "samples", [[0.5, 0.5], [], [[[math.nan, 1.0]]], [[[2.0, -1.0]]], [[[0.5, 0.4]]]]
)
def test_what_is_no_distribution_is_refused(samples):
    with pytest.raises(ValueError, match="samples"):
        Prediction(torch.tensor(samples))
