"""Rows as people have them: files, data frames, data sets; read by an adapter's tokenizer."""

import json

import datasets
import pandas
import pytest
import tiny
import torch
from torch.utils.data import Subset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainingArguments

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import ClassificationCollator, TextCollator, load_task
from pyro_blora.data.tables import read_table
from pyro_blora.errors import BatchError, ConfigurationError, DataError
from pyro_blora.evaluation.metrics import evaluate_text
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import LabelTokens, MultipleChoice, SequenceClassification

WORDS = ("dull", "funny")
ROWS = [{"text": f"a {WORDS[k % 2]} film {k}", "label": WORDS[k % 2]} for k in range(12)]
NUMBERED = [{**row, "label": WORDS.index(row["label"])} for row in ROWS]


@pytest.fixture
def small(build):
    """A tokenizer of fewer than 32 tokens, as the tiny networks have."""
    return build(bos="<s>", eos="</s>", pad="<pad>")


def classifier(tokenizer, **config):
    net = tiny.bert()
    net.resize_token_embeddings(len(tokenizer))
    for name, value in config.items():
        setattr(net.config, name, value)
    return net


@pytest.fixture
def files(tmp_path):
    frame = pandas.DataFrame(ROWS)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    pandas.DataFrame(ROWS[:6]).to_csv(tmp_path / "a[1].csv", index=False)
    pandas.DataFrame(ROWS[:3]).to_csv(tmp_path / "a1.csv", index=False)
    assert len(read_table(tmp_path / "a[1].csv")) == 6


def test_every_form_of_a_table_is_the_same_task_and_the_same_batches(files, small):
    expected = load_task(ROWS)
    assert {item.choices for item in expected.train} == {WORDS}
    encoded = datasets.Dataset.from_list(ROWS).class_encode_column("label")
    forms = [*files.iterdir(), pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS), encoded]
    net = classifier(small, id2label={0: "LABEL_0", 1: "LABEL_1"})
    for form in forms:
        task = load_task(form, seed=0)
        assert (task.train, task.test) == (expected.train, expected.test)
        blora = BayesianLoRA(net, tokenizer=small)
        rows, collate = blora.reading(form)
        batch = collate([rows[k] for k in range(12)])
        assert batch["labels"].tolist() == [k % 2 for k in range(12)]
        ids = small([row["text"] for row in ROWS], padding=True)["input_ids"]
        assert batch["input_ids"].tolist() == ids
        blora.unwrap()
    with pytest.raises(DataError, match=r"train or test, got \['dev'\]"):
        load_task({"dev": ROWS})
    whole = load_task(datasets.DatasetDict(train=encoded, test=encoded))
    assert (len(whole.train) + len(whole.validation), len(whole.test)) == (12, 12)


def test_a_single_table_is_split_alike_for_every_seed():
    rows = [{**ROWS[k % 12], "text": f"film {k}"} for k in range(60)]
    tasks = [load_task(rows, seed=seed) for seed in (0, 1)]
    assert tasks[0].test == tasks[1].test
    assert tasks[0].train != tasks[1].train
    assert 6 <= len(tasks[0].test) <= 18
    ids = [i.id for part in (tasks[0].train, tasks[0].validation, tasks[0].test) for i in part]
    assert len(set(ids)) == 60
    twice = load_task(rows * 2)  # no text is in two splits
    parts = [{item.question for item in p} for p in (twice.train, twice.validation, twice.test)]
    assert len(twice.test) == 2 * len(parts[2])
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    more = load_task([{**ROWS[0], "text": f"more {k}"} for k in range(20)] + rows)
    learned = {item.question for item in (*tasks[0].train, *tasks[0].validation)}
    assert not learned & {item.question for item in more.test}  # the file has grown since


def test_names_of_classes_are_the_networks_or_else_the_data_s_and_are_saved(small, tmp_path):
    """A network whose names are in another order keeps its order."""
    own = classifier(small, id2label={0: "funny", 1: "dull"})
    blora = BayesianLoRA(own, tokenizer=small)
    rows, collate = blora.reading(ROWS)
    assert collate(rows[:2])["labels"].tolist() == [1, 0]
    items, collate = blora.reading(load_task(ROWS).test)  # whose choices are sorted
    named = [item.choices[item.label] for item in items]
    assert [("funny", "dull")[k] for k in collate(list(items))["labels"]] == named
    blora.unwrap()
    numbered = datasets.Dataset.from_list(ROWS).class_encode_column("label")  # dull is 0
    for form in (numbered, Subset(numbered, range(12)), numbered.with_format("torch")):
        blora = BayesianLoRA(own, tokenizer=small)
        rows, collate = blora.reading(form)
        assert collate([rows[0], rows[1]])["labels"].tolist() == [1, 0]
        blora.unwrap()
    net = classifier(small, id2label={0: "LABEL_0", 1: "LABEL_1"})
    blora = BayesianLoRA(net, tokenizer=small)
    fit(blora, ROWS, num_steps=2, progress=False)
    assert blora.likelihood.num_data == 12
    blora.save_pretrained(tmp_path)
    blora.unwrap()
    again = BayesianLoRA.from_pretrained(net, tmp_path, tokenizer=small)
    assert again.likelihood.classes == WORDS
    texts = [row["text"] for row in ROWS[:5]]
    of_texts = again.predict(texts, 0).samples
    by_hand = again.predict(small(texts, padding=True, return_tensors="pt"), 0).samples
    assert of_texts.equal(by_hand)
    assert of_texts.equal(again.predict(ROWS[:5], 0).samples)
    _, labels = again.predict_dataset(ROWS[1::2], num_samples=0, progress=False)  # one class
    assert labels.tolist() == [1] * 6
    with pytest.raises(DataError, match=r"'label'.*\['dull', 'funny'\], got 'long'"):
        again.predict_dataset([{"text": "a", "label": "long"}], progress=False)


