"""Checkpoints of 0.1.0, when q and v of one shape were one group, ``q_proj_v_proj``."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from pyro_blora import BayesianLoRA, checkpoints
from pyro_blora.errors import CheckpointError

FOLDER = Path(__file__).parent / "merged_groups"
ROWS = {"q_proj": [0, 2], "v_proj": [1, 3]}  # block by block, q before v


def read(name):
    """The adapter, and the tensors of the file without their common names."""
    tensors = load_file(FOLDER / name / checkpoints.WEIGHTS)
    assert all(".q_proj_v_proj" in key for key in tensors)
    blora = BayesianLoRA.from_pretrained(tiny.llama(num_key_value_heads=4), FOLDER / name)
    assert [group.name for group in blora.model.groups] == list(ROWS)
    return blora, {
        key.rsplit(".", 1)[-1].removesuffix("_unconstrained"): t for key, t in tensors.items()
    }


def law(blora, site):
    return blora.guide.families()[site].distribution()


def covariance(factor):
    L = factor.tril(-1) + factor.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
    return L @ L.mT


def test_updates_and_moments_are_those_of_the_file(tmp_path):
    blora, old = read("matrix_normal")

    def whitened(side):
        Z, D = old[f"Z_{side}"], old[f"D_{side}"].exp()
        return torch.linalg.solve(torch.linalg.cholesky(Z @ Z.mT + D.square().diag_embed()), Z)

    sigma = old["sigma_"].exp()[:, None, None]
    expected = sigma * whitened("r").mT @ old["loc"] @ whitened("c")
    rows, columns = (covariance(old[f"{side}_scale_tril"]) for side in ("row", "col"))
    variance = (
        rows.diagonal(dim1=-2, dim2=-1)[:, :, None] * columns.diagonal(dim1=-2, dim2=-1)[:, None]
    )
    updates = blora.sample_updates(0)
    for name, places in ROWS.items():
        found = torch.stack([layer.weight() for layer in updates[name].layers()])
        torch.testing.assert_close(found, expected[places])
        torch.testing.assert_close(law(blora, f"{name}.V").variance, variance[places])
    blora.save_pretrained(tmp_path)  # by the new names
    saved = load_file(tmp_path / checkpoints.WEIGHTS)
    saved = {name: t for name, t in saved.items() if not name.startswith("base.")}
    assert saved.keys() == blora.state_dict().keys()
    blora.unwrap()
    again = BayesianLoRA.from_pretrained(blora.net, tmp_path)
    assert tiny.equal(again.state_dict(), saved)


def test_a_covariance_between_layers_is_cut_to_that_of_each_group():
    blora, old = read("layer_coupled")
    scale, between = old["scale"].exp(), covariance(old["layer_scale_tril"])
    for name, places in ROWS.items():
        draws = law(blora, f"{name}.s")
        variance = between.diagonal()[places, None] * scale.square()
        torch.testing.assert_close(draws.variance, variance)
        L = draws.layer_scale_tril
        torch.testing.assert_close(L @ L.mT, between[places][:, places])
        torch.testing.assert_close(draws.mean, old["loc"][places])


def test_members_of_an_ensemble_stay_together():
    blora, old = read("ensemble")
    for name, places in ROWS.items():
        family = blora.guide.families()[f"{name}.s"]
        assert torch.equal(family.points, old["points"][:, places])
        assert family.turn == old["turn"]


def test_what_does_not_fit_is_refused_still(tmp_path):
    for path in (FOLDER / "matrix_normal").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / checkpoints.CONFIG
    config.write_text(config.read_text().replace('"rank": 2', '"rank": 3'))
    net = tiny.llama(num_key_value_heads=4)
    with pytest.raises(CheckpointError, match="do not fit"):
        BayesianLoRA.from_pretrained(net, tmp_path)
    assert not any(module._forward_hooks for module in net.modules())
