"""Which logit a label means, whoever names the classes and however they are written."""

import json
import warnings
from types import SimpleNamespace

import datasets
import pandas
import peft
import pytest
import tiny
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate
from transformers import DataCollatorWithPadding, TrainingArguments, default_data_collator

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import load_task
from pyro_blora.errors import CheckpointError, ConfigurationError, DataError
from pyro_blora.inference import bayesianize
from pyro_blora.inference.trainer import BayesianLoRATrainer
from pyro_blora.labels import label_of
from pyro_blora.likelihoods import ClassificationCollator, SequenceClassification

NAMES = ("zero", "half", "all")  # not alphabetical
ROWS = [{"text": f"a film {k}", "label": NAMES[k % 3]} for k in range(12)]


@pytest.fixture
def small(build):
    """A tokenizer of fewer than 32 tokens, as the tiny networks have."""
    return build(bos="<s>", eos="</s>", pad="<pad>")


def classifier(tokenizer, **options):
    net = tiny.bert(**options)
    net.resize_token_embeddings(len(tokenizer))
    return net


def labels_of(blora, rows):
    data, collate = blora.reading(rows)
    return collate([data[k] for k in range(len(data))])["labels"].tolist()


@pytest.fixture
def lora(small, tmp_path):
    """A LoRA that PEFT has in memory and in a folder; nothing in either names its classes."""
    net = classifier(small)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path)
    return model


def test_a_lora_of_a_task_is_not_read_in_the_alphabet_s_order(lora, small, tmp_path):
    task, net = load_task(ROWS * 3), classifier(small)
    collate = task.collator(small, net=net)
    blora = BayesianLoRA.from_peft(net, tmp_path, tokenizer=small)
    for given in (collate, None):
        with pytest.raises(ConfigurationError, match="trained on numbers must have names"):
            blora.predict_dataset(task.test, given, progress=False)
    coded = [{"text": f"a film {k}", "label": k % 3} for k in range(12)]
    coded = datasets.Dataset.from_list(coded)
    coded = coded.cast_column("label", datasets.ClassLabel(names=["2", "0", "1"]))
    with pytest.raises(DataError, match="must number the classes"):  # as its trainer may have read
        blora.predict_dataset(coded, progress=False)
    coded = coded.cast_column("label", datasets.Value("int64"))
    assert blora.predict_dataset(coded, progress=False)[1].tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize("batched", [False, True])
def test_a_head_without_names_is_not_read_by_two_numberings(batched, lora, small, tmp_path):
    rows = [{**small(row["text"]), "label": k % 3} for k, row in enumerate(ROWS)]
    first, other = (
        datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=[*names]))
        for names in (NAMES, NAMES[::-1])
    )
    net, collate = classifier(small), DataCollatorWithPadding(small)
    blora = BayesianLoRA.from_peft(net, tmp_path, tokenizer=small)
    tiny.train(blora, DataLoader(first, 4, collate_fn=collate) if batched else first, collate=None)
    blora.save_pretrained(tmp_path)
    options = {"tokenizer": small}
    for likelihood in ({}, {"likelihood": SequenceClassification()}, None):
        blora.predict_dataset(first, progress=False)
        with pytest.raises(DataError, match="must number the classes"):
            blora.predict_dataset(other, progress=False)
        blora.unwrap()
        if likelihood is not None:
            blora = BayesianLoRA.from_pretrained(net, tmp_path, **options, **likelihood)


@pytest.mark.filterwarnings("ignore:The LoRA's NLL")  # which knows nothing, because it is random
def test_the_order_of_a_trained_head_is_never_guessed(lora, small, tmp_path):
    folder = tmp_path
    for rows in (ROWS, datasets.Dataset.from_list(ROWS).class_encode_column("label")):
        blora = BayesianLoRA.from_peft(classifier(small), folder, tokenizer=small)
        with pytest.raises(ConfigurationError, match=r"SequenceClassification\(classes=\[") as told:
            fit(blora, rows, num_steps=1) if rows is ROWS else blora.predict_dataset(ROWS)
        assert "\n" not in str(told.value)
        blora.unwrap()
    with pytest.raises(ConfigurationError, match="in the order in which"):
        bayesianize(lora, data=ROWS, tokenizer=small, progress=False)
    assert lora.active_adapters == ["default"]  # it is as it was
    assert hasattr(lora.get_base_model().classifier, "modules_to_save")
    likelihood = SequenceClassification(classes=NAMES)
    blora = bayesianize(lora, data=ROWS, tokenizer=small, likelihood=likelihood, progress=False)
    assert labels_of(blora, ROWS[:3]) == [0, 1, 2]
    blora.unwrap()
    net = classifier(small)  # whose user has named them before the training
    net.config.id2label = dict(enumerate(NAMES))
    blora = BayesianLoRA.from_peft(net, folder, tokenizer=small)
    assert blora.likelihood.classes == NAMES
    assert labels_of(blora, ROWS[:3]) == [0, 1, 2]
    blora.unwrap()


def test_a_head_that_was_trained_on_numbers_has_no_names_afterwards(small, tmp_path):
    encoded = [{**small(row["text"]), "label": k % 3} for k, row in enumerate(ROWS)]
    net = classifier(small)
    blora = BayesianLoRA(net, tokenizer=small)
    fit(blora, encoded, num_steps=1, progress=False)
    blora.save_pretrained(tmp_path)
    blora.unwrap()
    for adapter in (blora := BayesianLoRA.from_pretrained(net, tmp_path, tokenizer=small),):
        with pytest.raises(ConfigurationError, match="must have names before labels can be texts"):
            adapter.predict_dataset(ROWS, progress=False)
        numbers = [{**row, "label": k % 3} for k, row in enumerate(ROWS)]
        assert adapter.predict_dataset(numbers, progress=False)[1].tolist() == [0, 1, 2] * 4
        digits = [{**row, "label": str(k % 3)} for k, row in enumerate(ROWS)]
        assert adapter.predict_dataset(digits, progress=False)[1].tolist() == [0, 1, 2] * 4


