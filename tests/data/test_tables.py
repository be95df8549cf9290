"""Rows as people have them: files, data frames, data sets; read by an adapter's tokenizer."""

import json

import datasets
import pandas
import pytest
import tiny
from torch.utils.data import Subset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainingArguments

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import load_task
from pyro_blora.data.tables import read_table
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import (
    ClassificationCollator,
    MultipleChoice,
    SequenceClassification,
    TextCollator,
)

WORDS = ("dull", "funny")
ROWS = [{"text": f"a {WORDS[k % 2]} film {k}", "label": WORDS[k % 2]} for k in range(12)]
NUMBERED = [{**row, "label": WORDS.index(row["label"])} for row in ROWS]


UNNAMED = {0: "LABEL_0", 1: "LABEL_1"}


@pytest.fixture
def small(wrapped):
    """An adapter of a classifier, whose configuration may be changed, or of a language model."""

    def adapter(kind=tiny.bert, config=None, **options):
        net = kind(vocab_size=len(wrapped))
        for name, value in (config or {}).items():
            setattr(net.config, name, value)
        return BayesianLoRA(net, tokenizer=wrapped, **options)

    return adapter


def first_labels(blora, rows, count=2):
    data, collate = blora.reading(rows)
    return collate([data[k] for k in range(count)])["labels"].tolist()


def test_a_file_is_read_row_by_row_and_its_name_is_no_pattern(tmp_path):
    pandas.DataFrame(ROWS[:6]).to_csv(tmp_path / "a[1].csv", index=False)
    pandas.DataFrame(ROWS[:3]).to_csv(tmp_path / "a1.csv", index=False)
    assert len(read_table(tmp_path / "a[1].csv")) == 6
    (tmp_path / "a.jsonl").write_text('{"question": "a ?", "answer": "b"}\n')  # without choices
    assert read_table(tmp_path / "a.jsonl") == [{"question": "a ?", "answer": "b"}]


def test_every_form_of_a_table_is_the_same_task_and_the_same_batches(tmp_path, small, wrapped):
    expected, texts = load_task(ROWS), [row["text"] for row in ROWS]
    assert {item.choices for item in expected.train} == {WORDS}
    frame, table = pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    encoded = table.class_encode_column("label")
    for form in (*tmp_path.iterdir(), frame, table, encoded):
        task = load_task(form, seed=0)
        assert (task.train, task.test) == (expected.train, expected.test)
        rows, collate = small(config={"id2label": UNNAMED}).reading(form)
        batch = collate([rows[k] for k in range(12)])
        assert batch["labels"].tolist() == [k % 2 for k in range(12)]
        assert batch["input_ids"].tolist() == wrapped(texts, padding=True)["input_ids"]
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
    more = load_task([{**ROWS[0], "text": f"more {k}"} for k in range(20)] + rows)
    learned = {item.question for item in (*tasks[0].train, *tasks[0].validation)}
    assert not learned & {item.question for item in more.test}  # the file has grown since


def test_names_of_classes_are_the_network_s_or_the_data_s(small, wrapped, tmp_path):
    """A network whose names are in another order keeps its order."""
    reverse = {"config": {"id2label": {0: "funny", 1: "dull"}}}
    numbered = datasets.Dataset.from_list(ROWS).class_encode_column("label")  # dull is 0
    for form in (ROWS, numbered, Subset(numbered, range(12)), numbered.with_format("torch")):
        assert first_labels(small(**reverse), form) == [1, 0]
    items = load_task(ROWS).test  # whose choices are sorted
    found = [("funny", "dull")[k] for k in first_labels(small(**reverse), items, len(items))]
    assert found == [item.choices[item.label] for item in items]
    blora = small(config={"id2label": UNNAMED})
    fit(blora, ROWS, num_steps=2, progress=False)
    assert blora.likelihood.num_data == 12
    blora.save_pretrained(tmp_path)
    again = BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path, tokenizer=wrapped)
    assert again.likelihood.classes == WORDS
    texts = [row["text"] for row in ROWS[:5]]
    by_hand = again.predict(wrapped(texts, padding=True, return_tensors="pt"), 0).samples
    for rows in (texts, ROWS[:5]):
        assert again.predict(rows, 0).samples.equal(by_hand)
    _, labels = again.predict_dataset(ROWS[1::2], num_samples=0, progress=False)  # one class
    assert labels.tolist() == [1] * 6
    with pytest.raises(DataError):
        again.predict_dataset([{"text": "a", "label": "long"}], progress=False)


