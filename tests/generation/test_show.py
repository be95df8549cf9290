"""Generated text in the colors of its uncertainty."""

import math

import torch
from own_tokenizer import build_tokenizer

from pyro_blora.generation import Generation
from pyro_blora.generation.show import colored

TOKENIZER = build_tokenizer(["the cat sat on the mat"], eos="</s>")


def generation(rows):
    """Of these rows after a prompt of one token: the entropies of a row are 0, 1, 2 ... nats."""
    width = max(map(len, rows))
    steps = torch.arange(width - 1.0).repeat(len(rows), 1)
    for index, row in enumerate(rows):
        steps[index, len(row) - 1 :] = math.nan
    sequences = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Generation(sequences, log_probs=-steps, entropy=steps)


def test_each_word_has_the_color_of_its_token():
    text = " cat sat ☃ on\na é"  # of a snowman no token has more than a byte
    (prompt,) = TOKENIZER("the", add_special_tokens=False)["input_ids"]
    ids = TOKENIZER(text)["input_ids"]
    both = generation([[prompt, *ids], [prompt, *ids[:3]]])
    long, short = (colored(both, TOKENIZER, index, "entropy") for index in (0, 1))
    assert long.plain == text + "</s>"
    words = {long.plain[span.start : span.end]: str(span.style) for span in long.spans}
    assert "cat" not in words  # of 0 nats
    assert words["sat"].startswith("#1d1c1a on #fbd58a")  # of 1 nat
    assert words["☃"].startswith("underline")  # of 4 nats, although it began with 2
    assert text.startswith(short.plain)
    assert len(short.spans) == 2


def test_control_characters_are_shown_and_not_obeyed():
    ids = TOKENIZER("a\x1b[31m\x07\x7f\x9b\tb\n", add_special_tokens=False)["input_ids"]
    shown = colored(generation([ids]), TOKENIZER, by="entropy")
    assert shown.plain == "␛[31m␇␡\ufffd\tb\n"
