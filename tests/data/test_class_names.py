"""Which logit a label means, whoever names the classes and however they are written."""

import copy
import json
import warnings

import datasets
import pandas
import peft
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
from pyro.infer import SVI
from pyro.optim import SGD
from torch.utils.data import DataLoader

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import load_task
from pyro_blora.errors import CheckpointError, ConfigurationError, DataError
from pyro_blora.inference import bayesianize
from pyro_blora.likelihoods import ClassificationCollator, SequenceClassification

AS_NEG_POS = r"classes as \['neg', 'pos'\], got \['pos', 'neg'\]"
REFUSED = (ConfigurationError, DataError)


@pytest.mark.parametrize(
    ("names", "trained", "collator", "expected"),
    [
        (NEG_POS, "data", "ours", NEG_POS),
        (NEG_POS, "loader of numbers", None, NEG_POS),
        (("bad", "good"), "rows", "ours, pos neg", POS_NEG),  # the head was of other classes
        (None, "rows", "ours", NEG_POS),
        (None, "data", "ours", POS_NEG),
        (None, "loader", None, POS_NEG),
        (None, "loader with other names", None, POS_NEG),
        (None, "transformed", None, POS_NEG),
        (None, "numbers", None, ()),
    ],
)
def test_a_training_names_the_classes(names, trained, collator, expected, small, forms, collators):
    collate = collators[collator]
    blora = adapter(small, names, forms[trained], num_labels=2, collate=collate)
    assert blora.likelihood.classes == expected
    assert collate is None or collators["ours"].classes == ()


@pytest.mark.parametrize(
    ("names", "trained", "read", "collator", "expected"),
    [
        (NEG_POS, None, "data", None, IN_ORDER),
        (NEG_POS, None, "data", "ours, neg pos", IN_ORDER),
        (NEG_POS, None, "encoded", None, IN_ORDER),
        (NEG_POS, None, "labels alone", "padding", IN_ORDER),
        (NEG_POS, None, "tensors", "torch", IN_ORDER),
        (NEG_POS, None, "digits", None, IN_ORDER),
        (NEG_POS, "loader of numbers", "encoded", None, IN_ORDER),
        (POS_NEG, None, "transformed", None, IN_ORDER),  # the table has the order of the network
        (("POS", "Neg"), None, "loader", None, TURNED),
        (None, "rows", "data", "ours", IN_ORDER),
        (None, "data", "rows", None, TURNED),
        (None, "loader", "one class", None, [1] * 6),
        # numbers without names remain what they are after a training on numbers
        (None, "loader of numbers", "encoded", "padding", TURNED),
        (None, "loader of numbers", "encoded", "a function", TURNED),
    ],
)
def test_labels_are_read_by_their_names(
    names, trained, read, collator, expected, small, forms, collators
):
    blora = adapter(small, names, forms.get(trained), num_labels=2)
    assert labels_of(blora, forms[read], collators[collator]) == expected


@pytest.mark.parametrize(
    ("names", "trained", "read", "collator", "match"),
    [
        (NEG_POS, "data", "loader", None, AS_NEG_POS),
        (NEG_POS, None, "transformed", None, AS_NEG_POS),
        (NEG_POS, None, "loader with other names", None, AS_NEG_POS),
        (("odd", "pos", "neg"), None, "loader", None, "must number the classes as"),
        (("US", "us"), None, "loader", None, "must number the classes as"),
        (None, "rows", "rows", "ours, pos neg", AS_NEG_POS),
        (None, "loader of numbers", "rows", None, "trained on numbers must have names"),
        (None, "loader of numbers", "rows", "ours, pos neg", "trained on numbers must have names"),
    ],
)
def test_labels_in_another_order_are_refused(
    names, trained, read, collator, match, small, forms, collators
):
    blora = adapter(small, names, forms.get(trained), num_labels=2)
    with pytest.raises(REFUSED, match=match):
        labels_of(blora, forms[read], collators[collator])


