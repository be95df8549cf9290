"""Generated text in the colors of its uncertainty."""

import io
import math
import re

import pytest
import torch
from own_tokenizer import build_tokenizer
from rich.console import Console

from pyro_blora.generation import Generation
from pyro_blora.generation.show import colored, legend


def generation(rows, prompt_length):
    """A ``Generation`` of these rows of tokens, -1 where one has ended, with numbers of its own."""
    length = max(map(len, rows)) - prompt_length
    sequences = torch.tensor([row + [0] * (prompt_length + length - len(row)) for row in rows])
    steps = torch.arange(length).float().expand(len(rows), -1).clone()
    for index, row in enumerate(rows):
        steps[index, len(row) - prompt_length :] = math.nan
    fields = (-steps, steps, steps / 10, steps / 100)
    means = (-steps.nanmean(-1), steps.nanmean(-1), steps.nanmean(-1) / 10)
    return Generation(sequences, *fields, *means, steps[:, 0] > 0)


def shown(text, **options):
    console = Console(file=io.StringIO(), width=200, **options)
    console.print(text)
    return console.file.getvalue()


@pytest.mark.parametrize("index", [0, 1])
def test_each_word_has_the_color_of_its_token(index):
    """A character of several tokens that of the largest; a shorter sequence ends where it ends."""
    tokenizer = build_tokenizer(["the cat sat on the mat"], eos="</s>")
    prompt = tokenizer("the", add_special_tokens=False)["input_ids"]
    text = " cat sat ☃ on\na é"  # of a snowman no token has more than a byte
    ids = tokenizer(text)["input_ids"]
    found = colored(
        generation([prompt + ids, prompt + ids[:3]], len(prompt)), tokenizer, index, "entropy"
    )
    if index:
        assert text.startswith(found.plain)
        assert len(found.spans) == 2
        return
    assert found.plain == text + "</s>"
    words = {found.plain[span.start : span.end]: str(span.style) for span in found.spans}
    assert "cat" not in words  # of 0 nats
    assert words["sat"].startswith("#1d1c1a on #fbd58a")  # of 1 nat
    assert words["☃"].startswith("underline")  # of 4 nats, although it began with 2


def test_control_characters_are_shown_and_not_obeyed():
    tokenizer = build_tokenizer(["a"])
    ids = tokenizer("a\x1b[31m\x07\x7f\x9b\tb\n")["input_ids"]
    assert colored(generation([ids], 1), tokenizer).plain == "␛[31m␇␡\ufffd\tb\n"


def test_a_terminal_has_a_color_for_each_level():
    colors = shown(legend(), force_terminal=True, color_system="truecolor", no_color=False)
    styles = re.findall(r"\x1b\[([\d;]*)m (?:from|below)", colors)
    assert len(set(styles)) == 4
    assert [style.startswith("4;") for style in styles] == [False, False, True, True]
    assert shown(legend()).startswith("mutual information:  below 0.01   from 0.01 ")
