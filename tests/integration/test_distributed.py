"""Data-parallel training by Accelerate on two CPU processes, by the tutorials' own programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
PROGRAM = Path(__file__).with_name("processes.py")
ROOT = PROGRAM.parents[2]


def run(*command):
    paths = (ROOT, ROOT / "tests", ROOT / "tutorials", os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    environment |= {"CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run(PROGRAM, tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    said = run(*torchrun, PROGRAM, tmp_path / "two")

    def ends(name, processes="two"):
        return [load_file(p) for p in sorted((tmp_path / processes / name).glob("process-*"))]

    for name in ("point", "shared", "trainer", "drawn", "stopped", "resumed", "trainer, drawn"):
        first, second = ends(name)
        assert tiny.equal(first, second), name
    # a whole batch by one process is two halves by two, or one after the other
    (alone,), (accumulated,) = ends("point", "one"), ends("accumulated", "one")
    (trainer,) = ends("trainer", "one")
    for found, expected, near in (
        (ends("point")[0], alone, 1e-6),
        (ends("shared")[0], alone, 1e-6),
        (accumulated, alone, 1e-6),
        (ends("trainer")[0], trainer, 1e-5),
    ):
        torch.testing.assert_close(found, expected, atol=near, rtol=10 * near)
    for end in (alone, trainer):
        assert any(value.abs().max() > 1e-5 for name, value in end.items() if ".loc" in name)
    assert "holds 2208 of the blocks' 4416 weights" in said
    # the optimizer has momentum, the draws of each process go on, and an epoch has eight steps
    assert tiny.equal(ends("resumed")[0], ends("drawn")[0])
    assert not tiny.equal(ends("stopped")[0], ends("drawn")[0])
    # one process with the first one's seed and the whole batch has other draws
    (drawn,) = ends("drawn", "one")
    assert any(not torch.allclose(ends("drawn")[0][name], drawn[name]) for name in drawn)
    states = (tmp_path / "two" / "trainer, drawn" / "checkpoint-2").glob("rng_state_*.pth")
    assert not torch.equal(*(torch.load(path, weights_only=False)["cpu"] for path in states))
    for rank in "01":  # of a network in shares and of a whole one, at every step
        losses = (tmp_path / "two" / f"losses-{rank}").read_text().split()
        assert len(losses) == 6
        assert len(set(losses)) == 1
