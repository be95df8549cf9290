import pytest

SENTENCES = [
    "Question: What do people use a key for?\nAnswer: opening a lock",
    "Question: Which color is grass?\nAnswer: green red blue yellow",
    "Review: a warm and funny film\nSentiment (negative or positive): positive",
    "Review: a dull and endless film\nSentiment (negative or positive): negative",
] * 4


def build_tokenizer(bos=None, eos=None, pad=None):
    """A byte-level BPE tokenizer that puts ``bos`` before and ``eos`` after a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (pad, bos, eos) if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    if ends:
        layout = " ".join(filter(None, (bos, "$A", eos)))
        tokenizer.post_processor = processors.TemplateProcessing(single=layout, special_tokens=ends)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in names.items() if token}
    )


@pytest.fixture(scope="session")
def build():
    """The function that builds a tokenizer."""
    return build_tokenizer


@pytest.fixture(scope="session")
def plain():
    """No special tokens at all."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def wrapped():
    """``<s> text </s>``, with a pad token."""
    return build_tokenizer(bos="<s>", eos="</s>", pad="<pad>")
