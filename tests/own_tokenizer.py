"""A byte-level BPE tokenizer of a few words, made here."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def build_tokenizer(texts, bos=None, eos=None, pad=None):
    """It puts ``bos`` before and ``eos`` after a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    names = {name: token for name, token in names.items() if token is not None}
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(names.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    if ends:
        layout = " ".join(filter(None, (bos, "$A", eos)))
        tokenizer.post_processor = processors.TemplateProcessing(single=layout, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
