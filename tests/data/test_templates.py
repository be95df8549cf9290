import pytest

from pyro_blora.data import DataError, Item, Template, template_for

ITEM = Item("a", "Is {this} a %s?", ("false", "true"), 1)


@pytest.mark.parametrize(
    ("task", "prompt", "words"),
    [
        ("arc_easy", "Question: Is {this} a %s?\nAnswer:", ()),
        ("my own task", "Question: Is {this} a %s?\nAnswer:", ()),
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
def test_the_template_of_a_task(task, prompt, words):
    template = template_for(task)
    assert template.scoring == ("labels" if words else "options")
    assert template.label_words == words
    assert template.format(ITEM) == prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("Question:", "options"), "has no {q}"),
        (("{q}", "letters"), "choose 'options' or 'labels'"),
        (("{q}", "labels"), "one word a class"),
        (("{q}", "labels", (" yes",)), "one word a class"),
        (("{q}", "options", (" no", " yes")), "'options' has none"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(DataError, match=message):
        Template(*fields)
