"""Frozen blocks run in the first pass of a prediction alone, whatever the architecture reads."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from test_cached_prefix import passes
from test_shared_prefix import CASES, adapted
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMForSequenceClassification,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import LabelTokens, SequenceClassification
from pyro_blora.models import KroneckerInducing
from pyro_blora.network.adapter import entering
from pyro_blora.network.cached_prefix import PrefixCache
from pyro_blora.network.fast_path import logits_for
from pyro_blora.network.kept_prefix import KeptPrefix, can_keep, can_skip, in_place_of
from pyro_blora.network.shared_prefix import frozen_blocks
from pyro_blora.posterior import draws as predictive


class FirstOfDecoder(LabelTokens):
    """The first token of a decoder answers what the encoder has read."""

    def logits(self, net, batch):
        start = torch.zeros(len(batch["input_ids"]), 1, dtype=torch.long)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        output = net(**inputs, decoder_input_ids=start, use_cache=False)
        return output.logits[:, 0, list(self.token_ids)]


SIZES = {"vocab_size": 32, "hidden_size": 16}
TOKENS = LabelTokens(token_ids=tiny.ANSWERS, num_data=12)
DECODED = FirstOfDecoder(token_ids=tiny.ANSWERS, num_data=12)


def falcon():
    return FalconForCausalLM(
        FalconConfig(
            **SIZES, num_hidden_layers=4, num_attention_heads=4, alibi=True, multi_query=False,
            parallel_attn=False, bias=True,
        )
    )  # fmt: skip


def bloom():
    return BloomForCausalLM(BloomConfig(**SIZES, n_layer=4, n_head=4))


def mpt():
    """Its position bias has as many heads as two draws of four examples have rows."""
    return MptForCausalLM(
        MptConfig(vocab_size=32, d_model=16, n_heads=8, n_layers=4, max_seq_len=32)
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            **SIZES, num_hidden_layers=4, ffn_dim=24, num_attention_heads=4, word_embed_proj_dim=16
        )
    )


def xlm():
    """Its blocks are lists of attentions, norms and feed-forwards, side by side."""
    return XLMForSequenceClassification(
        XLMConfig(vocab_size=32, emb_dim=16, n_layers=4, n_heads=4, num_labels=3)
    )


def bart():
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=32, d_model=16, encoder_layers=2, decoder_layers=4,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_position_embeddings=32,
        )
    )  # fmt: skip


def t5():
    """A block hands its position bias on to the next."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=4,
            num_heads=4, decoder_start_token_id=0,
        )
    )  # fmt: skip


def xlstm():
    """A block puts out its state beside the hidden states."""
    return xLSTMForCausalLM(xLSTMConfig(vocab_size=32, hidden_size=16, num_blocks=4, num_heads=2))


