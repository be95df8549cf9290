"""The last block at the positions that are read gives the logits and gradients of the whole one."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import tiny
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice
from pyro_blora.likelihoods.logits_at import logits_at
from pyro_blora.models import KroneckerInducing
from pyro_blora.network.last_block import whole_last_block

LABELS = LabelTokens(token_ids=tiny.ANSWERS, num_data=12)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "c_attn", "c_proj"]


def text(rows=4, length=12):
    batch = tiny.texts(rows, length)
    batch["labels"][:, : length - 4] = -100
    return batch


def options():
    """Questions of 13 tokens, so that packed rows too have more that is not read than is."""
    batch = tiny.choices(4, 2, 17)
    ids = torch.cat([batch["input_ids"][..., :4].repeat(1, 1, 3), batch["input_ids"]], -1)
    real = torch.cat([torch.ones(4, 2, 12, dtype=torch.long), batch["attention_mask"]], -1)
    scored = torch.cat([torch.zeros(4, 2, 12, dtype=torch.bool), batch["option_mask"]], -1)
    return {**batch, "input_ids": ids, "attention_mask": real, "option_mask": scored}


CASES = {
    "label tokens": (LABELS, tiny.sequences),
    "text": (CausalLM(num_data=12), text),
    "options": (MultipleChoice(num_data=12, pack=False), options),
    "packed options": (MultipleChoice(num_data=12, pack=True), options),
}


@contextmanager
def seen_by(block):
    """Shapes that enter the block's own modules."""
    shapes = {}

    def note(name):
        return lambda module, args, output: shapes.__setitem__(name, tuple(output.shape[:2]))

    # inside of the parts, for a hook on the part itself may run after the positions are back
    inner = [(n, m) for n, m in block.named_modules() if not list(m.children())]
    handles = [m.register_forward_hook(note(n), prepend=True) for n, m in inner]
    yield shapes
    for handle in handles:
        handle.remove()


def step(blora, batch):
    elbo = TraceMeanField_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    return tiny.gradients(blora, batch, elbo)


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=2e-4, msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("build", [tiny.llama, tiny.qwen2, tiny.gpt2])
def test_a_step_is_the_whole_one(build, case):
    likelihood, make = CASES[case]
    net, batch = build(), make()
    blora = tiny.adapted(net, target_modules=TARGETS, likelihood=likelihood)
    with whole_last_block(net):
        expected = step(blora, batch)
    block = (net.base_model.layers if hasattr(net.base_model, "layers") else net.base_model.h)[-1]
    assert_same(step(blora, batch), expected)
    with seen_by(block) as shapes:
        step(blora, batch)
    attention, length = ("attn", "c_proj") if build is tiny.gpt2 else ("self_attn", "o_proj")
    narrow, wide = shapes[f"{attention}.{length}"], max(s[1] for s in shapes.values())
    assert 2 * narrow[1] <= wide
    keys = shapes["attn.c_attn" if build is tiny.gpt2 else "self_attn.k_proj"]
    assert keys == (narrow[0], wide)
    assert {s for n, s in shapes.items() if n.startswith("mlp")} == {narrow}


def test_without_gradients_it_predicts_the_same():
    net, batch = tiny.llama(), tiny.sequences()
    blora = tiny.adapted(net, target_modules=TARGETS)
    torch.manual_seed(0)
    narrow = blora.predict(batch, 5).samples
    with whole_last_block(net):
        torch.manual_seed(0)
        torch.testing.assert_close(blora.predict(batch, 5).samples, narrow, atol=2e-5, rtol=0)
    assert narrow.std(0).max() > 0.01


def test_half_of_the_positions_is_too_many():
    net, batch = tiny.llama(), tiny.sequences(2, 8)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    for count, narrowed in ((4, True), (5, False)):
        positions = torch.arange(count).expand(2, count)
        with seen_by(net.model.layers[-1]) as shapes:
            logits_at(net, inputs, positions, torch.ones_like(positions).bool())
        assert shapes["mlp.up_proj"] == (2, count if narrowed else 8)