LEARNED = [{"text": ("film", "key", "lock")[k % 3], "label": NAMES[k % 3]} for k in range(24)]


@pytest.fixture
def learned(small, tmp_path):
    """A function that makes the base of a LoRA that has learned the rows; it is in the folder."""
    model = peft.get_peft_model(classifier(small), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    collate = ClassificationCollator(small, NAMES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**collate(LEARNED)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)

    def base():
        net = classifier(small)
        net.load_state_dict(base_state(model), strict=False)
        return net

    return base


def warned(learned, folder, tokenizer, way, **likelihood):
    """What is warned of on the way to an adapter."""
    parts = {"likelihood": SequenceClassification(**likelihood), "tokenizer": tokenizer}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if way == "fit":
            blora = BayesianLoRA.from_peft(learned(), folder, **parts)
            fit(blora, LEARNED, num_steps=8, progress=False)
        else:
            bayesianize(learned(), folder, data=LEARNED, progress=False, **parts)
    return [str(each.message) for each in seen]


@pytest.mark.parametrize("way", ["fit", "bayesianize"])
def test_a_lora_that_knows_less_than_a_guess_is_suspected_of_another_order(
    way, learned, small, tmp_path
):
    """Of rows whose labels are those of the LoRA, and of the same with the labels turned on."""
    for names, suspected in ((NAMES, False), (NAMES[1:] + NAMES[:1], True)):
        found = warned(learned, tmp_path, small, way, classes=names)
        assert any("above that of a guess" in each for each in found) == suspected, names


def test_a_posterior_that_is_too_wide_for_its_lora_is_told(learned, small, tmp_path):
    """Of 24 rows little is known; of as many as 10,000 like them the curvature would be large."""
    for count, wide in ((None, True), (10_000, False)):
        found = warned(learned, tmp_path, small, "once", classes=NAMES, num_data=count)
        assert any("Call blora.calibrate(data)" in each for each in found) == wide, count


def base_state(model):
    """The base's own tensors, by their names without PEFT."""
    parts = (".base_layer", ".original_module")
    state = model.get_base_model().state_dict().items()
    kept = {n: t for n, t in state if "lora_" not in n and "modules_to_save" not in n}
    for part in parts:
        kept = {n.replace(part, ""): t for n, t in kept.items()}
    return kept


DIGITS = [{"text": f"a film {k}", "label": "123"[k % 3]} for k in range(12)]


def test_a_number_is_a_name_where_the_classes_are_numbers(small, tmp_path):
    """A CSV file or a data frame has made numbers of the names."""
    numbers = [{**row, "label": int(row["label"])} for row in DIGITS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, DIGITS)))
    frame = pandas.DataFrame(numbers)
    frame.to_csv(tmp_path / "a.csv", index=False)
    for trained in (DIGITS, numbers, frame, tmp_path / "a.csv", tmp_path / "a.jsonl"):
        blora = BayesianLoRA(classifier(small), tokenizer=small)
        fit(blora, trained, num_steps=1, progress=False)
        assert blora.likelihood.classes == ("1", "2", "3")
        for asked in (DIGITS, numbers, frame, tmp_path / "a.csv", tmp_path / "a.jsonl"):
            assert labels_of(blora, asked) == [0, 1, 2] * 4
        with pytest.raises(DataError, match=r"\['1', '2', '3'\], got '0'"):
            blora.predict_dataset([{"text": "a", "label": 0}], progress=False)
        blora.unwrap()
    eleven = [{"text": "a", "label": str(k)} for k in range(11)]
    blora = BayesianLoRA(classifier(small, num_labels=11), tokenizer=small)
    assert labels_of(blora, eleven) == [*range(11)]
    assert labels_of(blora, [{"text": "a", "label": 10}]) == [10]


def test_a_task_has_no_class_that_no_row_has(small):
    def choices(labels):
        rows = [{"text": f"film {k}", "label": labels[k % len(labels)]} for k in range(60)]
        task = load_task(rows)
        for item in (*task.train, *task.test):
            value = labels[int(item.question.split()[1]) % len(labels)]
            assert item.choices[item.label] == str(value)
        return task.test[0].choices

    assert choices([1, 2, 3, 4, 5]) == ("1", "2", "3", "4", "5")
    assert choices([20, 10]) == ("10", "20")
    assert choices([True, False]) == ("False", "True")
    assert choices([*map(str, range(11))]) == tuple(map(str, range(11)))
    net = classifier(small, num_labels=5)
    collate = load_task([{"text": f"{k}", "label": 1 + k % 5} for k in range(50)]).collator(
        small, net=net
    )
    assert collate.classes == ("1", "2", "3", "4", "5")


def test_a_data_set_that_calls_its_classes_otherwise_is_refused(small):
    """Its numbers might mean the logits, or they might not."""
    blora = BayesianLoRA(classifier(small), tokenizer=small)
    fit(blora, ROWS, num_steps=1, progress=False)
    loud = datasets.Dataset.from_list([{**r, "label": r["label"].upper()} for r in ROWS])
    assert labels_of(blora, loud.class_encode_column("label")) == labels_of(blora, ROWS)
    other = datasets.Dataset.from_list([{**r, "label": r["label"][::-1]} for r in ROWS])
    other = other.class_encode_column("label")
    with pytest.raises(DataError, match="spell them alike, or cast the column to int"):
        blora.predict_dataset(other, progress=False)
    numbers = other.cast_column("label", datasets.Value("int64"))
    assert blora.predict_dataset(numbers, progress=False)[1].tolist() == numbers["label"][:]