def llava():
    """Its vocabulary is that of a part; it is asked without a picture."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes, vocab_size=32, num_hidden_layers=4, num_key_value_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    )


# Architecture, adapted layers, likelihood, whether the blocks below can be skipped
OTHERS = {
    "falcon": (falcon, r".*h\.[23]\.self_attention\.query_key_value", TOKENS, True),
    "bloom": (bloom, r".*h\.[23]\.self_attention\.query_key_value", TOKENS, True),
    "mpt": (mpt, r".*blocks\.[23]\.attn\.Wqkv", TOKENS, True),
    "opt": (opt, r".*layers\.[23]\.self_attn\.[qv]_proj", TOKENS, True),
    "xlm": (xlm, r".*attentions\.[23]\.[qv]_lin", SequenceClassification(num_data=12), False),
    "xlstm": (xlstm, r".*blocks\.[23]\.mlstm_layer\.[qv]", TOKENS, True),
    "llava": (llava, r".*language_model.*layers\.[23]\.self_attn\.[qv]_proj", TOKENS, True),
    "bart": (bart, r".*decoder\.layers\.[23]\.encoder_attn\.[qv]_proj", DECODED, True),
    "t5": (t5, r"decoder\.block\.[23]\..*EncDecAttention\.[qv]", DECODED, False),
}


def of_architecture(name):
    make, targets, likelihood, skipped = OTHERS[name]
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8 * parameter.shape[-1] ** -0.5)
    blora = tiny.adapted(
        net,
        target_modules=targets,
        likelihood=likelihood,
        prior=KroneckerInducing(rank=2, sigma=2.0),
        guide=MatrixNormal(init_scale=1.0),
    )
    return blora, skipped


def of_draws(blora, batch):
    torch.manual_seed(1)
    return blora.predict(batch, 5, max_rows=2 * len(batch["input_ids"])).samples


@pytest.mark.parametrize("case", CASES)
def test_frozen_blocks_run_in_the_first_pass_alone(case, monkeypatch):
    torch.manual_seed(0)
    blora, batch = adapted(case, 4, [2, 3])
    blora.predict(batch, 2)  # the network is asked what it can do before passes are counted
    seen = passes(blora)
    found = of_draws(blora, batch)
    rows = seen[3] // 5
    assert seen == {0: rows, 1: rows, 2: 5 * rows, 3: 5 * rows}
    monkeypatch.setattr(predictive, "can_keep", lambda *_: False)
    seen.clear()
    expected = of_draws(blora, batch)
    assert seen == {0: 3 * rows, 1: 3 * rows, 2: 5 * rows, 3: 5 * rows}
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert expected.std(0).max() > 0.01


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_predict_the_same(name, monkeypatch):
    blora, skipped = of_architecture(name)
    batch = tiny.sequences(4)
    found = of_draws(blora, batch)
    blocks = frozen_blocks(blora.net, [adapter.name for adapter in blora.model.adapters])
    assert len(blocks) == 2
    assert can_skip(blora.net, blocks) == skipped
    monkeypatch.setattr(predictive, "can_keep", lambda *_: False)
    monkeypatch.setattr(predictive, "shared_prefix", lambda *_: nullcontext())
    expected = of_draws(blora, batch)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert expected.std(0).max() > 0.001


@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_across_epochs_gives_the_same_logits_or_is_refused(name):
    """Of rows that come a second time, in another order and beside others."""
    blora, skipped = of_architecture(name)
    if not skipped:
        with pytest.raises(ConfigurationError, match="without the cache"):
            PrefixCache(blora.net, blora.model.adapters)
        return
    batch = tiny.sequences(6)
    order = torch.tensor([5, 1, 2])
    again = {key: value[order] for key, value in batch.items()}
    logits = blora.likelihood.logits
    with torch.no_grad(), blora.model.applied(blora.sample_updates(1)) as net:
        expected = [logits(net, b) for b in (batch, again)]
        with PrefixCache(net, blora.model.adapters).in_place():
            found = [logits(net, b) for b in (batch, again)]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_another_input_is_never_taken_for_one_that_was_seen():
    """One that differs in what the encoder has read alone, and enters the decoder's blocks."""
    blora, _ = of_architecture("bart")
    first, second = tiny.sequences(4), tiny.sequences(4, seed=5)
    blocks = frozen_blocks(blora.net, [adapter.name for adapter in blora.model.adapters])
    logits = blora.likelihood.logits
    with torch.no_grad():
        expected = [logits(blora.net, b) for b in (first, second, first)]
        kept = predictive.KeptPrefix(blocks)
        with kept.in_place():
            found = [logits(blora.net, b) for b in (first, second, first)]
    assert kept.hits == 1
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)


def test_compiled_blocks_and_inputs_with_gradients_run_in_every_pass():
    net = tiny.llama(3)
    blocks = list(net.model.layers)[:2]
    assert not can_keep(net, blocks)
    with torch.no_grad():
        assert can_keep(net, blocks)
        net.forward = torch.compile(net.forward, backend="eager")
        assert not can_keep(net, blocks)
        del net.forward
        assert can_keep(net, blocks)
        blocks[1].compile(backend="eager")
        assert not can_keep(net, blocks)


def test_a_compiled_body_runs_in_every_pass():
    net = tiny.llama(3)
    net.model.compile(backend="eager")
    with torch.no_grad():
        assert not can_keep(net, list(net.model.layers)[:2])


def test_weights_that_are_shared_out_are_run_in_every_pass():
    """Processes would have to skip together."""
    net = tiny.llama(3)
    net.lm_head.weight.full_tensor = lambda: net.lm_head.weight  # as a DTensor has it
    with torch.no_grad():
        assert not can_keep(net, list(net.model.layers)[:2])


@pytest.mark.parametrize("kind", [list, tuple])
def test_blocks_may_put_out_lists(kind):
    hidden, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert in_place_of(kind((hidden, 5)), other) == kind((other, None))
    assert in_place_of(hidden, other) is other