def test_numbers_of_named_logits_mean_the_same_on_a_base_without_names(small, tmp_path):
    trained = adapter(small, NAMES, NUMBERS)
    trained.save_pretrained(tmp_path / "own")
    trained.export_peft(tmp_path / "peft")
    net, data = trained.unwrap(), datasets.Dataset.from_list(NUMBERS)
    net.config.id2label = classifier(small).config.id2label
    for read, name in (("from_pretrained", "own"), ("from_peft", "peft")):
        blora = getattr(BayesianLoRA, read)(net, tmp_path / name, tokenizer=small)
        assert labels_of(blora, relabeled(data, NAMES)) == [0, 1, 2] * 4
        assert labels_of(blora, relabeled(data, NAMES[::-1])) == [2, 1, 0] * 4
        blora.unwrap()


@pytest.mark.filterwarnings("ignore:The LoRA's NLL")  # which knows nothing, because it is random
def test_the_order_of_a_trained_head_is_never_guessed(lora, small, tmp_path):
    task, net = load_task(ROWS * 3), classifier(small)
    blora = BayesianLoRA.from_peft(net, tmp_path, tokenizer=small)
    for rows, collate in (
        (ROWS, None),
        (task.test, None),
        (task.test, task.collator(small, net=net)),
    ):
        with pytest.raises(ConfigurationError, match=r"SequenceClassification\(classes=\["):
            labels_of(blora, rows, collate)
    with pytest.raises(ConfigurationError, match=r"SequenceClassification\(classes=\["):
        fit(blora, ROWS, num_steps=1)
    data = datasets.Dataset.from_list(NUMBERS)
    with pytest.raises(DataError, match="must number the classes"):  # as its trainer may have read
        labels_of(blora, relabeled(data, "201"))
    fit(blora, relabeled(data, NAMES), num_steps=1, progress=False)  # as numbers, which have names
    assert labels_of(blora, relabeled(data, NAMES[::-1])) == [2, 1, 0] * 4
    blora.unwrap()
    with pytest.raises(ConfigurationError, match="in the order in which"):
        bayesianize(lora, data=ROWS, tokenizer=small, progress=False)
    assert lora.active_adapters == ["default"]  # it is as it was
    likelihood = SequenceClassification(classes=NAMES)
    blora = bayesianize(lora, data=ROWS, tokenizer=small, likelihood=likelihood, progress=False)
    assert labels_of(blora, ROWS[:3]) == [0, 1, 2]
    blora.unwrap()
    net = classifier(small, NAMES)  # its user has named them before the training
    blora = BayesianLoRA.from_peft(net, tmp_path, tokenizer=small)
    assert labels_of(blora, ROWS[:3]) == [0, 1, 2]
    blora.unwrap()
    blora = adapter(small, num_labels=3, modules_to_save=[])
    with pytest.raises(ConfigurationError, match="in the order in which"):
        fit(blora, ROWS, num_steps=1)


@pytest.mark.parametrize(
    ("names", "trained", "read", "expected"),
    [
        ("123", None, [1, 2, 3], [0, 1, 2]),
        (None, ["1", "2", "3+"], [2, 1], [1, 0]),
        (None, [*map(str, range(11))], [10, 2], [10, 2]),
        (None, None, ["0", "1", "2"], [0, 1, 2]),
        (None, [0, 1, 2], ["2", "1"], [2, 1]),
        ([f"LABEL_{k}" for k in range(12)], None, ["LABEL_10", "LABEL_2"], [10, 2]),
        (None, ["0.0", "1.0", "2.0"], [1], None),
        (None, [0, 1, 2], [3], None),
        (NAMES, [0, 1, 2], ["3"], None),
    ],
)
def test_numbers_that_are_names_are_names_in_every_split(names, trained, read, expected, small):
    train = trained and [{"text": "a", "label": label} for label in trained]
    blora = adapter(small, names, train, num_labels=len(trained or read))
    rows = [{"text": "a", "label": label} for label in read]
    if expected is None:
        with pytest.raises(DataError, match=r"one of the classes|must number the 3 logits"):
            labels_of(blora, rows)
    else:
        assert labels_of(blora, rows) == expected