def test_the_trainer_reads_each_data_set_by_its_own_numbers(small, tmp_path):
    names = [datasets.ClassLabel(names=[*order]) for order in (NAMES, NAMES[::-1])]
    train, other = (
        datasets.Dataset.from_list(
            [{**row, "label": label.str2int(row["label"])} for row in ROWS]
        ).cast_column("label", label)
        for label in names
    )
    blora = BayesianLoRA(classifier(small), tokenizer=small)
    arguments = {"report_to": [], "use_cpu": True, "max_steps": 2, "disable_tqdm": True}
    trainer = BayesianLoRATrainer(
        blora,
        TrainingArguments(str(tmp_path), **arguments),
        train_dataset=train,
        eval_dataset={"other": other, "same": train},
        eval_samples=0,
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_other_loss"] == pytest.approx(found["eval_same_loss"])
    for data in (train, other, ROWS):
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(found["eval_same_loss"])
        assert trainer.predict(data).label_ids.tolist() == [0, 1, 2] * 4
    unlabeled = datasets.Dataset.from_list([{"text": "a film"}] * 3)
    assert trainer.predict(unlabeled).label_ids is None
    single = BayesianLoRATrainer(
        blora,
        TrainingArguments(str(tmp_path), **arguments),
        train_dataset=train,
        eval_dataset=other,
        eval_samples=0,
    )
    assert single.evaluate()["eval_loss"] == pytest.approx(found["eval_same_loss"])


def test_a_transform_is_kept(small):
    """It turns the labels on, and the rows of token ids are made by another."""
    turned = datasets.Dataset.from_list([{**r, "label": k % 3} for k, r in enumerate(ROWS)])
    turned = turned.with_transform(lambda b: {**b, "label": [(k + 1) % 3 for k in b["label"]]})
    blora = BayesianLoRA(classifier(small), tokenizer=small)
    for data in (turned, torch.utils.data.Subset(turned, range(12))):
        assert labels_of(blora, data) == [1, 2, 0] * 4
        assert blora.predict_dataset(data, progress=False)[1].tolist() == [1, 2, 0] * 4
    named = datasets.Dataset.from_list(ROWS).with_transform(
        lambda b: {"text": [t.upper() for t in b["text"]], "label": b["label"]}
    )
    task = load_task(named)
    assert all(item.question.isupper() for item in task.test)
    encoded = datasets.Dataset.from_list(ROWS).with_transform(
        lambda b: {**small(b["text"]), "labels": [NAMES.index(n) for n in b["label"]]}
    )
    assert blora.predict_dataset(encoded, progress=False)[1].tolist() == [0, 1, 2] * 4


def test_rows_with_and_without_a_second_text(small):
    both, one = {"text": "a film", "text_pair": "funny"}, {"text": "a dull film"}
    collate = ClassificationCollator(small, ())
    alone = [small(*row.values())["input_ids"] for row in (both, one)]
    for absent in ({}, {"text_pair": None}, {"text_pair": float("nan")}):
        for order in (1, -1):
            found = collate([both, {**one, **absent}][::order])
            ids = [i[m.bool()].tolist() for i, m in zip(*map(found.get, KEYS), strict=True)]
            assert ids == alone[::order]


KEYS = ("input_ids", "attention_mask")


def two_orders(small, encoded=False):
    """Rows of two classes, and a data set that numbers them the other way round."""
    rows = [{"text": f"a {w} film {k}", "label": w} for k, w in enumerate(["neg", "pos"] * 6)]
    data = datasets.Dataset.from_list(rows).cast_column(
        "label", datasets.ClassLabel(names=["pos", "neg"])
    )
    return rows, data.map(lambda row: dict(small(row["text"]))) if encoded else data


def named(tokenizer, names, **options):
    net = classifier(tokenizer, num_labels=len(names), id2label=dict(enumerate(names)))
    return BayesianLoRA(net, tokenizer=tokenizer, **options)


def test_numbers_that_are_names_of_the_network_are_names_in_every_split(small):
    """Also in one without the highest class, and where only some names are numbers."""
    blora = named(small, "123")
    for labels in ("12", "123", "12"):
        for kind in (str, int):
            rows = [{"text": "a", "label": kind(label)} for label in labels]
            assert labels_of(blora, rows) == [int(label) - 1 for label in labels]
            assert blora.predict_dataset(rows, progress=False)[1].tolist() == labels_of(blora, rows)
    blora = BayesianLoRA(classifier(small), tokenizer=small)
    fit(blora, [{"text": "a", "label": n} for n in ("1", "2", "3+")], num_steps=1, progress=False)
    assert labels_of(blora, [{"text": "a", "label": k} for k in (2, 1)]) == [1, 0]
    with pytest.raises(DataError, match=r"one of the classes \['1', '2', '3\+'\], got '0'"):
        labels_of(blora, [{"text": "a", "label": 0}])
    many = classifier(small, num_labels=12)  # LABEL_10 comes before LABEL_2 in the alphabet
    rows = [{"text": "a", "label": f"LABEL_{k}"} for k in range(12)]
    assert labels_of(BayesianLoRA(many, tokenizer=small), rows) == [*range(12)]


def test_one_meaning_of_numbers_whoever_collates(small, tmp_path):
    """A collator of transformers, as an object or a function, and none; in fit and the Trainer."""
    encoded = two_orders(small, encoded=True)[1]
    expected = [k % 2 for k in range(12)]
    plain = two_orders(small)[1]
    padding = DataCollatorWithPadding(small)
    same = [row for row in encoded if len(row["input_ids"]) == len(encoded[0]["input_ids"])]
    for given in (None, {"classes": ["neg", "pos"]}):
        likelihood = SequenceClassification(**(given or {}))
        blora = named(small, ("neg", "pos"), likelihood=likelihood)
        for data, collate in ((encoded, padding), (encoded, None), (plain, None)):
            found = blora.predict_dataset(data, collate, progress=False)[1]
            assert found.tolist() == expected
        short = encoded.select([k for k, row in enumerate(encoded) if row in same])
        found = blora.predict_dataset(short, default_data_collator, progress=False)[1].tolist()
        assert found == [("neg", "pos").index(row["text"].split()[1]) for row in short]
        trainer = BayesianLoRATrainer(
            blora,
            TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1),
            train_dataset=encoded,
            eval_dataset=encoded,
            data_collator=padding,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        places = [[*encoded[k]["input_ids"]] for k in range(12)]
        for ids, mask, label in zip(*(batch[n] for n in (*KEYS, "labels")), strict=True):
            assert label == expected[places.index(ids[mask.bool()].tolist())]
        trainer.train()
        blora.unwrap()


def test_a_column_labels_and_our_own_collator_have_the_names_of_the_data_set(small):
    """Like a column ``label`` that the library collates; a loader that permutes is refused."""
    data, expected = two_orders(small, encoded=True)[1], [k % 2 for k in range(12)]
    labels, blora = data.rename_column("label", "labels"), named(small, ("neg", "pos"))
    padding, own = DataCollatorWithPadding(small), ClassificationCollator(small, ("neg", "pos"))
    for rows, collate in ((labels, None), (labels, padding), (data, own)):
        assert blora.predict_dataset(rows, collate, progress=False)[1].tolist() == expected
        collate = blora.reading(rows, collate)[1]
        assert collate([rows[k] for k in range(12)])["labels"].tolist() == expected
    for rows, collate in ((labels.remove_columns("text"), padding), (data, own)):
        fit(blora, rows, collate=collate, num_steps=1)
        assert blora.likelihood.classes == ("neg", "pos")
        with pytest.raises(DataError, match="must number the classes as"):
            blora.predict_dataset(DataLoader(rows, 4, collate_fn=collate), progress=False)
    named_by_data = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    fit(named_by_data, labels, num_steps=1)
    assert named_by_data.likelihood.classes == ("pos", "neg")


def test_a_second_text_is_a_text_or_nothing(small):
    rows = [{"text": "a", "text_pair": pair, "label": k % 2} for k, pair in enumerate([None, "b"])]
    blora = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    for pair in (8, True, 4.5):
        with pytest.raises(DataError, match=f"'text_pair' must hold a text, got {pair!r} in row 2"):
            fit(blora, [*rows, {"text": "a", "text_pair": pair, "label": 0}], num_steps=1)
    fit(blora, pandas.DataFrame(rows), num_steps=1)


def test_items_are_read_by_the_names_of_their_choices(small):
    """Like rows with the same names, or refused like them; also from a loader."""
    task = load_task(ROWS * 3)
    numbers = [{**row, "label": NAMES.index(row["label"])} for row in ROWS]
    blora = named(small, NAMES)
    fit(blora, numbers, num_steps=1)
    assert blora.likelihood.classes == ()
    expected = [NAMES.index(item.choices[item.label]) for item in task.test]
    assert blora.predict_dataset(task.test, progress=False)[1].tolist() == expected
    loader = DataLoader(task.test, 4, collate_fn=ClassificationCollator(small))
    blora.unwrap()
    blora = named(small, NAMES)
    fit(blora, ROWS, num_steps=1)
    part = DataLoader(Subset(task.test, [0, 1]), 2, collate_fn=ClassificationCollator(small))
    for each in (loader, part):
        with pytest.raises(DataError, match="must number the classes as"):
            blora.predict_dataset(each, progress=False)
    blora = BayesianLoRA(classifier(small), tokenizer=small)
    fit(blora, numbers, num_steps=1)
    for collate in (None, task.collator(small, net=blora.net)):  # whose names are alphabetical
        with pytest.raises(ConfigurationError, match="trained on numbers must have names"):
            blora.predict_dataset(task.test, collate, progress=False)


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
        blora = BayesianLoRA(classifier(small), likelihood=SequenceClassification(num_data=6))
        fit(blora, data, num_steps=1)
        blora.unwrap()


def test_a_prediction_names_nothing_and_a_training_does(small):
    rows = two_orders(small)[0]
    blora = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    blora.predict_dataset(rows, progress=False)
    with pytest.raises(ConfigurationError):
        blora.calibrate(rows, precision="nope")
    assert blora.likelihood.classes is None
    fit(blora, [{**row, "label": row["label"].upper()} for row in rows], num_steps=1)
    assert blora.likelihood.classes == ("NEG", "POS")


def test_parts_of_a_set_keep_their_names_and_wrappers_their_transforms(small):
    rows, data = two_orders(small)
    blora = named(small, ("neg", "pos"))
    assert labels_of(blora, ConcatDataset([data, data])) == [k % 2 for k in range(12)] * 2
    other = data.cast_column("label", datasets.ClassLabel(names=["pos", "neg", "odd"]))
    with pytest.raises(DataError, match="must number their classes alike"):
        labels_of(blora, ConcatDataset([data, other]))

    class Turned:
        """A wrapper with the attributes of a Subset."""

        def __init__(self, dataset, indices):
            self.dataset, self.indices = dataset, indices

        def __len__(self):
            return len(self.indices)

        def __getitem__(self, index):
            return {**self.dataset[self.indices[index]], "label": "pos"}

    assert labels_of(blora, Turned(rows, range(4))) == [1] * 4
    frame = Subset(pandas.DataFrame(rows), [0, 1])  # whose rows are read first
    assert labels_of(blora, frame) == [0, 1]


def test_a_saved_head_keeps_its_classes_whatever_likelihood_is_passed(small, tmp_path):
    rows, data = two_orders(small)
    blora = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    fit(blora, data, num_steps=1, progress=False)
    assert blora.likelihood.classes == ("pos", "neg")
    blora.save_pretrained(tmp_path / "saved")
    net = blora.unwrap()
    likelihood = SequenceClassification(num_data=24)
    again = BayesianLoRA.from_pretrained(net, tmp_path / "saved", likelihood=likelihood)
    assert (again.likelihood.classes, again.likelihood.num_data) == (("pos", "neg"), 24)
    again.unwrap()
    other = SequenceClassification(classes=["neg", "pos"])
    with pytest.raises(CheckpointError, match=r"classes \['pos', 'neg'\], in this order"):
        BayesianLoRA.from_pretrained(net, tmp_path / "saved", likelihood=other)
    how = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "save_steps": 1}
    arguments = TrainingArguments(str(tmp_path / "run"), **how)
    for each, refused in ((data, False), (rows, True)):
        blora = BayesianLoRA(net, tokenizer=small)
        trainer = BayesianLoRATrainer(blora, arguments, train_dataset=each)
        if refused:
            with pytest.raises(CheckpointError, match="in this order"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        else:
            trainer.train()
        blora.unwrap()
    assert arguments.remove_unused_columns  # the user's own


def test_labels_are_checked_before_the_first_step(small):
    rows = two_orders(small)[0]
    blora = named(small, ("neg", "pos"))
    steps = []
    for options in (
        {"validation": [*rows, {"text": "a", "label": "odd"}]},
        {"train": [{**row, "label": 2} for row in rows]},
        {"train": [{"text": "a"}, *rows]},
        {"train": [*rows, {"text": "a"}]},
    ):
        with pytest.raises(DataError, match=r"got 'odd'|got 2|label, got text|got none in row 0"):
            fit(blora, **{"train": rows, **options}, num_steps=9, callback=steps.append)
    with pytest.raises(DataError, match="got none in row 0"):
        blora.predict_dataset([{"text": "a"}, *rows], progress=False)
    assert not steps


def test_each_set_by_its_name_has_a_loader_of_its_own(small, tmp_path):
    rows = two_orders(small)[0]
    how = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    how |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    blora = named(small, ("neg", "pos"))
    trainer = BayesianLoRATrainer(
        blora,
        TrainingArguments(str(tmp_path), **how),
        train_dataset=rows,
        eval_dataset={"x": rows, "y": rows[:5]},
        eval_samples=0,
    )
    trainer.train()
    found = trainer.evaluate()
    for name, part in (("x", rows), ("y", rows[:5])):
        expected = -blora.log_predictive_dataset(part, num_samples=0, progress=False)[0].mean()
        assert found[f"eval_{name}_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_the_start_of_a_chat_is_written_once_whatever_stands_beside_it(build):
    tokenizer = build(bos="<s>", pad="<pad>")
    collate = ClassificationCollator(tokenizer)
    alone = collate([{"text": "<s>a film"}])["input_ids"][0].tolist()
    assert alone.count(tokenizer.bos_token_id) == 1
    beside = collate([{"text": "<s>a film"}, {"text": "a"}])
    assert [row.count(tokenizer.bos_token_id) for row in beside["input_ids"].tolist()] == [1, 1]
    assert beside["input_ids"][0, : len(alone)].tolist() == alone


def test_a_head_that_was_trained_on_numbers_reads_numbers_as_they_are(small, tmp_path):
    """Whatever its network calls them, in each split, and also in a column of ClassLabels."""
    texts = [{"text": f"a film {k}", "label": k % 3} for k in range(12)]
    blora = named(small, "123")
    fit(blora, texts, num_steps=1, progress=False)
    assert blora.likelihood.classes == ()
    part = [row for row in texts if row["label"]]
    assert labels_of(blora, part) == [row["label"] for row in part]
    blora.unwrap()
    encoded = two_orders(small, encoded=True)[1]
    numbers, padding = encoded["label"][:], DataCollatorWithPadding(small)
    rows = [{k: v for k, v in row.items() if k != "text"} for row in encoded]
    for names in (("pos", "neg"), None):
        blora = named(small, names) if names else BayesianLoRA(tiny.bert(), tokenizer=small)
        blora.net.resize_token_embeddings(len(small))
        loader = DataLoader(rows, 4, collate_fn=padding)
        fit(blora, loader, num_steps=1, progress=False)
        for collate in (padding, None, lambda part: padding([*map(only_ids, part)])):
            found = blora.predict_dataset(encoded, collate, progress=False)[1]
            assert found.tolist() == numbers
        blora.save_pretrained(tmp_path / "numbers")
        net = blora.unwrap()
        again = BayesianLoRA.from_pretrained(
            net, tmp_path / "numbers", tokenizer=small, likelihood=SequenceClassification()
        )
        assert again.likelihood.classes == ()
        if names is None:
            with pytest.raises(ConfigurationError, match="got 'neg'"):
                again.predict_dataset(two_orders(small)[0], progress=False)
        again.unwrap()
    blora = named(small, ("neg", "pos"))  # whose numbers were perhaps those of id2label
    fit(blora, loader, num_steps=1, progress=False)
    other = encoded.cast_column("label", datasets.ClassLabel(names=["pos", "negative"]))
    for data in (encoded, two_orders(small)[1], DataLoader(encoded, 4, collate_fn=padding)):
        with pytest.raises(DataError, match=r"classes as \['neg', 'pos'\], got \['pos', 'neg'\]"):
            blora.predict_dataset(data, progress=False)
    with pytest.raises(DataError, match=r"got \['pos', 'negative'\]"):
        blora.predict_dataset(other, progress=False)


def only_ids(row):
    return {name: row[name] for name in (*KEYS, "label")}


def test_a_loader_that_numbers_the_classes_otherwise_is_refused(small):
    encoded = two_orders(small, encoded=True)[1].remove_columns("text")
    padding = DataCollatorWithPadding(small)
    blora = named(small, ("neg", "pos"))
    fit(blora, encoded, collate=padding, num_steps=1, progress=False)
    assert blora.likelihood.classes == ("neg", "pos")
    with pytest.raises(DataError, match=r"number the classes as \['neg', 'pos'\]"):
        blora.predict_dataset(DataLoader(encoded, 4, collate_fn=padding), progress=False)


def test_a_run_on_numbers_is_not_resumed_on_names_nor_the_other_way_round(small, tmp_path):
    rows = two_orders(small)[0]
    numbers = [{**row, "label": int(row["label"] == "neg")} for row in rows]
    how = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "save_steps": 1}
    net = classifier(small, num_labels=2)
    for first, then, said in ((numbers, rows, "numbers"), (rows, numbers, r"\['neg', 'pos'\]")):
        folder = tmp_path / said[:3]
        for data in (first, then):
            blora = BayesianLoRA(net, tokenizer=small)
            arguments = TrainingArguments(str(folder), **how)
            trainer = BayesianLoRATrainer(blora, arguments, train_dataset=data)
            if data is first:
                trainer.train()
            else:
                with pytest.raises(CheckpointError, match=f"was trained on {said} as classes"):
                    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
            blora.unwrap()


def test_a_trainer_without_collator_and_tokenizer_reads_the_names(small, tmp_path):
    data = two_orders(small, encoded=True)[1]
    same = data.filter(lambda row: len(row["input_ids"]) == len(data[0]["input_ids"]))
    for classes in (("neg", "pos"), None):
        net = classifier(small, num_labels=2)
        if classes is None:
            net.config.id2label = {0: "neg", 1: "pos"}
        blora = BayesianLoRA(net, likelihood=SequenceClassification(classes=classes))
        arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1)
        trainer = BayesianLoRATrainer(blora, arguments, train_dataset=same, eval_dataset=same)
        for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
            places = {tuple(row["input_ids"]): "neg" in row["text"] for row in same}
            for batch in loader:
                pairs = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
                assert all(label == int(not places[tuple(ids)]) for ids, label in pairs)
        stream = same.remove_columns("text").to_iterable_dataset()
        with pytest.raises(DataError, match=r"number the classes as \['neg', 'pos'\]"):
            blora.reading(DataLoader(stream, 4), None)
        with pytest.raises(DataError, match=r"number the classes as \['neg', 'pos'\]"):
            trainer.predict(stream)
        blora.unwrap()


