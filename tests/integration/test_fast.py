"""What is fast gives what is plain: logits, hidden states, windows, padding."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from choice_batches import batch_of

from pyro_blora.errors import BatchError
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice, SequenceClassification
from pyro_blora.models import KroneckerInducing

TOKENS = LabelTokens(token_ids=tiny.ANSWERS, num_data=12)
CLASSES = SequenceClassification(num_data=12)
TEXT = CausalLM(num_data=12)
CHOICES = MultipleChoice(num_data=12)
UNPACKED = MultipleChoice(num_data=12, pack=False)
WIDE = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24}
LOCAL_SIZES = {**WIDE, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
GPT_NEO = {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}
# Networks whose layers see a window or a chunk of a row: configuration, and the window's name
LOCAL = {
    "Mistral": (LOCAL_SIZES, "sliding_window"),
    "GPTNeo": ({**GPT_NEO, "max_position_embeddings": 64}, "window_size"),
    "Llama4Text": ({**LOCAL_SIZES, **EXPERTS, "intermediate_size_mlp": 24}, "attention_chunk_size"),
}
ATTENTION = ["q_proj", "v_proj"]
WIDE_DRAWS = {"prior": KroneckerInducing(rank=2, sigma=2.0), "guide": MatrixNormal(init_scale=1.0)}


def network(name, kind="CausalLM", **options):
    """A network that a prediction, and a token misplaced, tell apart: its weights are large."""
    torch.manual_seed(0)
    options = {"vocab_size": 32, "hidden_size": 16, **options}
    config = getattr(transformers, f"{name}Config")(**options)
    net = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8 * parameter.shape[-1] ** -0.5)
    return net


def local(name, window):
    options, key = LOCAL[name]
    return network(name, **options, **{key: window})


# network, adapted layers, likelihood, a batch
CASES = {
    "llama": (lambda: tiny.llama(4), ATTENTION, TOKENS, tiny.sequences),
    "llama, text": (lambda: tiny.llama(4), ATTENTION, TEXT, tiny.texts),
    "llama, options, eager": (
        lambda: tiny.llama(4, attn_implementation="eager"), ATTENTION, CHOICES, tiny.choices,
    ),
    "llama, unpacked": (lambda: tiny.llama(4), ATTENTION, UNPACKED, tiny.choices),
    "gpt2": (lambda: tiny.gpt2(4), ["c_attn"], CHOICES, tiny.choices),
    "bert": (lambda: tiny.bert(4), ["query", "value"], CLASSES, tiny.sequences),
    "bloom": (
        lambda: network("Bloom", n_layer=4, n_head=4), ["query_key_value"], TOKENS, tiny.sequences,
    ),
    "convbert, which reads padding": (
        lambda: network("ConvBert", "SequenceClassification", **WIDE, num_labels=3),
        ["query"], CLASSES, tiny.sequences,
    ),
    "mistral, local": (
        lambda: local("Mistral", 4), ["q_proj"], TEXT, lambda rows: tiny.texts(rows, 14),
    ),
}  # fmt: skip


def adapted(case, *, layers=(2, 3), **options):
    make, targets, likelihood, batch = CASES[case]
    options = {**WIDE_DRAWS, "likelihood": likelihood, "layers_to_transform": layers, **options}
    return tiny.adapted(make(), target_modules=targets, **options), batch(6)


def scores(blora, batch, max_rows, draws=5):
    torch.manual_seed(1)
    sites = {site.name: torch.randn(draws, *site.prior.shape()) for site in blora.model.sites}
    if isinstance(blora.likelihood, CausalLM):
        return blora.log_predictive(batch, samples=sites, max_rows=max_rows)
    return blora.predict(batch, samples=sites, max_rows=max_rows).samples


def assert_fast_is_plain(blora, batch):
    blora.likelihood.fast = False
    expected = scores(blora, batch, max_rows=1)
    blora.likelihood.fast = True
    for max_rows in (1, 12, 100):
        found = scores(blora, batch, max_rows)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    return expected


@pytest.mark.parametrize("case", CASES)
def test_fast_is_plain(case):
    blora, batch = adapted(case)
    expected = assert_fast_is_plain(blora, batch)
    assert expected.std(0).max() > 1e-3


def test_a_hook_on_the_head_sees_all_positions():
    blora, batch = adapted("llama")
    shapes = []
    with torch.no_grad():
        expected = blora.likelihood.logits(blora.net, batch)
        handle = blora.net.lm_head.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
        found = blora.likelihood.logits(blora.net, batch)
        handle.remove()
    assert shapes == [torch.Size([6, 7, tiny.VOCABULARY])]
    torch.testing.assert_close(found, expected)


def test_two_adapters_of_a_network_are_as_fast_as_each_says():
    net, batch = tiny.llama(4), tiny.choices(6)
    slow = tiny.adapted(net, target_modules=["q_proj"], likelihood=CHOICES, fast=False)
    rows = []
    net.get_input_embeddings().register_forward_hook(lambda m, args, out: rows.append(len(out)))
    slow.predict(batch, 2, max_rows=100)
    assert rows[-1] == 2 * 18
    before = set(vars(net))
    fast = tiny.adapted(slow.unwrap(), target_modules=["v_proj"], likelihood=CHOICES)
    fast.predict(batch, 2, max_rows=100)
    assert rows[-1] == 2 * 6
    assert set(vars(net)) == before


def test_another_implementation_of_attention_is_probed_again():
    blora, batch = adapted("llama, options, eager")
    assert blora.model.keeps_rows()
    calls = []
    blora.net.register_forward_pre_hook(lambda *_: calls.append(1))

    def passes():
        calls.clear()
        blora.predict(batch, 2, max_rows=100)
        return len(calls)

    first, again = passes(), passes()
    assert again == 1 < first
    blora.net.set_attn_implementation("sdpa")
    assert passes() == first


def test_a_failing_pass_leaves_nothing_behind():
    blora, batch = adapted("llama")
    blora.predict(batch, 2)
    before = [dict(vars(module)) for module in blora.net.modules()]
    batch["input_ids"][0, 0] = tiny.VOCABULARY + 5
    with pytest.raises(IndexError):
        blora.predict(batch, 3)
    assert [vars(module) for module in blora.net.modules()] == before


def test_a_head_whose_weight_is_used_without_it():
    """As where it is tied by hand: no hook of the head is run."""
    blora, batch = adapted("llama, text")
    expected = scores(blora, batch, max_rows=1)
    net = blora.net

    def forward(input_ids, attention_mask, use_cache=False, **other):
        hidden = net.model(input_ids, attention_mask=attention_mask, **other).last_hidden_state
        return SimpleNamespace(logits=hidden @ net.lm_head.weight.mT)

    net.forward = forward
    torch.testing.assert_close(scores(blora, batch, max_rows=1), expected)


# Rows of up to 14 tokens, and packed of 17
LONGER = (range(3, 13), [(5, 6, 7, 8), (9,), (10, 11)], 0)
OPTIONS = batch_of([LONGER, (range(4, 10), [(12,), (13, 14, 15), (16, 17)], 1)])


@torch.no_grad()
@pytest.mark.parametrize("name", LOCAL)
def test_options_under_a_window_score_as_they_do_in_rows_of_their_own(name):
    rows, apart = [], MultipleChoice(pack=False)
    for window, passes in ((8, 6), (16, 6), (17, 2)):
        net = local(name, window)
        expected = apart.logits(net, OPTIONS)
        net.get_input_embeddings().register_forward_hook(lambda m, args, out: rows.append(len(out)))
        for pack in (None, True):
            scores = MultipleChoice(pack=pack).logits(net, OPTIONS)
            torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
        assert rows[-1] == passes  # a window as long as the packed rows changes nothing
    far = apart.logits(local(name, 8), OPTIONS)
    assert (far - expected).abs().max() > 0.01


PADDED = {
    "GPT2": {"n_layer": 2, "n_head": 4, "n_positions": 32},
    "Roberta": {**WIDE, "pad_token_id": 1, "max_position_embeddings": 32, "is_decoder": True},
    "Bloom": {"n_layer": 2, "n_head": 4},
}
# An encoder, and a network that takes no positions
REFUSED = ("Roberta", "Bloom")
READ = {"tokens": TOKENS, "text": TEXT, "classes": CLASSES}


def padded_rows(net, side):
    """Three rows of 4 to 6 tokens, padded on a side."""
    rows = [ids[: 6 - i] for i, ids in enumerate(tiny.sequences(6, 6)["input_ids"][::2])]
    labels = torch.nn.utils.rnn.pad_sequence(rows, True, -100, side)
    real = labels != -100
    ids = labels.where(real, net.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}


@torch.no_grad()
@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("kind", READ)
def test_rows_padded_on_the_left_are_read_as_rows_that_are_not(name, kind):
    likelihood, options = READ[kind], {"pad_token_id": 0, **PADDED[name]}
    if kind == "classes":
        options |= {"kind": "SequenceClassification", "num_labels": 3, "is_decoder": False}
    net = network(name, **options)
    right, left = (padded_rows(net, side) for side in ("right", "left"))
    expected = likelihood.logits(net, right)
    logits = net(input_ids=right["input_ids"], attention_mask=right["attention_mask"]).logits
    if kind != "text":
        plain = logits if kind == "classes" else tiny.answers(logits, right)
        torch.testing.assert_close(expected, plain)
    if name in REFUSED:
        with pytest.raises(BatchError, match="padded on the left"):
            likelihood.logits(net, left)
    else:
        found = likelihood.logits(net, left)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
