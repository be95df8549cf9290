"""TokenClassification beside transformers."""

import sys
from types import SimpleNamespace

import datasets
import pytest
import tiny
import torch
from kinds import FEW, NETS, PARTS, ROWS, TOKENIZER, WORDS, adapter
from kinds import TAGS as NAMES
from torch.utils.data import DataLoader
from transformers import LlamaForTokenClassification

from pyro_blora import compare, fit
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.likelihoods import TagCollator, TokenClassification

ROWS, tagger = ROWS["tags"], NETS["tags"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_has_the_words_in_order(side, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "padding_side", side)
    rows = [{"tokens": words, "tags": [*range(len(words))]} for words in (WORDS, WORDS[:2])]
    batch, likelihood = TagCollator(TOKENIZER)(rows), TokenClassification()
    assert likelihood.labels(batch).tolist() == [[*range(7)], [0, 1, *[-100] * 5]]
    assert torch.equal(batch["labels"] != -100, batch["word_mask"])
    starts = [TOKENIZER(text, add_special_tokens=False)["input_ids"][0] for text in ("a", "?")]
    assert batch["input_ids"][batch["word_mask"]][[0, 6]].tolist() == starts  # "?" for no text
    with pytest.warns(UserWarning, match="A row of 7 words keeps its first"):
        cut = TagCollator(TOKENIZER, max_length=6)(rows)
    assert torch.equal(likelihood.labels(cut)[0], torch.arange(cut["word_mask"][0].sum()))
    net = LlamaForTokenClassification(tiny.llama(vocab_size=400, num_labels=3).config).eval()
    alone = likelihood.logits(net, TagCollator(TOKENIZER)(rows[1:]))
    torch.testing.assert_close(likelihood.logits(net, batch)[1:, :2], alone)
    monkeypatch.setattr(TOKENIZER, "truncation_side", "left")
    with pytest.raises(ConfigurationError, match="truncation_side must be 'right'"):
        TagCollator(TOKENIZER)(rows)


def test_loss_and_gradients_are_those_of_transformers():
    net, likelihood = tagger(), TokenClassification()
    batch = TagCollator(TOKENIZER, NAMES)(ROWS[:6])
    plain = {key: value for key, value in batch.items() if key != "word_mask"}
    for given in (batch, plain):
        labels = likelihood.labels(given)
        logp = likelihood.distribution(likelihood.logits(net, given), labels).log_prob(labels)
        losses = -logp.sum(), net(**plain).loss * (labels >= 0).sum()
        both = ((loss, torch.autograd.grad(loss, net.parameters())) for loss in losses)
        torch.testing.assert_close(*both)


def test_predictions_have_the_words_in_order():
    blora = adapter("tags")
    with pytest.raises(ConfigurationError, match="num_labels=4"):
        fit(blora, [*ROWS, {"tokens": ["a"], "tags": ["X"]}], **FEW)
    fit(blora, ROWS, held_out=0.25, **FEW)
    assert blora.likelihood.classes == NAMES
    prediction, labels = blora.predict_dataset(ROWS, num_samples=0, batch_size=5)
    for k, row in enumerate(ROWS):  # in the order of the data, although lengths differ
        count = len(row["tokens"])
        torch.testing.assert_close(prediction.probs[k, :count], blora.predict([row], 0).probs[0])
        assert (prediction.entropy[k, count:] == 0).all()
        assert labels[k].tolist() == [*map(NAMES.index, row["tags"]), *[-100] * (4 - count)]
    metrics = blora.evaluate(ROWS, num_samples=0)
    assert metrics.nll == pytest.approx(-float(prediction.log_prob(labels).sum()) / metrics.n)


def test_spans_are_scored_where_seqeval_is_installed(monkeypatch):
    seen = SimpleNamespace(f1_score=lambda *both, **_: seen.__setattr__("both", both) or 0.5)
    monkeypatch.setitem(sys.modules, "seqeval.metrics", seen)
    pair = tagger(id2label=dict(enumerate(NAMES[::-1]))), TOKENIZER
    table = compare(pair, {"train": ROWS, "test": ROWS}, ["lora"], seeds=[0], **FEW)
    assert table.rows[0].metrics.f1 == 0.5
    assert seen.both[0] == [row["tags"] for row in ROWS]
    assert [*map(len, seen.both[1])] == [*map(len, PARTS)]


def test_a_loader_that_numbers_the_tags_in_another_order_is_refused():
    features = {"tokens": [datasets.Value("string")], "tags": [datasets.ClassLabel(names=NAMES)]}
    rows = datasets.Dataset.from_list(ROWS, features=datasets.Features(features))
    net = tagger(id2label=dict(enumerate([*NAMES[1:], NAMES[0]])))
    blora, loader = adapter("tags", net=net), DataLoader(rows, 4, collate_fn=TagCollator(TOKENIZER))
    with pytest.raises(DataError, match=r"as .*'I-key', 'O', 'B-key'.*, got"):
        fit(blora, loader, **FEW)
    read, collate = blora.reading(rows)  # by names
    fit(blora, DataLoader(read, 4, collate_fn=collate), held_out=0.0, **FEW)
