"""``fit(cache_frozen_prefix=True)``: frozen blocks run in the first epoch alone, equal losses."""

import warnings
from types import SimpleNamespace

import pyro
import pytest
import tiny
import torch
from choice_batches import batch_of
from test_shared_prefix import CASES, adapted
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from pyro_blora.errors import ConfigurationError
from pyro_blora.guides import Isotropic, Laplace
from pyro_blora.inference import fit
from pyro_blora.likelihoods import (
    CausalLM,
    LabelTokens,
    MultipleChoice,
    SequenceClassification,
)
from pyro_blora.network.cached_prefix import PrefixCache, _keys

ROWS = 10
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3}


def passes(blora):
    """The rows that each block sees, block by block; a skipped one sees none."""
    seen = {}
    blocks = next(m for m in blora.net.modules() if isinstance(m, torch.nn.ModuleList))
    for index, block in enumerate(blocks):
        forward = block.forward

        def counted(*args, index=index, forward=forward, **kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[index] = seen.get(index, 0) + hidden.shape[0]
            return forward(*args, **kwargs)

        block.forward = counted
    return seen


def history(blora, rows, collate, **options):
    options = {"num_steps": 9, "batch_size": 4, "progress": False, **options}
    result = fit(blora, rows, collate=collate, **options)
    return torch.tensor([step["loss"] for step in result.history])


def of_rows(batch):
    """The rows of a batch as examples, and what collates them again."""
    rows = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]
    return rows, torch.utils.data.default_collate


def unpadded():
    """Eight rows of seven tokens, and what collates them."""
    batch = tiny.sequences(8)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    return of_rows(batch)


def assert_same_losses(blora, rows, collate, atol=1e-5):
    start = {k: v.clone() for k, v in blora.state_dict().items()}
    expected = history(blora, rows, collate)
    blora.load_state_dict(start)
    found = history(blora, rows, collate, cache_frozen_prefix=True)
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)
    assert expected[0] != expected[-1]


def run_in_five_epochs(blora):
    """The rows that each block sees of eight that have no padding."""
    rows, collate = unpadded()
    seen = passes(tiny.asked(blora))
    history(blora, rows, collate, num_steps=10, cache_frozen_prefix=True)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_the_same_losses(case):
    torch.manual_seed(0)
    blora, batch = adapted(case, 4, [2, 3])
    assert_same_losses(blora, *of_rows(batch), atol=1e-4)