def test_a_class_whose_name_is_a_number_is_that_number_wherever_it_stands(small, collators):
    """``class_encode_column`` sorts them as texts, with 10 before 2."""
    numbers = [{"text": f"a film {k}", "label": k % 12} for k in range(24)]
    coded = datasets.Dataset.from_list(numbers).class_encode_column("label")
    coded_names = coded.features["label"].names
    assert coded_names[2] == "10"
    ids = coded.map(lambda row: dict(small(row["text"]))).remove_columns("text")
    for names, train in ((None, numbers), (None, coded), ([*map(str, range(12))], None)):
        blora = adapter(small, names, train, num_labels=12)
        for data in (numbers, coded, ids, ids.rename_column("label", "labels")):
            assert labels_of(blora, data) == [k % 12 for k in range(24)]
        with pytest.raises(DataError, match=r"classes as \['0', '1', '2', "):
            labels_of(blora, DataLoader(ids, 4, collate_fn=collators["padding"]))
    named = DataLoader(coded, 4, collate_fn=ClassificationCollator(small, coded_names))
    with pytest.raises(DataError, match=r"classes as \['0', '1', '2', "):  # it reads 2 as "2"
        fit(adapter(small, coded_names), named, num_steps=1, progress=False)


@pytest.fixture
def lora(small, tmp_path):
    net = classifier(small)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(net, config)
    model.save_pretrained(tmp_path)
    return model


LEARNED = [{"text": ("film", "key", "lock")[k % 3], "label": NAMES[k % 3]} for k in range(24)]


@pytest.fixture
def learned(small, tmp_path):
    """The base of a LoRA that has learned the rows; it is in the folder."""
    base = classifier(small)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    collate = ClassificationCollator(small, NAMES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**collate(LEARNED)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    return base


def warned(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return "\n".join(str(each.message) for each in seen)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("once", [False, True], ids=["fit", "bayesianize"])
def test_a_lora_that_knows_less_than_a_guess_is_suspected_of_another_order(
    once, shift, learned, small, tmp_path
):
    """The labels of the rows are those of the LoRA, or are shifted by one."""
    likelihood = SequenceClassification(classes=NAMES[shift:] + NAMES[:shift])
    parts = {"likelihood": likelihood, "tokenizer": small}

    def run():
        if once:
            bayesianize(learned, tmp_path, data=LEARNED, progress=False, **parts)
        else:
            blora = BayesianLoRA.from_peft(learned, tmp_path, **parts)
            fit(blora, LEARNED, num_steps=8, progress=False)

    assert ("above that of a guess" in warned(run)) == bool(shift)


@pytest.mark.parametrize(("num_data", "wide"), [(None, True), (10_000, False)])
def test_a_posterior_that_is_too_wide_for_its_lora_is_reported(
    num_data, wide, learned, small, tmp_path
):
    """Little is known of 24 rows; of as many as 10,000 like them the curvature would be large."""
    likelihood = SequenceClassification(classes=NAMES, num_data=num_data)
    options = {"data": LEARNED, "likelihood": likelihood, "tokenizer": small, "progress": False}
    seen = warned(lambda: bayesianize(learned, tmp_path, **options))
    assert ("Call blora.calibrate(data)" in seen) == wide


def test_a_number_is_a_name_where_the_classes_are_numbers(small, tmp_path):
    """A CSV file or a data frame has made numbers of the names."""
    digits = [{**row, "label": "123"[k % 3]} for k, row in enumerate(ROWS)]
    numbers = [{**row, "label": int(row["label"])} for row in digits]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, digits)))
    frame = pandas.DataFrame(numbers)
    frame.to_csv(tmp_path / "a.csv", index=False)
    every = (digits, numbers, frame, tmp_path / "a.csv", tmp_path / "a.jsonl")
    for trained in every:
        blora = adapter(small, None, trained)
        assert blora.likelihood.classes == ("1", "2", "3")
        for rows in every:
            assert labels_of(blora, rows) == [0, 1, 2] * 4
        with pytest.raises(DataError, match=r"\['1', '2', '3'\], got 0"):
            labels_of(blora, [{"text": "a", "label": 0}])


