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
from transformers import DataCollatorWithPadding

from pyro_blora import BayesianLoRA, fit
from pyro_blora.data import load_task
from pyro_blora.errors import CheckpointError, ConfigurationError, DataError
from pyro_blora.inference import bayesianize
from pyro_blora.labels import Item
from pyro_blora.likelihoods import ClassificationCollator, SequenceClassification

AS_NEG_POS = r"classes as \['neg', 'pos'\], got \['pos', 'neg'\]"
REFUSED = (ConfigurationError, DataError)


@pytest.mark.parametrize(
    ("names", "trained", "collator", "expected"),
    [
        (NEG_POS, "labels alone", "padding", NEG_POS),
        (NEG_POS, "data", "ours, neg pos", NEG_POS),
        (NEG_POS, "data", "ours", NEG_POS),
        (NEG_POS, "loader of numbers", None, ()),
        (("bad", "good"), "rows", "ours, pos neg", POS_NEG),  # the head was of other classes
        (None, "rows", "ours", NEG_POS),
        (None, "data", "ours", POS_NEG),
        (None, "labels", None, POS_NEG),
        (None, "loader", None, POS_NEG),
        (None, "loader with other names", None, POS_NEG),
        (None, "transformed", None, ()),
    ],
)
def test_a_training_names_the_classes(names, trained, collator, expected, small, forms, collators):
    collate = collators[collator]
    blora = adapter(small, names, forms[trained], num_labels=2, collate=collate)
    assert blora.likelihood.classes == expected
    assert collate is None or collators["ours"].classes == ()


def test_numbers_that_a_transform_makes_are_read_as_they_are(small, forms):
    """Also where it puts them into the column whose numbers had names."""
    for turn in (0, 1):
        made = forms["data"].with_transform(
            lambda rows, turn=turn: {
                **small(rows["text"]),
                "label": [abs(turn - k) for k in rows["label"]],
            }
        )
        assert labels_of(adapter(small, NEG_POS), made) == IN_ORDER


@pytest.mark.parametrize(
    ("names", "trained", "read", "collator", "expected"),
    [
        (NEG_POS, None, "data", None, IN_ORDER),
        (NEG_POS, None, "data", "ours, neg pos", IN_ORDER),
        (NEG_POS, None, "encoded", None, IN_ORDER),
        (NEG_POS, None, "labels", None, IN_ORDER),
        (NEG_POS, None, "both columns", "padding", IN_ORDER),
        (NEG_POS, None, "both columns", "transformers", IN_ORDER),
        (NEG_POS, None, "one length", "transformers", IN_ORDER),
        (NEG_POS, None, "tensors", "torch", IN_ORDER),
        (NEG_POS, None, "digits", None, IN_ORDER),
        (NEG_POS, None, "transformed without names", None, IN_ORDER),
        (NEG_POS, None, "stored", None, IN_ORDER),
        (POS_NEG, None, "transformed", None, IN_ORDER),  # the table has the order of the network
        (None, "rows", "rows", "ours", IN_ORDER),
        (None, "rows", "data", "ours", IN_ORDER),
        (None, "data", "rows", None, TURNED),
        (None, "loader", "one class", None, [1] * 6),
        # numbers without names remain what they are after a training on numbers
        (POS_NEG, "loader of numbers", "encoded", "padding", TURNED),
        (None, "loader of numbers", "encoded", None, TURNED),
        (None, "loader of numbers", "encoded", "a function", TURNED),
    ],
)
def test_labels_are_read_by_their_names(
    names, trained, read, collator, expected, small, forms, collators
):
    blora = adapter(small, names, forms.get(trained), num_labels=2)
    assert labels_of(blora, forms[read], collators[collator]) == expected
    if not isinstance(forms[read], DataLoader):
        data, collate = blora.reading(forms[read], collators[collator])
        assert collate([data[k] for k in range(len(data))])["labels"].tolist() == expected


