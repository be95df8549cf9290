"""Networks whose layers lie on several devices, or elsewhere between passes."""

import pytest
import tiny
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pyro_blora import models
from pyro_blora.errors import ConfigurationError
from pyro_blora.likelihoods import SequenceClassification
from pyro_blora.likelihoods.packing import supports_packing
from pyro_blora.likelihoods.reading import logits_at
from pyro_blora.network.adapter import LayerHook, updates_in_place
from pyro_blora.network.targets import dense_weight, group_layers
from pyro_blora.updates import LayerUpdate, MarginalNoise

accelerate = pytest.importorskip("accelerate")
# Two devices on any machine: with fake tensors, which have no storage
CARDS = (torch.device("cpu", 0), torch.device("cpu", 1))


def put(module, card):
    """Moves ``module`` as ``device_map`` does: Accelerate's hook brings its input to it."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = nn.Parameter(tensor.detach().to(card))
        for name, tensor in part._buffers.items():
            part._buffers[name] = tensor.to(card)
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(card))


@pytest.mark.parametrize("noisy", [False, True])
def test_the_layers_of_a_group_lie_on_two_cards(noisy):
    """Fake tensors refuse to meet across devices as those of two graphics cards do."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        net = tiny.llama()
        base, first, second = net.model, *net.model.layers
        for module in (base.embed_tokens, base.rotary_emb, first):
            put(module, CARDS[0])
        for module in (second, base.norm, net.lm_head):
            put(module, CARDS[1])
        layers = {f"{i}.q": b.self_attn.q_proj for i, b in enumerate(base.layers)}
        layers["head"] = net.lm_head
        group, head = group_layers(layers)
        assert (group.device, head.device) == CARDS
        adapters = [LayerHook(name, layer) for name, layer in layers.items()]
        factors = {"device": group.device, "requires_grad": True}
        A, B, core = (torch.ones(s, **factors) for s in ((2, 16), (16, 2), (2, 2, 2)))
        noise = MarginalNoise(torch.ones(2, device=group.device))
        update = LayerUpdate(A, B, core, noise if noisy else None)
        of_head = LayerUpdate(A.to(CARDS[1]), torch.ones(tiny.VOCABULARY, 2, device=CARDS[1]))
        inputs = {"input_ids": torch.ones(4, 7, dtype=torch.long, device=CARDS[0])}
        positions = torch.ones(4, 1, dtype=torch.long, device=CARDS[0])
        seen = []
        second.self_attn.q_proj.register_forward_hook(lambda m, a, y: seen.append(y.device))
        with updates_in_place(adapters, [update, update, of_head]):
            logits = logits_at(net, inputs, positions)
        logits.sum().backward()
        assert A.grad.device == B.grad.device == core.grad.device == CARDS[0]
    assert set(seen) == {CARDS[1]}


# A prior that reads the weights, and a head
READS = {"disk": {"prior": models.KernelInducing(rank=2)}}
READS["cpu"] = {"target_modules": ["q_proj", "lm_head"]}


def offloaded(net, where, folder):
    """``net`` with its weights put away between passes: all, or some of them on the disk."""
    if where == "cpu":
        return accelerate.cpu_offload(net)
    blocks = {"model.layers.0": "disk", "model.layers.1": "cpu"}
    ends = {"model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "disk"}
    device_map = {**blocks, **ends, "model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(net, device_map, offload_dir=str(folder))


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("where", READS)
def test_an_offloaded_network_trains_and_predicts_as_any(where, tmp_path):
    found = []
    for put_away in (False, True):
        torch.manual_seed(0)
        net = tiny.llama()
        if put_away:
            net = offloaded(net, where, tmp_path)
            assert net.model.layers[0].self_attn.q_proj.weight.is_meta
        torch.manual_seed(1)
        blora = tiny.adapted(net, num_data=10, **READS[where])
        tiny.train(blora, num_steps=3)
        torch.manual_seed(2)
        found.append((tiny.trained(blora), blora.predict(tiny.sequences(), 3).samples))
        assert not any(p.requires_grad for p in net.parameters())
        assert all(p.requires_grad for p in blora.unwrap().parameters())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_what_an_offloaded_network_can_do_is_known():
    assert supports_packing(accelerate.cpu_offload(tiny.llama()))
    options = {"target_modules": None, "likelihood": SequenceClassification(num_data=4)}
    with pytest.raises(ConfigurationError, match="classifier is offloaded"):
        tiny.adapted(accelerate.cpu_offload(tiny.bert()), **options)


def test_a_prior_reads_the_whole_of_a_shared_out_weight():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        layer = nn.Linear(4, 3)
        weight = layer.weight.detach().clone()
        fully_shard(layer)
        assert isinstance(layer.weight, DTensor)
        whole = dense_weight(layer, "layer")
        assert torch.equal(whole, weight)
        assert not isinstance(whole, DTensor)
    finally:
        torch.distributed.destroy_process_group()
