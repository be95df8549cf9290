"""Activation checkpointing, compilation, autocast and low-precision bases."""

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


def gradients(blora, batch, *, vectorized=True):
    """Loss and gradients of one step from a fixed seed."""
    elbo = TraceMeanField_ELBO(4, vectorize_particles=vectorized, max_plate_nesting=1)
    return tiny.gradients(blora, batch, elbo)


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
    expected = gradients(blora, batch, vectorized=vectorized)
    runs = []
    block = net.base_model.layers[0] if build is tiny.llama else net.base_model.h[0]
    net.base_model.register_forward_pre_hook(lambda *_: runs.append("network"))
    block.get_submodule("mlp").register_forward_pre_hook(lambda *_: runs.append("block"))
    # by the name that the installed transformers has for it
    newer = hasattr(net, "activation_checkpointing_enable")
    (net.activation_checkpointing_enable if newer else net.gradient_checkpointing_enable)()
    checkpoint = block._gradient_checkpointing_func
    found = gradients(blora, batch, vectorized=vectorized)
    assert runs.count("block") == 2 * runs.count("network")  # it did run again
    assert block._gradient_checkpointing_func is checkpoint  # and is left as it was found
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_compiles_without_a_graph_break():
    """``fullgraph`` fails at a graph break; the graph is not made again for another draw."""
    net, ids = tiny.llama(), tiny.sequences()["input_ids"]
    blora = tiny.adapted(net)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

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
        found = gradients(blora, batch)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(found, gradients(blora, batch), atol=1e-5, rtol=1e-4)
        blora.unwrap()
    torch._dynamo.reset()


def test_autocast_trains_in_bfloat16():
    prior = KroneckerInducing(rank=2, conditional="scaled", lambda_init=0.01)
    blora, seen = tiny.asked(tiny.adapted(num_data=8, prior=prior)), []
    layer = blora.net.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    options = {"num_steps": 60, "learning_rates": {"mean": 0.1, "scale": 0.05}}
    result = tiny.train(blora, tiny.examples(8), precision="bfloat16", batch_size=8, **options)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in blora.parameters())
    nlls = [h["nll"] for h in result.history]
    assert sum(nlls[-5:]) < 0.9 * sum(nlls[:5])


def test_autocast_keeps_the_guide_in_single_precision():
    blora, batch = tiny.adapted(), tiny.sequences()
    with torch.autocast("cpu", torch.bfloat16):
        trace = pyro.poutine.trace(blora.model).get_trace(batch)
        updates = blora.posterior.draws(2)
        samples = blora.predict(batch, 2).samples
    assert trace.nodes["q_proj.V"]["value"].dtype == torch.float32
    assert trace.nodes["labels"]["fn"].logits.dtype == torch.float32
    assert samples.dtype == torch.float32
    for update in updates.values():
        assert update.core.dtype == torch.float32
    # and not only by its name: no product on the way is rounded to bfloat16
    for name, update in blora.posterior.draws(0).items():
        assert torch.equal(updates[name].A, update.A)
        assert torch.equal(updates[name].B, update.B)


@pytest.mark.parametrize(
    ("build", "likelihood", "batch"),
    [
        (tiny.gpt2, CausalLM(num_data=8), tiny.texts(8)),
        (tiny.llama, MultipleChoice(num_data=8), tiny.choices(8)),
    ],
)
def test_a_bfloat16_base(build, likelihood, batch):
    net = build().to(torch.bfloat16)
    blora = tiny.adapted(net, target_modules=None, likelihood=likelihood)
    assert all(p.dtype == torch.float32 for p in blora.parameters())
    for name, gradient in gradients(blora, batch).items():
        assert gradient.dtype == torch.float32
        assert 0 < gradient.abs().max() < torch.inf, name
    if blora.likelihood.has_classes:
        assert blora.predict(batch, 2).samples.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())


def predict(blora, rows, collate, **options):
    predict_dataset(blora.predict, rows, collate, **options)


@pytest.mark.parametrize("run", [partial(fit, num_steps=1), finish, predict])
@pytest.mark.parametrize(
    ("pays", "options", "expected"),
    [(True, {}, True), (False, {}, False), (True, {"precision": "float32"}, False)],
)
def test_auto_is_the_default_everywhere(monkeypatch, run, pays, options, expected):
    monkeypatch.setattr("pyro_blora.options._bfloat16_pays", lambda kind: pays)
    net, seen = tiny.llama(), set()
    net.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.add(torch.is_autocast_enabled("cpu"))
    )
    blora = tiny.adapted(net, guide=Laplace() if run is finish else None)
    run(blora, tiny.examples(), collate=tiny.collate, **options)
    assert (True in seen) is expected