def test_validation_rows_with_names_are_refused_if_the_training_has_numbers(small):
    rows = two_orders(small)[0]
    numbers = [{**row, "label": int(row["label"] == "neg")} for row in rows]
    blora = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    with pytest.raises(ConfigurationError, match="trained on numbers must have names"):
        fit(blora, numbers, validation=rows, num_steps=1)
    assert blora.likelihood.classes is None


def test_a_network_without_a_configuration_reads_numbers(small):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.classifier = classifier(small).bert, torch.nn.Linear(16, 3)

        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            hidden = self.bert(input_ids, attention_mask=attention_mask).pooler_output
            return SimpleNamespace(logits=self.classifier(hidden))

    encoded = [{**small(row["text"]), "label": k % 3} for k, row in enumerate(ROWS)]
    likelihood = SequenceClassification()
    blora = BayesianLoRA(Plain(), target_modules=["query"], likelihood=likelihood)
    padding = DataCollatorWithPadding(small)
    fit(blora, encoded, collate=padding, num_steps=1, progress=False)
    found = blora.predict_dataset(encoded, padding, progress=False)[1]
    assert found.tolist() == [k % 3 for k in range(12)]


def test_a_label_that_is_no_class_is_refused_before_the_first_step(small):
    """As test sets without labels have it; a column ``labels`` beside texts is not read."""
    rows, data = two_orders(small, encoded=True)
    labels = data.remove_columns("text").rename_column("label", "labels")
    absent = labels.map(lambda row, k: {"labels": -1 if k == 11 else row["labels"]}, True)
    blora, steps = named(small, ("neg", "pos")), []
    for collate in (None, DataCollatorWithPadding(small)):
        for validation in (None, absent):
            train = absent if validation is None else labels
            with pytest.raises(DataError, match=r"'labels' must hold .* from 0, got -1 in row 11"):
                fit(
                    blora,
                    train,
                    collate=collate,
                    validation=validation,
                    num_steps=9,
                    callback=steps.append,
                )
        for call in (blora.predict_dataset, blora.calibrate):
            with pytest.raises(DataError, match="got -1 in row 11; leave the row out"):
                call(absent, collate, progress=False)
    with pytest.raises(DataError, match=r"number the classes \['pos', 'neg'\], got -1"):
        label_of({"label": -1}, classes=["neg", "pos"], table_names=["pos", "neg"])
    plural = [{"text": row["text"], "labels": row["label"]} for row in rows]
    for collate in (None, ClassificationCollator(small)):
        with pytest.raises(DataError, match="got text, labels in row 0; rename those that hold"):
            blora.predict_dataset(plural, collate, progress=False)
        with pytest.raises(DataError, match="got text, labels in row 0; rename those that hold"):
            fit(blora, plural, collate=collate, num_steps=9, callback=steps.append)
    assert not steps


