from dataclasses import replace

import datasets
import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import DataError, Item
from pyro_blora.labels import Template, template_for
from pyro_blora.likelihoods import (
    LabelTokens,
    LabelTokensCollator,
    MultipleChoice,
    MultipleChoiceCollator,
    TextCollator,
)

OPTIONS = template_for("facts")
LABELS = template_for("sst2")
KEY = Item("key", "What do people use a key for?", ("opening a lock", "grass"), 0)
COLOR = Item("color", "Which color is grass?", ("red", "green", "blue"), 1)
FILM = Item("film", "a warm and funny film", ("negative", "positive"), 1)
DULL = Item("dull", "dull", ("negative", "positive"), 0)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def row_of(item):
    return {"question": item.question, "choices": list(item.choices), "label": item.label}


class TestMultipleChoice:
    def test_layout(self, wrapped):
        batch = MultipleChoiceCollator(wrapped, OPTIONS)([KEY, COLOR])
        assert set(batch) == {"input_ids", "attention_mask", "option_mask", "labels"}
        assert batch["labels"].tolist() == [0, 1]
        length = batch["input_ids"].shape[-1]
        assert batch["input_ids"].shape == (2, 3, length)
        for b, item in enumerate((KEY, COLOR)):
            prompt = [wrapped.bos_token_id, *ids(wrapped, OPTIONS.format(item))]
            for k in range(3):
                option = ids(wrapped, " " + item.choices[k]) if k < len(item.choices) else []
                rest = length - len(prompt) - len(option)
                row = prompt + option + [wrapped.pad_token_id] * rest
                assert batch["input_ids"][b, k].tolist() == row
                mask = [1] * (len(prompt) + len(option)) + [0] * rest
                assert batch["attention_mask"][b, k].tolist() == mask
                scored = [False] * len(prompt) + [True] * len(option) + [False] * rest
                assert batch["option_mask"][b, k].tolist() == scored
        assert batch["option_mask"].dtype == torch.bool

    @pytest.mark.parametrize("eos", [None, "</s>"])
    def test_without_a_pad_token(self, build, eos):
        tokenizer = build(eos=eos)
        batch = MultipleChoiceCollator(tokenizer, OPTIONS)([KEY, COLOR])
        padding = batch["input_ids"][batch["attention_mask"] == 0]
        assert len(padding)
        assert (padding == (tokenizer.eos_token_id or 0)).all()

    def test_cuts_the_question_from_the_left_for_all_options_alike(self, wrapped):
        room, prompt = 6, ids(wrapped, OPTIONS.format(KEY))
        options = [ids(wrapped, " " + choice) for choice in KEY.choices]
        longest = max(map(len, options))
        batch = MultipleChoiceCollator(wrapped, OPTIONS, max_length=1 + room + longest)([KEY])
        for k, option in enumerate(options):
            row = [wrapped.bos_token_id, *prompt[-room:], *option]
            assert batch["input_ids"][0, k, : len(row)].tolist() == row
            scored = batch["input_ids"][0, k][batch["option_mask"][0, k]]
            assert scored.tolist() == option
        with pytest.raises(DataError, match=r"item 'key': .*raise max_length"):
            MultipleChoiceCollator(wrapped, OPTIONS, max_length=1 + longest)([KEY])

    def test_rows_of_one_s_own_need_neither_a_template_nor_an_id(self, wrapped):
        rows = [row_of(item) for item in (KEY, COLOR)]
        expected = MultipleChoiceCollator(wrapped, OPTIONS)([KEY, COLOR])
        for given in (rows, [KEY, {**rows[1], "id": "color", "level": 3}]):
            found = MultipleChoiceCollator(wrapped)(given)
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        bare = {"question": "2 + 2?", "choices": ["3", "4"]}
        assert "labels" not in MultipleChoiceCollator(wrapped)([bare])
        with pytest.raises(DataError, match="label"):
            MultipleChoiceCollator(wrapped)([rows[0], bare])


