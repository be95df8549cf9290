"""Every shortcut gives what the plain path gives: logits, gradients, hidden states, generation."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import CausalLM, LabelTokens, MultipleChoice, SequenceClassification
from pyro_blora.models import KroneckerInducing
from pyro_blora.network import fast_path
from pyro_blora.network.frozen_prefix import FrozenPrefix, frozen_blocks

TOKENS = LabelTokens(token_ids=tiny.ANSWERS, num_data=12)
CLASSES = SequenceClassification(num_data=12)
SIZES = {"vocab_size": 32, "hidden_size": 16}
HEADS = {"num_hidden_layers": 4, "num_attention_heads": 4}


def made(name, kind="CausalLM", **options):
    """A network that a prediction tells apart: its weights are large."""

    def make():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
        net = getattr(transformers, f"{name}For{kind}")(config).eval()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.8 * parameter.shape[-1] ** -0.5)
        return net

    return make


WIDE = {**HEADS, "intermediate_size": 24}
MPT = {"d_model": 16, "n_heads": 8, "n_layers": 4, "max_seq_len": 32}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}
ATTENTION = ["q_proj", "v_proj"]
FUSED = ["query_key_value"]
CHOICES = MultipleChoice(num_data=12)
UNPACKED = MultipleChoice(num_data=12, pack=False)

# network, adapted layers, likelihood, a batch
TESTED = {
    "llama": (lambda: tiny.llama(4), ATTENTION, TOKENS),
    "llama, eager": (lambda: tiny.llama(4, attn_implementation="eager"), ATTENTION, TOKENS),
    "llama, text": (lambda: tiny.llama(4), ATTENTION, CausalLM(num_data=12), tiny.texts),
    "llama, options": (lambda: tiny.llama(4), ATTENTION, CHOICES, tiny.choices),
    "llama, unpacked": (lambda: tiny.llama(4), ATTENTION, UNPACKED, tiny.choices),
    "qwen2": (lambda: tiny.qwen2(4), ATTENTION, TOKENS),
    "gpt2": (lambda: tiny.gpt2(4), ["c_attn"], TOKENS),
    "mixtral": (lambda: tiny.mixtral(4), ATTENTION, TOKENS),
    "bert": (lambda: tiny.bert(4), ["query", "value"], CLASSES),
    "mistral, window": (
        made("Mistral", **WIDE, num_key_value_heads=2, sliding_window=4), ATTENTION, TOKENS,
    ),
    "falcon, alibi": (
        made("Falcon", **HEADS, alibi=True, multi_query=False, parallel_attn=False), FUSED, TOKENS,
    ),
    "bloom": (made("Bloom", n_layer=4, n_head=4), FUSED, TOKENS),
    "mpt": (made("Mpt", **MPT), ["Wqkv"], TOKENS),
    "opt": (made("OPT", **HEADS, **OPT), ATTENTION, TOKENS),
    "phi": (made("Phi", **WIDE), ATTENTION, TOKENS),
    "convbert, which reads padding": (
        made("ConvBert", "SequenceClassification", **WIDE, num_labels=3), ["query"], CLASSES,
    ),
}  # fmt: skip
CASES = {name: (*case, tiny.sequences)[:4] for name, case in TESTED.items()}


def adapted(case, *, layers=(2, 3), **options):
    make, targets, likelihood, batch = CASES[case]
    blora = tiny.adapted(
        make(),
        target_modules=targets,
        likelihood=tiny.anew(options.pop("likelihood", likelihood)),
        layers_to_transform=list(layers),
        prior=KroneckerInducing(rank=2, sigma=2.0),
        guide=options.pop("guide", MatrixNormal(init_scale=1.0)),
        **options,
    )
    return blora, batch(6)


def blocks_of(net):
    return next(m for m in net.modules() if isinstance(m, torch.nn.ModuleList))


def rows_run(net):
    """How many rows each block has run; by its forward, for a hook would have it run every time."""
    seen = dict.fromkeys(range(len(blocks_of(net))), 0)

    def counting(index, forward):
        def counted(*args, **kwargs):
            seen[index] += (args[0] if args else kwargs["hidden_states"]).shape[0]
            return forward(*args, **kwargs)

        return counted

    for index, block in enumerate(blocks_of(net)):
        block.forward = counting(index, block.forward)
    return seen


def on(net, value):
    fast_path.put(net, on=value)


def scores(blora, batch, draws=5):
    """Of one draw after another, so that the order of the random numbers is that of no pass."""
    torch.manual_seed(1)
    if isinstance(blora.likelihood, CausalLM):
        return blora.log_predictive(batch, draws, max_rows=1)
    return blora.predict(batch, draws, max_rows=1).samples


def assert_plain_scores(blora, batch):
    found = scores(blora, batch)
    on(blora.net, False)
    expected = scores(blora, batch)
    on(blora.net, True)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    return expected


@pytest.mark.parametrize("case", CASES)
def test_predictions(case):
    blora, batch = adapted(case)
    assert assert_plain_scores(blora, batch).std(0).max() > 1e-3
    assert len(frozen_blocks(blora.net, blora.model.layer_names)) == 2
    assert blora.model.skippable_blocks()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_several_draws_in_a_pass_against_the_network_itself(case):
    """Logits by transformers alone, of the whole batch for every draw."""
    blora, batch = adapted(case)
    shape = batch["input_ids"].shape[-1]
    inputs = {k: batch[k].reshape(-1, shape) for k in ("input_ids", "attention_mask")}
    prefix, draws = FrozenPrefix(blora.net, blora.model.skippable_blocks()), 3
    thrice = {k: v.repeat(draws, 1) for k, v in inputs.items()}
    with blora.model.applied(blora.sample_updates(0)) as net, prefix.copies(1):
        net(**inputs)
    with blora.model.applied(blora.sample_updates(draws)) as net:
        expected = net(**thrice).logits
        with prefix.copies(draws):
            found = net(**thrice).logits
    if expected.dim() == 3:
        found, expected = (x[thrice["attention_mask"].bool()] for x in (found, expected))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_blocks_run_once_for_a_prediction():
    blora, batch = adapted("llama")
    blora.predict(batch, 3)  # asks
    seen = rows_run(blora.net)
    blora.predict(batch, 5, max_rows=100)
    assert seen == {0: 6, 1: 6, 2: 30, 3: 30}


@pytest.mark.parametrize("where", ["on a block", "inside of a block", "configuration", "batch"])
def test_who_looks_at_hidden_states_sees_those_of_every_draw(where):
    blora, batch = adapted("llama")
    blora.predict(batch, 3)
    kept, block = [], blora.net.model.layers[1]
    if where == "on a block":
        block.register_forward_hook(lambda m, args, out: kept.append(out))
    elif where == "inside of a block":
        block.mlp.register_forward_hook(lambda m, args, out: kept.append(out))
    else:  # the hidden states after the second block
        blora.net.config.output_hidden_states = where == "configuration"
        forward = blora.net.forward

        def noting(*args, **kwargs):
            shown = {"output_hidden_states": True} if where == "batch" else {}
            output = forward(*args, **{**kwargs, **shown})
            kept.append(output.hidden_states[2])
            return output

        blora.net.forward = noting
    if where == "batch":
        batch["output_hidden_states"] = True
    found = blora.predict(batch, 3, max_rows=100).samples
    assert found.isfinite().all()
    assert [len(hidden) for hidden in kept] == [18]
    for other in kept[0].chunk(3)[1:]:  # frozen, so alike in all draws
        torch.testing.assert_close(other, kept[0][:6])
    assert kept[0].std() > 0.01


def test_a_hook_on_the_head_sees_all_positions():
    blora, batch = adapted("llama")
    shapes = []
    with torch.no_grad():
        expected = blora.model.likelihood.logits(blora.net, batch)
        handle = blora.net.lm_head.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
        found = blora.model.likelihood.logits(blora.net, batch)
        handle.remove()
    assert shapes == [torch.Size([6, 7, tiny.VOCABULARY])]
    torch.testing.assert_close(found, expected)


def test_blocks_that_run_in_a_loop_are_run():
    """The second time round, a frozen block is given what the adapted one put out."""
    net = tiny.llama(4)
    first, second = net.model.layers[:2]
    net.model.layers = torch.nn.ModuleList([first, second, first, second])
    prior, guide = KroneckerInducing(rank=2, sigma=2.0), MatrixNormal(init_scale=1.0)
    blora = tiny.adapted(net, layers_to_transform=[1], prior=prior, guide=guide)
    assert_plain_scores(blora, tiny.sequences(4))


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


@pytest.mark.filterwarnings("ignore:.* does not give the same logits")
def test_a_network_that_cannot_be_asked_runs_plainly():
    blora = tiny.adapted(Plain(), target_modules=["blocks.2.0"], likelihood=CLASSES)
    assert blora.model.skippable_blocks() == []
    assert blora.predict(tiny.sequences(4), 5).samples.shape == (5, 4, 3)


@pytest.mark.parametrize("net", [tiny.llama(3), tiny.gpt2(3)], ids=["llama", "gpt2"])
def test_without_shortcuts_nothing_is_asked_and_all_is_run(net):
    blora = tiny.adapted(net, target_modules=None, layers_to_transform=[2], fast=False)
    blora.predict(tiny.sequences(4), 3)  # tells where the rows of a batch are
    seen, calls = rows_run(net), []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    blora.predict(tiny.sequences(4), 4, max_rows=100)
    assert seen == {0: 16, 1: 16, 2: 16}
    assert len(calls) == 1
    blora.unwrap()
    assert fast_path.is_on(net)


def test_a_changed_network_is_asked_again():
    blora, batch = adapted("llama")
    calls = []
    blora.net.register_forward_pre_hook(lambda *_: calls.append(1))

    def passes():
        calls.clear()
        blora.predict(batch, 2, max_rows=100)
        return len(calls)

    asked, again = passes(), passes()
    assert again == 2 < asked
    blora.net.set_attn_implementation("eager")
    assert passes() == asked
    blora.net.model.layers[3] = tiny.llama(4).model.layers[3]
    assert passes() > again


def test_an_answer_is_of_the_modules_themselves():
    """And not of their addresses, which others have when these are gone."""
    net, asked = torch.nn.Sequential(torch.nn.Linear(2, 2)), []
    for _ in range(20):
        net[0] = torch.nn.Linear(2, 2)
        assert fast_path.holds(net, "", lambda: not asked.append(1), net[0])
        assert fast_path.holds(net, "", lambda: False, net[0])
    assert len(asked) == 20


@pytest.mark.parametrize(
    ("layers", "change"),
    [
        ([0, 3], lambda net: None),
        ([2, 3], lambda net: net.model.layers[0].compile(backend="eager")),
        ([2, 3], lambda net: net.model.layers[0].register_forward_hook(lambda *_: None)),
    ],
)
def test_blocks_that_cannot_be_skipped_are_run(layers, change):
    blora, _ = adapted("llama", layers=layers)
    change(blora.net)
    assert blora.model.skippable_blocks() == []


def test_a_failing_pass_leaves_no_forward_behind():
    blora, batch = adapted("llama")
    blora.predict(batch, 2)
    before = [vars(block).get("forward") for block in blocks_of(blora.net)]
    batch["input_ids"][0, 0] = tiny.VOCABULARY + 5
    with pytest.raises(IndexError):
        blora.predict(batch, 3)
    assert [vars(block).get("forward") for block in blocks_of(blora.net)] == before


class Twice(LabelTokens):
    """Reads the rows, and the rows with their tokens turned round, or each row by itself."""

    row_by_row = False

    def logits(self, net, batch):
        if self.row_by_row:
            rows = [
                {k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))
            ]
            return torch.cat([super(Twice, self).logits(net, row) for row in rows])
        other = {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] == 0, 9)}
        return super().logits(net, batch) - super().logits(net, other)


@pytest.mark.parametrize("row_by_row", [False, True])
def test_a_likelihood_that_runs_the_network_several_times(row_by_row):
    likelihood = Twice(token_ids=tiny.ANSWERS, num_data=12)
    likelihood.row_by_row = row_by_row
    blora, batch = adapted("llama", likelihood=likelihood)
    assert_plain_scores(blora, batch)


def test_a_head_whose_weight_is_used_without_it():
    """As where it is tied by hand: no hook of the head is run."""
    blora, batch = adapted("llama, text")
    expected = scores(blora, batch)
    net = blora.net
    net.forward = lambda input_ids, attention_mask, use_cache=False, **other: SimpleNamespace(
        logits=torch.nn.functional.linear(
            net.model(input_ids, attention_mask=attention_mask, **other).last_hidden_state,
            net.lm_head.weight,
        )
    )
    torch.testing.assert_close(scores(blora, batch), expected)


def test_a_module_trained_below_the_blocks_has_them_run():
    options = {"target_modules": ["blocks.2.0"], "modules_to_save": ["embed"]}
    blora = tiny.adapted(Plain(), likelihood=CLASSES, **options)
    assert blora.model.skippable_blocks() == []