def test_a_class_whose_name_is_a_number_is_that_number_wherever_it_stands(small):
    """``class_encode_column`` sorts them as texts, with 10 before 2."""
    numbers = [{"text": f"a film {k}", "label": k % 12} for k in range(24)]
    coded = datasets.Dataset.from_list(numbers).class_encode_column("label")
    assert coded.features["label"].names[2] == "10"
    ids = coded.map(lambda row: dict(small(row["text"]))).remove_columns("text")
    expected, padding = [k % 12 for k in range(24)], DataCollatorWithPadding(small)
    titles = {k: f"class {k}" for k in range(12)}
    for train, options in ((numbers, {}), (coded, {}), (numbers, {"id2label": titles}), (None, {})):
        blora = BayesianLoRA(classifier(small, num_labels=12, **options), tokenizer=small)
        if train is not None:
            fit(blora, train, num_steps=1, progress=False)
        for data in (numbers, coded, ids, ids.rename_column("label", "labels")):
            assert blora.predict_dataset(data, progress=False)[1].tolist() == expected
        with pytest.raises(DataError, match=r"classes as \['0', '1', '2', "):
            blora.predict_dataset(DataLoader(ids, 4, collate_fn=padding), progress=False)
    ratings = datasets.Dataset.from_list(DIGITS).class_encode_column("label")
    ratings = ratings.map(lambda row: dict(small(row["text"]))).remove_columns("text")
    blora = BayesianLoRA(classifier(small), tokenizer=small)  # 3 is the name of its last logit
    fit(blora, DataLoader(ratings, 4, collate_fn=padding), num_steps=1, progress=False)
    assert blora.predict_dataset(ratings, progress=False)[1].tolist() == [0, 1, 2] * 4