def test_rows_of_options_need_labels_in_training_alone_and_are_all_read_first(wrapped):
    rows = [row_of(item) for item in (KEY, COLOR) * 3]
    net = tiny.llama(vocab_size=512)
    blora = BayesianLoRA(net, tokenizer=wrapped, likelihood=MultipleChoice(), rank=2)
    fit(blora, rows, num_steps=1, progress=False)
    bare = [{k: v for k, v in row.items() if k != "label"} for row in rows]
    found, labels = blora.predict_dataset(bare, num_samples=0, progress=False)
    assert labels is None
    expected = blora.predict_dataset(rows, num_samples=0, progress=False)[0].probs
    assert torch.equal(found.probs, expected)
    with pytest.raises(DataError, match="label"):
        fit(blora, bare, num_steps=1)
    with pytest.raises(DataError, match="row 5"):
        fit(blora, [*rows[:5], {**rows[0], "label": 7}], num_steps=1)


class TestLabelTokens:
    def test_layout(self, wrapped):
        collate = LabelTokensCollator(wrapped, LABELS)
        batch = collate([FILM, DULL])
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["labels"].tolist() == [1, 0]
        for b, item in enumerate((FILM, DULL)):
            prompt = [wrapped.bos_token_id, *ids(wrapped, LABELS.format(item))]
            rest = batch["input_ids"].shape[1] - len(prompt)
            assert batch["input_ids"][b].tolist() == prompt + [wrapped.pad_token_id] * rest
            assert batch["attention_mask"][b].tolist() == [1] * len(prompt) + [0] * rest
        assert wrapped.decode(list(collate.token_ids)) == " negative positive"
        with pytest.raises(DataError, match="item 'color' has 3 choices"):
            collate([COLOR])

    @pytest.mark.parametrize("second", [" unheard", " positive"])
    def test_a_word_of_several_tokens_or_of_another_s(self, build, second):
        template = Template("{q}", "labels", (" positive", second))
        with pytest.raises(DataError, match="expected a different single one each"):
            LabelTokensCollator(build(), template)


@pytest.mark.parametrize("form", ["table", "letters", "loader of items"])
def test_choices_keep_the_order_of_the_training(form, wrapped):
    collate, net = LabelTokensCollator(wrapped, LABELS), tiny.llama(vocab_size=len(wrapped))
    blora = BayesianLoRA(net, likelihood=LabelTokens(token_ids=collate.token_ids))
    items = [Item(str(k), f"film {k}", ("bad", "good"), k % 2) for k in range(9)]
    turned = [replace(item, choices=("good", "bad"), label=1 - item.label) for item in items]
    if form != "loader of items":
        items, turned = [*map(row_of, items)], [*map(row_of, turned)]
    data, given = items, collate
    if form.startswith("loader"):
        data, given = DataLoader(items, 4, collate_fn=collate), None
    elif form == "letters":
        table = datasets.Dataset.from_list(items)
        data = table.cast_column("label", datasets.ClassLabel(names=["A", "B"]))
    fit(blora, data, collate=given, num_steps=1, progress=False)
    collate = LabelTokensCollator(wrapped, LABELS)  # which has seen no item
    for data, given in ((turned, collate), (DataLoader(turned, 4, collate_fn=collate), None)):
        with pytest.raises(DataError, match=r"reorder|must number the classes"):
            blora.predict_dataset(data, given)


def film(choices, label=0, name="film"):
    return Item(name, "a film", choices, label)


@pytest.fixture
def words(wrapped):
    return LabelTokensCollator(wrapped, LABELS)


def test_letters_name_places_whatever_the_choices_are():
    letters = Template("Question: {q}\nAnswer:", "labels", (" A", " B"))
    found = LabelTokensCollator(build_tokenizer([": A B A B"] * 3), letters)
    batch = found([film(("red", "blue"), 1), film(("one", "two")), film(("blue", "red"))])
    assert batch["labels"].tolist() == [1, 0, 0]


def test_all_items_have_the_same_choices(words):
    """Words of which no choice is one, as those of BoolQ, cannot tell the order."""
    for wrong in (("positive", "negative"), ("positive", "bad")):  # which is not remembered
        with pytest.raises(DataError, match=r"'film'.*one for each of the label words.*reorder"):
            words([film(wrong)])
    words([film(("bad", "good")), film(("Bad", "Good"))])
    with pytest.raises(DataError, match=r"'next'.*expected those of all items"):
        words([film(("good", "bad"), name="next")])