def test_rows_skip_the_frozen_blocks_from_the_second_epoch_on_whatever_their_padding():
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    start = {k: v.clone() for k, v in blora.state_dict().items()}
    rows = tiny.examples(ROWS)
    expected = history(blora, rows, tiny.collate, num_steps=9)
    blora.load_state_dict(start)
    seen = passes(tiny.asked(blora))
    found = history(blora, rows, tiny.collate, num_steps=9, cache_frozen_prefix=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    epochs = 3
    # a row is a new one where it comes without any mask, as the longest of its batch
    assert ROWS <= seen[0] < 2 * ROWS
    assert seen[2] == epochs * ROWS


def test_without_padding_each_row_runs_once():
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    assert run_in_five_epochs(blora) == {0: 8, 1: 8, 2: 40}


def test_a_cache_of_no_use_says_so():
    """Fits of several epochs, as in the other tests, would fail if it said so there."""
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    rows, collate = unpadded()
    # eight rows, for those of the network's first questions do not count
    with pytest.warns(UserWarning, match="of 8 rows 0 have skipped the frozen blocks, and"):
        history(blora, rows, collate, num_steps=2, cache_frozen_prefix=True)


def test_a_second_epoch_is_use_enough():
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    rows, collate = unpadded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history(blora, rows, collate, num_steps=4, cache_frozen_prefix=True)


def test_position_biases_as_long_as_a_batch_leave_the_cache_without_use():
    net = BloomForCausalLM(BloomConfig(**{**SIZES, "vocab_size": 64}))
    layers = {"target_modules": ["query_key_value"], "layers_to_transform": [2]}
    blora = tiny.adapted(net, **layers)
    with pytest.warns(UserWarning, match="or BloomForCausalLM gives its blocks what changes"):
        history(blora, tiny.examples(16), tiny.collate, num_steps=16, cache_frozen_prefix=True)


def test_one_new_row_in_each_batch_leaves_the_cache_without_use():
    """Most rows come again, and hardly a pass skips a block."""

    def padded_on_the_left(rows):
        batch = tiny.collate(rows)
        for row, real in zip(*(batch[k] for k in ("input_ids", "attention_mask")), strict=True):
            shift = int((real == 0).sum())
            row.copy_(row.roll(shift))
            real.copy_(real.roll(shift))
        return batch

    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    rows, options = tiny.examples(64), {"batch_size": 8, "num_steps": 40}
    for index, row in enumerate(rows):
        row["input_ids"] = row["input_ids"][0].repeat(3 + 7 * index % 23)
    with pytest.warns(UserWarning, match="or with other padding on their left at each visit"):
        history(blora, rows, padded_on_the_left, cache_frozen_prefix=True, **options)


def test_packed_items_run_once_whatever_their_padding():
    items = [
        (range(8, 10 + i % 5), [(5, 6), (7,), range(20, 21 + i % 3)], i % 3) for i in range(ROWS)
    ]
    likelihood = MultipleChoice(num_data=ROWS)
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2], likelihood=likelihood)
    start = {k: v.clone() for k, v in blora.state_dict().items()}
    expected = history(blora, items, batch_of)
    blora.load_state_dict(start)
    PrefixCache(blora.net, blora.model.adapters)  # asks what was not yet asked
    seen = passes(blora)
    found = history(blora, items, batch_of, cache_frozen_prefix=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert seen == {0: ROWS, 1: ROWS, 2: 3 * ROWS}


@pytest.mark.parametrize("draws", [0, 3])
def test_validation_rows_run_once_and_count_the_same(draws):
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    start = {k: v.clone() for k, v in blora.state_dict().items()}
    rows, held = tiny.examples(12)[:ROWS], tiny.examples(12)[ROWS:]
    options = {"validation": held, "validate_every": 2, "validation_samples": draws}
    options |= {"num_steps": 8, "batch_size": 5, "progress": False, "collate": tiny.collate}
    expected = fit(blora, rows, **options).validation
    blora.load_state_dict(start)
    seen = passes(tiny.asked(blora))
    fit(blora, rows, cache_frozen_prefix=True, **{**options, "validation": None})
    of_training = seen.pop(0)
    blora.load_state_dict(start)
    found = fit(blora, rows, cache_frozen_prefix=True, **options).validation
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert len(found) == 4
    assert expected[0] != expected[-1]
    assert seen[0] == of_training + len(held)


@pytest.mark.parametrize("guide", [Laplace(), Isotropic()])
def test_post_hoc_guides_find_the_same_width_and_run_no_frozen_block_for_it(guide):
    widths = []
    for cached in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2], guide=guide)
        rows, collate = unpadded()
        seen = passes(tiny.asked(blora))
        history(blora, rows, collate, cache_frozen_prefix=cached)
        assert (seen[0] == 8) is cached
        torch.manual_seed(0)
        widths.append(blora.predict(collate(rows), 4).samples.var(0))
    torch.testing.assert_close(*widths, atol=1e-5, rtol=1e-3)
    assert widths[0].amax() > 1e-4