def test_a_class_keeps_its_name_in_tables_that_number_the_classes_apart(small, wrapped):
    """Two splits of a data set may have encoded their labels by themselves."""
    names = ("cold", "warm", "wet")
    rows = [{"text": f"was {names[k % 3]}", "label": names[k % 3]} for k in range(12)]
    train, test = (
        datasets.Dataset.from_list(part).class_encode_column("label")
        for part in (rows, [row for row in rows if row["label"] != "cold"])
    )
    assert test.features["label"].names == ["warm", "wet"]
    task = load_task(datasets.DatasetDict(train=train, test=test))
    for item in (*task.train, *task.test):
        assert item.question == f"was {item.choices[item.label]}"
    blora = small()
    fit(blora, train, num_steps=1, progress=False)
    for form in (test, test.map(lambda row: dict(wrapped(row["text"]))), rows[1:3]):
        assert first_labels(blora, form) == [1, 2]
    digits = [{"text": "a film", "label": str(k % 3)} for k in range(6)]
    assert first_labels(small(), digits, 6) == [0, 1, 2] * 2


def test_items_of_numbered_classes_are_distilled_without_labels(small):
    blora = small(guide=MatrixNormal(init_scale=1.0))
    task = load_task(NUMBERED)
    assert 0.01 <= blora.distill(task.train, num_samples=3, progress=False) <= 100
    assert blora.distill([{"text": "a film"}] * 4, num_samples=3, progress=False) > 0


def test_encoded_rows_lose_the_columns_that_no_one_takes(small, wrapped, tmp_path):
    """As under transformers' Trainer, by a collator of the user's or by the tokenizer alone."""
    rows = [{**row, **wrapped(row["text"]), "idx": 7} for row in NUMBERED]
    labels = [row["label"] for row in rows]
    blora = small(likelihood=SequenceClassification(num_data=12))
    pad = DataCollatorWithPadding(wrapped)
    expected = pad([{k: v for k, v in row.items() if k not in ("text", "idx")} for row in rows])
    for collate in (pad, None):
        data, made = blora.reading(datasets.Dataset.from_list(rows), collate)
        batch = made([data[k] for k in range(12)])
        assert {k: v.tolist() for k, v in batch.items()} == {
            k: v.tolist() for k, v in expected.items()
        }
    blora.net.config.id2label = {0: "dull", 1: "funny", 2: "long"}
    strings = [{**row, "label": WORDS[row["label"]]} for row in rows]
    data, made = blora.reading(strings, pad)  # whose labels no tensor can hold
    assert made(data)["labels"].tolist() == labels
    fit(blora, rows, num_steps=2, progress=False)
    trainer = tiny.BayesianLoRATrainer(
        blora,
        TrainingArguments(str(tmp_path), max_steps=1, report_to=[], dataloader_pin_memory=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=wrapped,
    )
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert set(batch) == {*wrapped("a"), "labels"}
    trainer.train()
    assert trainer.predict(pandas.DataFrame(rows)).label_ids.tolist() == labels


def test_text_and_completions_are_scored_as_by_transformers(small, wrapped):
    blora = small(tiny.llama, target_modules=["q_proj"])
    texts = [{"text": "a funny film"}, {"text": "film"}]
    batch = blora.reading(texts)[1](texts)
    end = wrapped.eos_token_id
    for k, row in enumerate(texts):
        ids = wrapped(row["text"])["input_ids"]
        ids = ids if ids[-1] == end else [*ids, end]
        assert batch["input_ids"][k, : len(ids)].tolist() == ids
        assert batch["labels"][k].tolist() == ids + [-100] * (batch["labels"].shape[1] - len(ids))
    parts = [("a dull", " film"), ("a", " funny film")]
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in parts]
    by_hand = []
    for prompt, completion in parts:
        before = [i for i in wrapped(prompt)["input_ids"] if i != end]
        after = wrapped(completion, add_special_tokens=False)["input_ids"] + [end]
        by_hand.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    rows, collate = blora.reading(pairs)
    found, expected = collate(rows), DataCollatorForSeq2Seq(wrapped)(by_hand)
    for key in ("input_ids", "labels", "attention_mask"):
        assert found[key].tolist() == expected[key].tolist(), key
    with pytest.warns(UserWarning, match="is cut to max_length=3"):
        long = TextCollator(wrapped, max_length=3)(pairs)
    assert long["input_ids"].shape[1] == 3
    assert (long["labels"] != -100).any(-1).all()