def test_a_class_keeps_its_name_in_tables_that_number_the_classes_apart(small):
    """Two splits of a data set may have encoded their labels by themselves."""
    names = ("cold", "warm", "wet")
    rows = [{"text": f"was {names[k % 3]}", "label": names[k % 3]} for k in range(12)]
    of = [
        datasets.Dataset.from_list(part).class_encode_column("label")
        for part in (rows, [row for row in rows if row["label"] != "cold"])
    ]
    assert of[1].features["label"].names == ["warm", "wet"]
    task = load_task(datasets.DatasetDict(train=of[0], test=of[1]))
    for item in (*task.train, *task.test):
        assert item.question == f"was {item.choices[item.label]}"
    net = classifier(small)
    blora = BayesianLoRA(net, tokenizer=small)
    fit(blora, of[0], num_steps=1, progress=False)
    encoded = of[1].map(lambda row: dict(small(row["text"])))
    for form in (of[1], encoded, rows[1:3]):
        data, collate = blora.reading(form)
        part = [data[k] for k in range(2)]
        found = [names[k] for k in collate(part)["labels"]]
        assert found == [row["text"].removeprefix("was ") for row in part]
    blora.unwrap()
    digits = [{"text": "a film", "label": str(k % 3)} for k in range(6)]
    blora = BayesianLoRA(net, tokenizer=small)
    data, collate = blora.reading(digits)
    assert collate(data)["labels"].tolist() == [0, 1, 2] * 2


def test_items_of_numbered_classes_are_distilled_without_labels(small):
    blora = BayesianLoRA(classifier(small), tokenizer=small, guide=MatrixNormal(init_scale=1.0))
    task = load_task(NUMBERED)
    assert 0.01 <= blora.distill(task.train, num_samples=3, progress=False) <= 100
    assert blora.distill([{"text": "a film"}] * 4, num_samples=3, progress=False) > 0


