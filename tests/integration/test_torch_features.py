"""Modes and dtypes, activation checkpointing, compilation, autocast and low-precision bases."""

from collections import Counter
from functools import partial

import pyro
import pytest
import tiny
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_blora.data.batches import predict_dataset
from pyro_blora.guides import Laplace
from pyro_blora.inference import finish, fit
from pyro_blora.likelihoods import CausalLM, MultipleChoice
from pyro_blora.models import KroneckerInducing
from pyro_blora.network.pretrained import _bfloat16_pays  # as it is without this suite


@pytest.mark.parametrize(
    ("build", "vectorized", "conditional"),
    [(tiny.llama, False, "deterministic"), (tiny.gpt2, True, "scaled")],
)
def test_activation_checkpointing(build, vectorized, conditional):
    """Backward runs the blocks again, each with the update of its own forward pass.

    Particles that are not vectorized are several passes before one backward. The noise of the
    conditional is drawn again from the same generator state.
    """
    net, batch = build(), tiny.sequences()
    prior = KroneckerInducing(rank=2, conditional=conditional)
    blora = tiny.adapted(net, target_modules=None, prior=prior)
    net.train()
    elbo = TraceMeanField_ELBO(4, vectorize_particles=vectorized, max_plate_nesting=1)
    expected = tiny.gradients(blora, batch, elbo)
    runs = Counter()
    block = net.base_model.layers[0] if build is tiny.llama else net.base_model.h[0]
    net.base_model.register_forward_pre_hook(lambda *_: runs.update(["network"]))
    block.mlp.register_forward_pre_hook(lambda *_: runs.update(["block"]))
    # by the name that the installed transformers has for it
    newer = hasattr(net, "activation_checkpointing_enable")
    (net.activation_checkpointing_enable if newer else net.gradient_checkpointing_enable)()
    checkpoint = block._gradient_checkpointing_func
    found = tiny.gradients(blora, batch, elbo)
    assert runs["block"] == 2 * runs["network"]  # it did run again
    assert block._gradient_checkpointing_func is checkpoint  # and is left as it was found
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_compiles_without_a_graph_break():
    """``fullgraph`` fails at a graph break; the graph is not made again for another draw."""
    net, ids = tiny.llama(), tiny.sequences()["input_ids"]
    blora = tiny.adapted(net)
    graphs = []
    counting = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=counting, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            with blora.model.applied(blora.posterior.draws(4)):
                eager, fast = net(ids).logits, compiled(ids).logits
            torch.testing.assert_close(fast, eager, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(eager, net(ids).logits, atol=1e-3)
    assert len(graphs) == 1
    torch._dynamo.reset()


# Dynamo looks at the .grad of every tensor that it finds on a module, the factors included
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_compiled_one_by_one_train():
    """Blocks of one class share a graph, and one of a block without adapters adds no update."""
    net, batch = tiny.llama(), tiny.sequences()
    torch._dynamo.reset()
    for index, block in enumerate(net.model.layers):
        if index:  # as accelerate's hooks leave it
            block.self_attn.q_proj.forward = block.self_attn.q_proj.forward
        block.compile(backend="aot_eager", dynamic=False)
    for layers in ([0, 1], [1]):
        blora = tiny.adapted(net, layers_to_transform=layers, target_modules=["q_proj"])
        found = tiny.gradients(blora, batch, tiny.elbo(4))
        with torch.compiler.set_stance("force_eager"):
            expected = tiny.gradients(blora, batch, tiny.elbo(4))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        blora.unwrap()
    torch._dynamo.reset()


def test_autocast_keeps_the_guide_in_single_precision():
    blora, batch = tiny.adapted(), tiny.sequences()
    with torch.autocast("cpu", torch.bfloat16):
        trace = pyro.poutine.trace(blora.model).get_trace(batch)
        updates = blora.posterior.draws(2)
        samples = blora.predict(batch, 2).samples
    value, logits = trace.nodes["q_proj.V"]["value"], trace.nodes["labels"]["fn"].logits
    for tensor in (value, logits, samples, *(update.core for update in updates.values())):
        assert tensor.dtype == torch.float32
    # and not only by its name: no product on the way is rounded to bfloat16
    for name, update in blora.posterior.draws(0).items():
        assert torch.equal(updates[name].A, update.A)
        assert torch.equal(updates[name].B, update.B)


TEXTS = (tiny.gpt2, CausalLM(num_data=8), tiny.texts(8))
CHOICES = (tiny.llama, MultipleChoice(num_data=8), tiny.choices(8))


@pytest.mark.parametrize(("build", "likelihood", "batch"), [TEXTS, CHOICES])
def test_a_bfloat16_base(build, likelihood, batch):
    net = build().to(torch.bfloat16)
    blora = tiny.adapted(net, target_modules=None, likelihood=likelihood)
    assert all(p.dtype == torch.float32 for p in blora.parameters())
    for name, gradient in tiny.gradients(blora, batch, tiny.elbo(4)).items():
        assert gradient.dtype == torch.float32
        assert 0 < gradient.abs().max() < torch.inf, name
    if blora.likelihood.has_classes:
        assert blora.predict(batch, 2).samples.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())


