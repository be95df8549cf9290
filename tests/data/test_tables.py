"""Rows as people have them: files, data frames, data sets; read by an adapter's tokenizer."""

import copy
import json

import datasets
import pandas
import pytest
import tiny
from own_tokenizer import build_tokenizer
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import load_task
from pyro_blora.data.reading import reading
from pyro_blora.data.tables import read_table
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.guides import MatrixNormal
from pyro_blora.likelihoods import Ordinal, SequenceClassification, TokenClassification

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


def test_a_file_is_read_row_by_row_and_its_name_is_no_pattern(tmp_path):
    """Words such as "None" are texts, and questions need not have a right answer."""
    for name, count in (("a[1].csv", 6), ("a1.csv", 3)):
        rows = [{"text": text, "text_pair": "NA", "label": "null"} for text in ("None", "a", "b")]
        pandas.DataFrame((2 * rows)[:count]).to_csv(tmp_path / name, index=False)
        assert list(read_table(tmp_path / name)) == (2 * rows)[:count]
    (tmp_path / "a.csv").write_text("text,label\nGood, a film,0\nDull, a film,1\n")
    with pytest.raises(DataError, match="a name for each column"):
        read_table(tmp_path / "a.csv")
    for line in ("[]", "null", '[["text", 1]]'):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"a\.jsonl, line 1: a line must be a JSON object"):
            read_table(tmp_path / "a.jsonl")
    lines = [{"question": "a ?", "answer": "b"}], [{"question": "is it", "choices": ["yes", "no"]}]
    for rows in lines:
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert read_table(tmp_path / "a.jsonl") == rows


def test_columns_of_an_item_beside_others_are_the_same_in_every_file(tmp_path, small):
    """A classifier reads the text, and not the question that is in each row."""
    about = {"question": "is it", "choices": list(WORDS)}
    rows = [{**row, **about} for row in NUMBERED]
    for name, text in (("a.json", json.dumps(rows)), ("a.jsonl", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(text)
        read, collate = small().reading(tmp_path / name)
        assert list(read) == rows
        assert tiny.equal(collate(list(read)), small().reading(NUMBERED)[1](NUMBERED))


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


def test_a_class_keeps_its_name_in_splits_that_number_the_classes_apart():
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


def test_numbers_keep_their_names_in_rows_that_are_no_items():
    """A head may have another order, and so may another split."""
    tags, words = ("O", "B", "I"), ("a", "warm", "film")
    rows = [{"tokens": words, "tags": tags} for _ in range(9)]
    kinds = {"tokens": datasets.List(datasets.Value("string"))}

    def numbered(*names):
        named = kinds | {"tags": datasets.List(datasets.ClassLabel(names=[*names]))}
        return datasets.Dataset.from_list(rows, datasets.Features(named))

    task = load_task({"train": numbered(*tags), "test": numbered("I", "O", "B")})
    assert (task.train[0]["tags"], task.test[0]["tags"]) == ([0, 1, 2], [1, 2, 0])
    likelihood = TokenClassification(classes=tags)
    tokenizer = build_tokenizer(["a warm film"], pad="<pad>")
    net = tiny.bert(vocab_size=len(tokenizer), num_labels=3)
    with pytest.raises(TypeError, match="unsupported operand"):
        assert task.train + task.test
    twice = task.test + task.test
    for part in (task.train, task.test, task.train[2:], copy.deepcopy(task.test), twice):
        rows_read, collate = reading(part, None, net, likelihood, tokenizer)
        assert [t for t in collate([rows_read[0]])["labels"][0].tolist() if t >= 0] == [0, 1, 2]
    stars = datasets.Dataset.from_list([{"text": f"film {k}", "label": "2"} for k in range(9)])
    stars = load_task(stars.class_encode_column("label"), as_rows=True)
    with pytest.raises(DataError, match="got a ClassLabel that has 0 for '2'"):
        reading(stars.train, None, net, Ordinal(num_classes=3), tokenizer)


def test_a_single_table_is_split_alike_for_every_seed():
    rows = [{**ROWS[k % 12], "text": f"film {k}"} for k in range(60)]
    tasks = [load_task(rows, seed=seed) for seed in (0, 1)]
    assert tasks[0].test == tasks[1].test
    assert tasks[0].train != tasks[1].train
    assert 6 <= len(tasks[0].test) <= 18
    ids = [i.id for part in (tasks[0].train, tasks[0].validation, tasks[0].test) for i in part]
    assert len(set(ids)) == 60


def test_items_of_numbered_classes_are_distilled_without_labels(small):
    blora = small(guide=MatrixNormal(init_scale=1.0))
    task = load_task(NUMBERED)
    assert 0.01 <= blora.distill(task.train, num_samples=3, progress=False) <= 100
    assert blora.distill([{"text": "a film"}] * 4, num_samples=3, progress=False) > 0


def test_encoded_rows_lose_the_columns_that_no_one_takes(small, wrapped, tmp_path):
    rows = [{**row, **wrapped(row["text"]), "idx": 7} for row in NUMBERED]
    labels = [row["label"] for row in rows]
    blora = small(likelihood=SequenceClassification(num_data=12))
    pad = DataCollatorWithPadding(wrapped)
    expected = pad([{k: v for k, v in row.items() if k not in ("text", "idx")} for row in rows])
    for collate in (pad, None):
        data, made = blora.reading(datasets.Dataset.from_list(rows), collate)
        batch = made([data[k] for k in range(12)])
        assert tiny.equal(batch, expected)
    blora.net.config.id2label = {0: "dull", 1: "funny", 2: "long"}
    strings = [{**row, "label": WORDS[row["label"]]} for row in rows]
    data, made = blora.reading(strings, pad)  # whose labels no tensor can hold
    assert made(data)["labels"].tolist() == labels
    fit(blora, rows, num_steps=2, progress=False)
    table, options = datasets.Dataset.from_list(rows), {"data_collator": None, "max_steps": 1}
    trainer = tiny.trainer(tmp_path, blora, table, processing_class=wrapped, **options)
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
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}


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


def test_an_id_may_be_a_number(tmp_path):
    item = {"question": "is it", "choices": ["yes", "no"], "label": 0}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": k, **item}) for k in (7, 8)))
    assert [item.id for item in load_task({"test": tmp_path / "a.jsonl"}).test] == ["7", "8"]


@pytest.mark.parametrize("labels", [(4, 3.5), (3.5, 4), (4.0, 3.5)], ids=str)
def test_labels_of_which_some_are_no_whole_numbers_stay_rows_of_numbers(labels):
    rows = [{"text": f"film {k}", "label": labels[k % 2]} for k in range(20)]
    task = load_task(rows)
    assert task.template is None
    assert all(row in rows for row in task.test)
