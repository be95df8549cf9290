"""Each likelihood with what users do with an adapter: it works, or is refused in one line."""

from functools import partial

import kinds
import pytest
import tiny

from pyro_blora import compare
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation import comparison
from pyro_blora.evaluation.metrics import doubts, out_of_scope, rank, threshold_for
from pyro_blora.network import probes

SCORES = {"MultiLabel": "nll ece f1 auroc n", "Regression": "nll rmse coverage crps n"}
# of several labels, of a number, or of none
OTHERS = {"MultiLabel", "TokenClassification", "Regression", "CausalLM"}


@pytest.fixture(params=tiny.LIKELIHOODS)
def kind(request):
    return request.param


@pytest.fixture
def data(kind):
    batch = tiny.LIKELIHOODS[kind][2](6)
    return tiny.rows_of(batch)


@pytest.fixture
def blora(kind):
    make, net, _ = tiny.LIKELIHOODS[kind]
    unit = {"loc": 0.0, "scale": 1.0} if kind == "Regression" else {}
    return tiny.adapted(net(), target_modules=None, likelihood=make(num_data=6, **unit))


def predicted(blora, data):
    return blora.predict_dataset(data, num_samples=3, precision="float32")


def test_the_first_example_of_a_batch_shows_that_draws_can_share_a_pass(kind, blora):
    batch = blora.model.prepared(tiny.LIKELIHOODS[kind][2](4))
    run = partial(blora.model._first_row, batch)
    assert probes.keeps_rows(blora.net, blora.model.adapters, run) is True


def test_evaluate(kind, blora, data):
    if kind == "CausalLM":
        with pytest.raises(ConfigurationError, match="must have a likelihood of labels, got"):
            blora.evaluate(data)
        return
    scores = blora.evaluate(data, num_samples=3, precision="float32")
    assert {*scores} <= {*SCORES.get(kind, "acc ece gap nll brier n").split()}
    assert scores.n == len(data) or kind == "TokenClassification"
    prediction, labels = predicted(blora, data)
    logp, _ = blora.log_predictive_dataset(data, num_samples=1, precision="float32")
    one = prediction.log_prob(labels).reshape(len(data), -1).sum(-1)
    assert one.isfinite().all()
    assert logp.isfinite().all()


def test_thresholds_ranks_and_plots(kind, blora, data):
    if kind == "CausalLM":
        return
    prediction, labels = predicted(blora, data)
    numbers = kind == "Regression"
    names = {"stddev", "adapter_stddev"} if numbers else {"entropy", "mutual_information"}
    assert names <= {*doubts(prediction)}
    if kind == "Regression":
        for measure in (lambda p: threshold_for(p, labels), rank):
            with pytest.raises(ConfigurationError, match="by must be one of stddev"):
                measure(prediction)
    else:
        with pytest.warns(UserWarning, match=f"errors in {int((labels >= 0).sum())};"):
            threshold_for(prediction, labels)
        assert sorted(rank(prediction).tolist()) == [*range(len(data))]
    by = min(names)
    if kind not in OTHERS - {"Regression"}:
        assert out_of_scope(prediction, prediction, by=by).auroc == 0.5
    else:
        with pytest.raises(ConfigurationError, match="out_of_scope must have one label"):
            out_of_scope(prediction, prediction, by=by)


def test_calibrate_and_distill(kind, blora, data):
    if kind == "CausalLM":
        with pytest.raises(ConfigurationError, match="calibrate must have a likelihood of labels"):
            blora.calibrate(data)
    else:
        assert 0.01 <= blora.calibrate(data, num_samples=3, precision="float32") <= 100
    if kind == "Regression":
        with pytest.raises(ConfigurationError, match="distill must have a likelihood of classes"):
            blora.distill(data)
    else:
        assert 0.01 <= blora.distill(data, num_samples=3, precision="float32") <= 100


def test_the_trainer_trains_and_evaluates(blora, data, tmp_path):
    options = {"max_steps": 2, "per_device_train_batch_size": 3, "held_out": 0.0}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "data_collator": None, "eval_samples": 0}
    trainer = tiny.trainer(tmp_path, blora, data, eval_dataset=data, **options)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 2
    expected = -blora.log_predictive_dataset(data, None, 0, progress=False)[0].mean()
    assert losses[1] == pytest.approx(float(expected), rel=1e-4)


LINEAR = [
    (k, method, {}) for k in ("numbers", "labels", "tags") for method in ("linearized:", "laplace-")
]
OUTSIDE = [(k, "", {"outside": kinds.ROWS[k][:4]}) for k in ("labels", "tags")]


@pytest.mark.parametrize(
    ("kind", "view", "options"), [*LINEAR, ("numbers", "distilled:", {}), *OUTSIDE]
)
def test_a_comparison_that_it_cannot_do_is_refused_before_training(
    kind, view, options, monkeypatch
):
    monkeypatch.setattr(comparison, "train_and_score", lambda *_, **__: pytest.fail("it trained"))
    pair, likelihood = (kinds.NETS[kind](), kinds.TOKENIZER), kinds.PASSED.get(kind, lambda: None)()
    options = {"likelihood": likelihood, **options, **kinds.FEW}
    with pytest.raises(ConfigurationError, match=r"must have .*class.*, got [A-Z]") as caught:
        compare(pair, kinds.ROWS[kind], [f"{view}lora"], **options)
    assert "\n" not in str(caught.value)