def test_a_network_that_knows_of_no_cache_is_asked_without_one():
    net = tiny.llama(3)
    ids = torch.arange(8, 16).reshape(1, 8)
    with torch.no_grad():
        expected = net(input_ids=ids).logits
        own = net.forward
        net.forward = lambda input_ids, attention_mask: own(input_ids, attention_mask)
        torch.testing.assert_close(logits_for(net, ids), expected.flatten(0, 1))


def test_the_network_is_itself_between_passes_and_two_predictions_may_take_turns():
    blora, batch = adapted("llama", 4, [2, 3])
    with torch.no_grad():
        torch.manual_seed(1)
        expected = list(predictive.logits_of_draws(blora, batch, 4, 6))
        plain = blora.net(input_ids=batch["input_ids"]).logits
        torch.manual_seed(1)
        first = predictive.logits_of_draws(blora, batch, 4, 6)
        found = [next(first)]
        second = predictive.logits_of_draws(blora, batch, 4, 6)
        torch.testing.assert_close(blora.net(input_ids=batch["input_ids"]).logits, plain)
        found += list(first)
        next(second)
        second.close()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert all("forward" not in vars(block) for block in blora.net.model.layers)


def test_hooks_that_write_in_place_reach_nothing_that_is_kept(monkeypatch):
    """On the first of the frozen blocks, which is given it, and on the last, which puts it out."""
    blora, batch = adapted("llama", 4, [2, 3])
    below = blora.net.model.layers
    unchanged = of_draws(blora, batch)
    below[0].register_forward_pre_hook(lambda block, args: args[0].mul_(2))
    below[1].register_forward_hook(lambda block, args, output: output.mul_(-1))
    found = of_draws(blora, batch)
    monkeypatch.setattr(predictive, "can_keep", lambda *_: False)
    torch.testing.assert_close(found, of_draws(blora, batch), atol=2e-5, rtol=0)
    assert not torch.allclose(found, unchanged, atol=1e-3)


def test_blocks_that_write_over_what_they_are_given():
    block = torch.nn.Identity()
    block.forward = lambda hidden: hidden.mul_(2.0)
    kept = KeptPrefix([block])
    with kept.in_place():
        found = [block(torch.ones(2)) for _ in range(3)]
    assert kept.hits == 2
    torch.testing.assert_close(found, [torch.full((2,), 2.0)] * 3)


def test_hidden_states_may_enter_by_name():
    hidden = torch.ones(2, 3)
    assert entering((hidden, None), {}) is hidden
    for name in ("hidden_states", "hidden_state", "input", "x"):
        assert entering((), {"attention_mask": None, name: hidden}) is hidden


@pytest.mark.parametrize(
    ("seen", "given", "same"),
    [
        ([torch.ones(2), None, 3], [torch.ones(2), None, 3], True),
        ([torch.ones(2), "a", 0.5], [torch.ones(2), "a", 0.5], True),
        ([torch.ones(2)], [torch.ones(2), torch.zeros(2)], False),
        ([torch.ones(2), None], [torch.ones(2)], False),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.float64)], False),
        ([torch.ones(2)], [torch.ones(2, 1)], False),
        ([True], [1], False),
        ([object()], [object()], False),
    ],
)
def test_what_counts_as_the_same_inputs(seen, given, same):
    kept = KeptPrefix([torch.nn.Identity()])
    kept.blocks[0].forward = lambda *args: args[0]
    with kept.in_place():
        kept.blocks[0](*seen)
        kept.blocks[0](*given)
    assert kept.hits == same


@pytest.mark.parametrize("name", ["falcon", "bloom", "mpt", "opt"])
def test_draws_share_frozen_blocks_whatever_their_mask_has_first(name):
    blora, _ = of_architecture(name)
    batch = tiny.sequences(4)
    blora.predict(batch, 2)  # the network is asked before rows are counted
    seen = passes(blora)
    blora.predict(batch, 2)
    assert seen == {0: 4, 1: 4, 2: 8, 3: 8}


def test_blocks_that_were_replaced_are_asked_again():
    net = tiny.llama(3)
    assert can_skip(net, list(net.model.layers)[:2])
    net.model.layers[0] = torch.nn.Identity()  # hands on no more than it is given
    net.model.layers[0].forward = lambda hidden, **_: hidden
    seen = []
    net.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    can_skip(net, list(net.model.layers)[:2])
    assert seen
