"""Questions with candidate answers: the item, and the template of its prompt."""

from dataclasses import dataclass
from typing import Any, Literal

from pyro_blora.errors import DataError
from pyro_blora.labels import listed

FORMAT = '{"id": "a-1", "question": "...", "choices": ["...", "..."], "label": 0}'


@dataclass(frozen=True)
class Item:
    """A question, its candidate answers (two or more) and the index of the right one.

    The question is plain text without a prompt; ``id`` names the item in its data set.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        where = f" in {self!r:.300}"
        if not isinstance(self.choices, tuple) or len(self.choices) < 2:
            raise DataError(f"choices must be two answers or more, got {self.choices!r}{where}")
        for text in (self.id, self.question, *self.choices):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"id, question and choices must be texts, got {text!r}{where}")
        last = len(self.choices) - 1
        if type(self.label) is not int or not 0 <= self.label <= last:
            raise DataError(f"label must be an integer from 0 to {last}, got {self.label!r}{where}")


def item_of(record: Any, defaults: dict[str, Any]) -> Item:
    """The item of a dictionary, whose missing keys are taken from ``defaults``."""
    if isinstance(record, Item):
        return record
    try:
        record = {**defaults, **record}
        choices, label = listed(record["choices"]), listed(record["label"])
        choices = tuple(choices) if isinstance(choices, list) else choices
        return Item(str(record["id"]), record["question"], choices, label)
    except (KeyError, TypeError) as error:
        raise DataError(f"an item must be {FORMAT}, got {record!r:.300} ({error!r})") from None


@dataclass(frozen=True)
class Template:
    r"""A prompt and a way of scoring the answers.

    With ``scoring="options"`` each choice is scored by its log-likelihood as the text
    ``" " + choice`` after the prompt. With ``scoring="labels"`` the answer is a softmax over the
    tokens of ``label_words`` at the prompt's last position, in the order of the item's choices.

    In ``prompt``, ``{q}`` stands for the question. Each of ``label_words`` has its leading space.
    """

    prompt: str
    scoring: Literal["options", "labels"]
    label_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "{q}" not in self.prompt:
            raise DataError(f"the prompt {self.prompt!r} has no {{q}}: say where the question goes")

    def format(self, item: Item) -> str:
        """The prompt of one item, without an answer."""
        return self.prompt.replace("{q}", item.question)


QUESTION = Template("Question: {q}\nAnswer:", "options")

_TEMPLATES = {
    "sst2": Template(
        "Review: {q}\nSentiment (negative or positive):", "labels", (" negative", " positive")
    ),
    "ag_news": Template(
        "Article: {q}\nTopic (world, sports, business or technology):",
        "labels",
        (" world", " sports", " business", " technology"),
    ),
    # the questions end with a question mark, and the choices are ("false", "true")
    "boolq": Template("Question: {q}\nAnswer (yes or no):", "labels", (" no", " yes")),
}


def template_for(task: str) -> Template:
    """The template of a task, with label words for ``sst2``, ``ag_news`` and ``boolq``."""
    return _TEMPLATES.get(task, QUESTION)
