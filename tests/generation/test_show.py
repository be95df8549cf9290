"""Generated text in pieces, in a terminal, and as a page."""

import io
import math
import re

import pytest
import torch
from own_tokenizer import build_tokenizer
from rich.console import Console

from pyro_blora.generation import Generation, show
from pyro_blora.generation.show import Answer, Piece, answers, page, pieces

ATTACK = "<script>window.harm = 1</script>\"'><img src=x onerror='window.harm = 2'>{{ 7 * 7 }}"


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


def test_pieces_are_the_text_each_token_with_its_own_numbers():
    tokenizer = build_tokenizer(["the cat sat on the mat"], eos="</s>")
    prompt = tokenizer("the", add_special_tokens=False)["input_ids"]
    text = " cat sat ☃ on\na é"  # of a snowman no token has more than a byte
    ids = tokenizer(text)["input_ids"]
    rows = [prompt + ids, prompt + ids[:3]]
    out = generation(rows, len(prompt))
    found = pieces(tokenizer, out, 0)
    assert "".join(piece.text for piece in found) == text + "</s>"
    assert found[-1].text == "</s>"
    assert "☃" in [piece.text for piece in found]
    assert len(found) == len(ids) - 2 - 1
    at = [piece.text for piece in found].index("☃")  # of bytes at, at + 1, at + 2
    assert found[at].log_prob == pytest.approx(-(3 * at + 3))
    assert found[at].entropy == pytest.approx(at + 2)
    assert found[at].mutual_information == pytest.approx((at + 2) / 10)
    assert found[at + 1].entropy == pytest.approx(at + 3)
    assert len(pieces(tokenizer, out, 1)) == 3


def test_control_characters_are_shown_and_not_obeyed():
    tokenizer = build_tokenizer(["a"])
    ids = tokenizer("a\x1b[31m\x07\x7f\x9b\tb\n")["input_ids"]
    found = pieces(tokenizer, generation([ids], 1), 0)
    assert "".join(piece.text for piece in found) == "␛[31m␇␡\ufffd\tb\n"


def piece(text, level=0):
    value = (0.0, *show.MEASURES["mutual_information"].steps)[level]
    return Piece(text, log_prob=-1.0, entropy=0.0, mutual_information=value, disagreement=0.0)


def answer(*given, prompt="Why?"):
    return Answer(prompt, list(given), -1.5, 1.2, 0.25, False, len(given))


def shown(text, **options):
    console = Console(file=io.StringIO(), width=60, **options)
    console.print(text)
    return console.file.getvalue()


def test_a_terminal_has_a_color_for_each_level():
    text = show.colored(answer(*(piece(f" w{level}", level) for level in range(5))))
    colors = shown(text, force_terminal=True, color_system="truecolor", no_color=False)
    backgrounds = re.findall(r" ?\x1b\[([\d;]*)m(w\d)", colors)
    assert [word for _, word in backgrounds] == ["w1", "w2", "w3", "w4"]  # w0 is as all else
    assert len({style for style, _ in backgrounds}) == 4
    assert [style.startswith("4;") for style, _ in backgrounds] == [False, False, True, True]
    assert shown(text) == " w0 w1 w2 w3 w4\n"  # into a file
    assert "0.03 to 0.1" in shown(show.legend()).replace("\n", "")


def test_answers_belong_to_their_prompts():
    tokenizer = build_tokenizer(["a b c"])
    rows = [tokenizer(text)["input_ids"] for text in ("a bc", "a cb", "b cb", "b bc")]
    found = answers(generation(rows, 1), tokenizer, ["a", "b"])
    assert [each.prompt for each in found] == ["a", "a", "b", "b"]


def test_a_page_escapes_what_it_shows():
    html = page([answer(piece(ATTACK), prompt=ATTACK)], title=ATTACK, subtitle=ATTACK)
    assert "<script" not in html
    assert "<img" not in html
    assert "harm" in html
