"""Bases quantized by torchao and bitsandbytes: the layers stay what they are."""

import pytest
import tiny
import torch

from pyro_blora import models
from pyro_blora.likelihoods import MultipleChoice
from pyro_blora.network.targets import find_targets, group_layers, top_singular

ROWS = tiny.examples(8)
BATCH = tiny.collate(ROWS)


def network():
    """The same random Llama at every call, with sides of a whole block of weights, 64."""
    torch.manual_seed(0)
    return tiny.llama(hidden_size=64, intermediate_size=64, num_key_value_heads=4)


def torchao():
    """A Llama whose linear layers, the head's too, hold quantized tensors."""
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    net = network()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


def bitsandbytes(kind, **options):
    """A Llama whose linear layers but the head are those of bitsandbytes."""
    layers = pytest.importorskip("bitsandbytes.nn", reason="needs bitsandbytes")
    net = network()
    for name, old in find_targets(net, "all-linear").items():
        new = getattr(layers, kind)(old.in_features, old.out_features, bias=False, **options)
        new.load_state_dict(old.state_dict())
        # or it packs its weights anew when first evaluated, after which no gradient passes
        new.support_avx512bf16_for_cpu = False
        net.set_submodule(name, new.to("cpu"))  # which quantizes it
    return net.eval()


QUANTIZED = {
    "torchao int8": torchao,
    "bitsandbytes 8 bits": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes nf4": lambda: bitsandbytes("Linear4bit", quant_type="nf4"),
}


@pytest.fixture(params=QUANTIZED)
def net(request):
    net = QUANTIZED[request.param]()
    plain, quantized = (find_targets(each, "all-linear") for each in (network(), net))
    for name, layer in quantized.items():
        weight = plain[name].weight
        assert 1e-4 < (unit_response(layer) - weight).abs().max() / weight.abs().max() < 0.2
    return net


def logits(net):
    with torch.no_grad():
        return net(BATCH["input_ids"], BATCH["attention_mask"]).logits


def stored(net):
    """Every tensor that the network stores, those inside of quantized tensors too, copied."""
    found = {}
    for name, tensor in net.state_dict().items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            found |= {f"{name}.{part}": getattr(tensor, part).clone() for part in parts}
        else:
            found[name] = tensor.clone()
    return found


def unit_response(layer):
    """The weight as the layer applies it, whatever it stores."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).mT


def test_training_fits_the_batch_and_leaves_the_base(net, tmp_path):
    output, before = logits(net), stored(net)
    blora = tiny.adapted(net, prior=models.SpectralInducing(rank=4), num_data=8)
    assert not any(p.requires_grad for p in net.parameters())
    start = blora.log_predictive(BATCH, 0).mean()
    for name, gradient in tiny.gradients(blora, BATCH, tiny.elbo()).items():
        assert 0 < gradient.abs().max() < torch.inf, name
    rates = {"mean": 0.1, "scale": 0.05, "direction": 0.02}
    tiny.train(blora, ROWS, batch_size=8, num_steps=30, learning_rates=rates)
    assert blora.log_predictive(BATCH, 0).mean() > 0.9 * start
    expected = blora.predict(BATCH, 0).probs
    blora.save_pretrained(tmp_path)
    assert blora.unwrap() is net
    assert torch.equal(logits(net), output)
    assert tiny.equal(stored(net), before)
    again = type(blora).from_pretrained(net, tmp_path)
    assert torch.equal(again.predict(BATCH, 0).probs, expected)


@pytest.mark.parametrize("options", [{}, {"likelihood": MultipleChoice(num_data=8)}])
@pytest.mark.filterwarnings("ignore:.* does not give the same logits")  # int8 rounds its inputs
def test_fast_is_plain(net, options):
    blora = tiny.adapted(net, target_modules=["q_proj", "lm_head"], **options)
    batch = tiny.choices(4) if options else BATCH
    found = blora.predict(batch, 0).probs
    blora.likelihood.fast = False
    torch.testing.assert_close(found, blora.predict(batch, 0).probs, atol=1e-5, rtol=1e-4)


def test_singular_directions_are_those_of_the_weight_as_it_is_applied(net):
    (group,) = group_layers(find_targets(net, ["q_proj"]))
    left, right, values = top_singular(group, 3, 3)
    for i, layer in enumerate(group.modules):
        moved, expected = left[i] @ unit_response(layer), values[i, :3, None] * right[i]
        torch.testing.assert_close(moved, expected, atol=1e-2 * float(values[i, 0]), rtol=0)
