"""Generated text in pieces, in a terminal, and as a page that Chromium is asked about."""

import io
import math
import re
import shutil

import pytest
import torch
from own_tokenizer import build_tokenizer
from rich.console import Console

from pyro_blora.generation import Generation
from pyro_blora.generation.show import (
    MEASURES,
    Answer,
    Piece,
    answers,
    colored,
    legend,
    page,
    pieces,
)

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


def piece(text, level=0, **numbers):
    value = (0.0, *MEASURES["mutual_information"].steps)[level]
    given = {"log_prob": math.log(0.25), "entropy": 0.0, "disagreement": 0.0}
    return Piece(text, **{**given, "mutual_information": value, **numbers})


def answer(*given, prompt="Why?", abstained=False):
    return Answer(prompt, list(given), -1.5, 1.2, 0.25, abstained, len(given))


def shown(text, **options):
    console = Console(file=io.StringIO(), width=60, **options)
    console.print(text)
    return console.file.getvalue()


def test_a_terminal_has_a_color_for_each_level():
    text = colored(answer(*(piece(f" w{level}", level) for level in range(5))))
    colors = shown(text, force_terminal=True, color_system="truecolor", no_color=False)
    backgrounds = re.findall(r" ?\x1b\[([\d;]*)m(w\d)", colors)
    assert [word for _, word in backgrounds] == ["w1", "w2", "w3", "w4"]  # w0 is as all else
    assert len({style for style, _ in backgrounds}) == 4
    assert [style.startswith("4;") for style, _ in backgrounds] == [False, False, True, True]
    assert shown(text) == " w0 w1 w2 w3 w4\n"  # into a file
    assert "0.03 to 0.1" in shown(legend()).replace("\n", "")


def test_answers_belong_to_their_prompts():
    tokenizer = build_tokenizer(["a b c"])
    rows = [tokenizer(text)["input_ids"] for text in ("a bc", "a cb", "b cb", "b bc")]
    found = answers(generation(rows, 1), tokenizer, ["a", "b"])
    assert [each.prompt for each in found] == ["a", "a", "b", "b"]


def test_a_page_escapes_what_it_shows():
    html = page([answer(piece(ATTACK), prompt=ATTACK)], title=ATTACK, subtitle=ATTACK)
    assert html.count("<script") == 1
    assert "<img" not in html
    assert "harm" in html


def test_a_page_in_chromium(tmp_path):
    """Colors by what is chosen, numbers on hover; nothing is asked for, and no text is run."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    file, faults = tmp_path / "page.html", []
    text = [piece(f" word{level}", level, entropy=4.0 - level) for level in range(5)]
    file.write_text(page([answer(*text, piece(ATTACK), prompt=ATTACK)]), encoding="utf-8")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 360, "height": 600})
        view.on("request", lambda r: r.url == file.as_uri() or faults.append(r.url))
        view.on("pageerror", lambda error: faults.append(str(error)))
        view.on("console", lambda message: faults.append(message.text))
        view.goto(file.as_uri())

        def colors():
            style = "token => getComputedStyle(token).backgroundColor"
            found = [view.locator(".t", has_text=f"word{level}") for level in range(5)]
            return [token.evaluate(style) for token in found]

        before = colors()
        assert len(set(before)) == 5
        assert before[0] == "rgba(0, 0, 0, 0)"
        key = view.locator(".scale:visible li")
        assert key.all_inner_texts() == MEASURES["mutual_information"].ranges()
        view.get_by_label("Entropy").check(force=True)
        assert key.all_inner_texts() == MEASURES["entropy"].ranges()
        assert colors() == [before[n] for n in (4, 4, 3, 2, 0)]
        tip = view.get_by_role("tooltip")
        assert not tip.is_visible()
        view.locator(".t", has_text="word3").hover()
        told = re.split(r"\s+", tip.inner_text().strip())
        assert " ".join(told) == (
            "␣word3 Probability 0.25 Mutual information 0.100 Entropy 1.000 Disagreement 0.000"
        )
        assert view.evaluate("document.documentElement.scrollWidth") == 360
        assert view.locator(".prompt").text_content() == ATTACK
        assert view.evaluate("window.harm") is None
        browser.close()
    assert faults == []