class Mixing(nn.Module):
    """An MLP with a look at the positions before."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x.cumsum(1))


def test_a_part_that_mixes_positions_sees_them_all():
    net, batch = tiny.llama(), tiny.sequences()
    net.model.layers[-1].mlp = Mixing(net.model.layers[-1].mlp)
    blora = tiny.adapted(net)
    with whole_last_block(net):
        expected = step(blora, batch)
    assert_same(step(blora, batch), expected)
    with seen_by(net.model.layers[-1]) as shapes:
        step(blora, batch)
    # what comes after the mixing works position by position again, what comes before is needed
    assert shapes["mlp.mlp.up_proj"] == shapes["mlp.mlp.down_proj"] == (4, 1)
    assert shapes["self_attn.o_proj"] == shapes["self_attn.q_proj"] == (4, 7)


def test_a_network_that_reads_the_rest_is_left_alone():
    """One whose logits look at every position of the last block."""
    net, batch = tiny.llama(), tiny.sequences()
    net.model.norm = nn.Sequential(net.model.norm, Mixing(nn.Identity()))
    with seen_by(net.model.layers[-1]) as shapes:
        LABELS.logits(net, batch)
    assert {s[1] for s in shapes.values()} == {7}


# Dynamo looks at the .grad of every tensor that it finds on a module, the factors included
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_a_block_that_runs_otherwise_is_whole(how):
    net, batch = tiny.llama(), tiny.sequences()
    blora = tiny.adapted(net)
    net.train()
    expected = step(blora, batch)
    if how == "checkpointed":
        net.activation_checkpointing_enable({"use_reentrant": False})
    else:
        torch._dynamo.reset()
        net.model.compile(backend="eager", dynamic=False)
    assert_same(step(blora, batch), expected)
    torch._dynamo.reset()


def test_asking_changes_nothing():
    net, batch = tiny.gpt2(), tiny.sequences()
    net.train()
    net.transformer.h[0].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    torch.manual_seed(0)
    LABELS.logits(net, batch)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == after
    assert modes == {name: module.training for name, module in net.named_modules()}
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]


def test_noise_of_the_conditional_at_the_positions_read():
    """Its law there is the same: mean and variance of the logits over draws."""
    net, batch = tiny.llama(), tiny.sequences(2)
    prior = KroneckerInducing(rank=2, conditional="scaled", lambda_init=0.3)
    blora = tiny.adapted(net, prior=prior, target_modules=["q_proj", "o_proj", "up_proj"])
    torch.manual_seed(0)
    narrow = blora.predict(batch, 4000).samples
    with whole_last_block(net):
        whole = blora.predict(batch, 4000).samples
    for moment in (torch.mean, torch.var):
        a, b = moment(narrow, 0), moment(whole, 0)
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.1)
    assert whole.std(0).max() > 0.05


def test_of_its_errors_no_hook_is_left():
    net, batch = tiny.llama(), tiny.sequences()
    LABELS.logits(net, batch)
    net.model.layers[-1].mlp.up_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LABELS.logits(net, batch)
    parts = (net.model.layers[-1].mlp, net.model.layers[-1].self_attn.o_proj)
    assert not any(p._forward_pre_hooks or p._forward_hooks for p in parts)


def agrees(net, batch=None):
    """A step of an adapter is the one of the whole block."""
    blora, batch = tiny.adapted(net), tiny.sequences(4, 12) if batch is None else batch
    found = step(blora, batch)
    with whole_last_block(net):
        assert_same(found, step(blora, batch))


def test_a_network_that_changed_is_asked_again():
    net = tiny.llama()
    mlp = net.model.layers[-1].mlp
    LABELS.logits(net, tiny.sequences())
    mlp.up_proj = Mixing(mlp.up_proj)
    agrees(net)


def test_a_setting_that_changed_is_asked_about_again():
    """With its router's logits put out, the experts' output is of another kind."""
    net = tiny.mixtral()
    LABELS.logits(net, tiny.sequences(4, 12))
    net.config.output_router_logits = True
    agrees(net)


class Norm(nn.Module):
    """Position by position in evaluation alone."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.norm = mlp, nn.BatchNorm1d(16)

    def forward(self, x):
        return self.mlp(self.norm(x.mT).mT)


class Lag(Mixing):
    """A look at nine positions before, and no nearer."""

    def forward(self, x):
        return self.mlp(x) + self.mlp(x.roll(9, 1) * (torch.arange(x.shape[1]) >= 9)[:, None])


@pytest.mark.parametrize("kind", [Norm, Lag])
def test_what_shows_neither_in_evaluation_nor_nearby(kind):
    net = tiny.llama()
    net.model.layers[-1].mlp = kind(net.model.layers[-1].mlp)
    net.train()
    agrees(net)


class Asserting(Mixing):
    """Refuses any length but one."""

    error = AssertionError

    def forward(self, x):
        if x.shape[1] != 12:
            raise self.error("an unexpected length")
        return self.mlp(x)


@pytest.mark.parametrize("error", [AssertionError, KeyError, ValueError])
def test_a_part_that_refuses_is_left_alone(error):
    net = tiny.llama(max_position_embeddings=12)
    net.model.layers[-1].mlp = Asserting(net.model.layers[-1].mlp)
    net.model.layers[-1].mlp.error = error
    agrees(net)


def test_whole_within_whole():
    net, batch = tiny.llama(), tiny.sequences()
    with whole_last_block(net):
        with whole_last_block(net):
            pass
        with seen_by(net.model.layers[-1]) as shapes:
            LABELS.logits(net, batch)
    assert {s[1] for s in shapes.values()} == {7}


def test_an_answer_keeps_no_network():
    net = tiny.llama()
    LABELS.logits(net, tiny.sequences())
    net.model.layers[-1].mlp.register_forward_hook(lambda *_, owner=net: None)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
