"""No command loses a file that is not its own, and none that fails leaves a folder."""

from pathlib import Path

import pytest
import tiny
from neighbors import NEIGHBORS, put, tree

QUICK = ["--max-steps", 1, "--rank", 2, "--max-validation", 5, "--top", 1]


@pytest.fixture
def commands(run_words, run, model_dir, data_dir, tmp_path):
    """Each command that writes, by its name, into ``tmp_path / out``; what it may not replace."""
    own = ["--model", model_dir, "--task", "words", "--data-dir", data_dir]
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    run_words("train", adapter, *QUICK)
    asked = ["--adapter", adapter, *own]
    comparing = ["--methods", "lora", "--seeds", "0", "--max-steps", 1, "--max-test", 3]
    return {
        "train": (
            lambda **code: run_words("train", out, *QUICK, **code),
            "bayesian_lora.safetensors",
        ),
        "train --peft": (
            lambda **code: run_words("train", out, *QUICK, "--peft", "--overwrite", **code),
            "peft/adapter_config.json",
        ),
        "train --overwrite": (
            lambda **code: run_words("train", out, *QUICK, "--overwrite", **code),
            "training/training_state.safetensors",
        ),
        "evaluate": (lambda **code: run("evaluate", *asked, "--out", out, **code), "metrics.json"),
        "compare": (
            lambda **code: run_words("compare", out, *comparing, **code),
            "reliability.png",
        ),
        "generate": (
            lambda **code: run("generate", "a", *asked[:4], "--html", out / "a.html", **code),
            "a.html",
        ),
    }


def test_neighbors_are_as_they_were_and_a_file_in_the_way_stops_it(commands, tmp_path):
    out = tmp_path / "out"
    for name, (command, taken) in commands.items():
        put(out, NEIGHBORS)
        before = tree(out)
        command()
        after = tree(out)
        assert {n: after.get(n) for n in before} == before, name
        assert after.keys() - before.keys(), name
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        put(out, [*NEIGHBORS, taken])
        before = tree(out)
        _, told = command(codes=(2,))
        assert Path(taken).name in told or "has an adapter already" in told, name
        assert len(told.strip().splitlines()) == 1, name
        assert tree(out) == before, name
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_overwrite_leaves_no_export_of_the_adapter_before(run_words, tmp_path):
    out = tmp_path / "out"
    run_words("train", out, *QUICK, "--peft")
    put(out, ["peft/notes.txt"])
    run_words("train", out, *QUICK, "--overwrite", "--seed", 1)
    assert tiny.written(out / "peft") == {"notes.txt"}


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./none", "a/b/c"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_command_that_fails_leaves_no_folder(run_words, command, model, tmp_path):
    out = tmp_path / "new/out"
    _, told = run_words(command, out, "--model", model, codes=(2,))
    assert told.startswith(f"pyro-blora: model '{model}' must be a folder with a config.json")
    assert not (tmp_path / "new").exists()
