"""What fit refuses, and how it says what is wrong."""

import pyro
import pytest
import tiny
import torch
from pyro.infer import (
    SVI,
    RenyiELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.optim import ClippedAdam
from torch.utils.data import DataLoader

from pyro_blora.errors import BatchError, ConfigurationError, NonFiniteLossError
from pyro_blora.evaluation.predict_dataset import predict_dataset
from pyro_blora.inference import fit
from pyro_blora.likelihoods import CausalLM, LabelTokens

# Pyro's ELBO also warns of the NaN that the error is about
pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")


def poison(parameter, value):
    with torch.no_grad():
        parameter.view(-1)[0] = value


@pytest.mark.parametrize("name", ["q_proj.Z_r", "v_proj.sigma_"])
def test_a_parameter_of_the_prior_that_is_not_finite(run, name):
    blora = tiny.adapted(num_data=10)
    poison(blora.model.get_parameter(name + "_unconstrained"), float("nan"))
    group = name.split(".")[0]
    with pytest.raises(NonFiniteLossError, match=rf"{group}") as caught:
        run(blora)
    assert name.rsplit(".", 1)[-1].rstrip("_") in str(caught.value)


def test_a_parameter_of_the_guide_that_is_not_finite(run):
    blora = tiny.adapted(num_data=10)
    poison(blora.guide.q_proj_V.loc_unconstrained, float("nan"))
    message = r"step 0: the parameters q_proj_V\.loc are not\. Lower the learning rates"
    with pytest.raises(NonFiniteLossError, match=message):
        run(blora)


def test_a_site_that_is_not_finite(run):
    """Finite parameters whose log-probability overflows."""
    blora = tiny.adapted(num_data=10)
    poison(blora.guide.v_proj_V.loc_unconstrained, 1e30)
    message = r"not finite at step 0; not finite are: .*v_proj\.V in the model \(its log-prob"
    with pytest.raises(NonFiniteLossError, match=message):
        run(blora)
    assert not blora.net.training
    assert blora.model.kl_weight == 1.0


@pytest.mark.parametrize("data", [[], DataLoader([])])
def test_an_empty_data_set(run, data):
    with pytest.raises(BatchError, match="empty"):
        run(tiny.adapted(num_data=10), data)


def test_an_empty_validation_set(run):
    with pytest.raises(BatchError, match="validation set is empty"):
        run(tiny.adapted(num_data=10), validation=[])


def test_an_empty_data_set_to_predict():
    blora = tiny.adapted()
    with pytest.raises(BatchError, match="empty"):
        predict_dataset(blora.predict, [], tiny.collate)


@pytest.mark.parametrize(
    "likelihood", [LabelTokens(token_ids=[5, 6], num_data=4), CausalLM(num_data=4)]
)
def test_a_batch_without_labels(run, likelihood):
    unlabelled = {k: v for k, v in tiny.sequences().items() if k != "labels"}
    with pytest.raises(BatchError, match="no labels to learn from"):
        run(tiny.adapted(likelihood=likelihood), DataLoader([unlabelled], batch_size=None))


def test_fit_needs_num_data(run):
    blora = tiny.adapted(likelihood=LabelTokens(token_ids=tiny.ANSWERS))
    with pytest.raises(ConfigurationError, match=r"LabelTokens.*num_data=len\(train\)"):
        run(blora)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"validate_every": 0}, "validate_every=0"),
        ({"decay": "sudden"}, "decay='sudden'"),
        ({"precision": "float16"}, "precision='float16'"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"warmup": -0.1}, "warmup=-0.1"),
        ({"num_particles": 0}, "num_particles=0"),
        ({"kl_weight": 0.0}, "kl_weight=0.0"),
        ({"kl_weight": float("nan")}, "kl_weight=nan"),
        ({"kl_warmup": 1.5}, "kl_warmup=1.5"),
    ],
)
def test_bad_options(run, options, message):
    blora = tiny.adapted(num_data=10)
    before = tiny.trained(blora)
    with pytest.raises(ConfigurationError, match=message):
        run(blora, **options)
    assert all(torch.equal(value, before[name]) for name, value in tiny.trained(blora).items())


@pytest.mark.parametrize("elbo", [RenyiELBO, TraceTailAdaptive_ELBO, TraceGraph_ELBO])
def test_a_bound_whose_particles_do_not_share_out_the_examples(run, elbo):
    with pytest.raises(ConfigurationError, match=rf"elbo={elbo.__name__} does not average"):
        run(tiny.adapted(num_data=10), elbo=elbo)


def test_a_batch_larger_than_the_data_set(run):
    with pytest.raises(BatchError, match=r"batch of 4 examples.*num_data=3"):
        run(tiny.adapted(num_data=3))


def test_an_unknown_option_is_not_swallowed(run):
    with pytest.raises(TypeError, match="learning_rate"):
        run(tiny.adapted(num_data=10), learning_rate=1e-3)


def test_validation_needs_a_collator():
    blora = tiny.adapted(num_data=10)
    loader = DataLoader(tiny.examples(10), batch_size=5, collate_fn=tiny.collate)
    with pytest.raises(ConfigurationError, match="validation= needs collate="):
        fit(blora, loader, num_steps=1, validation=tiny.examples(2))


def test_nothing_to_train(run):
    blora = tiny.adapted(num_data=10)
    for parameter in blora.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        run(blora)


def test_a_hand_written_loop_without_num_data_warns():
    blora = tiny.adapted(likelihood=LabelTokens(token_ids=tiny.ANSWERS))
    elbo = TraceMeanField_ELBO(max_plate_nesting=1)
    svi = SVI(blora.model, blora.guide, ClippedAdam({"lr": 1e-3}), elbo)
    with pytest.warns(UserWarning, match=r"not told num_data.*batch of 4"):
        svi.step(tiny.sequences())


def test_two_adapters_that_would_share_tensors_warn():
    first = tiny.adapted()
    with pytest.warns(UserWarning, match=r"already holds model\.q_proj.*clear_param_store"):
        tiny.adapted()
    pyro.clear_param_store()
    second = tiny.adapted()
    assert second.model.q_proj.Z_r is not first.model.q_proj.Z_r