def test_a_collator_without_classes_takes_those_that_are_known(small):
    rows, data = two_orders(small)
    expected, bare = [k % 2 for k in range(12)], ClassificationCollator(small)
    blora = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    fit(blora, rows, num_steps=1, progress=False)
    for read in (rows, data):
        assert blora.predict_dataset(read, bare, progress=False)[1].tolist() == expected
    other = ClassificationCollator(small, ("pos", "neg"))
    for read in (rows, data, DataLoader(rows, 4, collate_fn=other)):
        with pytest.raises(DataError, match=r"classes as \['neg', 'pos'\], got \['pos', 'neg'\]"):
            blora.predict_dataset(read, other, progress=False)
    for net, train, classes in (
        (classifier(small, num_labels=2), data, ("pos", "neg")),
        (classifier(small, num_labels=2), rows, ("neg", "pos")),
        (named(small, ("neg", "pos")).unwrap(), data, ("neg", "pos")),
    ):
        blora = BayesianLoRA(net, tokenizer=small)
        fit(blora, train, collate=bare, num_steps=1, progress=False)
        assert blora.likelihood.classes == classes
        assert labels_of(blora, data) == [classes.index(row["label"]) for row in rows]
        blora.unwrap()
    assert bare.classes == ()
    with pytest.raises(DataError, match=r"classes as \['neg', 'pos'\], got \['pos', 'neg'\]"):
        fit(named(small, ("neg", "pos")), rows, collate=other, num_steps=1)
    anew = named(small, ("bad", "good"))  # whose head is trained for other classes
    fit(anew, rows, collate=other, num_steps=1, progress=False)
    assert anew.likelihood.classes == ("pos", "neg")


