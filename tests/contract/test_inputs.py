"""A wrong input is told in one line, at the place that knows, and before anything is done."""

import copy
import json
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from own_tokenizer import build_tokenizer
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, TrainingArguments

from pyro_blora import BayesianLoRA, checkpoints, fit, guides, models
from pyro_blora.checkpoints.checkpoint import read_tensors, write_tensors
from pyro_blora.data import DataError, Item, LabelTokensCollator, MultipleChoiceCollator
from pyro_blora.data.items import Template, template_for
from pyro_blora.errors import BatchError, CheckpointError, ConfigurationError
from pyro_blora.inference import optim_args
from pyro_blora.inference.resume import STATE
from pyro_blora.inference.trainer import BayesianLoRATrainer
from pyro_blora.likelihoods import LabelTokens, MultipleChoice, SequenceClassification

ROWS = tiny.examples(10)
BATCH = tiny.sequences()


@pytest.fixture(scope="module")
def blora():
    return tiny.adapted(num_data=10)


def fitted(blora, rows=ROWS, **options):
    options = {"collate": tiny.collate, "num_steps": 1, "progress": False, **options}
    return fit(blora, rows, **options)


def of_trainer(folder, blora, **options):
    args = TrainingArguments(
        folder, max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    how = {"train_dataset": ROWS, "data_collator": tiny.collate, **options}
    return BayesianLoRATrainer(blora, args, **how)


# The size of the data


def loader(rows):
    return DataLoader(rows, 5, collate_fn=tiny.collate)


@pytest.mark.filterwarnings("default:The likelihood was told num_data")
@pytest.mark.parametrize("way", ["list", "loader", "Trainer"])
@pytest.mark.parametrize(("told", "warns"), [(5000, True), (10, False)])
def test_another_size_than_that_of_the_data_is_told(way, told, warns, tmp_path, recwarn):
    blora = tiny.adapted(num_data=told)
    if way == "Trainer":
        of_trainer(tmp_path, blora).train()
    else:
        fitted(blora, loader(ROWS) if way == "loader" else ROWS)
    said = [str(w.message) for w in recwarn if "num_data" in str(w.message)]
    expected = "num_data=5000, and train has 10 examples: the KL weighs 0.002 times"
    assert [expected in text for text in said] == ([True] if warns else [])


@pytest.mark.filterwarnings("error:The likelihood was told num_data")
def test_a_loader_of_whole_batches_does_not_tell_the_number_of_examples():
    fitted(tiny.adapted(num_data=10), DataLoader([tiny.collate(ROWS)], batch_size=None))


# Numbers


def rank_of(kind, rank):
    return lambda b: tiny.adapted(prior=kind(rank=rank))


NUMBERS = {
    "ascent": (lambda b: fitted(b, max_grad_norm=-1), "max_grad_norm must be positive"),
    "no norm": (lambda b: fitted(b, max_grad_norm=0), "max_grad_norm must be positive .* got 0"),
    "a rate": (
        lambda b: fitted(b, learning_rates={"mean": -0.05}),
        "rate of 'mean' must be .*-0.05",
    ),
    "a NaN": (lambda b: fitted(b, learning_rates=torch.nan), "rate of 'mean' must be finite"),
    "SVI's": (lambda b: optim_args(b, {"direction": -1}), "rate of 'direction' must be"),
    "half an example": (lambda b: tiny.adapted(num_data=12.5), "num_data must be a whole number"),
    "half a draw": (lambda b: b.predict(BATCH, 2.5), r"num_samples must be a whole .* got 2\.5"),
    "half of a log": (lambda b: b.log_predictive(BATCH, 2.5), "num_samples must be a whole"),
    "half a text": (
        lambda b: b.generate(BATCH["input_ids"], num_samples=2.5),
        "num_samples must be a whole",
    ),
    "half an export": (lambda b: b.export_peft("x", 2.5), "num_samples must be a whole"),
    "half distilled": (
        lambda b: b.distill(ROWS, tiny.collate, num_samples=2.5),
        "num_samples must be a whole",
    ),
    "true draws": (lambda b: b.predict(BATCH, True), "num_samples must be a whole .* got True"),
    "half a step": (lambda b: fitted(b, num_steps=2.5), "num_steps must be a whole number"),
    "half a batch": (lambda b: fitted(b, batch_size=2.5), "batch_size must be a whole number"),
    "half a particle": (lambda b: fitted(b, num_particles=2.5), "num_particles must be a whole"),
    "all KL": (lambda b: fitted(b, kl_weight=torch.inf), "kl_weight must be positive and finite"),
    "no epoch": (
        lambda b: fitted(b, num_steps=None, num_epochs=torch.nan),
        "num_epochs must be positive and finite, got nan",
    ),
    "rank 2.5": (rank_of(models.KroneckerInducing, 2.5), "rank must be a whole number"),
    "rank '8'": (
        rank_of(models.KroneckerInducing, "8"),
        "rank must be positive and finite, got '8'",
    ),
    "rank True": (rank_of(models.Subspace, True), "rank must be positive and finite, got True"),
    "rank pair": (rank_of(models.KroneckerInducing, (2, 2.5)), "rank must be a whole number"),
    "rank of the facade": (
        lambda b: BayesianLoRA(tiny.llama(), rank=2.5),
        "rank must be a whole number, 1 or more, got 2.5",
    ),
    "rank of a guide": (lambda b: guides.LowRank(rank=2.5), "rank must be a whole number"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range(name, blora):
    ask, told = NUMBERS[name]
    before = tiny.trained(blora)
    with pytest.raises(ConfigurationError, match=told) as error:
        ask(blora)
    assert "\n" not in str(error.value)
    assert tiny.equal(tiny.trained(blora), before)
    assert not Path("x").exists()


def test_an_adapter_that_is_off_is_not_trained(tmp_path):
    blora = tiny.adapted(num_data=10)
    before = tiny.trained(blora)
    for train in (lambda: fitted(blora), of_trainer(tmp_path, blora).train):
        with blora.disable_adapter(), pytest.raises(ConfigurationError, match="adapter is off"):
            train()
    assert tiny.equal(tiny.trained(blora), before)


# Networks and batches


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(wrong):
    net = tiny.llama()
    net.model.layers[1].self_attn.q_proj.weight.data[0, 0] = wrong
    with pytest.raises(
        ConfigurationError, match=r"weight of model\.layers\.1.*q_proj must be fini"
    ):
        BayesianLoRA(net)
    assert not any(module._forward_hooks for module in net.modules())


def test_answers_beyond_the_vocabulary():
    with pytest.raises(ConfigurationError, match=r"token_ids must be below 32.*got \[5, 32\]"):
        tiny.adapted(likelihood=LabelTokens(token_ids=(5, 32)))


def changed(batch, **parts):
    return {**batch, **parts}


OPTIONS = tiny.choices()
GONE = OPTIONS["option_mask"].clone()
GONE[1, 2] = False
EMPTY = OPTIONS["option_mask"].clone()
EMPTY[1] = False
PADDED = BATCH["attention_mask"].clone()
PADDED[2] = 0
BATCHES = {
    "a label of an absent option": (
        MultipleChoice(num_data=4),
        changed(OPTIONS, option_mask=GONE, labels=torch.tensor([0, 2, 1])),
        "labels must name an option that the item has",
    ),
    "no option": (
        MultipleChoice(num_data=4),
        changed(OPTIONS, option_mask=EMPTY),
        "Each item must have an option with a token to score",
    ),
    "padding": (
        LabelTokens(token_ids=tiny.ANSWERS, num_data=4),
        changed(BATCH, attention_mask=PADDED),
        "Each row of attention_mask must have a real token",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_means_nothing(name):
    likelihood, batch, told = BATCHES[name]
    blora = tiny.adapted(likelihood=tiny.anew(likelihood))
    asks = (blora.log_predictive, blora.model, *(() if "label" in name else (blora.predict,)))
    for ask in asks:  # a prediction reads no labels
        with pytest.raises(BatchError, match=told):
            ask(batch)


def test_beams_want_no_cache_of_one_size(blora):
    how = {"num_beams": 2, "cache_implementation": "static", "max_new_tokens": 1}
    with pytest.raises(ConfigurationError, match="generate takes no cache_implementation"):
        blora.generate(BATCH["input_ids"], **how)


# Files that were edited


def edited(change, folder):
    header, tensors = read_tensors(folder / checkpoints.WEIGHTS)
    (name,) = header.keys() - {"format"}
    config = json.loads(header[name])
    made = change(config)
    text = made if isinstance(made, str) else json.dumps(config if made is None else made)
    write_tensors(folder / checkpoints.WEIGHTS, tensors, {name: text})


CONFIGS = {
    "no JSON": lambda c: "{",
    "a list": lambda c: [c],
    "an unknown option": lambda c: c["prior"]["options"].update(lengths=3),
    "a newer method": lambda c: c["method"].update(schedule="new"),
}
for key in (
    "base",
    "base_model",
    "layers",
    "modules_to_save",
    "method",
    "prior",
    "guide",
    "likelihood",
):
    CONFIGS[f"no {key}"] = lambda c, key=key: c.pop(key) and c


@pytest.mark.parametrize("name", CONFIGS)
def test_an_edited_configuration_is_one_line(name, tmp_path):
    blora = tiny.adapted(num_data=10)
    blora.net.config.name_or_path = "me/base"
    blora.save_pretrained(tmp_path)
    edited(CONFIGS[name], tmp_path)
    base = blora.unwrap()
    with pytest.raises(CheckpointError, match=r"safetensors cannot be used") as error:
        BayesianLoRA.from_pretrained(base, tmp_path)
    assert "\n" not in str(error.value)
    assert not any(module._forward_hooks for module in base.modules())


def test_a_scale_that_is_missing_is_not_one(tmp_path):
    blora = tiny.adapted(likelihood=MultipleChoice(num_data=10))
    blora.save_pretrained(tmp_path)
    header, tensors = read_tensors(tmp_path / checkpoints.WEIGHTS)
    tensors = {name: t for name, t in tensors.items() if "score_slope" not in name}
    write_tensors(tmp_path / checkpoints.WEIGHTS, tensors, header)
    with pytest.raises(CheckpointError, match=r"do not fit, among them .*score_slope"):
        BayesianLoRA.from_pretrained(blora.unwrap(), tmp_path)


@pytest.mark.parametrize("what", ["no JSON", "a list", "no B"])
def test_an_edited_lora_is_one_line(what, tmp_path):
    pytest.importorskip("peft")
    blora = tiny.adapted(num_data=10)
    blora.export_peft(tmp_path)
    base = blora.unwrap()
    if what == "no B":
        _, tensors = read_tensors(tmp_path / checkpoints.PEFT_WEIGHTS)
        kept = {n: t for n, t in tensors.items() if "lora_B" not in n}
        save_file(kept, tmp_path / checkpoints.PEFT_WEIGHTS)
    else:
        text = {"no JSON": "{", "a list": "[1]"}[what]
        (tmp_path / checkpoints.PEFT_CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be used"):
        BayesianLoRA.from_peft(base, tmp_path)


@pytest.mark.parametrize("key", ["history", "settings", "stream", "python", None])
def test_an_edited_state_of_a_run_is_one_line(key, tmp_path):
    how = {"checkpoint_dir": tmp_path, "num_steps": 2}
    torch.manual_seed(0)
    fitted(tiny.adapted(num_data=10), **how)
    header, tensors = read_tensors(tmp_path / STATE)
    notes = json.loads(header["training"])
    notes.pop(key, None)
    text = json.dumps(notes) if key else "["
    write_tensors(tmp_path / STATE, tensors, {"training": text})
    torch.manual_seed(0)
    with pytest.raises(CheckpointError, match="cannot be used"):
        fitted(tiny.adapted(num_data=10), **{**how, "num_steps": 3}, resume=True)


# Words and tokens

FILMS = template_for("sst2")
WORDS = build_tokenizer(["Review: Sentiment negative positive Article: Topic"] * 3)


def film(choices, label=0, name="film"):
    return Item(name, "a film", choices, label)


@pytest.fixture
def words():
    return LabelTokensCollator(WORDS, FILMS)


def test_label_words_have_the_order_of_the_choices(words):
    assert words([film(("negative", "positive"))])["labels"].tolist() == [0]
    for wrong in (("positive", "negative"), ("positive", "bad")):
        with pytest.raises(DataError, match=r"'film'.*one for each of the label words.*reorder"):
            words([film(wrong)])


def test_letters_name_places_whatever_the_choices_are():
    letters = Template("Question: {q}\nAnswer:", "labels", (" A", " B"))
    found = LabelTokensCollator(build_tokenizer([": A B A B"] * 3), letters)
    batch = found([film(("red", "blue"), 1), film(("one", "two")), film(("blue", "red"))])
    assert batch["labels"].tolist() == [1, 0, 0]


def test_all_items_have_the_same_choices(words):
    """Words of which no choice is one, as those of BoolQ, cannot tell the order."""
    with pytest.raises(DataError, match="'film'"):
        words([film(("positive", "bad"))])  # which is not remembered
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
    found = LabelTokensCollator(tokenizer, FILMS)
    assert found.token_ids == (4, 5)
    batch = MultipleChoiceCollator(tokenizer)([film(("negative", "positive"))])
    assert batch["input_ids"][batch["option_mask"]].tolist() == [4, 5]


# What is asked of an adapter


class Weighed(LabelTokens):
    """A likelihood with a buffer of the name of its argument."""

    def __init__(self, *, token_ids, weights, kind: "Literal['a', 'b']" = "a", num_data=None):
        super().__init__(token_ids=token_ids, num_data=num_data)
        self.register_buffer("weights", torch.as_tensor(weights))


def test_an_argument_may_be_a_buffer_and_a_choice_a_string():
    made = Weighed(token_ids=(5, 6), weights=[1.0, 2.0])
    assert torch.equal(made.state_dict()["weights"], made.weights)
    assert torch.equal(made.weights, torch.tensor([1.0, 2.0]))
    assert made.num_data is None
    with pytest.raises(ConfigurationError, match=r"kind must be one of \('a', 'b'\), got 'c'"):
        Weighed(token_ids=(5, 6), weights=[1.0], kind="c")


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_an_adapter_whose_autoguide_began_in_a_step_is_copied(kind):
    blora = tiny.adapted(guide=kind)
    elbo = Trace_ELBO(max_plate_nesting=blora.max_plate_nesting)
    SVI(blora.model, blora.guide, Adam({"lr": 0.1}), elbo).step(BATCH)
    expected = blora.predict(BATCH, 0).samples
    assert torch.equal(copy.deepcopy(blora).predict(BATCH, 0).samples, expected)


@pytest.mark.parametrize("guide", [guides.Delta(), guides.Ensemble()])
def test_points_have_no_kl(guide):
    assert tiny.adapted(guide=guide).kl() is None


def test_a_head_of_classes_alone_is_no_row_of_padding():
    """Other likelihoods with a mask are told, too."""
    batch = changed(BATCH, attention_mask=PADDED)
    likelihood = SequenceClassification(num_data=4)
    blora = tiny.adapted(tiny.bert(), target_modules=None, likelihood=likelihood)
    with pytest.raises(BatchError, match="a row of padding alone"):
        blora.predict(batch)
