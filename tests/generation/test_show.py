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
from pyro_blora.generation.pieces import MEASURES, Piece, pieces
from pyro_blora.generation.show import Answer, answers, coloured, legend, page

ATTACK = "<script>window.harm = 1</script>\"'><img src=x onerror='window.harm = 2'>{{ 7 * 7 }}"


def generation(rows, prompt_length):
    """A ``Generation`` of these rows of tokens, -1 where one has ended, with numbers of its own."""
    length = max(map(len, rows)) - prompt_length
    sequences = torch.tensor([row + [0] * (prompt_length + length - len(row)) for row in rows])
    steps = torch.arange(length).float().expand(len(rows), -1).clone()
    for index, row in enumerate(rows):
        steps[index, len(row) - prompt_length :] = math.nan
    fields = (-steps, steps, steps / 10, steps / 100)
    return Generation(sequences, *fields, -steps.nanmean(-1), steps.nanmean(-1), steps[:, 0] > 0)


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
    return Answer(prompt, list(given), -1.5, 0.25, abstained, len(given))


def shown(text, **options):
    console = Console(file=io.StringIO(), width=60, **options)
    console.print(text)
    return console.file.getvalue()


def test_levels_are_those_of_the_legend():
    for measure in MEASURES.values():
        assert [measure.level(step) for step in (0, *measure.steps)] == [0, 1, 2, 3, 4]
        assert measure.level(measure.steps[0] - 1e-6) == 0
        assert len(measure.ranges()) == 5
        assert all(f"{step:g}" in " ".join(measure.ranges()) for step in measure.steps)


def test_a_terminal_has_a_colour_for_each_level():
    text = coloured(answer(*(piece(f" w{level}", level) for level in range(5))))
    colours = shown(text, force_terminal=True, color_system="truecolor", no_color=False)
    backgrounds = re.findall(r" ?\x1b\[([\d;]*)m(w\d)", colours)
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
    assert [len(each.pieces) for each in found] == [each.length for each in found]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page; a request for anything but the page, or an error in it, fails the test."""
    pages = []

    def opened(html, *, width=1000, **options):
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        view = browser.new_page(viewport={"width": width, "height": 600}, **options)
        view.faults = []
        view.on("request", lambda r: r.url == file.as_uri() or view.faults.append(r.url))
        view.on("pageerror", lambda error: view.faults.append(str(error)))
        view.on("console", lambda message: view.faults.append(message.text))
        view.goto(file.as_uri())
        pages.append(view)
        return view

    yield opened
    assert [fault for view in pages for fault in view.faults] == []
    for view in pages:
        view.close()


TEXT = [piece(f" word{level}", level, entropy=4.0 - level) for level in range(5)]


def colour(view, word):
    found = view.locator(".t", has_text=word)
    return found.evaluate("token => getComputedStyle(token).backgroundColor")


def test_chromium_colours_by_what_is_chosen(opened):
    view = opened(page([answer(*TEXT)]))
    assert view.locator(".answer").inner_text() == " word0 word1 word2 word3 word4"
    words = [f"word{level}" for level in range(5)]
    before = [colour(view, word) for word in words]
    assert len(set(before)) == 5
    assert before[0] == "rgba(0, 0, 0, 0)"
    swatch = "li => getComputedStyle(li, '::before').backgroundColor"
    key = view.locator(".scale:visible li")
    assert [key.nth(level).evaluate(swatch) for level in range(5)] == before
    assert key.all_inner_texts() == MEASURES["mutual_information"].ranges()
    view.get_by_label("Entropy").check(force=True)
    assert key.all_inner_texts() == MEASURES["entropy"].ranges()
    assert [colour(view, word) for word in words] == [before[n] for n in (4, 4, 3, 2, 0)]


def test_chromium_tells_the_numbers_on_hover_and_to_a_keyboard(opened):
    view = opened(page([answer(*TEXT)]), width=360)
    tip = view.get_by_role("tooltip")
    assert not tip.is_visible()
    view.locator(".t", has_text="word3").hover()
    told = re.split(r"\s+", tip.inner_text().strip())
    assert told[0] == "␣word3"
    assert " ".join(told[1:]) == (
        "Probability 0.25 Mutual information 0.100 Entropy 1.000 Disagreement 0.000"
    )
    box = tip.bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
    view.locator("h1").hover()
    assert not tip.is_visible()
    view.locator(".t").first.focus()
    view.keyboard.press("ArrowRight")
    assert "word1" in tip.inner_text()
    view.keyboard.press("Escape")
    assert not tip.is_visible()


def luminance(rgb):
    parts = [int(part) / 255 for part in re.findall(r"\d+", rgb)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1000])
def test_chromium_can_be_read_from(opened, scheme, width):
    """Contrast of 4.5 and more (WCAG AA) on every level; nothing is wider than the window."""
    view = opened(page([answer(*TEXT, abstained=True)]), width=width, color_scheme=scheme)
    assert view.evaluate("document.documentElement.scrollWidth") == width
    style = "(e, name) => getComputedStyle(e)[name]"
    ink = luminance(view.locator(".answer").evaluate(style, "color"))
    card = luminance(view.locator("article").evaluate(style, "backgroundColor"))
    assert (card < ink) == (scheme == "dark")
    for level in range(5):
        ground = luminance(colour(view, f"word{level}")) if level else card
        light, dark = max(ink, ground), min(ink, ground)
        assert (light + 0.05) / (dark + 0.05) > 4.5, level
    assert "Abstains" in view.locator(".abstained").inner_text()


def test_chromium_shows_hostile_text_and_runs_none_of_it(opened):
    html = page([answer(piece(ATTACK), prompt=ATTACK)], title=ATTACK, subtitle=ATTACK)
    view = opened(html)
    for place in (".t", ".prompt", "h1", "header p"):
        assert view.locator(place).text_content() == ATTACK
    view.locator(".t").hover()
    assert "<script>window.harm" in view.get_by_role("tooltip").inner_text()
    assert view.evaluate("window.harm") is None
    assert view.locator("img").count() == 0
    assert view.locator("script").count() == 1