@pytest.mark.parametrize(
    ("names", "trained", "read", "collator", "match"),
    [
        (NEG_POS, "labels alone", "loader of labels", None, "must number the classes as"),
        (NEG_POS, "data", "loader of texts", None, "must number the classes as"),
        (NEG_POS, "encoded", "loader", None, AS_NEG_POS),
        (NEG_POS, "loader of numbers", "encoded", None, AS_NEG_POS),
        (NEG_POS, "loader of numbers", "data", None, AS_NEG_POS),
        (NEG_POS, "loader of numbers", "loader", None, AS_NEG_POS),
        (NEG_POS, "loader of numbers", "another name", None, r"got \['pos', 'negative'\]"),
        (NEG_POS, None, "transformed", None, "read as they are, must number the classes"),
        (NEG_POS, None, "subset of transformed", None, "read as they are, must number"),
        (POS_NEG, None, "transformed and joined", None, "must number the classes"),
        (None, "rows", "rows", "ours, pos neg", AS_NEG_POS),
        (None, "rows", "data", "ours, pos neg", AS_NEG_POS),
        (None, "rows", "loader with other names", "ours, pos neg", AS_NEG_POS),
        (None, "rows", "another name", None, "spell them alike, or cast the column to int"),
        (None, "transformed", "numbered anew", None, "must number the classes"),
        (None, "loader of numbers", "rows", None, "trained on numbers must have names"),
    ],
)
def test_labels_in_another_order_are_refused(
    names, trained, read, collator, match, small, forms, collators
):
    blora = adapter(small, names, forms.get(trained), num_labels=2)
    with pytest.raises(REFUSED, match=match):
        labels_of(blora, forms[read], collators[collator])


@pytest.mark.parametrize(
    ("names", "table", "refused"),
    [
        (("POS", "Neg"), POS_NEG, None),
        (("pos", "neg", "odd"), POS_NEG, None),
        (NEG_POS, ("0", "1"), None),
        (("neg", "POS"), POS_NEG, "must number the classes as"),
        (("odd", "pos", "neg"), POS_NEG, "must number the classes as"),
        (("US", "us"), ("us", "US"), r"classes as \['US', 'us'\]"),
    ],
)
def test_a_loader_may_have_the_first_classes_alone_or_spell_them_otherwise(
    names, table, refused, small, forms, collators
):
    encoded = relabeled(forms["encoded"], table).remove_columns("text")
    loader, blora = DataLoader(encoded, 4, collate_fn=collators["padding"]), adapter(small, names)
    if refused is None:
        assert labels_of(blora, loader) == TURNED
        fit(blora, loader, num_steps=1, progress=False)
        assert labels_of(blora, loader) == TURNED
    else:
        with pytest.raises(DataError, match=refused):
            labels_of(blora, loader)


def test_a_loader_of_fewer_names_than_outputs_is_refused_before_a_step(small, forms, collators):
    encoded = DataLoader(forms["encoded"].remove_columns("text"), collate_fn=collators["padding"])
    named = DataLoader(forms["rows"], collate_fn=ClassificationCollator(small, NEG_POS))
    for loader in (encoded, named):
        with pytest.raises(ConfigurationError, match="must have a logit for each of the classes"):
            fit(adapter(small, num_labels=3), loader, num_steps=1, progress=False)


def test_names_that_are_numbers_are_read_alike_after_any_training(small):
    """The network says that its logits are called 1 and 2."""
    rows = [{**row, "label": str(1 + k % 2)} for k, row in enumerate(ROWS)]
    data = datasets.Dataset.from_list(rows).class_encode_column("label")
    encoded = data.map(lambda row: dict(small(row["text"]))).remove_columns("text")
    for part in (encoded, encoded.cast_column("label", datasets.Value("int64"))):
        loader = DataLoader(part, 4, collate_fn=DataCollatorWithPadding(small))
        blora = adapter(small, ("1", "2"), loader)
        for read in (loader, rows, data):
            assert labels_of(blora, read) == IN_ORDER


def test_a_collator_gives_numbers_no_other_places(small):
    rows = [{**row, "label": 1 + k % 3} for k, row in enumerate(ROWS)]
    trained = adapter(small, None, rows, num_labels=4)
    named = [ClassificationCollator(small, [*map(str, range(k, 4))]) for k in (0, 1)]
    assert labels_of(trained, rows, named[0]) == [row["label"] for row in rows]
    for blora in (trained, adapter(small, ("0", "1", "2", "3"))):
        with pytest.raises(DataError, match="must number the classes as"):
            labels_of(blora, rows, named[1])
    blora, few = adapter(small, None, rows), [row for row in rows if row["label"] < 3]
    items = [Item(row["text"], row["text"], ("1", "2", "3"), row["label"] - 1) for row in few]
    assert labels_of(blora, items) == [item.label for item in items]
    with pytest.raises(DataError, match="must number the classes as"):
        labels_of(blora, DataLoader(items, 4, collate_fn=ClassificationCollator(small)))


