"""Data-parallel training by Accelerate on two CPU processes, by the tutorial's own program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[2]


def launched(folder, processes, *arguments):
    """The adapters that the processes end with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes)]
    command += [str(ROOT / "tutorials" / "distributed.py"), *arguments, "--out", str(folder)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"process-{i}.safetensors") for i in range(processes)]


def test_processes_end_equal_and_as_one_process_with_the_whole_batch(tmp_path):
    """A point guide draws nothing, so that two half batches are one whole batch exactly."""
    first, second = launched(tmp_path / "two", 2, "--guide", "Delta")
    assert all(torch.equal(first[name], second[name]) for name in first)
    (alone,) = launched(tmp_path / "one", 1, "--guide", "Delta")
    assert set(alone) == set(first)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=1e-5)
    (accumulated,) = launched(tmp_path / "half", 1, "--guide", "Delta", "--accumulate", "2")
    for name, value in alone.items():
        torch.testing.assert_close(accumulated[name], value, atol=1e-6, rtol=1e-5)
    assert any(value.abs().max() > 1e-5 for name, value in alone.items() if ".loc" in name)


def test_processes_draw_particles_of_their_own_and_stay_equal(tmp_path):
    first, second = launched(tmp_path / "two", 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # one process with the first one's seed and the whole batch has other draws
    (alone,) = launched(tmp_path / "one", 1)
    assert any(not torch.allclose(first[name], alone[name]) for name in first)
