"""Sentences of the pages that people land on are short, with few figures, and so are the pages."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = sorted((ROOT / "docs/reference").glob("*.md"))
SHORT = ["docs/index.md", "docs/peft.md", "docs/choose.md", "docs/own_data.md", "docs/theory.md"]
PAGES = ["README.md", *SHORT, "docs/calibration.md", "docs/large_models.md", "docs/faq.md"]
PAGES += ["docs/troubleshooting.md", "docs/priors_and_guides.md", "docs/checkpoints.md"]
PAGES += ["docs/reading_the_code.md", "docs/evaluation.md", "docs/programs.md", "docs/cost.md"]
PAGES += ["docs/many_machines.md", *(f"docs/reference/{page.name}" for page in REFERENCE)]
MOST_WORDS, MOST_FIGURES, MOST_ON_A_PAGE = 25, 2, 600

MARKDOWN = MarkdownIt("commonmark").enable("table")
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
READ = {"text": None, "code_inline": "Code", "softbreak": " ", "hardbreak": " "}
ABBREVIATED = re.compile(r"\b(?:e\.g|i\.e|al|vs|cf|no|approx)\.$", re.IGNORECASE)
ENDED = re.compile(r"(?<=[.!?])[\"')\]”]*\s+(?=[\"'(\[“]?[A-Z0-9])")
# A number that is part of a name: a version, a year, notebook 04, seed 0.
NAMED = re.compile(
    r"\b(?:python|torch|transformers|peft|pyro|cuda|llama|qwen|gemma|version|arxiv|notebook|figure|"
    r"section|table|equation|step|seed)s?:?[ \n]?(?:>=? ?|≥ ?|v)?\d[\d.]*|\b\d+\.\d+\.\d+\b|"
    r"\b(?:19|20)\d\d\b|± ?\d[\d.]*",
    re.IGNORECASE,
)
FIGURE = re.compile(
    r"[^\w\s]*(\d[\d.,]*(?:[/\u2013-]\d[\d.,]*)*)(?:[%\xd7xsh]|ms|[kMG]i?B)?(?:'s)?"
)


def blocks(markdown: str) -> Iterator[tuple[str, bool]]:
    """Paragraphs, list items and cells without markup, and whether it is a cell of a table."""
    for before, token in pairwise(MARKDOWN.parse(FORMULA.sub("Formula", markdown))):
        if token.type == "inline" and before.type != "heading_open":
            parts = (READ[t.type] or t.content for t in token.children or () if t.type in READ)
            yield "".join(parts), before.type in ("td_open", "th_open")


def sentences(block: str) -> list[str]:
    parts: list[str] = []
    for part in ENDED.split(block):
        if parts and ABBREVIATED.search(parts[-1]):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return [part for part in parts if part]


def words(text: str) -> int:
    """What has a letter or a digit between spaces; code or a formula is one."""
    return sum(any(char.isalnum() for char in part) for part in text.split())


def figures(sentence: str) -> int:
    """Numerals that measure or count; a mean with its error is one, a range is two."""
    tokens = NAMED.sub(" ", sentence).split()
    found = (FIGURE.fullmatch(token.strip(".,;:!?()[]\"'“”")) for token in tokens)
    return sum(len(re.split(r"[/\u2013-]", match[1])) for match in found if match)


def faults(markdown: str) -> list[str]:
    """The sentences with too many words or, but for tables, figures."""
    told = []
    for block, cell in blocks(markdown):
        for sentence in sentences(block):
            if words(sentence) > MOST_WORDS:
                told.append(f"{words(sentence)} words: {sentence}")
            if not cell and figures(sentence) > MOST_FIGURES:
                told.append(f"{figures(sentence)} figures: {sentence}")
    return told


def length(markdown: str) -> int:
    return sum(words(block) for block, cell in blocks(markdown) if not cell)


MADE_UP = """# A heading is no sentence, however many words and figures: 1, 2, 3

One two [three](https://a.b/1 "4") **four** `code, 5, 6`. Of SmolLM2-135M, GPT-2 (arXiv:2601.21003,
2025) and torch 2.11, version 0.1.0, a 7B has 1.01 of PEFT's, e.g. 14.8 ± 0.4 %.

* Item one
* Item two, from 15 to 21 % in 300 steps

| cell | 1, 2, 3 |
|---|---|
| `a|b` | 4 |

```python
print("no prose", 1, 2, 3)
```
"""


def test_what_is_prose():
    found = [text for text, cell in blocks(MADE_UP) if not cell]
    assert [sentence for block in found for sentence in sentences(block)] == [
        "One two three four Code.",
        "Of SmolLM2-135M, GPT-2 (arXiv:2601.21003, 2025) and torch 2.11, version 0.1.0, a 7B has "
        "1.01 of PEFT's, e.g. 14.8 ± 0.4 %.",
        "Item one",
        "Item two, from 15 to 21 % in 300 steps",
    ]
    assert [figures(text) for text in found] == [2, 0, 3]
    assert faults(MADE_UP) == ["3 figures: Item two, from 15 to 21 % in 300 steps"]
    assert length("# no\n\nFour words, `f(x, y)` here.\n\n| not | these |\n|---|---|\n") == 4


@pytest.mark.parametrize(
    ("sentence", "count"),
    [
        ("It is 8.2 passes, 3.6 with six.", 2),
        ("From 63-66 % to 1,024.", 3),
        ("Python 3.10, transformers 5.8 or later, notebook 04, seed 0.", 0),
        ("ECE falls (0.4 points), NLL by -0.022.", 2),
        ("Load it in 4-bit or float32.", 0),
        ("A 70B needs 140GB, about 2x.", 2),
    ],
)
def test_what_is_a_figure(sentence, count):
    assert figures(sentence) == count


@pytest.mark.parametrize("count", [25, 26])
def test_a_sentence_has_at_most_25_words(count):
    assert len(faults("| " + "word " * count + "|\n|---|\n")) == count - 25
    assert len(faults("word " * count + "\nend? Another one.")) == 1


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short_and_have_few_figures(page):
    told = faults((ROOT / page).read_text("utf-8"))
    assert told == [], "\n".join([page, *told])


@pytest.mark.parametrize("page", SHORT)
def test_pages_that_people_land_on_are_short(page):
    assert length((ROOT / page).read_text("utf-8")) <= MOST_ON_A_PAGE
