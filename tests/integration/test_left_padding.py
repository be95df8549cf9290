"""Rows padded on the left give the logits of rows that are not, or an error says so."""

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import CausalLM, LabelTokens, SequenceClassification

BASE = {"vocab_size": 32, "pad_token_id": 0, "num_labels": 3}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32, **HEADS}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 24}
BART = {f"{side}_{kind}": n for side in ("encoder", "decoder") for kind, n in SIDE.items()}
CONFIGS = {
    "gpt2": GPT2,
    "gpt_neo": {"hidden_size": 16, "window_size": 4, "max_position_embeddings": 32, **GPT_NEO},
    "llama": WIDE,
    "qwen2": {**WIDE, "num_key_value_heads": 2},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, **HEADS},
    "roberta": {**WIDE, "pad_token_id": 1},
    "bert": WIDE,
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 2},
    "bart": {"d_model": 16, **BART},
}
# A state runs over the padding; positions are places in the row; the first place is read
REFUSED = {("tokens", "rwkv"), ("text", "rwkv"), ("tokens", "bart"), ("text", "bart")}
REFUSED |= {("classes", "bert"), ("classes", "roberta")}


def network(name, auto):
    torch.manual_seed(0)
    options = {**BASE, **CONFIGS[name], "is_decoder": auto is AutoModelForCausalLM}
    net = auto.from_config(AutoConfig.for_model(name, **options)).eval()
    return tiny.shaken(net, 0.3)


def rows(net, side):
    """Three rows of 4 to 6 tokens, padded on a side."""
    pad = net.config.pad_token_id
    ids = torch.randint(8, 32, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) < torch.tensor([[6], [5], [4]])).long()
    ids = ids.where(mask.bool(), pad)
    if side == "left":
        shift = 6 - mask.sum(-1)
        order = (torch.arange(6) - shift[:, None]) % 6
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


LIKELIHOODS = {
    "tokens": (AutoModelForCausalLM, LabelTokens(token_ids=tiny.ANSWERS)),
    "text": (AutoModelForCausalLM, CausalLM()),
    "classes": (AutoModelForSequenceClassification, SequenceClassification()),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_left_is_right(name, kind):
    auto, likelihood = LIKELIHOODS[kind]
    if kind == "classes" and name in ("rwkv", "bart"):
        pytest.skip(f"{name} has no classifier that reads the end of a row")
    net = network(name, auto)
    padded = rows(net, "left")
    if (kind, name) in REFUSED:
        with pytest.raises(BatchError, match=r"gives other logits then.*padding_side = 'right'"):
            likelihood.logits(net, padded)
        return
    found = likelihood.logits(net, padded)
    expected = likelihood.logits(net, rows(net, "right"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0.01