def test_encoded_rows_lose_the_columns_that_no_one_takes(small, tmp_path):
    """As under transformers' Trainer, by a collator of the user's or by the tokenizer alone."""
    rows = [{**row, **small(row["text"]), "idx": 7} for row in NUMBERED]
    strings = [{**row, "label": WORDS[row["label"]]} for row in rows]
    net = classifier(small)
    blora = BayesianLoRA(net, likelihood=SequenceClassification(num_data=12), tokenizer=small)
    pad = DataCollatorWithPadding(small)
    kept = [{k: v for k, v in row.items() if k not in ("text", "idx")} for row in rows]
    for collate in (pad, None):
        given, made = blora.reading(datasets.Dataset.from_list(rows), collate)
        found = made([given[k] for k in range(12)])
        assert {k: v.tolist() for k, v in found.items()} == {
            k: v.tolist() for k, v in pad(kept).items()
        }
    net.config.id2label = {0: "dull", 1: "funny", 2: "long"}
    given, made = blora.reading(strings, pad)  # whose labels no tensor can hold
    assert made(given)["labels"].tolist() == [row["label"] for row in rows]
    fit(blora, rows, num_steps=2, progress=False)
    trainer = tiny.BayesianLoRATrainer(
        blora,
        TrainingArguments(str(tmp_path), max_steps=1, report_to=[], dataloader_pin_memory=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=small,
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert set(batch) == {*small("a"), "labels"}
    trainer.train()
    found = trainer.predict(pandas.DataFrame(rows))
    assert found.label_ids.tolist() == [row["label"] for row in rows]


def test_text_and_completions_are_scored_as_a_collator_of_transformers_does(small):
    net = tiny.llama(vocab_size=len(small))
    blora = BayesianLoRA(net, tokenizer=small, target_modules=["q_proj"])
    rows, collate = blora.reading([{"text": "a funny film"}, {"text": "film"}])
    assert isinstance(collate, TextCollator)
    found = collate(rows)
    end = small.eos_token_id
    for k, row in enumerate(rows):
        ids = small(row["text"])["input_ids"]
        ids = ids if ids[-1] == end else [*ids, end]
        assert found["input_ids"][k, : len(ids)].tolist() == ids
        assert found["labels"][k].tolist() == ids + [-100] * (found["labels"].shape[1] - len(ids))
    pairs = [
        {"prompt": "a dull", "completion": " film"},
        {"prompt": "a", "completion": " funny film"},
    ]
    rows, collate = blora.reading(pairs)
    made = []
    for row in pairs:
        before = [i for i in small(row["prompt"])["input_ids"] if i != end]
        after = small(row["completion"], add_special_tokens=False)["input_ids"] + [end]
        made.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    expected = DataCollatorForSeq2Seq(small)(made)
    for key in ("input_ids", "labels", "attention_mask"):
        assert collate(rows)[key].tolist() == expected[key].tolist(), key
    with pytest.warns(UserWarning, match="is cut to max_length=3"):
        long = TextCollator(small, max_length=3)(pairs)
    assert long["input_ids"].shape[1] == 3
    assert (long["labels"] != -100).any(-1).all()
    fit(blora, pairs, num_steps=2, progress=False)


def test_rows_of_text_that_cannot_be_used_are_named_before_the_first_step(small):
    blora = BayesianLoRA(tiny.llama(vocab_size=len(small)), tokenizer=small, rank=2)
    good = {"prompt": "a", "completion": " film"}
    for rows, said in (
        ([{"instruction": "a", "response": "b"}], "got instruction, response; rename or drop"),
        ([{"prompt": "a"}], "or prompt and completion, got prompt"),
        ([good, {**good, "completion": None}], "'completion' must hold a text, got None in row 1"),
        ([{**good, "label": 1, "text": "b"}], "got prompt, completion, label, text; rename or"),
        ((row for row in [good]), "must have a length, got a generator"),
    ):
        with pytest.raises((DataError, ConfigurationError), match=said):
            fit(blora, rows, num_steps=1)
    with pytest.raises(DataError, match="got completion, prompt; use fit"):
        load_task([good] * 9)
    with pytest.raises(BatchError, match="got 1 without one"):
        evaluate_text(torch.zeros(2), torch.tensor([3, 0]))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"review": "a", "label": 0}],
            "columns text and label, got review, label in row 0; rename those that hold the text",
        ),
        (
            [ROWS[0], {"text": None, "label": 0}],
            "a text, got None in row 1; leave the row out, or convert",
        ),
        ([{"headline": "a", "topic": 0}], "rename those that hold the text and the label"),
        ([{"text": "a", "stars": 0}], "got text, stars in row 0; rename those that hold the label"),
        (
            [{"text": "a", "label": 0.5}],
            "whole number from 0, got 0.5 in row 0; cast the column to int",
        ),
        ([{"text": "a", "label": -1}], "whole number from 0, got -1 in row 0; leave the row out"),
        ([ROWS[0], NUMBERED[1]], "must hold texts or numbers, got both, such as 'dull' and 1"),
        ([{"text": "a", "label": 4}], "load it with num_labels=5, or name all of its classes"),
        ([{"text": "a", "label": "b"}] * 3, r"a logit for each of the classes \['b'\], got 2"),
        ({"train": ROWS}, r"one split, got \['train'\]"),
        ("a.txt", "must be one of .csv"),
        ("missing.csv", "must be a file, got none"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(rows, said, small):
    net = classifier(small, id2label={0: "LABEL_0", 1: "LABEL_1"})
    blora = BayesianLoRA(net, tokenizer=small)
    with pytest.raises((DataError, ConfigurationError), match=said) as caught:
        fit(blora, rows, num_steps=1, progress=False)
    assert "\n" not in str(caught.value)


def test_a_language_model_reads_options_by_its_tokenizer_and_refuses_labels_as_text(small):
    net = tiny.llama(vocab_size=len(small))
    with pytest.raises(
        ConfigurationError,
        match="or prompt and completion, got text, label",
    ):
        BayesianLoRA(net, tokenizer=small, target_modules=["q_proj"]).reading(ROWS)
    net = tiny.llama(vocab_size=len(small))
    options = [{"question": "which color", "choices": ["red", "blue"], "label": 1}] * 2
    blora = BayesianLoRA(
        net, tokenizer=small, target_modules=["q_proj"], likelihood=MultipleChoice()
    )
    fit(blora, options, num_steps=1, held_out=0.0, progress=False)
    blora.unwrap()
    blora = BayesianLoRA(net, target_modules=["q_proj"], likelihood=LabelTokens(token_ids=(5, 6)))
    with pytest.raises(ConfigurationError, match="must have a tokenizer"):
        fit(blora, ROWS, num_steps=1)


def test_a_classifier_reads_pairs_and_rows_without_labels(small):
    collate = ClassificationCollator(small, WORDS)
    both = collate([{"text": "a film", "text_pair": "funny"}])
    assert both["input_ids"].tolist() == [small("a film", "funny")["input_ids"]]
    assert "labels" not in both


def test_json_lines_may_have_questions_without_choices(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a ?", "answer": "b"}\n')
    assert read_table(path) == [{"question": "a ?", "answer": "b"}]
