"""How rows of every kind become batches, and which of them are refused."""

import datasets
import pandas
import pytest
import tiny
import torch
from classifiers import (
    IN_ORDER,
    NAMES,
    NEG_POS,
    NUMBERS,
    POS_NEG,
    ROWS,
    TURNED,
    adapter,
    classifier,
    labels_of,
    relabeled,
)
from torch.utils.data import ConcatDataset, DataLoader, Subset

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import load_task
from pyro_blora.errors import DataError
from pyro_blora.labels import label_of
from pyro_blora.likelihoods import ClassificationCollator, SequenceClassification


def test_the_trainer_reads_each_data_set_by_its_own_numbers(small, forms, tmp_path):
    """Each has a loader of its own, also where the loaders of several sets persist."""
    rows, data = forms["rows"], forms["data"]
    other = relabeled(datasets.Dataset.from_list(rows), NEG_POS)
    options = {"data_collator": None, "eval_samples": 0, "max_steps": 2}
    options |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    blora = adapter(small, num_labels=2)
    every = {"other": other, "same": data, "few": data.select([0])}
    trainer = tiny.trainer(tmp_path, blora, data, eval_dataset=every, **options)
    trainer.train()
    losses = trainer.evaluate()
    for name, part in every.items():
        expected = -blora.log_predictive_dataset(part, num_samples=0, progress=False)[0].mean()
        assert losses[f"eval_{name}_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert losses["eval_other_loss"] == pytest.approx(losses["eval_same_loss"])
    single = tiny.trainer(tmp_path, blora, data, eval_dataset=other, **options)
    assert single.evaluate()["eval_loss"] == pytest.approx(losses["eval_same_loss"])
    for part in (data, other, rows):
        assert trainer.evaluate(part)["eval_loss"] == pytest.approx(losses["eval_same_loss"])
        assert trainer.predict(part).label_ids.tolist() == TURNED
    assert trainer.predict(data.remove_columns("label")).label_ids is None


@pytest.mark.parametrize("classes", [NEG_POS, None])
def test_the_loaders_of_a_trainer_have_the_names(classes, small, forms, collators, tmp_path):
    data = forms["encoded"]
    expected = {tuple(row["input_ids"]): int("pos" in row["text"]) for row in data}
    net = classifier(small, None if classes else NEG_POS, num_labels=2)
    blora = BayesianLoRA(net, likelihood=SequenceClassification(classes=classes))
    options = {"data_collator": collators["padding"], "max_steps": 1}
    trainer = tiny.trainer(tmp_path, blora, data, eval_dataset=data, **options)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for batch in loader:
            columns = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
            for ids, mask, label in zip(*columns, strict=True):
                assert label == expected[tuple(ids[mask.bool()].tolist())]
    stream = data.remove_columns("text").to_iterable_dataset()
    with pytest.raises(DataError, match=r"number the classes as \['neg', 'pos'\]"):
        trainer.predict(stream)


def test_parts_of_a_set_keep_their_names_and_transforms_their_rows(small, forms):
    rows, data, blora = forms["rows"], forms["data"], adapter(small, NEG_POS)
    assert labels_of(blora, ConcatDataset([data, data])) == IN_ORDER * 2
    assert labels_of(blora, Subset(pandas.DataFrame(rows), [0, 1])) == [0, 1]
    other = relabeled(data, (*POS_NEG, "odd"))
    with pytest.raises(DataError, match="must number their classes alike"):
        labels_of(blora, ConcatDataset([data, other]))

    class Turned(Subset):
        def __getitem__(self, index):
            row = self.dataset[self.indices[index]]
            return {**row, "label": 1 - row["label"]}

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    assert labels_of(blora, Turned(data, range(12))) == [1 - k for k in data["label"]]
    shifted = datasets.Dataset.from_list(NUMBERS)
    shifted = shifted.with_transform(lambda b: {**b, "label": [(k + 1) % 3 for k in b["label"]]})
    assert labels_of(adapter(small), Subset(shifted, range(12))) == [1, 2, 0] * 4


def test_a_data_set_may_have_features_of_its_own(small):
    class Encoded(torch.utils.data.Dataset):
        def __init__(self):
            self.features = torch.ones(6, 4, dtype=torch.long)

        def __len__(self):
            return 6

        def __getitem__(self, k):
            ids = self.features[k]
            return {"input_ids": ids, "attention_mask": ids, "labels": torch.tensor(k % 3)}

    for data in (Encoded(), DataLoader(Encoded(), 3)):
        adapter(small, None, data, likelihood=SequenceClassification(num_data=6))


def test_a_network_without_a_configuration_reads_numbers(small, collators):
    encoded = [{**small(row["text"]), "label": row["label"]} for row in NUMBERS]
    likelihood = SequenceClassification()
    net = tiny.BareClassifier(len(small))
    blora = BayesianLoRA(net, target_modules=["query"], likelihood=likelihood)
    fit(blora, encoded, collate=collators["padding"], num_steps=1, progress=False)
    assert labels_of(blora, encoded, collators["padding"]) == [0, 1, 2] * 4


def test_labels_are_checked_before_the_first_step(small, forms, collators):
    """Test sets without labels have -1; a column ``labels`` beside texts is not read."""
    rows, steps = forms["rows"], []
    labels = forms["labels alone"]
    absent = labels.map(lambda row, k: {"labels": -1 if k == 11 else row["labels"]}, True)
    plural = [{"text": row["text"], "labels": row["label"]} for row in rows]
    blora, odd = adapter(small, NEG_POS), [*rows, {"text": "a", "label": "odd"}]
    for train, validation, collate, match in (
        (rows, odd, None, "got 'odd'"),
        ([{**row, "label": 2} for row in rows], None, None, "got '?2"),
        ([{"text": "a"}, *rows], None, None, "got none in row 0|label, got text"),
        ([*rows, {"text": "a"}], None, None, "label, got text"),
        (absent, None, None, r"'labels' must hold .* from 0, got -1 in row 11"),
        (labels, absent, None, "got -1 in row 11"),
        (labels, absent, "padding", "got -1 in row 11"),
        (plural, None, None, "got text, labels in row 0; rename those that hold"),
        (plural, None, "ours", "got text, labels in row 0; rename those that hold"),
    ):
        options = {"validation": validation, "collate": collators[collate], "num_steps": 9}
        with pytest.raises(DataError, match=match):
            fit(blora, train, callback=steps.append, **options)
    assert not steps
    for call in (blora.predict_dataset, blora.calibrate):
        with pytest.raises(DataError, match="got -1 in row 11; leave the row out"):
            call(absent, progress=False)
    for wrong in ([{"text": "a"}, *rows], plural):
        with pytest.raises(DataError, match="in row 0"):
            labels_of(blora, wrong)
    with pytest.raises(DataError, match=r"number the classes \['pos', 'neg'\], got -1"):
        label_of(-1, classes=NEG_POS, table_names=POS_NEG)


def test_rows_with_and_without_a_second_text(small):
    both, one = {"text": "a film", "text_pair": "funny"}, {"text": "a dull film"}
    collate = ClassificationCollator(small, ())
    alone = [small(*row.values())["input_ids"] for row in (both, one)]
    for absent in ({}, {"text_pair": None}, {"text_pair": float("nan")}):
        for order in (1, -1):
            batch = collate([both, {**one, **absent}][::order])
            pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            assert [ids[mask.bool()].tolist() for ids, mask in pairs] == alone[::order]


def test_a_second_text_is_a_text_or_nothing(small):
    rows = [{"text": "a", "text_pair": pair, "label": k % 2} for k, pair in enumerate([None, "b"])]
    blora = adapter(small, None, pandas.DataFrame(rows), num_labels=2)
    for pair in (8, True, 4.5):
        with pytest.raises(DataError, match=f"'text_pair' must hold a text, got {pair!r} in row 2"):
            fit(blora, [*rows, {"text": "a", "text_pair": pair, "label": 0}], num_steps=1)


def test_streams_with_a_length_and_chains_of_streams_are_read_as_streams(small):
    collate = ClassificationCollator(small, NAMES)
    for data in (tiny.SizedStream(ROWS), tiny.Stream(ROWS[:5]) + tiny.Stream(ROWS[5:])):
        blora = adapter(small)
        blora.likelihood.num_data = len(ROWS)
        loader = DataLoader(data, 4, collate_fn=collate)
        fit(blora, loader, num_steps=1, progress=False)
        assert len(blora.predict_dataset(loader, None, 0)[1]) == len(ROWS)
        with pytest.raises(DataError, match="pass a DataLoader"):
            fit(blora, data, num_steps=1)


def test_a_hidden_column_stays_hidden(small):
    rows = datasets.Dataset.from_list([{"text": "a", "text_pair": "b", "label": 0}] * 3)
    blora = adapter(small)
    for whole in (False, True):
        rows.set_format("torch", columns=["text", "label"], output_all_columns=whole)
        assert ("text_pair" in blora.reading(rows)[0][0]) == whole


def test_the_start_of_a_chat_is_written_once_whatever_stands_beside_it(build):
    tokenizer = build(bos="<s>", pad="<pad>")
    collate = ClassificationCollator(tokenizer)
    alone = collate([{"text": "<s>a film"}])["input_ids"][0].tolist()
    assert alone.count(tokenizer.bos_token_id) == 1
    beside = collate([{"text": "<s>a film"}, {"text": "a"}])
    assert [row.count(tokenizer.bos_token_id) for row in beside["input_ids"].tolist()] == [1, 1]
    assert beside["input_ids"][0, : len(alone)].tolist() == alone


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 2, 3, 4, 5], ("1", "2", "3", "4", "5")),
        ([20, 10], ("10", "20")),
        ([True, False], ("False", "True")),
    ],
)
def test_a_task_has_no_class_that_no_row_has(labels, expected, small):
    labels = [labels[k % len(labels)] for k in range(60)]
    task = load_task([{"text": f"film {k}", "label": label} for k, label in enumerate(labels)])
    for item in (*task.train, *task.test):
        assert item.choices[item.label] == str(labels[int(item.question.split()[1])])
        assert item.choices == expected
    net = classifier(small, num_labels=len(expected))
    assert task.collator(small, net=net).classes == expected


def test_items_are_read_by_the_names_of_their_choices(small):
    task, bare = load_task(ROWS * 3), ClassificationCollator(small)
    for names, train in ((NAMES, NUMBERS), (NAMES, ROWS), (None, ROWS)):
        blora = adapter(small, names, train)
        classes = blora.likelihood.classes
        expected = [classes.index(item.choices[item.label]) for item in task.test]
        assert labels_of(blora, task.test) == expected
        with pytest.raises(DataError, match="must be the number of a logit"):
            labels_of(blora, DataLoader(task.test, 4, collate_fn=bare))
