"""Logits at some positions and of some tokens are those of the full computation."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pyro
import pytest
import tiny
import torch
from tiny import VOCABULARY, adapted, bert, gpt2, llama, qwen2, sequences

from pyro_blora import BayesianLoRA
from pyro_blora.errors import BatchError, ConfigurationError
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import MultipleChoice
from pyro_blora.likelihoods.reading import logits_at

NETS = {
    "llama": llama,
    "llama, tied": lambda: llama(tied=True),
    "qwen2": qwen2,
    "gpt2": gpt2,
}
BODY = r".*\.(q_proj|v_proj|c_attn)"  # of every network
TARGETS = {"body": BODY, "head": ["lm_head"], "both": rf"{BODY}|lm_head"}
TOKENS = [7, 2, 30]


def make(name, targets, net=None):
    blora = adapted(
        NETS[name]() if net is None else net,
        target_modules=TARGETS[targets],
        guide=MatrixNormal(init_scale=0.5),
    )
    tiny.shaken(blora.guide, 0.3)
    batch = sequences(6)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return blora, inputs


def some(rows=6):
    """Positions out of order, twice the same, and some that are not real."""
    positions = torch.tensor([[2, 0, 2], [1, 3, 0], [6, 5, 0], [0, 1, 2], [3, 3, 3], [4, 0, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    return positions[:rows], mask[:rows]


def draw(blora, particles):
    """Updates with a gradient into prior and guide, of ``particles`` draws."""
    pyro.set_rng_seed(3)
    if particles == 1:
        trace = pyro.poutine.trace(blora.guide).get_trace()
        return pyro.poutine.replay(blora.model.updates, trace=trace)()
    with pyro.plate("particles", particles, dim=-2):
        trace = pyro.poutine.trace(blora.guide).get_trace()
        return pyro.poutine.replay(blora.model.updates, trace=trace)()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_logits_and_gradients_are_the_full_ones(name, targets, particles, tokens):
    blora, inputs = make(name, targets)
    positions, mask = some()
    parameters = list(blora.parameters())
    chosen = None if tokens is None else torch.tensor(tokens)

    with blora.model.applied(draw(blora, particles)) as net:
        narrow = logits_at(net, inputs, positions, mask, chosen)
    with blora.model.applied(draw(blora, particles)) as net:
        full = net(**inputs).logits
    full = full[torch.arange(6).unsqueeze(-1).expand_as(mask)[mask], positions[mask]]
    if tokens is not None:
        full = full[:, tokens]
    torch.testing.assert_close(narrow, full, rtol=0, atol=1e-10)
    assert narrow.shape == (int(mask.sum()), VOCABULARY if tokens is None else len(tokens))

    weights = torch.randn(full.shape)
    a, b = (torch.autograd.grad((logits * weights).sum(), parameters) for logits in (narrow, full))
    for x, y in zip(a, b, strict=True):
        assert y.abs().max() > 1e-8
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
    plain = blora.net(**inputs).logits
    plain = plain[torch.arange(6).unsqueeze(-1).expand_as(mask)[mask], positions[mask]]
    assert (plain[:, tokens or slice(None)] - narrow).abs().max() > 1e-4  # adapters act


@pytest.mark.parametrize("targets", ["body", "both"])
def test_the_head_is_left_as_it_was(targets):
    blora, inputs = make("llama", targets)
    head, (positions, mask) = blora.net.lm_head, some()
    hooks = len(head._forward_pre_hooks), len(head._forward_hooks)
    own = vars(head).get("forward")
    before = blora.net(**inputs).logits
    tokens = torch.tensor(TOKENS)
    logits_at(blora.net, inputs, positions, mask, tokens)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        logits_at(blora.net, {**inputs, "input_ids": None}, positions, mask, tokens)
    assert (len(head._forward_pre_hooks), len(head._forward_hooks)) == hooks
    assert vars(head).get("forward") is own
    assert torch.equal(blora.net(**inputs).logits, before)


@torch.no_grad()
def test_a_replaced_forward_is_kept():
    blora, inputs = make("llama", "both")
    head, (positions, mask), calls = blora.net.lm_head, some(), []
    replaced = head.forward

    def forward(hidden):
        calls.append(hidden.shape)
        return replaced(hidden)

    head.forward = forward
    logits = logits_at(blora.net, inputs, positions, mask, torch.tensor(TOKENS))
    assert head.forward is forward
    assert len(calls) == 1
    full = logits_at(blora.net, inputs, positions, mask)
    torch.testing.assert_close(logits, full[:, TOKENS], rtol=0, atol=1e-10)


class OwnHead(torch.nn.Linear):
    """Not a plain linear layer, as a quantized one is not: its rows cannot be picked."""


@pytest.mark.parametrize("tokens", [TOKENS, torch.randperm(VOCABULARY).tolist()])
@pytest.mark.parametrize("targets", ["body", "head"])
def test_a_head_whose_rows_cannot_be_picked(tokens, targets):
    net = llama()
    net.lm_head.__class__ = OwnHead
    blora, inputs = make("llama", targets, net)
    positions, mask = some()
    with torch.no_grad(), blora.model.applied(draw(blora, 1)) as net:
        narrow = logits_at(net, inputs, positions, mask, torch.tensor(tokens))
        full = net(**inputs).logits
    full = full[torch.arange(6).unsqueeze(-1).expand_as(mask)[mask], positions[mask]]
    torch.testing.assert_close(narrow, full[:, tokens], rtol=0, atol=1e-10)


def test_a_network_without_a_head_is_refused():
    positions, mask = some()
    with pytest.raises(ConfigurationError, match=r"no language-model head.*SequenceClassification"):
        logits_at(bert(), sequences(6), positions, mask)


def test_a_network_may_be_read_in_several_threads():
    """Both are between the hook on the head and the head itself, with rows of one shape."""
    net, likelihood = llama().eval(), MultipleChoice()
    batches = [tiny.choices(3, seed=seed) for seed in (1, 2)]
    barrier = threading.Barrier(2, timeout=30)

    @torch.no_grad()
    def read(batch):
        return likelihood.logits(net, batch)

    def wait(*_):
        barrier.wait()

    alone = [read(batch) for batch in batches]
    with net.model.register_forward_hook(wait), ThreadPoolExecutor(2) as threads:
        found = list(threads.map(read, batches))
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_by_another_token_than_the_networks_is_refused():
    net = tiny.llama_classifier()
    net.config.pad_token_id = 3
    blora = BayesianLoRA(net, rank=2)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    for pad in (3, 0):
        batch = {"input_ids": torch.tensor([[5, 6, 7], [5, pad, pad]]), "attention_mask": mask}
        refused = pytest.raises(BatchError, match=r"padded with net.config.pad_token_id, 3")
        with nullcontext() if pad == 3 else refused:
            blora.predict(batch)
