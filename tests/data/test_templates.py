import pytest

from pyro_blora.data import DataError, Item, Template, template_for

ITEM = Item("a", "Is {this} a %s?", ("false", "true"), 1)


@pytest.mark.parametrize(
    "task",
    [
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "winogrande_xs",
        "piqa",
        "social_iqa",
        "mmlu_physics",
        "facts",
        "my own task",
    ],
)
def test_options(task):
    template = template_for(task)
    assert template.scoring == "options"
    assert template.label_words == ()
    assert template.format(ITEM) == "Question: Is {this} a %s?\nAnswer:"


@pytest.mark.parametrize(
    ("task", "prompt", "words"),
    [
        (
            "sst2",
            "Review: Is {this} a %s?\nSentiment (negative or positive):",
            (" negative", " positive"),
        ),
        (
            "ag_news",
            "Article: Is {this} a %s?\nTopic (world, sports, business or technology):",
            (" world", " sports", " business", " technology"),
        ),
        ("boolq", "Question: Is {this} a %s?\nAnswer (yes or no):", (" no", " yes")),
    ],
)
def test_labels(task, prompt, words):
    template = template_for(task)
    assert template.scoring == "labels"
    assert template.label_words == words
    assert template.format(ITEM) == prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("Question:", "options"), "has no {q}"),
        (("{q}", "letters"), "choose 'options' or 'labels'"),
        (("{q}", "labels"), "one word a class"),
        (("{q}", "labels", (" yes",)), "one word a class"),
        (("{q}", "options", (" no", " yes")), "reads none"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(DataError, match=message):
        Template(*fields)
