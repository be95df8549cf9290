from functools import partial

import pytest
from own_tokenizer import build_tokenizer

SENTENCES = [
    "Question: What do people use a key for?\nAnswer: opening a lock",
    "Question: Which color is grass?\nAnswer: green red blue yellow",
    "Review: a warm and funny film\nSentiment (negative or positive): positive",
    "Review: a dull and endless film\nSentiment (negative or positive): negative",
] * 4


@pytest.fixture(scope="session")
def build():
    """The function that builds a tokenizer, without special tokens if it is told of none."""
    return partial(build_tokenizer, SENTENCES)


@pytest.fixture(scope="session")
def wrapped(build):
    """``<s> text </s>``, with a pad token."""
    return build(bos="<s>", eos="</s>", pad="<pad>")
