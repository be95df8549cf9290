"""A save that is cut short leaves the old checkpoint or the new one, with its card."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_blora.checkpoints import write_together, written


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_whatever_moment_a_save_is_killed_at(tmp_path):
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", here / "kills.py", tmp_path / "a"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here.parent}"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_other_files_stay_and_a_failure_leaves_the_old(tmp_path):
    (tmp_path / "mine").write_text("mine")
    write_together(tmp_path, {"a": b"1", "b": b"1"})
    with pytest.raises(TypeError):
        write_together(tmp_path, {"a": b"2", "b": "no bytes"})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "mine": "mine",
        "a": "1",
        "b": "1",
    }


def test_what_waits_to_be_moved_is_read_and_then_moved(tmp_path):
    write_together(tmp_path, {"a": b"old", "b": b"old"})
    (tmp_path / ".saved").mkdir()
    (tmp_path / ".saved" / "a").write_bytes(b"new")
    assert written(tmp_path, "a").read_bytes() == b"new"
    assert written(tmp_path, "b").read_bytes() == b"old"
    write_together(tmp_path, {"b": b"newer"})
    assert (tmp_path / "a").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