def test_a_data_set_is_read_whatever_the_case_of_its_classes(small, forms):
    blora = adapter(small, None, forms["rows"], num_labels=2)
    assert labels_of(blora, relabeled(forms["numbers"], ("POS", "NEG"))) == IN_ORDER
    assert labels_of(blora, forms["numbers"]) == TURNED


@pytest.fixture
def lora(small, tmp_path):
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
            labels_of(blora, task.test, given)
    coded = relabeled(datasets.Dataset.from_list(NUMBERS), "201")
    with pytest.raises(DataError, match="must number the classes"):  # as its trainer may have read
        labels_of(blora, coded)
    coded = coded.cast_column("label", datasets.Value("int64"))
    assert labels_of(blora, coded) == [0, 1, 2] * 4


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


@pytest.mark.parametrize("batched", [False, True])
def test_numbers_of_named_logits_mean_the_same_on_a_base_without_names(batched, small, tmp_path):
    rows = [{**row, "label": NAMES.index(row["label"])} for row in ROWS]
    train = [{**small(row["text"]), "label": row["label"]} for row in rows]
    loader = DataLoader(train, 4, collate_fn=DataCollatorWithPadding(small))
    trained = adapter(small, NAMES, loader if batched else rows)
    trained.save_pretrained(tmp_path / "own")
    trained.export_peft(tmp_path / "peft")
    net, data = trained.unwrap(), datasets.Dataset.from_list(rows)
    net.config.id2label = classifier(small).config.id2label
    for read, name in (("from_pretrained", "own"), ("from_peft", "peft")):
        blora = getattr(BayesianLoRA, read)(net, tmp_path / name, tokenizer=small)
        assert labels_of(blora, relabeled(data, NAMES)) == [0, 1, 2] * 4
        with pytest.raises(DataError, match="must number the classes as"):
            labels_of(blora, relabeled(data, NAMES[::-1]))
        blora.unwrap()


@pytest.mark.filterwarnings("ignore:The LoRA's NLL")  # which knows nothing, because it is random
def test_the_order_of_a_trained_head_is_never_guessed(lora, small, tmp_path):
    blora = BayesianLoRA.from_peft(classifier(small), tmp_path, tokenizer=small)
    with pytest.raises(ConfigurationError, match=r"SequenceClassification\(classes=\["):
        labels_of(blora, ROWS)
    with pytest.raises(ConfigurationError, match=r"SequenceClassification\(classes=\["):
        fit(blora, ROWS, num_steps=1)
    blora.unwrap()
    with pytest.raises(ConfigurationError, match="in the order in which"):
        bayesianize(lora, data=ROWS, tokenizer=small, progress=False)
    assert lora.active_adapters == ["default"]  # it is as it was
    assert hasattr(lora.get_base_model().classifier, "modules_to_save")
    likelihood = SequenceClassification(classes=NAMES)
    blora = bayesianize(lora, data=ROWS, tokenizer=small, likelihood=likelihood, progress=False)
    assert labels_of(blora, ROWS[:3]) == [0, 1, 2]
    blora.unwrap()
    net = classifier(small, NAMES)  # its user has named them before the training
    blora = BayesianLoRA.from_peft(net, tmp_path, tokenizer=small)
    assert blora.likelihood.classes == NAMES
    assert labels_of(blora, ROWS[:3]) == [0, 1, 2]


def test_a_head_that_stays_as_it_is_has_no_order_but_its_own(small, forms):
    blora = adapter(small, num_labels=2, modules_to_save=[])
    for call in (blora.predict_dataset, blora.calibrate, lambda r, **_: fit(blora, r, num_steps=1)):
        with pytest.raises(ConfigurationError, match="in the order in which"):
            call(forms["rows"], progress=False)
    blora = adapter(small, POS_NEG, modules_to_save=[])
    assert labels_of(blora, forms["rows"]) == TURNED


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
        with pytest.raises(DataError, match=r"\['1', '2', '3'\], got '0'"):
            labels_of(blora, [{"text": "a", "label": 0}])