def test_a_tokenizer_that_begins_each_text_with_a_space_of_its_own():
    """A word is one token where it goes on from a text, as it does from a prompt."""
    names = ["[UNK]", "▁", ":", "▁:", "▁negative", "▁positive", "▁a"]
    own = Tokenizer(WordLevel({name: k for k, name in enumerate(names)}, unk_token="[UNK]"))
    own.normalizer = normalizers.Prepend(" ")
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
    assert len(tokenizer(" negative")["input_ids"]) == 2
    assert LabelTokensCollator(tokenizer, LABELS).token_ids == (4, 5)
    batch = MultipleChoiceCollator(tokenizer)([film(("negative", "positive"))])
    assert batch["input_ids"][batch["option_mask"]].tolist() == [4, 5]


@pytest.mark.parametrize("eos", [None, "</s>"])
def test_a_chat_template_s_start_is_not_written_twice(build, eos):
    """Llama's, Gemma's and Mistral's tokenizers add BOS to a text that has it already."""
    tokenizer = build(bos="<s>", eos=eos, pad=None if eos else "<pad>")
    chat, start = "<s>Question: What color is grass?", tokenizer.bos_token_id
    plain = ids(tokenizer, chat)
    assert plain.count(start) == 1
    expected = plain + ids(tokenizer, " red") + ([] if eos is None else [tokenizer.eos_token_id])
    for row in ({"prompt": chat, "completion": " red"}, {"text": chat + " red"}):
        assert TextCollator(tokenizer)([row])["input_ids"][0].tolist() == expected
    template, item = Template("<s>{q}", "options"), {**row_of(COLOR), "question": chat[3:]}
    options = MultipleChoiceCollator(tokenizer, template)([item])
    assert options["input_ids"][0, 0][: len(plain)].tolist() == plain
    cut = MultipleChoiceCollator(tokenizer, template, max_length=8)([item])["input_ids"][0, 0]
    assert cut.tolist().count(start) == 1
    assert cut[0] == start


def test_a_long_completion_keeps_its_prompt_and_loses_its_end(wrapped):
    """A prompt that is long, too, gets half of the room and keeps BOS."""
    collate = TextCollator(wrapped, max_length=8)
    short, long = "a film", "a film a film a film a film a film"
    for prompt, completion, before in ((short, long, 3), (long, short, 5), (long, long, 4)):
        with pytest.warns(UserWarning, match="is cut to max_length=8"):
            batch = collate([{"prompt": prompt, "completion": f" {completion}"}])
        row, labels = batch["input_ids"][0], batch["labels"][0]
        assert len(row) == 8
        assert (labels == -100).sum() == before
        assert row[0] == wrapped.bos_token_id
        assert row[1:before].tolist() == ids(wrapped, prompt)[-(before - 1) :]
        read = wrapped.decode(labels[before : before + 3], skip_special_tokens=True)
        assert completion.startswith(read.strip())


def test_an_end_that_a_chat_template_has_written_stays(wrapped):
    batch = TextCollator(wrapped)([{"prompt": "a film</s>", "completion": "green"}])
    prompt = batch["input_ids"][0][batch["labels"][0] == -100].tolist()
    assert prompt == [wrapped.bos_token_id, *ids(wrapped, "a film</s>")]
    assert prompt[-1] == wrapped.eos_token_id


@pytest.mark.parametrize("text", ["a film", "a film</s>", "a film</s></s>"])
def test_an_end_that_the_tokenizer_adds_is_no_second_one(text, build):
    tokenizer = build(eos="</s>", pad="<pad>")
    found = TextCollator(tokenizer)([{"text": text}])["input_ids"][0].tolist()
    assert found.count(tokenizer.eos_token_id) == max(1, text.count("</s>"))


def test_a_start_that_is_also_the_end_stays_before_an_empty_prompt(build):
    """As GPT-2's; without it the first token of the completion would not be scored."""
    tokenizer = build(bos="<s>")
    tokenizer.eos_token = "<s>"
    found = TextCollator(tokenizer)([{"prompt": "", "completion": "green"}])
    assert found["input_ids"][0, 0] == tokenizer.bos_token_id
    assert found["labels"][0].tolist() == [-100, *found["input_ids"][0, 1:].tolist()]
