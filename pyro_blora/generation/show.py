"""Generated text coloured by its uncertainty: in a terminal, or as a page for a browser."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.text import Text

from pyro_blora.generation.generation import Generation
from pyro_blora.generation.pieces import MEASURES, Piece, pieces

__all__ = ["Answer", "answers", "coloured", "legend", "page"]

# Of one hue, from nothing to much, so that they are told apart by lightness alone
_LIGHT = ("transparent", "#fdf0cd", "#fbd58a", "#f4a95b", "#e5773f")
_DARK = ("transparent", "#3d3215", "#654a12", "#8f4f14", "#b4461c")
_IN_A_TERMINAL = (
    "",
    *(f"#1d1c1a on {colour}" for colour in _LIGHT[1:3]),
    *(f"underline #1d1c1a on {colour}" for colour in _LIGHT[3:]),  # seen without colours, too
)


@dataclass(frozen=True)
class Answer:
    """One generated sequence, ready to be shown.

    Attributes:
        prompt: its prompt, as text.
        pieces: its tokens.
        mean_log_prob: in nats a token.
        epistemic: in nats a token.
        abstained: whether the epistemic score is above the threshold.
        length: number of tokens.
    """

    prompt: str
    pieces: list[Piece]
    mean_log_prob: float
    epistemic: float
    abstained: bool
    length: int

    @property
    def notice(self) -> str:
        """What is said of a sequence that abstained."""
        return (
            f"Abstains: the draws do not agree on this text ({self.epistemic:.3g} nats a token, "
            "which is above the threshold)."
        )


def answers(generation: Generation, tokenizer: Any, prompts: Sequence[str]) -> list[Answer]:
    """The sequences of ``generation``, which has as many for each of ``prompts``, in order."""
    each = len(generation.sequences) // len(prompts)
    return [
        Answer(
            prompt=prompts[index // each],
            pieces=pieces(tokenizer, generation, index),
            mean_log_prob=float(generation.mean_log_prob[index]),
            epistemic=float(generation.epistemic[index]),
            abstained=bool(generation.abstained[index]),
            length=int((~generation.log_probs[index].isnan()).sum()),
        )
        for index in range(len(generation.sequences))
    ]


def coloured(answer: Answer, by: str = "mutual_information") -> Text:
    """An answer's text for a terminal, coloured by one of ``MEASURES``."""
    text = Text()
    for piece in answer.pieces:
        space, word = piece.parts
        text.append(space)
        text.append(word, _IN_A_TERMINAL[piece.level(by)])
    return text


def legend(by: str = "mutual_information") -> Text:
    """What the colours of :func:`coloured` mean."""
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
    """A self-contained HTML page: text coloured by its uncertainty, a legend, numbers on hover.

    Args:
        answers: what :func:`answers` gave.
        title: its heading.
        subtitle: a line below: the model, the number of draws.
        by: which of ``MEASURES`` is chosen when it opens; the page has a switch.

    Returns:
        HTML that asks for nothing from elsewhere. All text is escaped.

    Example::

        shown = answers(generation, tokenizer, prompts)
        Path("answer.html").write_text(page(shown), encoding="utf-8")
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["exp"] = math.exp
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        answers=answers,
        title=title,
        subtitle=subtitle,
        by=by,
        measures=MEASURES,
        light=_LIGHT,
        dark=_DARK,
    )
