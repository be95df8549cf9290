import pytest
import tiny
from own_tokenizer import build_tokenizer

WORDS = "it was cold warm wet dry and hot here there one two three four five"


@pytest.fixture(scope="session")
def small():
    """A tokenizer of a few words with a pad token."""
    return build_tokenizer([WORDS] * 4, bos="<s>", eos="</s>", pad="<pad>")


@pytest.fixture
def bert(small):
    """Makes a BERT of this vocabulary."""
    sizes = {"vocab_size": len(small), "max_position_embeddings": 64}
    return lambda **options: tiny.bert(**sizes, **options)
