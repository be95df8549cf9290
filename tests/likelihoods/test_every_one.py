"""Each likelihood with what users do with an adapter: it works, or is refused in one line."""

from functools import partial

import pytest
import tiny
import torch

from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.metrics import doubts, out_of_scope, rank, threshold_for
from pyro_blora.evaluation.plots import ood_diagram
from pyro_blora.likelihoods import (
    CausalLM,
    LabelTokens,
    MultiLabel,
    MultipleChoice,
    Ordinal,
    Preference,
    Regression,
    SequenceClassification,
    TokenClassification,
)

TAGGER = partial(tiny.bert, task="TokenClassification")
ANSWERS = partial(LabelTokens, token_ids=tiny.ANSWERS)
CLASSES = "acc ece gap nll brier n"
# the network, its batches, the scores, and the kind of its labels
KINDS = {
    "text": (CausalLM, tiny.llama, tiny.texts, ""),
    "words": (ANSWERS, tiny.llama, tiny.sequences, CLASSES),
    "options": (MultipleChoice, tiny.llama, tiny.choices, CLASSES),
    "classes": (SequenceClassification, tiny.bert, tiny.sequences, CLASSES),
    "order": (partial(Ordinal, num_classes=3), tiny.scorer, tiny.sequences, CLASSES),
    "pairs": (Preference, tiny.scorer, tiny.pairs, CLASSES),
    "labels": (MultiLabel, tiny.labeler, tiny.several, "nll ece f1 auroc n"),
    "tags": (TokenClassification, TAGGER, tiny.tags, CLASSES),
    "numbers": (
        Regression,
        partial(tiny.bert, num_labels=1),
        tiny.numbers,
        "nll rmse coverage crps n",
    ),
}
SINGLE = {"words", "options", "classes", "order", "pairs"}  # one class of each example


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def data(kind):
    batch = KINDS[kind][2](6)
    return [{name: value[k] for name, value in batch.items()} for k in range(6)]


@pytest.fixture
def blora(kind):
    make, net, *_ = KINDS[kind]
    unit = {"loc": 0.0, "scale": 1.0} if kind == "numbers" else {}
    return tiny.adapted(net(), target_modules=None, likelihood=make(num_data=6, **unit))


def predicted(blora, data):
    return blora.predict_dataset(data, num_samples=3, precision="float32")


def test_evaluate(kind, blora, data):
    if kind == "text":
        with pytest.raises(
            ConfigurationError, match="predict must have a likelihood of labels, got"
        ):
            blora.evaluate(data)
        return
    scores = blora.evaluate(data, num_samples=3, precision="float32")
    assert {*scores} <= {*KINDS[kind][3].split()}
    assert scores.n == len(data) or kind == "tags"
    prediction, labels = predicted(blora, data)
    logp, _ = blora.log_predictive_dataset(data, num_samples=1, precision="float32")
    one = prediction.log_prob(labels).reshape(len(data), -1).sum(-1)
    assert one.isfinite().all()
    assert logp.isfinite().all()


def test_thresholds_ranks_and_plots(kind, blora, data):
    if kind == "text":
        return
    prediction, labels = predicted(blora, data)
    names = {"stddev", "adapter_stddev"} if kind == "numbers" else {"entropy", "mutual_information"}
    assert names <= {*doubts(prediction)}
    if kind == "numbers":
        with pytest.raises(ConfigurationError, match="threshold_for must have classes or texts"):
            threshold_for(prediction, labels)
        with pytest.raises(ConfigurationError, match="must be of classes to have probs"):
            rank(prediction)
    else:
        with pytest.warns(UserWarning, match=f"errors in {int((labels >= 0).sum())};"):
            threshold_for(prediction, labels)
        assert sorted(rank(prediction).tolist()) == [*range(len(data))]
    by = min(names)
    if kind in SINGLE | {"numbers"}:
        assert out_of_scope(prediction, prediction, by=by).auroc == 0.5
    else:
        with pytest.raises(ConfigurationError, match="out_of_scope must have one label"):
            out_of_scope(prediction, prediction, by=by)
    if kind in SINGLE:
        assert len(ood_diagram(prediction, prediction, ("a", "b")).axes) == 2


def test_calibrate_and_distill(kind, blora, data):
    if kind == "text":
        with pytest.raises(ConfigurationError, match="calibrate must have a likelihood of labels"):
            blora.calibrate(data)
    else:
        assert 0.01 <= blora.calibrate(data, num_samples=3, precision="float32") <= 100
    if kind == "numbers":
        with pytest.raises(ConfigurationError, match="distill must have a likelihood of classes"):
            blora.distill(data)
    else:
        assert 0.01 <= blora.distill(data, num_samples=3, precision="float32") <= 100


def test_the_trainer_trains_and_evaluates(blora, data, tmp_path):
    options = {"max_steps": 2, "per_device_train_batch_size": 3, "held_out": 0.0}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "data_collator": None}
    trainer = tiny.trainer(tmp_path, blora, data, eval_dataset=data, **options)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
