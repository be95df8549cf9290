"""Llama, GPT-2 and BERT: training fits the batch, and leaves the network what it was."""

import copy
from contextlib import nullcontext
from functools import partial

import pyro
import pytest
import tiny
import torch
import transformers as hf
from own_classes import OfX
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import nn

from pyro_blora.errors import BatchError, ParticleError
from pyro_blora.guides import Delta
from pyro_blora.inference import fit
from pyro_blora.likelihoods import CausalLM, LabelTokens, SequenceClassification
from pyro_blora.posterior.linearized import logit_jacobian

ROWS = tiny.examples(8)
BATCH = tiny.collate(ROWS)
del BATCH["index"]  # which a network does not take


def adapted(net, *, num_data=8, **options):
    likelihood = SequenceClassification(num_data=num_data)
    if hasattr(net, "lm_head"):
        likelihood = LabelTokens(token_ids=tiny.ANSWERS, num_data=num_data)
    return tiny.adapted(net, likelihood=likelihood, **{"target_modules": None, **options})


def outputs(net):
    """The logits, and the embeddings, which a head that is adapted may share."""
    ids = BATCH["input_ids"]
    with torch.no_grad():
        logits = net(input_ids=ids, attention_mask=BATCH["attention_mask"]).logits
        return {"logits": logits, "embeddings": net.get_input_embeddings()(ids)}


def objects(net):
    """Modules and parameters by name; tied ones are one."""
    parameters = net.named_parameters(remove_duplicate=False)
    return {name: id(part) for name, part in (*net.named_modules(), *parameters)}


def train_by_fit(blora):
    rates = {"mean": 0.1, "scale": 0.05, "direction": 0.02}
    fit(blora, ROWS, collate=tiny.collate, num_steps=30, progress=False, learning_rates=rates)


def train_by_svi(blora, steps=30, batch=BATCH):
    svi = SVI(blora.model, blora.guide, ClippedAdam({"lr": 5e-2}), tiny.elbo())
    for _ in range(steps):
        svi.step(batch)


@pytest.mark.parametrize(
    ("build", "targets", "train", "local"),
    [
        (tiny.llama, None, train_by_fit, False),
        (tiny.gpt2, None, train_by_svi, False),
        (tiny.bert, None, train_by_fit, False),
        (tiny.roberta, None, train_by_fit, True),
        (tiny.roberta, None, train_by_svi, False),
        (partial(tiny.llama, tied=True), ["lm_head"], train_by_svi, False),
    ],
)
def test_training_fits_the_batch_and_leaves_the_network(build, targets, train, local):
    """A new head is trained as a point, and nothing else of the network changes."""
    net = build()
    heads = {name for name, _ in net.named_parameters() if name.startswith("classifier.")}
    frozen = next(iter(net.parameters()))
    frozen.requires_grad_(False)  # by its owner: unwrap must not thaw it
    wanted = {name: p.requires_grad for name, p in net.named_parameters()}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parts, output = objects(net), outputs(net)

    with pyro.settings.context(module_local_params=local):
        blora = adapted(net, target_modules=targets)
        assert not any(p.requires_grad for p in net.parameters())
        start = blora.log_predictive(BATCH, 0).mean()
        train(blora)
    assert blora.log_predictive(BATCH, 0).mean() > 0.85 * start
    assert tiny.equal(net.state_dict(), before)
    assert all(p.grad is None for p in net.parameters())
    assert not net.training  # as it was found
    with blora.posterior(0):
        inside = outputs(net)
        assert {n for n, p in net.named_parameters() if not torch.equal(p, before[n])} == heads
    assert not torch.allclose(inside["logits"], output["logits"], atol=1e-3)
    assert torch.equal(inside["embeddings"], output["embeddings"])
    assert tiny.equal(outputs(net), output)  # outside, the network is as pretrained

    assert blora.unwrap() is net
    assert tiny.equal(outputs(net), output)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert objects(net) == parts
    assert {name: p.requires_grad for name, p in net.named_parameters()} == wanted


HEADS = [
    ({"modules_to_save": []}, (), None),
    ({"target_modules": "all-linear"}, ("classifier",), None),
    ({"modules_to_save": ["out_proj"]}, ("classifier.out_proj",), None),
    ({"target_modules": ["query", "out_proj"]}, (), "layers of classifier"),
]


@pytest.mark.parametrize(("options", "names", "warned"), HEADS)
def test_which_heads_are_trained(options, names, warned):
    with pytest.warns(UserWarning, match=warned) if warned else nullcontext():
        assert adapted(tiny.roberta(), **options).model.trained_heads.names == names


def test_the_gradient_of_a_head_is_that_of_the_plain_network():
    """Every row of the batch counts, whichever particle sees it."""
    net = tiny.roberta()
    plain = copy.deepcopy(net)
    blora = adapted(net, guide=Delta())  # whose update starts at zero
    tiny.elbo()(blora.model, blora.guide)(BATCH).backward()
    (8 * plain(**BATCH).loss).backward()
    for name, own in plain.classifier.named_parameters(prefix="classifier"):
        attribute = name.replace(".", "_") + "_unconstrained"
        torch.testing.assert_close(getattr(blora.model.trained_heads, attribute).grad, own.grad)