def predict(blora, rows, collate, **options):
    predict_dataset(blora.predict, rows, collate, **options)


AUTO = [(True, {}, True), (False, {}, False), (True, {"precision": "float32"}, False)]


@pytest.mark.parametrize("run", [partial(fit, num_steps=1), finish, predict])
@pytest.mark.parametrize(("pays", "options", "expected"), AUTO)
def test_auto_is_the_default_everywhere(monkeypatch, run, pays, options, expected):
    monkeypatch.setattr("pyro_blora.network.pretrained._bfloat16_pays", lambda kind: pays)
    net, seen = tiny.llama(), set()
    note = lambda *_: seen.add(torch.is_autocast_enabled("cpu"))  # noqa: E731
    net.model.layers[0].register_forward_pre_hook(note)
    blora = tiny.adapted(net, guide=Laplace() if run is finish else None)
    run(blora, tiny.examples(), collate=tiny.collate, **options)
    assert (True in seen) is expected


@pytest.mark.parametrize(
    ("found", "pays"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx2": True}, False),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it_faster(monkeypatch, found, pays):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert _bfloat16_pays("cpu") is pays


@pytest.mark.parametrize("name", ["half", "double"])
def test_a_dtype_is_the_network_s_and_not_that_of_what_is_variational(name):
    blora, batch, double = tiny.adapted(), tiny.sequences(), name == "double"
    kl, before, held = blora.kl(), blora.predict(batch, 0).samples, [*blora.parameters()]
    moved = blora.to("cpu", torch.float64) if double else getattr(blora, name)()
    assert moved is blora
    assert {p.dtype for p in blora.net.parameters()} == {getattr(torch, name)}
    assert {p.dtype for p in blora.parameters()} == {torch.float64 if double else torch.float32}
    assert all(p is q for p, q in zip(blora.parameters(), held, strict=True))
    torch.testing.assert_close(blora.kl().float(), kl)
    after = blora.predict(batch, 0).samples.float()
    torch.testing.assert_close(after, before, atol=1e-4 if double else 0.05, rtol=0)
    found = tiny.gradients(blora, batch, tiny.elbo(4))
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_modes_reach_the_network():
    blora = tiny.adapted(tiny.llama(attention_dropout=0.5))
    assert blora.training is blora.net.training is False  # as it was given
    blora.train()
    assert all(module.training for module in blora.net.modules())
    ids = tiny.sequences()["input_ids"]
    once, again = blora(ids).logits, blora(ids).logits
    assert not torch.allclose(once, again)
    blora.eval()
    assert not any(module.training for module in blora.net.modules())
    assert torch.equal(blora(ids).logits, blora(ids).logits)
