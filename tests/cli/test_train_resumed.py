"""``pyro-blora train`` goes on after Ctrl-C."""

import os
import signal

import pytest
from safetensors.torch import load_file

from pyro_blora.inference.objective import Objective

ADAPTER = "bayesian_lora.safetensors"


@pytest.fixture
def train(run, model_dir, data_dir):
    """Trains six steps on the task ``words``, in a process with other random numbers each time."""

    def train(out, *flags):
        options = ["--model", model_dir, "--task", "words", "--data-dir", data_dir, "--rank", 2]
        return run("train", *options, "--max-steps", 6, "--batch-size", 4, "--out", out, *flags)

    return train


@pytest.mark.usefixtures("interruptible")
def test_train_stops_and_goes_on(train, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    code, text, err = train(whole, "--resume")
    assert code == 0, err
    assert f"{whole / 'training'} has no run to go on with: this one begins" in text

    loss, steps = Objective.__call__, []

    def interrupted(self, batch):
        steps.append(batch)
        if len(steps) in (4, 10):
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    code, text, _ = train(out)
    assert code not in (0, 2)
    assert f"Kept in {out / 'training'}: with --resume the same command goes on" in text
    assert not (out / ADAPTER).exists()
    for flags, told in (
        ((), "has a run that was stopped; add --resume to go on, or --overwrite"),
        (("--resume", "--overwrite"), "leave one of them out"),
        (("--resume", "--rank", 3), "prior.rank was 2, is 3"),
    ):
        code, _, err = train(out, *flags)
        assert code == 2
        assert told in err
        assert len(err.strip().splitlines()) == 1
    assert len(steps) == 4  # and it is what is done

    code, _, err = train(out, "--resume")
    assert code == 0, err
    assert len(steps) == 6
    expected = load_file(whole / ADAPTER)
    for name, value in load_file(out / ADAPTER).items():
        assert value.equal(expected[name]), name

    assert train(out, "--resume")[0] == 0  # finished: nothing is trained
    assert len(steps) == 6
    assert train(out, "--overwrite")[0] not in (0, 2)
    assert len(steps) == 10