class Handed(torch.nn.Module):
    """A block whose own names of its arguments are not told."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def test_a_batch_may_have_any_names():
    """BERT hands on to its blocks what it does not know."""
    blora = tiny.adapted(
        tiny.bert(3),
        target_modules=["query"],
        layers_to_transform=[2],
        likelihood=SequenceClassification(num_data=ROWS),
    )

    def collate(rows):
        batch = tiny.collate(rows)
        return {**batch, "own": batch["index"], "weight": batch["index"] / 7}

    start = {k: v.clone() for k, v in blora.state_dict().items()}
    expected = history(blora, tiny.examples(ROWS), collate)
    blora.load_state_dict(start)
    tiny.asked(blora)
    seen = []
    within = blora.net.bert.encoder.layer[0].output
    within.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    found = history(blora, tiny.examples(ROWS), collate, cache_frozen_prefix=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert ROWS <= sum(seen) < 2 * ROWS  # of what each row has one of, its key has its own
    assert blora.predict(collate(tiny.examples(4)), 6, max_rows=8).samples.shape == (6, 4, 3)


@pytest.mark.parametrize("pad", [-1, 32, None])
def test_a_padding_token_may_be_none_of_the_vocabulary(pad):
    net = tiny.llama(3)
    net.config.pad_token_id = pad
    blora = tiny.adapted(net, layers_to_transform=[2])
    with PrefixCache(net, blora.model.adapters).in_place():
        assert net(tiny.sequences()["input_ids"]).logits.shape == (4, 7, 32)


def test_blocks_that_read_one_position_ahead_are_refused():
    """What stands there is padding at one visit, and nothing at another."""

    class Ahead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv1d(16, 16, 3, padding=1)

        def forward(self, hidden):
            return self.convolution(hidden.mT).mT

    torch.manual_seed(0)
    net = tiny.llama(3)
    net.model.layers[0].mlp = Ahead()
    blora = tiny.adapted(net, layers_to_transform=[2])
    with pytest.raises(ConfigurationError, match="depends on its padding"):
        PrefixCache(net, blora.model.adapters)


@pytest.mark.parametrize("attention", ["flex_attention", "eager", "sdpa"])
def test_a_refusal_names_the_attention_that_would_do(attention):
    net = tiny.llama(3)
    net.set_attn_implementation(attention)
    torch.nn.init.zeros_(net.lm_head.weight)  # for another reason where it would do
    blora = tiny.adapted(net, layers_to_transform=[2])
    with pytest.raises(ConfigurationError) as refusal:
        PrefixCache(net, blora.model.adapters)
    remedy = "attn_implementation='sdpa' instead of 'flex_attention'"
    assert (remedy in str(refusal.value)) == (attention == "flex_attention")


@pytest.mark.parametrize("target", [r".*layer\.2\..*layer_1", "lm_loss"])
def test_rows_in_the_second_dimension_are_refused(target):
    """They are where blocks begin, though the head has them first."""
    net = XLNetLMHeadModel(XLNetConfig(vocab_size=32, d_model=16, n_layer=3, n_head=4, d_inner=24))
    blora = tiny.adapted(net.eval(), target_modules=target)
    with pytest.raises(ConfigurationError, match="row by row"):
        PrefixCache(net, blora.model.adapters)


def test_a_head_of_zeros_tells_nothing():
    net = tiny.llama(3)
    torch.nn.init.zeros_(net.lm_head.weight)
    blora = tiny.adapted(net, layers_to_transform=[2])
    with pytest.raises(ConfigurationError, match="gives other logits, or none"):
        PrefixCache(net, blora.model.adapters)


def test_a_row_is_asked_with_the_padding_that_the_network_knows():
    """It reads the class at the last token that is not that one."""
    config = tiny.llama(3).config
    config.pad_token_id, config.num_labels = 31, 3
    torch.manual_seed(0)
    net = LlamaForSequenceClassification(config).eval()
    blora = tiny.adapted(
        net, layers_to_transform=[2], likelihood=SequenceClassification(num_data=ROWS)
    )
    assert PrefixCache(net, blora.model.adapters)


class MaskFirst(torch.nn.Module):
    """A block whose mask, of a token each, comes before its hidden states, both by name."""

    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(16, 16)

    def forward(self, attention_mask=None, hidden_states=None):
        seen = attention_mask.unsqueeze(-1)
        mean = (hidden_states * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return torch.where(seen, self.dense(hidden_states) + mean, hidden_states)


class OfMaskFirst(torch.nn.Module):
    def __init__(self):
        super().__init__()
        net = tiny.bert(1)
        self.config, self.embeddings, self.head = net.config, net.bert.embeddings, net.classifier
        self.layers = torch.nn.ModuleList(MaskFirst() for _ in range(3))

    def forward(self, input_ids, attention_mask, **options):
        hidden = self.embeddings(input_ids)
        for block in self.layers:
            hidden = block(attention_mask=attention_mask.bool(), hidden_states=hidden)
        return SimpleNamespace(logits=self.head(hidden[:, 0]))


def test_a_row_under_another_mask_is_another_row():
    torch.manual_seed(0)
    net = OfMaskFirst().eval()
    likelihood = SequenceClassification(num_data=4)
    blora = tiny.adapted(net, target_modules=r"layers\.2\.dense", likelihood=likelihood)
    ids, mask = tiny.sequences()["input_ids"], torch.ones(4, 7, dtype=torch.long)
    masks = [mask, mask.clone(), mask.clone(), mask]
    masks[1][:, 2], masks[2][:, 4:] = 0, 0
    with torch.no_grad():
        expected = [net(ids, mask).logits for mask in masks]
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        cache = PrefixCache(net, blora.model.adapters)
        with cache.in_place():
            for mask, logits in zip(masks, expected, strict=True):
                torch.testing.assert_close(net(ids, mask).logits, logits)
    assert len(cache._rows.kept) == 12
    assert cache._rows.visits == 16


def test_positions_that_all_rows_share_are_no_rows():
    """Of as many rows as positions."""
    positions = torch.arange(4)
    keys, lengths = _keys(torch.ones(4, 4, 2), {"cache_position": positions})
    assert len(set(keys)) == 1
    assert lengths == [4] * 4
    others, _ = _keys(torch.ones(4, 4, 2), {"cache_position": positions + 1})
    assert set(keys).isdisjoint(others)


def test_what_is_kept_keeps_no_batch():
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    cache = PrefixCache(blora.net, blora.model.adapters)
    with cache.in_place():
        blora.net(**{k: v for k, v in tiny.sequences().items() if k != "labels"})
    kept = list(cache._rows.kept.values())
    assert len(kept) == 4
    assert all(row.untyped_storage().nbytes() == row.nbytes for row in kept)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_body_that_is_compiled_is_asked_as_it_stands():
    """Its graph of a fit without the cache would be run, or made anew at each question."""
    torch._dynamo.reset()
    net = tiny.llama(3)
    net.model.compile(backend="eager")
    graph = net.model._compiled_call_impl
    blora = tiny.adapted(net, layers_to_transform=[2])
    assert_same_losses(blora, tiny.examples(ROWS), tiny.collate)
    assert net.model._compiled_call_impl is graph
    assert graph is not None
    torch._dynamo.reset()


def test_a_network_of_few_positions_is_asked_within_them():
    net = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=4, n_positions=8)
    ).eval()
    blora = tiny.adapted(net, target_modules=["c_attn"], layers_to_transform=[2])
    assert PrefixCache(net, blora.model.adapters)


def test_blocks_that_read_padding_are_refused():
    """A convolution looks at the positions beside a token, padded or not."""
    torch.manual_seed(0)
    net = ConvBertForSequenceClassification(
        ConvBertConfig(**SIZES, intermediate_size=24, embedding_size=16, num_labels=3)
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    blora = tiny.adapted(
        net,
        target_modules=["query"],
        layers_to_transform=[2],
        likelihood=SequenceClassification(num_data=ROWS),
    )
    with pytest.raises(ConfigurationError, match="depends on its padding"):
        PrefixCache(net, blora.model.adapters)


@pytest.mark.parametrize("named", [False, True])
def test_the_same_tokens_under_another_mask_are_another_row(named):
    net = tiny.gpt2(4)
    if not named:
        net.transformer.h = torch.nn.ModuleList([Handed(block) for block in net.transformer.h])
    blora = tiny.adapted(net, target_modules=r".*h\.[23].*c_attn")
    whole = {"input_ids": torch.arange(8, 20).reshape(2, 6), "attention_mask": torch.ones(2, 6)}
    holed = {**whole, "attention_mask": whole["attention_mask"].clone()}
    holed["attention_mask"][:, 2] = 0
    expected = [net(**inputs).logits for inputs in (whole, holed)]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    with PrefixCache(net, blora.model.adapters).in_place():
        found = [net(**inputs).logits for inputs in (whole, holed, whole)]
    torch.testing.assert_close(found, [*expected, expected[0]])


def test_the_same_tokens_under_another_bias_are_another_row():
    """A mask that is no mask alone does not tell what is seen."""
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    hidden = torch.full((6, 6), -torch.inf).triu(1)
    ids = torch.arange(8, 20).reshape(2, 6)
    masks = [(hidden - slope * torch.rand(6, 6)).expand(2, 1, -1, -1) for slope in (1.0, 5.0)]
    expected = [blora.net(ids, attention_mask=mask).logits for mask in masks]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    with PrefixCache(blora.net, blora.model.adapters).in_place():
        found = [blora.net(ids, attention_mask=mask).logits for mask in masks]
    torch.testing.assert_close(found, expected)


def test_dropout_below_is_off_and_everything_is_put_back():
    net = tiny.gpt2(3)
    net.transformer.drop.p = 0.5
    net.transformer.h[0].mlp.dropout.p = 0.5
    likelihood = LabelTokens(token_ids=tiny.ANSWERS, num_data=8)
    blora = tiny.adapted(
        net, target_modules=["c_attn"], layers_to_transform=[2], likelihood=likelihood
    )
    rows, collate = unpadded()
    tiny.asked(blora)
    seen = passes(blora)
    history(blora, rows, collate, num_steps=6, cache_frozen_prefix=True)
    assert seen[0] == 8
    assert seen[2] == 24
    cache = PrefixCache(net, blora.model.adapters)
    net.train()
    forwards = [block.forward for block in net.transformer.h]
    with cache.in_place():
        assert not net.transformer.drop.training
        assert not net.transformer.h[0].mlp.dropout.training
        assert net.transformer.h[2].training
    assert all(module.training for module in net.modules())
    assert [block.forward for block in net.transformer.h] == forwards


def xglm():
    config = XGLMConfig(
        vocab_size=32, d_model=16, ffn_dim=24, attention_heads=4, num_layers=3, dropout=0.5
    )
    return XGLMForCausalLM(config)


def opt():
    config = OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0, layerdrop=0.5)
    return OPTForCausalLM(config)


def phi():
    return PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=24, embd_pdrop=0.5))


class InDictionary(torch.nn.Module):
    """As nanoGPT has it: the blocks and the rest in a ``ModuleDict``, dropout by a function."""

    def __init__(self):
        super().__init__()
        net = tiny.bert(3)
        self.config = net.config
        self.parts = torch.nn.ModuleDict(
            {"tokens": net.bert.embeddings, "layers": net.bert.encoder.layer, "out": net.classifier}
        )

    def forward(self, input_ids, attention_mask, **options):
        hidden = self.parts["tokens"](input_ids)
        hidden = torch.nn.functional.dropout(hidden, 0.5, self.training)
        for block in self.parts["layers"]:
            hidden = block(hidden)
        return SimpleNamespace(logits=self.parts["out"](hidden[:, 0]))


def bert():
    net = tiny.bert(3)
    net.bert.embeddings.dropout.p = 0.5
    return net


@pytest.mark.parametrize("make", [xglm, opt, phi, bert, InDictionary])
def test_what_runs_the_blocks_drops_nothing_out(make):
    """Of what it embeds: in XGLM by a function, in Phi by a late leaf, in BERT by an early one.

    Or whole blocks, in OPT.
    """
    net = make()
    options = {}
    if make in (bert, InDictionary):
        options["likelihood"] = SequenceClassification(num_data=8)
    blora = tiny.adapted(net.eval(), target_modules=r".*layers?\.2\..*(query|q_proj)", **options)
    assert run_in_five_epochs(blora) == {0: 8, 1: 8, 2: 40}


def test_where_activations_are_checkpointed_what_drops_rows_out_is_told():
    """What runs the blocks stays in training mode there, and XGLM drops out in it."""
    net = xglm().eval()
    net.activation_checkpointing_enable({"use_reentrant": False})
    blora = tiny.adapted(net, target_modules=r".*layers\.2\..*q_proj")
    with pytest.warns(UserWarning, match="or dropout under activation checkpointing"):
        run_in_five_epochs(blora)


def test_activations_may_be_checkpointed():
    """By the network's mode GPT-2 decides whether to keep keys and values, block by block."""
    config = tiny.gpt2(3).config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    net = GPT2ForSequenceClassification(config).eval()
    net.activation_checkpointing_enable({"use_reentrant": False})
    likelihood = SequenceClassification(num_data=ROWS)
    blora = tiny.adapted(net, target_modules=r".*h\.2.*c_attn", likelihood=likelihood)
    assert_same_losses(blora, tiny.examples(ROWS), tiny.collate)