def test_classes_may_be_a_list(small):
    rows, data = two_orders(small)
    task = load_task(rows * 5)
    likelihood = SequenceClassification(classes=["neg", "pos"])
    net = classifier(small, num_labels=2)
    blora = BayesianLoRA(net, tokenizer=small, likelihood=likelihood)
    for collate in (ClassificationCollator(small, ["neg", "pos"]), task.collator(small, net=net)):
        for train in (rows, data, DataLoader(rows, 4, collate_fn=collate), task.train):
            fit(blora, train, collate=collate, num_steps=1, progress=False)
    assert blora.likelihood.classes == ("neg", "pos")
    anew = BayesianLoRA(classifier(small, num_labels=2), likelihood=task.likelihood(collate))
    fit(anew, DataLoader(task.train, 4, collate_fn=collate), num_steps=1, progress=False)
    assert anew.likelihood.classes == ("neg", "pos")  # a new head is named by its collator


def test_a_loader_may_have_the_first_classes_alone_or_spell_them_otherwise(small):
    encoded = two_orders(small, encoded=True)[1].remove_columns("text")
    padding = DataCollatorWithPadding(small)
    loader = DataLoader(encoded, 4, collate_fn=padding)
    for names in (("POS", "Neg"), ("pos", "neg", "odd")):
        blora = named(small, names)
        fit(blora, loader, num_steps=1, progress=False)
        assert blora.predict_dataset(loader, progress=False)[1].tolist() == encoded["label"][:]
    for names in (("neg", "POS"), ("odd", "pos", "neg")):
        with pytest.raises(DataError, match="must number the classes as"):
            named(small, names).predict_dataset(loader, progress=False)
    digits = encoded.cast_column("label", datasets.ClassLabel(names=["0", "1"]))
    loader = DataLoader(digits, 4, collate_fn=padding)
    blora = named(small, ("neg", "pos"))
    assert blora.predict_dataset(loader, progress=False)[1].tolist() == digits["label"][:]
    cases = encoded.cast_column("label", datasets.ClassLabel(names=["us", "US"]))
    loader, blora = DataLoader(cases, 4, collate_fn=padding), named(small, ("US", "us"))
    with pytest.raises(DataError, match=r"classes as \['US', 'us'\]"):
        blora.predict_dataset(loader, progress=False)


def test_a_collator_of_another_class_stays_what_it_is(small):
    """Whatever its constructor takes, and with what was set on it later."""

    class Prefixed(ClassificationCollator):
        prefix = ""

        def __init__(self, tokenizer):
            super().__init__(tokenizer, ["neg", "pos"])

        def __call__(self, rows):
            return super().__call__([{**row, "text": self.prefix + row["text"]} for row in rows])

    (rows, data), blora = two_orders(small), named(small, ("neg", "pos"))
    collate = Prefixed(small)
    collate.prefix, collate.max_length = "key ", 9
    read = blora.reading(data, collate)[1]
    assert torch.equal(read([data[0]])["input_ids"], collate([rows[0]])["input_ids"])
    found = blora.predict_dataset(data, collate, progress=False)[1]
    assert found.tolist() == [k % 2 for k in range(12)]


