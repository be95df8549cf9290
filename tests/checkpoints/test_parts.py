"""Guides of Pyro and classes of the user's own in a folder."""

import functools
import json
import sys

import own_classes
import pyro
import pytest
import tiny
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_mean,
)

from pyro_blora import BayesianLoRA, checkpoints, guides
from pyro_blora.errors import CheckpointError
from pyro_blora.models import KroneckerInducing

AUTOGUIDES = {
    "normal": AutoNormal,
    "low rank": functools.partial(AutoLowRankMultivariateNormal, rank=3),
    "full": AutoMultivariateNormal,
    "delta": AutoDelta,
}


def net():
    torch.manual_seed(0)
    return tiny.llama(1)


def saved(folder, **parts):
    """The mean's and the draws' probabilities of an adapter that is saved."""
    blora = tiny.adapted(net(), **parts)
    blora.guide(tiny.sequences())
    tiny.shaken(blora, 0.1)
    blora.save_pretrained(folder)
    expected = predicted(blora)
    blora.unwrap()
    return expected


def predicted(blora):
    pyro.set_rng_seed(0)
    return [blora.predict(tiny.sequences(), n).samples for n in (0, 3)]


def read(folder, **options):
    blora = BayesianLoRA.from_pretrained(net(), folder, **options)
    found = predicted(blora)
    blora.unwrap()
    return found


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", AUTOGUIDES)
def test_an_autoguide_is_read_as_it_was_saved(name, local, tmp_path):
    with pyro.settings.context(module_local_params=local):
        expected = saved(tmp_path, guide=AUTOGUIDES[name])
        assert_equal(read(tmp_path), expected)
        assert_equal(read(tmp_path, guide=AUTOGUIDES[name]), expected)


def test_an_autoguide_goes_on_training_after_it_is_read(tmp_path):
    saved(tmp_path, guide=AutoNormal)
    blora = BayesianLoRA.from_pretrained(net(), tmp_path)
    before = tiny.trained(blora)
    svi = pyro.infer.SVI(
        blora.model, blora.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
    )
    svi.step(tiny.sequences(12))
    moves = [float((value - before[n]).abs().max()) for n, value in tiny.trained(blora).items()]
    assert all(0 < move < 2e-3 for move in moves)


def test_a_guide_in_place_of_the_first_is_the_one_that_is_saved(tmp_path):
    blora = tiny.adapted(net())
    blora.guide = AutoDelta(blora.model)
    blora.guide(tiny.sequences())
    blora.save_pretrained(tmp_path)
    expected = predicted(blora)
    assert_equal(read(tmp_path), expected)


OWN = {
    "prior": (own_classes.Scaled(rank=3), "own_classes"),
    "guide": (own_classes.Spread(init_scale=0.2), "own_classes"),
    "likelihood": (None, __name__),
}


class Labels(tiny.LabelTokens):
    """A likelihood of the user's own."""


@pytest.mark.parametrize("part", OWN)
def test_a_class_of_ones_own_is_imported_if_trusted(part, tmp_path):
    made, module = OWN[part]
    made = made or Labels(token_ids=tiny.ANSWERS, num_data=12)
    expected = saved(tmp_path, **{part: made})
    told = json.loads((tmp_path / checkpoints.CONFIG).read_text())[part]
    assert (told["module"], told["name"]) == (module, type(made).__name__)
    with pytest.raises(CheckpointError, match=rf"{part}=.*or trust_remote_code=True to import"):
        read(tmp_path)
    assert_equal(read(tmp_path, trust_remote_code=True), expected)
    for given in (made, type(made)):
        assert_equal(read(tmp_path, **{part: given}), expected)


def test_nothing_is_imported_that_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "untrusted.py").write_text("from own_classes import Plain as Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    saved(tmp_path / "a", prior=own_classes.Plain())
    path = tmp_path / "a" / checkpoints.CONFIG
    config = json.loads(path.read_text())
    config["prior"] |= {"module": "untrusted", "name": "Mine"}
    path.write_text(json.dumps({**config, "sha256": ""}))
    with pytest.raises(CheckpointError, match="untrusted"):
        read(tmp_path / "a")
    assert "untrusted" not in sys.modules
    read(tmp_path / "a", trust_remote_code=True)
    assert "untrusted" in sys.modules
    for name, told in {"Nothing": "cannot be imported", "torch.nn.Linear": "cannot be imp"}.items():
        config["prior"]["name"] = name
        path.write_text(json.dumps({**config, "sha256": ""}))
        with pytest.raises(CheckpointError, match=told):
            read(tmp_path / "a", trust_remote_code=True)
    config["prior"] |= {"module": "pathlib", "name": "Path"}
    path.write_text(json.dumps({**config, "sha256": ""}))
    with pytest.raises(CheckpointError, match="'Path', is no UpdateModel"):
        read(tmp_path / "a", trust_remote_code=True)


@pytest.mark.parametrize(
    "guide",
    [lambda model: AutoNormal(model), functools.partial(AutoNormal, init_loc_fn=init_to_mean)],
)
def test_what_no_file_can_hold_is_asked_for(guide, tmp_path):
    """A lambda has no import path, and a function among the options is no JSON."""
    expected = saved(tmp_path, guide=guide)
    with pytest.raises(CheckpointError, match="pass guide= with"):
        read(tmp_path, trust_remote_code=True)
    assert_equal(read(tmp_path, guide=guide), expected)


def test_a_laplace_approximation_of_pyro(tmp_path):
    torch.manual_seed(0)
    blora = tiny.adapted(
        tiny.llama(1, attn_implementation="eager"),
        guide=AutoLaplaceApproximation,
        target_modules=["v_proj"],
        prior=KroneckerInducing(rank=1, sigma=0.3),
    )
    batch = tiny.sequences(12)
    blora.guide(batch)
    blora.guide = blora.guide.laplace_approximation(batch)
    blora.save_pretrained(tmp_path)
    expected = blora.guide.get_posterior()
    blora.unwrap()
    read = BayesianLoRA.from_pretrained(blora.net, tmp_path)
    found = read.guide.get_posterior()
    torch.testing.assert_close(found.loc, expected.loc)
    torch.testing.assert_close(found.covariance_matrix, expected.covariance_matrix)
    assert read.predict(batch, 3).samples.isfinite().all()


def test_another_family_of_the_same_tensors_is_the_users_choice(tmp_path):
    """As where a class was renamed."""

    class Renamed(guides.MatrixNormal):
        pass

    expected = saved(tmp_path)
    assert_equal(read(tmp_path, guide=Renamed()), expected)
    with pytest.raises(CheckpointError, match="do not fit"):
        read(tmp_path, guide=guides.MeanField())