GOOD = {"prompt": "a", "completion": " film"}


TEXTS = [[{"instruction": "a", "response": "b"}], [{"prompt": "a"}], ROWS, iter([GOOD])]
TEXTS += [[GOOD, {**GOOD, "completion": None}], [{**GOOD, "label": 1, "text": "b"}]]
CLASSES = [[{"review": "a", "label": 0}], [ROWS[0], {"text": None, "label": 0}], {"train": ROWS}]
CLASSES += [[{"text": "a", "label": label}] for label in (0.5, -1, 4)]  # of two classes
CLASSES += [[{"text": "a", "label": "b"}] * 3, [ROWS[0], NUMBERED[1]]]  # one class, two kinds
CLASSES += [[{"text": "a", "stars": 0}], "a.txt", "missing.csv"]
UNUSABLE = [*((tiny.llama, rows) for rows in TEXTS), *((tiny.bert, rows) for rows in CLASSES)]


@pytest.mark.parametrize(("kind", "rows"), UNUSABLE)
def test_rows_that_cannot_be_used_are_refused_before_the_first_step(kind, rows, small):
    blora = small(kind, config={"id2label": UNNAMED}, target_modules="all-linear", rank=2)
    before = tiny.trained(blora)
    with pytest.raises((DataError, ConfigurationError)):
        fit(blora, rows, num_steps=1)
    assert tiny.equal(tiny.trained(blora), before)


def test_a_language_model_reads_options_by_its_tokenizer(small):
    options = [{"question": "which color", "choices": ["red", "blue"], "label": 1}] * 2
    blora = small(tiny.llama, target_modules=["q_proj"], likelihood=MultipleChoice())
    fit(blora, options, num_steps=1, held_out=0.0, progress=False)
    with pytest.raises(ConfigurationError, match="must have a tokenizer"):
        fit(tiny.adapted(), ROWS, num_steps=1)


def test_a_classifier_reads_pairs_and_rows_without_labels(wrapped):
    both = ClassificationCollator(wrapped, WORDS)([{"text": "a film", "text_pair": "funny"}])
    assert both["input_ids"].tolist() == [wrapped("a film", "funny")["input_ids"]]
    assert "labels" not in both


def test_words_such_as_none_are_texts_in_a_file_too(tmp_path):
    rows = [{"text": text, "text_pair": "NA", "label": "null"} for text in ("None", "a film")]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    assert list(read_table(tmp_path / "a.csv")) == rows


def test_questions_without_a_right_answer_may_be_json_lines(tmp_path):
    rows = [{"question": f"is it {k}", "choices": ["yes", "no"]} for k in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_table(tmp_path / "a.jsonl") == rows


def test_an_id_may_be_a_number(tmp_path):
    rows = [
        {"id": k, "question": f"is it {k}", "choices": ["yes", "no"], "label": 0} for k in (7, 8)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [item.id for item in load_task({"test": tmp_path / "a.jsonl"}).test] == ["7", "8"]
