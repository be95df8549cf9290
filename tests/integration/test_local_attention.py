"""Networks whose layers see a window or a chunk of a row: what is packed or kept is theirs."""

import pytest
import tiny
import torch
import transformers
from choice_batches import batch_of

from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import CausalLM, MultipleChoice
from pyro_blora.models import KroneckerInducing
from pyro_blora.network import fast_path
from pyro_blora.network.frozen_prefix import skippable_blocks

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
GPT_NEO = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 2]],
    "initializer_range": 0.3,
}
# Architecture, configuration, and the name of its window
LOCAL = {
    "Mistral": (SIZES, "sliding_window"),
    "Qwen2": ({**SIZES, "use_sliding_window": True, "max_window_layers": 1}, "sliding_window"),
    "Gemma2": ({**SIZES, "query_pre_attn_scalar": 4}, "sliding_window"),
    "Gemma3": ({**SIZES, "query_pre_attn_scalar": 4}, "sliding_window"),
    "GPTNeo": (GPT_NEO, "window_size"),
    "GptOss": ({**SIZES, **EXPERTS}, "sliding_window"),
    "Llama4": (
        {**SIZES, **EXPERTS, "intermediate_size_mlp": 24},
        "attention_chunk_size",
    ),
}
CHOICES = batch_of(
    [
        (range(3, 13), [(5, 6, 7, 8), (9,), (10, 11)], 0),
        (range(4, 10), [(12,), (13, 14, 15), (16, 17)], 1),
    ]
)  # rows of up to 14 tokens, and packed of 17


def local(name, window):
    options, key = LOCAL[name]
    torch.manual_seed(0)
    text = "Text" if name in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{name}{text}Config")(**options, **{key: window})
    net = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # so that a token misplaced shows
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return net


def by_hand(net, batch):
    """The mean log-likelihood of each option, in a row of its own."""
    scores = torch.zeros(batch["input_ids"].shape[:2])
    for i, k in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        real = batch["attention_mask"][i, k].bool()
        ids = batch["input_ids"][i, k][real]
        scored = batch["option_mask"][i, k][real].nonzero().squeeze(-1)
        row = net(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
        scores[i, k] = row.logits[0].log_softmax(-1)[scored - 1, ids[scored]].mean()
    return scores


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 16, 32])
@pytest.mark.parametrize("pack", [None, True])
@pytest.mark.parametrize("name", LOCAL)
def test_options_score_as_they_do_by_themselves(name, pack, window):
    net = local(name, window)
    expected = by_hand(net, CHOICES)
    rows = []
    net.get_input_embeddings().register_forward_hook(lambda m, args, out: rows.append(len(out)))
    scores = MultipleChoice(pack=pack).logits(net, CHOICES)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    if pack or window < 32:  # a window as long as the packed rows changes nothing
        assert rows[-1] == (2 if window == 32 else 6)
    wider = by_hand(local(name, 32), CHOICES)
    assert (wider - expected).abs().max() > 0.01 or window > 8


@pytest.mark.parametrize("name", LOCAL)
def test_frozen_blocks_keep_their_windows(name):
    blora = tiny.adapted(
        local(name, 4),
        target_modules=["q_proj"],
        layers_to_transform=[2, 3],
        likelihood=CausalLM(num_data=12),
        prior=KroneckerInducing(rank=2, sigma=2.0),
        guide=MatrixNormal(init_scale=1.0),
    )
    batch = tiny.texts(4, 14)

    def found():
        torch.manual_seed(1)
        return blora.log_predictive(batch, 5, max_rows=1)

    skipped = found()
    assert skippable_blocks(blora.net, blora.model.layer_names)
    fast_path.put(blora.net, on=False)
    torch.testing.assert_close(found(), skipped, atol=1e-4, rtol=0)


def test_attention_to_the_top_few_is_a_window_too():
    """Of sparse attention, whose choice a mask of one's own would not have."""
    net = tiny.llama()
    assert fast_path.window_of(net) is None
    net.config.index_topk = 8
    assert fast_path.window_of(net) == 8
