"""What fit refuses, and how it says what is wrong."""

import pytest
import tiny
import torch
from pyro.infer import RenyiELBO
from torch.utils.data import DataLoader

from pyro_blora.errors import BatchError, ConfigurationError, NonFiniteLossError
from pyro_blora.likelihoods import LabelTokens

# Pyro's ELBO also warns of the NaN that the error is about
pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")


NAN = float("nan")


@pytest.mark.parametrize(
    ("part", "name", "value", "told"),
    [
        ("model", "v_proj.sigma_", NAN, r"at step 0; .* finite: the parameter v_proj\.sigma_\."),
        ("guide", "q_proj_V.loc", NAN, r"the parameter q_proj_V\.loc\. Lower the learning rates"),
        # finite, but its log-probability overflows
        ("guide", "v_proj_V.loc", 1e30, r"finite: .*log-probability of v_proj\.V in the model"),
    ],
)
def test_what_is_not_finite_is_named(part, name, value, told):
    blora = tiny.adapted(num_data=10)
    with torch.no_grad():
        getattr(blora, part).get_parameter(name + "_unconstrained").view(-1)[0] = value
    with pytest.raises(NonFiniteLossError, match=told):
        tiny.train(blora)
    assert not blora.net.training


ANSWERS, SIZED = (LabelTokens(token_ids=tiny.ANSWERS, num_data=count) for count in (None, 10))
UNLABELED = {key: value for key, value in tiny.sequences().items() if key != "labels"}
UNLABELED = DataLoader([UNLABELED], batch_size=None)
WHOLE_BATCHES = DataLoader([tiny.sequences()], batch_size=None)  # of a number that no one knows
BATCHES = DataLoader([tiny.sequences()], batch_size=1, collate_fn=lambda batches: batches[0])


@pytest.mark.parametrize(
    ("likelihood", "rows", "options", "told"),
    [
        (SIZED, [], {}, "training set is empty"),
        (SIZED, DataLoader([]), {}, "training set is empty"),
        (SIZED, None, {"validation": []}, "validation set is empty"),
        (SIZED, UNLABELED, {"validation": [1], "collate": None}, "pass collate="),
        (SIZED, UNLABELED, {}, "must have labels to learn"),
        (SIZED, BATCHES, {}, "must have examples, .* got 1 batches of 4"),
        (LabelTokens(token_ids=tiny.ANSWERS, num_data=3), None, {}, "batch of 4 ex.*num_data=3"),
        (ANSWERS, WHOLE_BATCHES, {}, r"LabelTokens.*num_data=len\(train\)"),
        (SIZED, None, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
        (SIZED, None, {"precision": "float16"}, "precision must be .* got 'float16'"),
        (SIZED, None, {"num_particles": 0}, "num_particles must be .* got 0"),
        (SIZED, None, {"kl_weight": NAN}, "kl_weight must be .* got nan"),
        # a bound whose particles do not divide the examples
        (SIZED, None, {"elbo": RenyiELBO}, "elbo=RenyiELBO does not average"),
        (SIZED, None, {"learning_rates": {"means": 2}}, r"roles among \['mean', .* \['means'\]"),
        (SIZED, None, {"keep_best": True}, "keep_best=True needs validation="),
        (SIZED, None, {"patience": 3}, "patience=3 needs validation="),
        (SIZED, None, {"patience": 0, "validation": [1]}, "patience must be at least 1, got 0"),
        (SIZED, None, {"num_epochs": 1}, "one of num_steps= and num_epochs= must be given"),
        (SIZED, [(1, 2)], {"collate": None}, "An example is a tuple: pass collate="),
        (SIZED, None, {"collate": tuple}, "mapping of tensors.* a tuple; make"),
    ],
)
def test_what_fit_refuses(likelihood, rows, options, told):
    blora = tiny.adapted(likelihood=likelihood)
    before = tiny.trained(blora)
    with pytest.raises((BatchError, ConfigurationError), match=told):
        tiny.train(blora, rows, **options)
    assert tiny.equal(tiny.trained(blora), before)


def test_nothing_to_train():
    blora = tiny.adapted(num_data=10).requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        tiny.train(blora)


def test_the_best_of_one_validation_is_hardly_meant():
    with pytest.warns(UserWarning, match="has only one, after the last of 6"):
        tiny.train(tiny.adapted(num_data=10), keep_best=True, validation=tiny.examples(4))
