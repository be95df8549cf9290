"""Data-parallel training by Accelerate on two CPU processes, by the tutorial's own program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ["distributed.py", "trainer.py"]


def torchrun(processes, *command_line):
    """What the processes of a program say; none of them may fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *map(str, command_line)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launched(folder, processes, *arguments, program="distributed.py", says=""):
    """The adapters that the processes end with; what they say has ``says`` in it."""
    said = torchrun(processes, ROOT / "tutorials" / program, *arguments, "--out", folder)
    assert says in said
    return [load_file(folder / f"process-{i}.safetensors") for i in range(processes)]


POINT = ("--guide", "Delta")  # draws nothing, so that two half batches are one whole batch exactly
HALF = "holds 2208 of the blocks' 4416 weights"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with the whole batch ends with, by each program."""
    folder = tmp_path_factory.mktemp("alone")
    return {p: launched(folder / p, 1, *POINT, program=p)[0] for p in PROGRAMS}


@pytest.mark.parametrize(
    ("processes", "arguments", "program", "says"),
    [
        (2, (), "distributed.py", ""),
        (1, ("--accumulate", "2"), "distributed.py", ""),
        (2, ("--shard",), "distributed.py", HALF),
        (2, (), "trainer.py", ""),
    ],
)
def test_they_end_as_one_with_the_whole_batch(tmp_path, alone, processes, arguments, program, says):
    ends = launched(tmp_path, processes, *POINT, *arguments, program=program, says=says)
    assert all(tiny.equal(end, ends[0]) for end in ends)
    expected, near = alone[program], {"distributed.py": 1e-6, "trainer.py": 1e-5}[program]
    assert set(ends[0]) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ends[0][name], value, atol=near, rtol=10 * near)
    assert any(value.abs().max() > 1e-5 for name, value in expected.items() if ".loc" in name)


def test_two_processes_resume_in_new_ones_where_they_stopped(tmp_path):
    """The optimizer has momentum, the draws of each process go on, and an epoch has eight steps."""
    whole = launched(tmp_path / "whole", 2, "--steps", "10")
    half = ["--steps", "5", "--state", str(tmp_path / "state")]
    stopped = launched(tmp_path / "stopped", 2, *half)
    resumed = launched(tmp_path / "resumed", 2, *half)
    assert all(map(tiny.equal, resumed, whole))
    assert not tiny.equal(stopped[0], whole[0])


def test_processes_draw_particles_of_their_own_and_stay_equal(tmp_path):
    first, second = launched(tmp_path / "two", 2)
    assert tiny.equal(first, second)
    # one process with the first one's seed and the whole batch has other draws
    (alone,) = launched(tmp_path / "one", 1)
    assert any(not torch.allclose(first[name], alone[name]) for name in first)
    assert tiny.equal(*launched(tmp_path, 2, program="trainer.py"))
    states = sorted((tmp_path / "checkpoint-2").glob("rng_state_*.pth"))
    seeds = [torch.load(path, weights_only=False)["cpu"] for path in states]
    assert len(seeds) == 2
    assert not torch.equal(*seeds)


def test_processes_that_read_unequal_parts_run_a_sharded_network_alike(tmp_path):
    torchrun(2, Path(__file__).with_name("uneven_shards.py"), tmp_path)
    for rank in "01":
        losses = (tmp_path / rank).read_text().split()
        assert len(losses) == 6
        assert len(set(losses)) == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_tutorial_trains_no_two_processes_as_one(program, tmp_path):
    command = [sys.executable, ROOT / "tutorials" / program, "--out", tmp_path / "out"]
    environment = {**os.environ, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("RANK", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 1
    assert "ACCELERATE_USE_CPU" in done.stderr
    assert not (tmp_path / "out").exists()
