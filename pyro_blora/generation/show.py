"""Shows generated text colored by its uncertainty, in a terminal or as a page for a browser."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template
from rich.text import Text

from pyro_blora.generation.generate import Generation

__all__ = ["Answer", "answers", "colored", "legend", "page"]

# The levels have one hue and differ in lightness, so that color-blind readers can tell them apart
_LIGHT = ("transparent", "#fdf0cd", "#fbd58a", "#f4a95b", "#e5773f")
_DARK = ("transparent", "#3d3215", "#654a12", "#8f4f14", "#b4461c")
_IN_A_TERMINAL = (
    "",
    *(f"#1d1c1a on {color}" for color in _LIGHT[1:3]),
    *(f"underline #1d1c1a on {color}" for color in _LIGHT[3:]),  # visible without colors, too
)
# Control characters, which a terminal would obey, are replaced by their pictures
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


@dataclass(frozen=True)
class Measure:
    """A measure that colors text; levels 1 to 4 begin at ``steps``, the same for every text."""

    label: str
    unit: str
    steps: tuple[float, float, float, float]
    meaning: str

    def ranges(self) -> list[str]:
        """The range of values of each level, in words."""
        inner = [f"{a:g} to {b:g}" for a, b in zip(self.steps, self.steps[1:], strict=False)]
        return [f"below {self.steps[0]:g}", *inner, f"{self.steps[-1]:g} and more"]


MEASURES = {
    "mutual_information": Measure(
        "Mutual information", "nats", (0.01, 0.03, 0.1, 0.3), "how much the draws disagree"
    ),
    "entropy": Measure("Entropy", "nats", (0.5, 1.0, 2.0, 3.0), "how open the next token is"),
    "disagreement": Measure(
        "Disagreement", "share of the draws", (0.05, 0.2, 0.4, 0.6), "how many prefer another token"
    ),
}


@dataclass(frozen=True)
class Piece:
    """A token's text and numbers; for several tokens of one character, their sum and maxima."""

    text: str
    log_prob: float
    entropy: float
    mutual_information: float
    disagreement: float

    @property
    def parts(self) -> tuple[str, str]:
        """The spaces before a word, which are not colored, and the word."""
        word = self.text.lstrip(" ") or self.text
        return self.text[: len(self.text) - len(word)], word

    def level(self, measure: str) -> int:
        """The level, 0 to 4, by one of ``MEASURES``."""
        return bisect_right(MEASURES[measure].steps, getattr(self, measure))


@dataclass(frozen=True)
class Answer:
    """One generated sequence; its prompt as text, and its scores in nats per token."""

    prompt: str
    pieces: list[Piece]
    mean_log_prob: float
    mean_entropy: float
    epistemic: float
    abstained: bool
    length: int  # number of tokens

    @property
    def figures(self) -> str:
        """The length and the scores, and whether the sequence abstained, in one line."""
        return (
            f"{'Abstains: the score is above the threshold. ' if self.abstained else ''}"
            f"{self.length} tokens, mean log-probability {self.mean_log_prob:.3f}, mean entropy "
            f"{self.mean_entropy:.3f}, epistemic score {self.epistemic:.4f} nats per token"
        )


def answers(generation: Generation, tokenizer: Any, prompts: Sequence[str]) -> list[Answer]:
    """The sequences of a generation in order, the same number for each prompt."""
    each = len(generation.sequences) // len(prompts)
    scores = ("mean_log_prob", "mean_entropy", "epistemic", "abstained")
    return [
        Answer(
            prompt=prompts[index // each],
            pieces=pieces(tokenizer, generation, index),
            length=int((~generation.log_probs[index].isnan()).sum()),
            **{name: generation[name][index].item() for name in scores},
        )
        for index in range(len(generation.sequences))
    ]


def pieces(tokenizer: Any, generation: Generation, index: int) -> list[Piece]:
    """The new tokens of one sequence, including special ones, with control characters visible."""

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    names = ("log_probs", "entropy", "mutual_information", "disagreement")
    columns = zip(*(generation[name][index].tolist() for name in names), strict=True)
    numbers = [own for own in columns if not math.isnan(own[0])]
    ids = generation.sequences[index].tolist()
    start = len(ids) - generation.log_probs.shape[1]
    found: list[Piece] = []
    waiting: list[tuple[float, ...]] = []
    before = text_of(ids[:start])
    for end, own in enumerate(numbers, start + 1):
        waiting.append(own)
        text = text_of(ids[:end])
        if text.endswith("\ufffd") and end < start + len(numbers):
            continue  # the next token may complete the bytes of the character
        log_probs, *others = zip(*waiting, strict=True)
        shown = text[len(before) :].translate(_PICTURES)
        found.append(Piece(shown, sum(log_probs), *(max(values) for values in others)))
        before, waiting = text, []
    return found


def colored(answer: Answer, by: str = "mutual_information") -> Text:
    """An answer's text for a terminal, colored by one of ``MEASURES``."""
    text = Text()
    for piece in answer.pieces:
        space, word = piece.parts
        text.append(space)
        text.append(word, _IN_A_TERMINAL[piece.level(by)])
    return text


def legend(by: str = "mutual_information") -> Text:
    """The legend of the colors of :func:`colored`."""
    measure = MEASURES[by]
    text = Text(f"{measure.label}, {measure.unit}:")
    for level, values in enumerate(measure.ranges()):
        text.append(" ")
        text.append(f" {values} ", _IN_A_TERMINAL[level])
    return text


def page(
    answers: Sequence[Answer],
    *,
    title: str = "Generated text and its uncertainty",
    subtitle: str = "",
    by: str = "mutual_information",
) -> str:
    """A self-contained HTML page: text colored by its uncertainty, a legend, numbers on hover.

    All text is escaped. ``by`` is the measure that is selected at first.
    """
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    shown: dict[str, Any] = {"answers": answers, "title": title, "subtitle": subtitle, "by": by}
    shown |= {"measures": MEASURES, "light": _LIGHT, "dark": _DARK, "exp": math.exp}
    return Template(source, autoescape=True).render(shown)
