"""Blocks below the lowest adapted layer run once for all draws, and nothing else changes."""

import gc
import weakref
from types import SimpleNamespace

import pyro
import pytest
import tiny
import torch

from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import LabelTokens, MultipleChoice, SequenceClassification
from pyro_blora.models import KroneckerInducing
from pyro_blora.network.fast_path import agree, remembered, vocabulary_of
from pyro_blora.network.shared_prefix import _all_alike, frozen_blocks, shared_prefix
from pyro_blora.posterior import draws as predictive
from pyro_blora.posterior.draws import rows_of_a_pass

CLASSES = LabelTokens(token_ids=tiny.ANSWERS, num_data=12)
CASES = {
    "llama": (tiny.llama, ["q_proj"], CLASSES, tiny.sequences),
    "llama, eager": (
        lambda n: tiny.llama(n, attn_implementation="eager"), ["q_proj"], CLASSES, tiny.sequences
    ),
    "qwen2": (tiny.qwen2, ["v_proj"], CLASSES, tiny.sequences),
    "gpt2": (tiny.gpt2, ["c_attn"], CLASSES, tiny.sequences),
    "bert": (tiny.bert, ["query"], SequenceClassification(num_data=12), tiny.sequences),
    "options": (tiny.llama, ["q_proj"], MultipleChoice(num_data=12), tiny.choices),
    "unpacked options": (
        tiny.llama, ["q_proj"], MultipleChoice(num_data=12, pack=False), tiny.choices
    ),
}  # fmt: skip


def adapted(case, layers, blocks):
    make, targets, likelihood, batch = CASES[case]
    blora = tiny.adapted(
        make(layers),
        target_modules=targets,
        likelihood=likelihood,
        layers_to_transform=blocks,
        prior=KroneckerInducing(rank=2, sigma=2.0),
        guide=MatrixNormal(init_scale=1.0),
    )
    return blora, batch(6)


def block_rows(blora):
    """How many rows each block is given."""
    rows = []
    blocks = next(m for m in blora.net.modules() if isinstance(m, torch.nn.ModuleList))
    for block in blocks:
        block.forward = noting(block.forward, lambda args, kwargs: rows.append(len(args[0])))
    return rows


def noting(forward, note):
    """A forward that takes note of what it is given; hooks would have the block run every time."""

    def noted(*args, **kwargs):
        note(args, kwargs)
        return forward(*args, **kwargs)

    return noted


@pytest.mark.parametrize("case", CASES)
def test_it_changes_nothing_but_the_work(case, monkeypatch):
    blora, batch = adapted(case, 4, [2, 3])
    torch.manual_seed(0)
    shared = blora.predict(batch, 5).samples
    rows = block_rows(blora)
    blora.predict(batch, 5)
    below, above = rows[-4], rows[-1]
    assert above == 5 * below
    assert rows[-4:] == [below, below, above, above]
    monkeypatch.setattr(predictive, "shared_prefix", lambda *_: pyro.poutine.scale(scale=1.0))
    torch.manual_seed(0)
    torch.testing.assert_close(blora.predict(batch, 5).samples, shared, atol=2e-5, rtol=0)
    blora.predict(batch, 5)
    assert rows[-4:] == [above] * 4
    assert shared.std(0).max() > 0.01


def test_blocks_that_run_in_a_loop_share_nothing(monkeypatch):
    """The second time round, the frozen block is given what the adapted one put out."""
    net = tiny.llama(4)
    first, second = net.model.layers[:2]
    net.model.layers = torch.nn.ModuleList([first, second, first, second])
    blora = tiny.adapted(
        net,
        layers_to_transform=[1],
        prior=KroneckerInducing(rank=2, sigma=2.0),
        guide=MatrixNormal(init_scale=1.0),
    )
    torch.manual_seed(0)
    together = blora.predict(tiny.sequences(4), 5).samples
    monkeypatch.setattr(predictive, "shared_prefix", lambda *_: pyro.poutine.scale(scale=1.0))
    torch.manual_seed(0)
    torch.testing.assert_close(blora.predict(tiny.sequences(4), 5).samples, together)


