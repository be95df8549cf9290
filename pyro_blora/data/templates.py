"""How a question becomes a prompt, and how its answers are scored."""

from dataclasses import dataclass, replace
from typing import Literal

from pyro_blora.data.items import Item
from pyro_blora.errors import DataError

__all__ = ["QUESTION", "Scoring", "Template", "template_for"]

Scoring = Literal["options", "labels"]


@dataclass(frozen=True)
class Template:
    r"""A prompt with a way of scoring.

    With ``scoring="options"`` each choice is scored by its log-likelihood as the text
    ``" " + choice`` after the prompt. With ``scoring="labels"`` the answer is a softmax over the
    tokens of ``label_words`` at the prompt's last position, in the order of the item's choices.

    Attributes:
        prompt: the text, in which ``{q}`` stands for the question.
        scoring: ``"options"`` or ``"labels"``.
        label_words: for ``"labels"`` only, one word a class, with its leading space.
        twins: whether items of the same choices are nearly one question, whose answers tell each
            other, as in WinoGrande: no split comes between them. Default: no.

    Raises:
        DataError: ``{q}`` is not in the prompt, the scoring is unknown, or label words are missing
            or given where they have no use.

    Example::

        >>> template = Template("Question: {q}\nAnswer:", "options")
        >>> template.format(Item("a", "2 + 2?", ("3", "4"), 1))
        'Question: 2 + 2?\nAnswer:'
    """

    prompt: str
    scoring: Scoring
    label_words: tuple[str, ...] = ()
    twins: bool = False

    def __post_init__(self) -> None:
        if "{q}" not in self.prompt:
            raise DataError(f"the prompt {self.prompt!r} has no {{q}}: say where the question goes")
        if self.scoring not in ("options", "labels"):
            raise DataError(f"scoring is {self.scoring!r}: choose 'options' or 'labels'")
        fits = len(self.label_words) >= 2 if self.scoring == "labels" else not self.label_words
        if not fits:
            raise DataError(
                f"label_words is {self.label_words!r}: scoring 'labels' needs one word a class, "
                "such as (' no', ' yes'), and scoring 'options' has none"
            )

    def format(self, item: Item) -> str:
        """The prompt of one item, without an answer."""
        return self.prompt.replace("{q}", item.question)


QUESTION = Template("Question: {q}\nAnswer:", "options")
_PAIRED = replace(QUESTION, twins=True)

_TEMPLATES = {
    "sst2": Template(
        "Review: {q}\nSentiment (negative or positive):", "labels", (" negative", " positive")
    ),
    "ag_news": Template(
        "Article: {q}\nTopic (world, sports, business or technology):",
        "labels",
        (" world", " sports", " business", " technology"),
    ),
    # the question of the data ends with its own question mark; choices are ("false", "true")
    "boolq": Template("Question: {q}\nAnswer (yes or no):", "labels", (" no", " yes")),
    "winogrande_xs": _PAIRED,
    "winogrande_s": _PAIRED,
    "winogrande_m": _PAIRED,
}


def template_for(task: str) -> Template:
    """The template of a task: label words for ``sst2``, ``ag_news`` and ``boolq``, else options.

    Args:
        task: the name of a task, known or not.

    Example::

        >>> template_for("boolq").label_words
        (' no', ' yes')
        >>> template_for("arc_easy").scoring
        'options'
    """
    return _TEMPLATES.get(task, QUESTION)