def test_classes_in_another_order_than_a_pipeline_has_are_reported(small):
    with pytest.warns(UserWarning, match="by which a pipeline answers"):
        adapter(small, POS_NEG, likelihood=SequenceClassification(classes=NEG_POS))


def test_neither_a_prediction_nor_a_refused_training_names_the_classes(small, forms, collators):
    rows, blora = forms["rows"], adapter(small, num_labels=2)
    blora.predict_dataset(rows, progress=False)
    with pytest.raises(ConfigurationError):
        blora.calibrate(rows, precision="nope")
    with pytest.raises(ConfigurationError, match="kl_weight"):
        fit(blora, forms["transformed"], num_steps=1, kl_weight=-1)
    with pytest.raises(ConfigurationError, match="trained on numbers must have names"):
        fit(blora, forms["numbers"], validation=rows, num_steps=1)
    with pytest.raises(DataError, match=AS_NEG_POS):
        fit(adapter(small, NEG_POS), rows, collate=collators["ours, pos neg"], num_steps=1)
    assert blora.likelihood.classes is None
    assert labels_of(blora, forms["loader"]) == TURNED
    fit(blora, [{**row, "label": row["label"].upper()} for row in rows], num_steps=1)
    assert blora.likelihood.classes == ("NEG", "POS")


@pytest.mark.parametrize("way", ["SVI", "state_dict"])
def test_a_head_of_a_loop_of_one_s_own_is_not_read_by_names(way, small, forms):
    """The loop's numbers may have stood for the classes in any order."""
    blora = adapter(small, num_labels=2, likelihood=SequenceClassification(num_data=12))
    if way == "SVI":
        batch = next(iter(forms["loader"]))
        SVI(blora.model, blora.guide, SGD({"lr": 1e-3}), tiny.elbo(4)).step(batch)
    else:
        with pytest.raises(RuntimeError, match="Missing key"):
            blora.load_state_dict({})
        assert not blora.likelihood.by_numbers
        blora.load_state_dict(adapter(small, None, forms["data"], num_labels=2).state_dict())
    with pytest.raises(ConfigurationError, match="trained on numbers must have names"):
        labels_of(blora, forms["rows"])
    assert labels_of(blora, forms["numbers"]) == TURNED
    # unless somebody says how they are numbered
    assert labels_of(blora, forms["rows"], ClassificationCollator(small, POS_NEG)) == TURNED


def test_a_saved_head_keeps_its_classes_whatever_likelihood_is_passed(small, forms, tmp_path):
    blora = adapter(small, None, forms["data"], num_labels=2)
    blora.save_pretrained(tmp_path)
    net = blora.unwrap()
    likelihood = SequenceClassification(num_data=24)
    again = BayesianLoRA.from_pretrained(net, tmp_path, likelihood=likelihood)
    assert (again.likelihood.classes, again.likelihood.num_data) == (POS_NEG, 24)
    again.unwrap()
    other = SequenceClassification(classes=NEG_POS)
    with pytest.raises(CheckpointError, match=r"classes \['pos', 'neg'\], in this order"):
        BayesianLoRA.from_pretrained(net, tmp_path, likelihood=other)


@pytest.mark.parametrize(
    ("first", "then", "match"),
    [
        ("data", "rows", r"classes \['pos', 'neg'\], in this order"),
        ("numbers", "rows", "was trained on numbers as classes"),
        ("rows", "numbers", r"was trained on \['neg', 'pos'\] as classes"),
    ],
)
def test_a_run_is_not_resumed_on_other_classes(first, then, match, small, forms, tmp_path):
    options = {"data_collator": None, "max_steps": 1, "save_steps": 1, "save_strategy": "steps"}
    blora = adapter(small, num_labels=2)
    trainer = tiny.trainer(tmp_path, blora, forms[first], **options)
    trainer.train()
    blora = BayesianLoRA(blora.unwrap(), tokenizer=small)
    trainer = tiny.trainer(tmp_path, blora, forms[then], **options)
    with pytest.raises(CheckpointError, match=match):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
