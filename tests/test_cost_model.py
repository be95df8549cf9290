"""The formulae of docs/cost.md against what the library allocates and computes."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop
from transformers import LlamaConfig, LlamaForCausalLM

from pyro_blora import models

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cost_model  # noqa: E402
from cost_formulas import Adapter, Shape, Task  # noqa: E402

DEPTH, ROWS, LENGTH = 6, 4, 32
SHAPES = [Shape(64, 96, 64, DEPTH, 32), Shape(64, 96, 32, DEPTH, 32)]  # one group of q and v, two


def adapted(adapter, dtype=torch.float32):
    """The library's adapter of the same shape, its batch, and the loss of a step."""
    shape = adapter.shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.v,
        hidden_size=shape.h,
        intermediate_size=shape.f,
        num_hidden_layers=shape.L,
        num_attention_heads=4,
        num_key_value_heads=4 * shape.k // shape.h,
        pad_token_id=0,
    )
    net = LlamaForCausalLM(config).to(dtype).train()
    top = list(range(shape.L - adapter.layers, shape.L))
    prior = models.KroneckerInducing(rank=adapter.r)
    blora = tiny.adapted(net, prior=prior, layers_to_transform=top)
    batch = {
        "input_ids": torch.randint(8, shape.v, (ROWS, LENGTH)),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "labels": torch.arange(ROWS) % len(tiny.ANSWERS),
    }
    tiny.asked(blora)
    elbo = TraceMeanField_ELBO(num_particles=ROWS, vectorize_particles=True, max_plate_nesting=1)
    return blora, batch, elbo(blora.model, blora.guide)


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [DEPTH, 2])
@pytest.mark.parametrize("rank", [2, 5])
def test_bytes_are_those_that_are_allocated(shape, layers, rank):
    adapter = Adapter(shape, rank, layers)
    blora, batch, loss_of = adapted(adapter)
    assert size(*blora.net.parameters()) == shape.base_bytes("float32")
    assert size(*blora.parameters()) == adapter.parameter_bytes

    loss_of(batch).backward()
    optimizer = torch.optim.AdamW(blora.parameters())
    optimizer.step()
    assert size(*(p.grad for p in blora.parameters())) == adapter.parameter_bytes
    state = [t for values in optimizer.state.values() for t in values.values()]
    assert size(*state) == adapter.optimizer_bytes

    held = []
    for name, update in blora.sample_updates(3).items():
        prior = getattr(blora.model, name)
        held += [prior.row_covariance().to_dense(), prior.col_covariance().to_dense()]  # as L
        held += [update.A, update.B, update.core]
    assert size(*held) == adapter.factor_bytes(3)


@pytest.mark.parametrize("layers", [DEPTH, 2])
def test_plain_lora_is_counted_as_peft_makes_it(layers):
    peft = pytest.importorskip("peft", reason="needs peft")
    adapter = Adapter(SHAPES[1], 2, layers, bayesian=False)
    blora, *_ = adapted(adapter)
    net = blora.unwrap()
    top = list(range(DEPTH - layers, DEPTH))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=top)
    peft.inject_adapter_in_model(config, net)
    trained = [p for n, p in net.named_parameters() if "lora_" in n]
    assert size(*trained) == adapter.parameter_bytes
    assert len(trained) == adapter.tensors


def counter_of_flops():
    """Torch's counter, which knows the sums in place no more than attention on the CPU."""
    aten = torch.ops.aten
    in_place = {
        aten.addmm_: lambda _, a, b, *rest, **options: mm_flop(a, b),
        aten.baddbmm_: lambda _, a, b, *rest, **options: bmm_flop(a, b),
    }
    return FlopCounterMode(display=False, custom_mapping=in_place)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [DEPTH, 2])
def test_flops_are_those_that_are_counted(monkeypatch, shape, layers):
    """To half a percent; torch's counter knows no attention on the CPU, and no solve."""
    monkeypatch.setattr(Task, "attention", lambda self, tokens: 0.0)
    task = Task(Adapter(shape, 4, layers), ROWS, LENGTH)
    blora, batch, loss_of = adapted(task.adapter)
    with counter_of_flops() as counter:
        loss_of(batch).backward()
    assert counter.get_total_flops() == pytest.approx(task.step(), rel=5e-3)
    for draws in (1, 5):
        with counter_of_flops() as counter:
            blora.predict(batch, draws)
        assert counter.get_total_flops() == pytest.approx(task.prediction(draws), rel=5e-3)
    with counter_of_flops() as counter:
        blora.predict(batch, 9, linearised=True)
    expected = task.linearised(len(tiny.ANSWERS))
    assert counter.get_total_flops() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("layers", [3, 1])
def test_activations_are_what_autograd_keeps(layers):
    adapter = Adapter(Shape(256, 384, 256, 3, 32), 2, layers)
    blora, batch, loss_of = adapted(adapter, torch.bfloat16)
    weights = {p.data_ptr() for p in (*blora.net.parameters(), *blora.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, or its address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(batch)
    found = sum(count for count, _ in kept.values()) - adapter.factor_bytes(ROWS)
    assert found == pytest.approx(Task(adapter, ROWS, LENGTH).activations(), rel=0.06)


def test_the_page_has_the_figures_of_the_formulae():
    page = cost_model.PAGE.read_text(encoding="utf-8")
    begin, end = cost_model.BEGIN, cost_model.END
    assert page.partition(begin)[2].partition(end)[0] == cost_model.tables(), (
        "run python benchmarks/cost_model.py --write"
    )


def test_measured_documents_are_compared():
    arguments = {"size": "tiny", "layers": None, "rows": 8, "length": 64}
    spread = {"ratio": 1.0, "low": 0.9, "high": 1.1}
    to = {"to peft": spread, "to peft:read": spread}
    names = ("peft", "peft:read", "bayesian-lora", "blob")
    rows = [{"name": name, "seconds": 0.1, **to} for name in names]
    compared = {n: v for n, *v in cost_model.compare({"arguments": arguments, "rows": rows})}
    assert 0.6 < compared["bayesian-lora to peft"][0] < 1 < compared["peft to peft:read"][0] < 1.7
    assert 1.0 < compared["bayesian-lora to peft:read"][0] < 1.2
    assert compared["bayesian-lora to peft:read"][1:] == [1.0, 0.9, 1.1]
    assert not any(name.startswith("blob") for name in compared)
    assert compared["adapter bytes"][0] == compared["adapter bytes"][1]

    to = {"to plain": spread, "to plain:read": spread}
    names = ("plain", "plain:read", "S = 10", "linearised")
    rows = [{"name": name, "seconds": 0.1, **to} for name in names]
    arguments = {"size": "tiny", "top": 1, "rows": 8, "length": 64, "classes": 2}
    compared = {n: v for n, *v in cost_model.compare({"arguments": arguments, "rows": rows})}
    # of three blocks and a tenth of the last, which is not run whole
    assert 1 < compared["S = 10 to plain:read"][0] < 1 + 9 * 0.25
    assert 1 < compared["linearised to plain:read"][0] < 1.5
    assert compared["S = 10 to plain"][0] < compared["S = 10 to plain:read"][0]
    assert compared["adapter bytes"][0] == compared["adapter bytes"][1]
