"""Shows generated text colored by its uncertainty, in a terminal or a notebook."""

import math
from bisect import bisect_right
from typing import Any, Literal

from rich.text import Text

from pyro_blora.generation.generate import Generation

Measure = Literal["mutual_information", "entropy", "disagreement"]
# The values at which levels 1 to 4 of a measure begin, the same for every text
_STEPS: dict[str, tuple[float, ...]] = {
    "mutual_information": (0.01, 0.03, 0.1, 0.3),  # nats
    "entropy": (0.5, 1.0, 2.0, 3.0),  # nats
    "disagreement": (0.05, 0.2, 0.4, 0.6),  # share of the draws that prefer another token
}
# One hue that differs in lightness, for color-blind readers; underlined where there are no colors
_STYLES = (
    "",
    "#1d1c1a on #fdf0cd",
    "#1d1c1a on #fbd58a",
    "underline #1d1c1a on #f4a95b",
    "underline #1d1c1a on #e5773f",
)
# Control characters, which a terminal would obey, are replaced by their pictures
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def colored(
    generation: Generation, tokenizer: Any, index: int = 0, by: Measure = "mutual_information"
) -> Text:
    """The new text of one sequence, each word on a color that says how uncertain its token is.

    It includes special tokens. Tokens that share a character have the largest of their values.
    Print it by ``rich.print``.
    """

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    values = [value for value in generation[by][index].tolist() if not math.isnan(value)]
    ids = generation.sequences[index].tolist()
    start = len(ids) - generation.log_probs.shape[1]
    shown, before, largest = Text(), text_of(ids[:start]), 0.0
    for end, value in enumerate(values, start + 1):
        text, largest = text_of(ids[:end]), max(largest, value)
        if text.endswith("\ufffd") and end < start + len(values):
            continue  # the next token may complete the bytes of the character
        piece = text[len(before) :].translate(_PICTURES)
        word = piece.lstrip(" ") or piece
        shown.append(piece[: len(piece) - len(word)])
        shown.append(word, _STYLES[bisect_right(_STEPS[by], largest)])
        before, largest = text, 0.0
    return shown
