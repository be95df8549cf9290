"""The default's width is in units of the pretrained weight: a rescaled network learns the same."""

import pyro
import pytest
import tiny
import torch
from torch import nn

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import LabelTokens, SequenceClassification
from pyro_blora.models import Hierarchical, KroneckerInducing
from pyro_blora.network.targets import group_layers


def bound(layers, prior=KroneckerInducing, **options):
    named = {f"{i}.q": layer for i, layer in enumerate(layers)}
    return prior(rank=2, **options).bind(group_layers(named)[0])


@pytest.mark.parametrize("scale", ["learned", "fixed"])
def test_it_starts_at_a_fifth_of_the_weight_s_singular_values(scale):
    layers = [nn.Linear(6, 5) for _ in range(3)]
    prior = bound(layers, scale=scale)
    values = torch.stack([torch.linalg.svdvals(layer.weight) for layer in layers])
    expected = 0.2 * values.square().mean(-1).sqrt()
    torch.testing.assert_close(prior.layer_scale(), expected.detach())
    prior.to(torch.float64)
    assert prior.sigma_start.dtype == torch.float64


def test_a_weight_without_numbers_has_a_width_all_the_same():
    layers = [nn.Linear(6, 5), nn.Linear(6, 5)]
    nn.init.zeros_(layers[0].weight)
    found = bound(layers).layer_scale()
    assert found[0] == torch.tensor(0.2)
    assert found[1] != found[0]
    with torch.device("meta"):
        layers = [nn.Linear(6, 5)]
    assert bound(layers).sigma_start == torch.tensor(0.2 / 5**0.5)


def test_a_weight_that_cannot_be_read_wants_a_sigma():
    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(6, 5)
            weight = self.weight.detach().to(torch.float8_e4m3fn)  # of an unknown scale
            self.weight = nn.Parameter(weight, requires_grad=False)

    with pytest.raises(
        ConfigurationError, match=r"0.q has no weight of \(5, 6\) floats.*sigma=\.\.\."
    ):
        bound([Packed()])
    assert bound([Packed()], sigma=0.5).layer_scale() == 0.5


def test_a_sigma_that_is_given_is_in_units_of_weight():
    layers = [nn.Linear(6, 5) for _ in range(24)]
    assert torch.equal(bound(layers, sigma=0.3).layer_scale(), torch.full((24,), 0.3))
    prior = pyro.poutine.trace(bound(layers, Hierarchical)).get_trace().nodes["q.tau"]["fn"]
    assert prior.scale == 0.3


def llama(factor):
    """What the norms give times a factor, and the values; what reads them by it."""
    net = tiny.llama()
    for layer in net.model.layers:
        layer.input_layernorm.weight.mul_(factor)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.div_(factor)
        layer.self_attn.v_proj.weight.mul_(factor**2)
        layer.self_attn.o_proj.weight.div_(factor**2)
    return net, LabelTokens(token_ids=tiny.ANSWERS, num_data=24), None


def bert(factor):
    """Queries times a factor, keys by it; and the values, and what reads them."""
    net = tiny.bert()
    for layer in net.bert.encoder.layer:
        parts = (layer.attention.self.query, layer.attention.self.key)
        parts += (layer.attention.self.value, layer.attention.output.dense)
        for part, power in zip(parts, (1, -1, -1, 1), strict=True):
            part.weight.mul_(factor**power)
            if part is not layer.attention.output.dense:
                part.bias.mul_(factor**power)
    return net, SequenceClassification(num_data=24), ["query", "value"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The adapter has not learned")  # because its head stays
@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize("make", [llama, bert])
def test_a_rescaled_network_learns_the_same(make, factor):
    rows, found = tiny.examples(24), []
    for each in (1.0, factor):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            net, likelihood, targets = make(each)
        blora = BayesianLoRA(net, rank=2, likelihood=likelihood, target_modules=targets)
        with torch.no_grad():
            plain = blora.predict(tiny.collate(rows), 0).probs
        rates = {"head": 0.0, "mean": 0.2}  # by the layers
        options = {"num_steps": 60, "learning_rates": rates, "kl_weight": 0.01}
        result = fit(blora, rows, collate=tiny.collate, **options)
        torch.manual_seed(0)
        learned = blora.predict(tiny.collate(rows), 4).probs
        found.append((plain, sum(step["nll"] for step in result.history[-20:]) / 20, learned))
    (plain, nll, probs), (same, other_nll, other_probs) = found
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)  # the network's function
    assert (probs - plain).abs().max() > 0.05  # it has learned
    assert other_nll == pytest.approx(nll, abs=0.01)
    torch.testing.assert_close(other_probs, probs, atol=0.02, rtol=0)
