import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer
from peft import PeftModel
from transformers import LlamaForTokenClassification

from pyro_blora import BayesianLoRA, fit
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.evaluation.comparison import compare
from pyro_blora.likelihoods import TagCollator, TokenClassification

NAMES = ("B-key", "I-key", "O")
WORDS = ["a", "warm", "film", "Question:", "\u200b", "unhearable", ""]
PARTS = [range(k % 3, k % 3 + 1 + (5 * k) % 4) for k in range(24)]
ROWS = [{"tokens": [WORDS[w] for w in p], "tags": [NAMES[w % 3] for w in p]} for p in PARTS]
RUN = {"num_steps": 4, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["a warm and funny film", "Question: Which color is grass?"] * 4
    return build_tokenizer(texts, bos="<s>", eos="</s>", pad="<pad>")


def tagger(**options):
    return tiny.bert(task="TokenClassification", vocab_size=400, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_has_the_words_in_order(tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    rows = [{"tokens": words, "tags": [*range(len(words))]} for words in (WORDS, WORDS[:2])]
    batch, likelihood = TagCollator(tokenizer)(rows), TokenClassification()
    assert likelihood.labels(batch).tolist() == [[*range(7)], [0, 1, *[-100] * 5]]
    assert torch.equal(batch["labels"] != -100, batch["word_mask"])
    starts = [tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("a", "?")]
    assert batch["input_ids"][batch["word_mask"]][[0, 6]].tolist() == starts  # "?" for no text
    cut = TagCollator(tokenizer, max_length=6)(rows)
    assert torch.equal(likelihood.labels(cut)[0], torch.arange(cut["word_mask"][0].sum()))
    net = LlamaForTokenClassification(tiny.llama(vocab_size=400, num_labels=3).config).eval()
    alone = likelihood.logits(net, TagCollator(tokenizer)(rows[1:]))
    torch.testing.assert_close(likelihood.logits(net, batch)[1:, :2], alone)


def test_loss_and_gradients_are_those_of_transformers(tokenizer):
    net, likelihood = tagger(), TokenClassification()
    batch = TagCollator(tokenizer, NAMES)(ROWS[:6])
    plain = {key: value for key, value in batch.items() if key != "word_mask"}
    for given in (batch, plain):
        labels = likelihood.labels(given)
        logp = likelihood.distribution(likelihood.logits(net, given), labels).log_prob(labels)
        losses = -logp.sum(), net(**plain).loss * (labels >= 0).sum()
        both = ((loss, torch.autograd.grad(loss, net.parameters())) for loss in losses)
        torch.testing.assert_close(*both)


def test_rows_train_predict_and_survive(tokenizer, tmp_path):
    (path := tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    blora = BayesianLoRA(tagger(), tokenizer=tokenizer)
    with pytest.raises(ConfigurationError, match="num_labels=4"):
        fit(blora, [*ROWS, {"tokens": ["a"], "tags": ["X"]}], **RUN)
    fit(blora, path, held_out=0.25, **RUN)
    assert blora.likelihood.classes == NAMES
    assert blora.distill(ROWS) != blora.calibrate(ROWS)
    prediction, labels = blora.predict_dataset(ROWS, num_samples=0, batch_size=5)
    for k, row in enumerate(ROWS):  # in the order of the data, although lengths differ
        count = len(row["tokens"])
        torch.testing.assert_close(prediction.probs[k, :count], blora.predict([row], 0).probs[0])
        assert (prediction.entropy[k, count:] == 0).all()
        assert labels[k].tolist() == [*map(NAMES.index, row["tags"]), *[-100] * (4 - count)]
    metrics = blora.evaluate(ROWS, num_samples=0)
    assert metrics.nll == pytest.approx(-float(prediction.log_prob(labels).sum()) / metrics.n)
    blora.save_pretrained(tmp_path / "saved")
    blora.export_peft(tmp_path / "lora")
    loaded = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path / "saved", tokenizer=tokenizer)
    again, _ = loaded.predict_dataset(ROWS, num_samples=0)
    torch.testing.assert_close(again.probs, prediction.probs)
    lora = PeftModel.from_pretrained(loaded.unwrap(), tmp_path / "lora")
    probs = blora.likelihood.logits(lora, TagCollator(tokenizer, NAMES)(ROWS)).softmax(-1)
    torch.testing.assert_close(probs, prediction.probs, rtol=0, atol=1e-5)


def test_methods_are_compared_by_words_and_spans(tokenizer, monkeypatch):
    seen = SimpleNamespace(f1_score=lambda *both, **_: seen.__setattr__("both", both) or 0.5)
    monkeypatch.setitem(sys.modules, "seqeval.metrics", seen)
    pair, data = (tagger(id2label=dict(enumerate(NAMES[::-1]))), tokenizer), {"train": ROWS}
    methods = {"methods": ["lora", "bayesian-lora"], "seeds": [0], "num_steps": 2}
    table = compare(pair, {**data, "test": ROWS}, **methods, progress=False)
    lora, ours = (row.metrics for row in table.rows)
    assert table.differences()["bayesian-lora"]["nll"][0] == pytest.approx(ours.nll - lora.nll)
    assert ours.f1 == 0.5
    assert seen.both[0] == [row["tags"] for row in ROWS]
    assert [*map(len, seen.both[1])] == [*map(len, PARTS)]


WRONG = [{"tags": ["O"]}, {"tokens": []}, {"tokens": ["a", 1]}, {"tokens": "ab"}]
WRONG += [{"tags": ["O"] * 3}, *({"tags": ["O", tag]} for tag in (None, 3, "X"))]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_row_is_named(tokenizer, wrong):
    likelihood = TokenClassification(classes=NAMES)
    blora = BayesianLoRA(tagger(), likelihood=likelihood, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"in row 24|must all be texts or numbers"):
        fit(blora, [*ROWS, {"tokens": ["a", "film"], "tags": ["O", "O"], **wrong}], **RUN)