def test_the_labels_that_a_transform_makes_have_no_names(small):
    """They may be in the order of the network; without names to doubt them they are."""
    data, padding = two_orders(small)[1], DataCollatorWithPadding(small)

    def turned(batch):
        return {**small(batch["text"]), "labels": [1 - label for label in batch["label"]]}

    numbers = data.cast_column("label", datasets.Value("int64"))
    stored = data.map(turned, batched=True)
    stored.set_format(columns=[*KEYS, "labels"])  # and label has the names still
    made = data.with_transform(turned)
    blora = named(small, ("neg", "pos"))
    for collate in (None, padding):
        for part in (made, Subset(made, range(12))):
            with pytest.raises(DataError, match="read as they are, must number the classes"):
                blora.predict_dataset(part, collate, progress=False)
        for part in (numbers.with_transform(turned), stored):
            found = blora.predict_dataset(part, collate, progress=False)[1]
            assert found.tolist() == [k % 2 for k in range(12)]
    blora = named(small, ("pos", "neg"))  # as the data set has them, and so the labels are taken
    assert blora.predict_dataset(made, progress=False)[1].tolist() == [k % 2 for k in range(12)]
    fresh = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    fit(fresh, made, num_steps=1, progress=False)
    assert fresh.likelihood.classes == ()
    anew = numbers.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    with pytest.raises(DataError, match="must number the classes"):
        fresh.predict_dataset(anew, progress=False)
    refused = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    with pytest.raises(ConfigurationError, match="kl_weight"):
        fit(refused, made, num_steps=1, kl_weight=-1)
    ids = anew.map(lambda row: dict(small(row["text"]))).remove_columns("text")
    found = refused.predict_dataset(DataLoader(ids, 4, collate_fn=padding), progress=False)[1]
    assert found.tolist() == ids["label"][:]
    with pytest.raises(DataError, match="must number the classes"):
        blora.predict_dataset(ConcatDataset([anew.with_transform(turned)] * 2), progress=False)


def test_a_hidden_column_stays_hidden(small):
    rows = datasets.Dataset.from_list([{"text": "a", "text_pair": "b", "label": 0}] * 3)
    blora = BayesianLoRA(classifier(small), tokenizer=small)
    for whole in (False, True):
        rows.set_format("torch", columns=["text", "label"], output_all_columns=whole)
        assert ("text_pair" in blora.reading(rows)[0][0]) == whole


def test_a_loader_names_the_classes_of_a_network_without_names(small):
    """Its numbers have names, so that rows which are numbered otherwise are read by them."""
    data, padding = two_orders(small, encoded=True)[1], DataCollatorWithPadding(small)
    blora = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small)
    fit(blora, DataLoader(data.remove_columns("text"), 4, collate_fn=padding), num_steps=1)
    assert blora.likelihood.classes == ("pos", "neg")
    part = data.filter(lambda row: row["label"] == 1)  # neg, which is alone when encoded anew
    part = part.cast_column("label", datasets.Value("string"))
    alone = part.map(lambda row: {"label": "neg"}).class_encode_column("label")
    assert set(blora.predict_dataset(alone, progress=False)[1].tolist()) == {1}


def test_a_head_that_stays_as_it_is_has_no_order_but_its_own(small):
    rows = two_orders(small)[0]
    blora = BayesianLoRA(classifier(small, num_labels=2), tokenizer=small, modules_to_save=[])
    for call in (blora.predict_dataset, blora.calibrate, lambda r, **_: fit(blora, r, num_steps=1)):
        with pytest.raises(ConfigurationError, match="in the order in which"):
            call(rows, progress=False)
    blora.unwrap()
    blora = named(small, ("pos", "neg"), modules_to_save=[])
    assert labels_of(blora, rows) == [int(row["label"] == "neg") for row in rows]


def test_a_second_column_of_labels_and_digits_as_texts_are_read(small):
    data = two_orders(small, encoded=True)[1]
    both = data.map(lambda row: {"labels": row["label"]}).remove_columns("text")
    same = both.filter(lambda row: len(row["input_ids"]) == len(both[0]["input_ids"]))
    blora = named(small, ("neg", "pos"))
    for collate in (default_data_collator, DataCollatorWithPadding(small)):
        found = blora.predict_dataset(same, collate, progress=False)[1].tolist()
        assert found == [1 - label for label in same["label"]]
    digits = [{**small("a film"), "label": str(k % 2)} for k in range(4)]
    assert blora.predict_dataset(digits, progress=False)[1].tolist() == [0, 1, 0, 1]


def test_classes_in_another_order_than_a_pipeline_has_are_told(small):
    with pytest.warns(UserWarning, match="by which a pipeline answers"):
        named(small, ("pos", "neg"), likelihood=SequenceClassification(classes=["neg", "pos"]))


def test_torch_s_own_function_collates_by_the_names_of_the_data_set(small):
    """Like transformers', if it is passed beside a data set."""
    data = (
        two_orders(small, encoded=True)[1].remove_columns("text").rename_column("label", "labels")
    )
    same = data.filter(lambda row: len(row["input_ids"]) == len(data[0]["input_ids"]))
    found = named(small, ("neg", "pos")).predict_dataset(
        same.with_format("torch"), default_collate, progress=False
    )[1]
    assert found.tolist() == [1 - label for label in same["labels"]]


def test_a_number_beyond_the_logits_is_refused_after_a_training_on_numbers(small):
    rows = [{"text": f"a film {k}", "label": k % 3} for k in range(6)]
    blora = BayesianLoRA(classifier(small), tokenizer=small)
    fit(blora, rows, num_steps=1)
    others = [{"text": f"a film {k}", "label": str(k % 4)} for k in range(6)]
    for data in (others, load_task({"test": others}).test):
        with pytest.raises(DataError, match="must number the 3 logits from 0, got 3"):
            blora.predict_dataset(data, progress=False)
