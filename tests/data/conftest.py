from functools import partial

import datasets
import pytest
from classifiers import NEG_POS, POS_NEG, relabeled
from own_tokenizer import build_tokenizer
from torch.utils.data import DataLoader, default_collate
from transformers import DataCollatorWithPadding

from pyro_blora.likelihoods import ClassificationCollator

SENTENCES = [
    "Question: What do people use a key for?\nAnswer: opening a lock",
    "Question: Which color is grass?\nAnswer: green red blue yellow",
    "Review: a warm and funny film\nSentiment (negative or positive): positive",
    "Review: a dull and endless film\nSentiment (negative or positive): negative",
] * 4


@pytest.fixture(scope="session")
def build():
    """The function that builds a tokenizer, without special tokens unless they are given."""
    return partial(build_tokenizer, SENTENCES)


@pytest.fixture(scope="session")
def wrapped(build):
    return build(bos="<s>", eos="</s>", pad="<pad>")


@pytest.fixture(scope="module")
def small(build):
    """A tokenizer of fewer than 32 tokens, as the tiny networks have."""
    return build(bos="<s>", eos="</s>", pad="<pad>")


@pytest.fixture(scope="module")
def forms(small):
    """Twelve rows of two classes in many forms; data sets number the classes ``pos, neg``."""

    def turned(batch):
        return {**small(batch["text"]), "labels": [1 - label for label in batch["label"]]}

    def loader(rows, collate=None):
        return DataLoader(rows, 4, collate_fn=collate or DataCollatorWithPadding(small))

    rows = [{"text": f"a {w} film {k}", "label": w} for k, w in enumerate(NEG_POS * 6)]
    data = relabeled(datasets.Dataset.from_list(rows), POS_NEG)
    encoded = data.map(lambda row: dict(small(row["text"])))
    ids = encoded.remove_columns("text")
    even = data.map(lambda row: dict(small("film"))).remove_columns("text")
    negative = encoded.filter(lambda row: row["label"] == 1)
    negative = negative.cast_column("label", datasets.Value("string"))
    return {
        "rows": rows,
        "data": data,
        "encoded": encoded,
        "labels alone": ids.rename_column("label", "labels"),
        "tensors": even.rename_column("label", "labels").with_format("torch"),
        "loader": loader(ids),
        "loader with other names": loader(rows, ClassificationCollator(small, POS_NEG)),
        "loader of numbers": loader([{k: v for k, v in r.items() if k != "text"} for r in encoded]),
        "numbers": data.cast_column("label", datasets.Value("int64")),
        "transformed": data.with_transform(turned),
        "one class": negative.map(lambda row: {"label": "neg"}).class_encode_column("label"),
        "digits": [{**small("a film"), "label": str(k % 2)} for k in range(12)],
    }


@pytest.fixture(scope="module")
def collators(small):
    padding = DataCollatorWithPadding(small)
    return {
        None: None,
        "padding": padding,
        "a function": lambda rows: padding(
            [{k: v for k, v in row.items() if k != "text"} for row in rows]
        ),
        "torch": default_collate,
        "ours": ClassificationCollator(small),
        "ours, neg pos": ClassificationCollator(small, list(NEG_POS)),
        "ours, pos neg": ClassificationCollator(small, POS_NEG),
    }