def test_an_encoder_decoder_classifies_sequences():
    ends = BATCH["attention_mask"].sum(-1, keepdim=True) - 1
    batch = {**BATCH, "input_ids": BATCH["input_ids"].scatter(1, ends, 1)}
    sizes = {"vocab_size": tiny.VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2}
    sizes |= {"eos_token_id": 1, "decoder_start_token_id": 0, "num_heads": 4, "num_labels": 3}
    blora = adapted(hf.T5ForSequenceClassification(hf.T5Config(**sizes)).eval())
    assert blora.model.trained_heads.names == ("classification_head",)
    start = blora.log_predictive(batch, 0).mean()
    train_by_svi(blora, 10, batch)
    assert blora.log_predictive(batch, 0).mean() > start
    assert blora.predict(batch, 2).samples.shape == (2, 8, 3)


SMALL = {"vocab_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
SMALL |= {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3, "num_labels": 3}
WINDOWS = {"attention_window": 8, "max_position_embeddings": 64}
DEBERTA = {"relative_attention": True, "position_buckets": 8, "share_att_key": True}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24, "vocab_size": 32}
XLNET |= {"initializer_range": 0.3, "num_labels": 3}
MIXING = {
    "Longformer": (SMALL | WINDOWS, ["query", "value"]),
    "DebertaV2": (SMALL | DEBERTA, ["query_proj", "value_proj"]),
    "XLNet": (XLNET, ["ff.layer_1"]),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_network_that_mixes_rows_runs_under_one_draw_in_a_pass(name):
    """Against the network with each draw in its weights."""
    options, targets = MIXING[name]
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**options)
    net = getattr(hf, f"{name}ForSequenceClassification")(config).eval()
    plain, likelihood = copy.deepcopy(net), SequenceClassification(num_data=8)
    blora = tiny.adapted(net, target_modules=targets, likelihood=likelihood)
    sites = {site.name: torch.randn(8, *site.shape) for site in blora.model.sites}
    updates, expected = blora.posterior._updates_at(sites, 8), []
    batch = tiny.sequences(8, 16)
    if name == "XLNet":  # which is padded on the left
        with pytest.raises(BatchError, match="reads a row's last token"):
            blora.predict(batch, 0)
        batch |= {key: batch[key].flip(1) for key in ("input_ids", "attention_mask")}
    for draw in range(8):
        one = copy.deepcopy(plain)
        for group in blora.model.groups:
            for layer, update in zip(group.module_names, updates[group.name].layers(), strict=True):
                one.get_submodule(layer).weight.data += update.weight()[draw].detach()
        expected.append(one(**tiny.unlabeled(batch)).logits.softmax(-1).detach())
    with pytest.warns(UserWarning, match="each draw takes a pass"):
        found = blora.predict(batch, samples=sites).samples
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    with pytest.raises(ParticleError, match="one draw in a pass"), blora.posterior(8) as several:
        several(**tiny.unlabeled(batch))
    _, jacobian = logit_jacobian(blora.model, blora.guide, batch)
    row = {key: value[3:4] for key, value in batch.items()}
    _, alone = logit_jacobian(blora.model, blora.guide, row)
    assert all(torch.allclose(jacobian[n][3:4], alone[n], atol=1e-5) for n in alone)
    fit(blora, [{k: v[i] for k, v in batch.items()} for i in range(8)], num_steps=2, progress=False)


class SequenceFirst(nn.Module):
    """Torch's encoder with the rows in the second dimension, its default, on numbers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.encoder(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("steps", [8, 7])  # which four draws divide, or do not
def test_a_network_of_ones_own_that_mixes_rows_is_found_by_its_first_batch(steps):
    torch.manual_seed(0)
    net = SequenceFirst().eval()
    plain = copy.deepcopy(net)
    batch = {"x": torch.randn(4, steps, 8), "labels": torch.arange(4) % 3}
    blora = tiny.adapted(net, target_modules=["linear1"], likelihood=OfX(num_data=4))
    sites = {site.name: torch.randn(4, *site.shape) for site in blora.model.sites}
    (update,) = blora.posterior._updates_at(sites, 4)["linear1"].layers()
    with pytest.warns(UserWarning, match="each draw takes a pass"):
        found = blora.predict(batch, samples=sites).samples
    for draw in range(4):
        one = copy.deepcopy(plain)
        one.encoder.layers[0].linear1.weight.data += update.weight()[draw].detach()
        expected = one(batch["x"]).softmax(-1).detach()
        torch.testing.assert_close(found[draw], expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ParticleError, match="one draw in a pass"):
        tiny.elbo(4)(blora.model, blora.guide)(batch)


@pytest.mark.filterwarnings("ignore:An adapted layer of XLNetLMHeadModel")
def test_a_language_model_that_mixes_rows_learns_text_and_scores_it():
    net = hf.XLNetLMHeadModel(hf.XLNetConfig(**XLNET)).eval()
    batch, likelihood = tiny.texts(4), CausalLM(num_data=4)
    blora = tiny.adapted(net, target_modules=["ff.layer_1"], likelihood=likelihood)
    torch.manual_seed(0)
    found = blora.log_predictive(batch, 3)
    torch.manual_seed(0)
    torch.testing.assert_close(found, blora.log_predictive(batch, 3, max_rows=1))
    fit(blora, [{k: v[i] for k, v in batch.items()} for i in range(4)], num_steps=2, progress=False)


def test_a_first_row_that_the_update_does_not_change_decides_nothing():
    """Queries of a row of one token have no effect."""
    blora = tiny.adapted(
        target_modules=["q_proj"], likelihood=LabelTokens(token_ids=tiny.ANSWERS, num_data=4)
    )
    batch = tiny.sequences(4)
    batch["attention_mask"][0, 1:] = 0
    assert blora.model.keeps_rows(blora.model.prepared(batch))