@pytest.mark.parametrize(
    ("names", "trained", "read", "expected"),
    [
        ("123", None, [1, 2, 3], [0, 1, 2]),
        (None, ["1", "2", "3+"], [2, 1], [1, 0]),
        (None, [*map(str, range(11))], [10, 2], [10, 2]),
        (None, None, ["0", "1", "2"], [0, 1, 2]),
        ([f"LABEL_{k}" for k in range(12)], None, ["LABEL_10", "LABEL_2"], [10, 2]),
        ("123", [0, 1, 2], [1, 2], [1, 2]),  # trained on numbers, whatever the network calls them
    ],
)
def test_numbers_that_are_names_are_names_in_every_split(names, trained, read, expected, small):
    train = trained and [{"text": "a", "label": label} for label in trained]
    blora = adapter(small, names, train, num_labels=len(trained or read))
    assert labels_of(blora, [{"text": "a", "label": label} for label in read]) == expected


def test_a_class_whose_name_is_a_number_is_that_number_wherever_it_stands(small, collators):
    """``class_encode_column`` sorts them as texts, with 10 before 2."""
    numbers = [{"text": f"a film {k}", "label": k % 12} for k in range(24)]
    coded = datasets.Dataset.from_list(numbers).class_encode_column("label")
    coded_names = coded.features["label"].names
    assert coded_names[2] == "10"
    ids = coded.map(lambda row: dict(small(row["text"]))).remove_columns("text")
    titles = [f"class {k}" for k in range(12)]
    for names, train in ((None, numbers), (None, coded), (titles, numbers), (None, None)):
        blora = adapter(small, names, train, num_labels=12)
        for data in (numbers, coded, ids, ids.rename_column("label", "labels")):
            assert labels_of(blora, data) == [k % 12 for k in range(24)]
        with pytest.raises(DataError, match=r"classes as \['0', '1', '2', "):
            labels_of(blora, DataLoader(ids, 4, collate_fn=collators["padding"]))
        named = DataLoader(coded, 4, collate_fn=ClassificationCollator(small, coded_names))
        with pytest.raises(DataError, match=r"classes as \['0', '1', '2', "):  # it reads 2 as "2"
            fit(adapter(small, coded_names), named, num_steps=1, progress=False)
    ratings = ids.select(range(1, 4)).cast_column("label", datasets.Value("string"))
    ratings = ratings.class_encode_column("label")  # 1, 2, 3: the last is the name of no logit
    blora = adapter(small, None, DataLoader(ratings, 4, collate_fn=collators["padding"]))
    assert labels_of(blora, ratings) == [0, 1, 2]


def test_a_number_is_not_the_place_of_a_class_that_is_a_number(small):
    rows = [{"text": "a film", "label": f"{k % 3}.0"} for k in range(9)]
    with pytest.raises(DataError, match="must be one of the classes"):
        labels_of(adapter(small, None, rows), [{"text": "a film", "label": 1}])


@pytest.mark.parametrize("names", [None, NAMES])
def test_a_head_that_was_trained_on_numbers_has_no_names_afterwards(names, small, tmp_path):
    blora = adapter(small, names, NUMBERS)
    blora.save_pretrained(tmp_path)
    net, likelihood = blora.unwrap(), SequenceClassification()
    blora = BayesianLoRA.from_pretrained(net, tmp_path, tokenizer=small, likelihood=likelihood)
    assert blora.likelihood.classes == ()
    digits = [{**row, "label": str(row["label"])} for row in NUMBERS]
    for rows in (NUMBERS, digits):
        assert labels_of(blora, rows) == [0, 1, 2] * 4
    others = [{"text": f"a film {k}", "label": str(k % 4)} for k in range(6)]
    for data in (others, load_task({"test": others}).test):
        with pytest.raises(DataError, match="must number the 3 logits from 0, got 3"):
            labels_of(blora, data)
    if names is None:
        with pytest.raises(ConfigurationError, match="trained on numbers must have names"):
            labels_of(blora, ROWS)


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