def test_a_pass_that_leaves_the_first_block_out_is_an_error():
    """Its rows would be taken for those of the pass before."""
    blora = tiny.adapted(tiny.llama(3), layers_to_transform=[2])
    ids = tiny.sequences()["input_ids"]
    cache = PrefixCache(blora.net, blora.model.adapters)
    with cache.in_place():
        blora.net(ids)
        blora.net.model.layers = blora.net.model.layers[1:]
        with pytest.raises(ConfigurationError, match="came to block 1"):
            blora.net(ids)


def test_nothing_below_the_adapters_is_refused():
    with pytest.raises(ConfigurationError, match="layers_to_transform"):
        history(tiny.adapted(), tiny.examples(), tiny.collate, cache_frozen_prefix=True)


def test_a_network_frozen_to_its_last_block_keeps_all_positions():
    """What another visit reads of it may be another position."""
    net = tiny.llama(2)
    blora = tiny.adapted(net, target_modules=["lm_head"], likelihood=CausalLM(num_data=4))
    batch = tiny.texts(4, 12)
    early, late = ({**batch, "labels": batch["labels"].clone()} for _ in range(2))
    early["labels"][:, 4:] = -100
    late["labels"][:, :8] = -100
    with blora.model.applied(blora.sample_updates(0)):
        expected = [blora.likelihood.logits(net, b) for b in (early, late)]
        with PrefixCache(net, blora.model.adapters).in_place():
            found = [blora.likelihood.logits(net, b) for b in (early, late)]
    torch.testing.assert_close(found, expected)