class Plain(torch.nn.Module):
    """A network of one's own, which declares nothing and runs its blocks twice."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(tiny.VOCABULARY, 8)
        blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(3)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.head = torch.nn.Linear(8, len(tiny.ANSWERS))

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids)
        for block in (*self.blocks, *self.blocks):
            hidden = hidden + block(hidden)
        return SimpleNamespace(logits=self.head(hidden.mean(1)))


def test_a_network_that_cannot_be_asked_shares_nothing():
    torch.manual_seed(0)
    blora = tiny.adapted(
        Plain(),
        target_modules=["blocks.2.0"],
        likelihood=SequenceClassification(num_data=12),
        prior=KroneckerInducing(rank=2, sigma=2.0),
        guide=MatrixNormal(init_scale=1.0),
    )
    torch.manual_seed(0)
    together = blora.predict(tiny.sequences(4), 5).samples
    inputs = {k: v.repeat(5, 1) for k, v in tiny.sequences(4).items() if k != "labels"}
    torch.manual_seed(0)
    with torch.no_grad(), blora.model.applied(blora.sample_updates(5)) as net:
        expected = net(**inputs).logits.softmax(-1).unflatten(0, (5, 4))
    torch.testing.assert_close(together, expected)
    assert expected.std(0).max() > 0.01
    assert rows_of_a_pass(blora, tiny.sequences(4, 16)) == 64  # which no sharing is worth more than


@pytest.mark.parametrize("config", [None, {"lr": 1}, torch.ones(2), SimpleNamespace(vocab_size=[])])
def test_a_config_may_be_anything(config):
    net = torch.nn.Module()
    net.config, net.inner = config, tiny.llama()
    assert vocabulary_of(net) == tiny.VOCABULARY
    assert vocabulary_of(torch.nn.Linear(2, 2)) == 0
    net.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))
    assert vocabulary_of(net) == 9


def test_a_head_of_zeros_tells_nothing():
    zeros = torch.zeros(4, 3)
    assert not agree(zeros, zeros)
    assert agree(zeros + torch.arange(3), zeros + torch.arange(3))


def test_answers_about_several_sets_of_blocks_are_kept_side_by_side():
    questions = []

    @remembered
    def ask(net, blocks):
        questions.append(len(blocks))
        return len(blocks) == 1

    net = tiny.llama(4)
    for _ in range(2):
        assert ask(net, net.model.layers[:1]) is True
        assert ask(net, net.model.layers[:2]) is False
    assert questions == [1, 2]


def test_an_answer_about_a_block_that_is_gone_is_none_about_the_others():
    ask = remembered(lambda net, blocks: len(blocks) == 1)
    net, gone = tiny.llama(2), tiny.llama(1)
    first = net.model.layers[0]
    assert ask(net, [first, *gone.model.layers]) is False
    del gone
    gc.collect()
    assert ask(net, [first]) is True


def test_a_network_is_asked_by_what_its_parts_declare():
    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny.bert(4)

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask)

    blora = tiny.adapted(
        Around(),
        target_modules=["query"],
        layers_to_transform=[3],
        likelihood=SequenceClassification(num_data=12),
    )
    blora.predict(tiny.sequences(4), 5)
    rows = []
    for layer in blora.net.bert.bert.encoder.layer:
        layer.forward = noting(layer.forward, lambda args, kwargs: rows.append(len(args[0])))
    blora.predict(tiny.sequences(4), 5)
    assert rows == [4, 4, 4, 20]


def test_a_block_that_stands_twice_among_the_frozen_ones_is_not_shared():
    net = tiny.llama(5)
    first, second, *_, last = net.model.layers
    net.model.layers = torch.nn.ModuleList([first, second, first, second, last])
    blora = tiny.adapted(net, layers_to_transform=[4])
    assert blora.predict(tiny.sequences(4), 5).samples.shape == (5, 4, 3)
    assert not frozen_blocks(net, [adapter.name for adapter in blora.model.adapters])


def test_an_adapted_head_alone_shares_every_block():
    net = tiny.llama(3)
    blora = tiny.asked(tiny.adapted(net, target_modules=["lm_head"]))
    rows = block_rows(blora)
    assert blora.predict(tiny.sequences(4), 6).samples.shape == (6, 4, 3)
    assert rows == [4, 4, 4]


def test_what_is_frozen():
    net = tiny.llama(4)
    blocks = list(net.model.layers)
    name = "model.layers.{}.self_attn.q_proj"
    assert frozen_blocks(net, [name.format(2), name.format(3)]) == blocks[:2]
    assert frozen_blocks(net, [name.format(0), name.format(3)]) == []
    assert frozen_blocks(net, [name.format(3), "lm_head"]) == blocks[:3]
    bert = tiny.bert(2)
    assert frozen_blocks(bert, ["bert.encoder.layer.1.attention.self.query", "classifier"]) == []


def test_no_hook_stays_behind():
    blora, batch = adapted("llama", 4, [3])
    net = blora.net
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    blora.predict(batch, 3)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    assert after == before == 1


def test_a_pass_leaves_nothing_to_the_collector():
    blora, batch = adapted("llama", 4, [2, 3])
    blora.predict(batch, 5)
    seen = []

    def note(args, kwargs):
        seen.extend(weakref.ref(x) for x in (args[0], kwargs["attention_mask"]))

    block = blora.net.model.layers[0]
    block.forward = noting(block.forward, note)
    gc.collect()
    gc.disable()
    try:
        blora.predict(batch, 5)
        assert [tensor() for tensor in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("asks", ["a hook", "a hook inside", "the configuration", "the batch"])
def test_whoever_looks_at_frozen_blocks_sees_every_row(asks):
    blora, batch = adapted("bert" if asks == "the batch" else "llama", 4, [2, 3])
    net, seen = blora.net, []
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if asks == "the batch":
        inputs["output_hidden_states"] = batch["output_hidden_states"] = True
    if asks.startswith("a hook"):
        for block in net.model.layers[:2]:
            module = block if asks == "a hook" else block.mlp
            module.register_forward_hook(lambda m, args, out: seen.append(out))
    else:
        net.config.output_hidden_states = asks == "the configuration"
        base = net.base_model
        base.register_forward_hook(lambda m, a, out: seen.extend((out.hidden_states or ())[1:3]))
    net(**inputs)
    expected = [state.repeat(2, 1, 1) for state in seen]
    blora.predict(batch, 4, max_rows=12)
    torch.testing.assert_close(seen[-4:], expected * 2, atol=1e-5, rtol=1e-5)


def test_what_a_hook_has_kept_stays_as_it_was():
    net, kept = tiny.llama(), []
    layer = net.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda m, args, out: kept.append((out, args[0] @ m.weight.T)))
    tiny.adapted(net, prior=KroneckerInducing(rank=2, sigma=2.0)).predict(tiny.sequences(), 3)
    for found, expected in kept:
        torch.testing.assert_close(found, expected)


def test_nothing_is_shared_without_an_update_in_place():
    """While a network is asked what it can do, a batch is no repetition of anything."""
    blora, batch = adapted("llama", 4, [2, 3])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), shared_prefix(blora.net, blora.model.adapters, 2):
        found = blora.net(**inputs).logits
    torch.testing.assert_close(found, blora.net(**inputs).logits)


def test_not_a_number_in_both_copies_is_alike():
    copies = torch.tensor([[0.5, torch.nan]]).repeat(2, 1)
    assert _all_alike(copies, 2)
    assert not _all_alike(copies + torch.tensor([[0.0], [1.0]]), 2)


def test_joint_noise_still_has_a_weight_for_each_draw():
    prior = KroneckerInducing(rank=2, conditional="exact", noise="joint", sigma=0.05)
    blora = tiny.adapted(tiny.llama(4), prior=prior, layers_to_transform=[3])
    samples = blora.predict(tiny.sequences(4), 5).samples
    assert samples.shape == (5, 4, 3)
    assert samples.std(0).min() > 0
