"""A generated text cut into its tokens, each with its uncertainty, to be shown."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from pyro_blora.generation.generation import Generation

__all__ = ["MEASURES", "Measure", "Piece", "pieces"]

# Control characters, which a terminal would obey, are shown by their pictures.
_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


@dataclass(frozen=True)
class Measure:
    """What text may be coloured by.

    Attributes:
        label: what it is called.
        unit: of its values.
        steps: the values at which levels 1 to 4 begin, the same for every text.
        meaning: in a few words.
    """

    label: str
    unit: str
    steps: tuple[float, float, float, float]
    meaning: str

    def level(self, value: float) -> int:
        """The level of a value, 0 to 4."""
        return bisect_right(self.steps, value)

    def ranges(self) -> list[str]:
        """The values of each level, in words."""
        inner = [f"{a:g} to {b:g}" for a, b in zip(self.steps, self.steps[1:], strict=False)]
        return [f"below {self.steps[0]:g}", *inner, f"{self.steps[-1]:g} and more"]


MEASURES = {
    "mutual_information": Measure(
        "Mutual information",
        "nats",
        (0.01, 0.03, 0.1, 0.3),
        "what the draws do not agree on: more training data could settle it",
    ),
    "entropy": Measure(
        "Entropy", "nats", (0.5, 1.0, 2.0, 3.0), "how open the next token is, for whatever reason"
    ),
    "disagreement": Measure(
        "Disagreement",
        "of the draws",
        (0.05, 0.2, 0.4, 0.6),
        "the share of draws that would have put another token first",
    ),
}


@dataclass(frozen=True)
class Piece:
    """A token's text, or that of several which make one character, and its uncertainty.

    Of several, ``log_prob`` is the sum and the others are the greatest.
    """

    text: str
    log_prob: float
    entropy: float
    mutual_information: float
    disagreement: float

    @property
    def parts(self) -> tuple[str, str]:
        """The spaces before a word, which are not coloured, and the word."""
        word = self.text.lstrip(" ") or self.text
        return self.text[: len(self.text) - len(word)], word

    def level(self, measure: str) -> int:
        """The level, 0 to 4, by one of ``MEASURES``."""
        return MEASURES[measure].level(getattr(self, measure))


def pieces(tokenizer: Any, generation: Generation, index: int) -> list[Piece]:
    """The new tokens of sequence ``index``, special ones included, control characters made visible.

    Args:
        tokenizer: a Hugging Face tokenizer.
        generation: what ``blora.generate`` gave.
        index: which of its ``N`` sequences.

    Returns:
        Their texts, one after the other, are what was generated.
    """
    names = ("log_probs", "entropy", "mutual_information", "disagreement")
    columns = zip(*(generation[name][index].tolist() for name in names), strict=True)
    numbers = [own for own in columns if not math.isnan(own[0])]
    ids = generation.sequences[index].tolist()
    start = len(ids) - generation.log_probs.shape[1]
    last = start + len(numbers)
    found: list[Piece] = []
    waiting: list[tuple[float, ...]] = []
    before = _text(tokenizer, ids[:start])
    for end, own in enumerate(numbers, start + 1):
        waiting.append(own)
        text = _text(tokenizer, ids[:end])
        if text.endswith("\ufffd") and end < last:
            continue  # the bytes of a character are not all there yet
        log_probs, *others = zip(*waiting, strict=True)
        shown = text[len(before) :].translate(_PICTURES)
        found.append(Piece(shown, sum(log_probs), *(max(values) for values in others)))
        before, waiting = text, []
    return found


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
