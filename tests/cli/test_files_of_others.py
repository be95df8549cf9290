"""No command loses a file that is not its own, and none that fails leaves a folder."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from neighbors import NEIGHBORS, put, tree

QUICK = ["--max-steps", 1, "--rank", 2, "--max-validation", 5, "--top", 1]


@pytest.fixture
def commands(run_words, run, model_dir, data_dir, tmp_path):
    """Commands that write into ``tmp_path / out``, each by a file that it may not replace."""
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    run_words("train", adapter, *QUICK)
    asked = ["--adapter", adapter, "--model", model_dir]
    items = ["--task", "words", "--data-dir", data_dir]
    train = partial(run_words, "train", out, *QUICK)
    comparing = ["--methods", "lora", "--seeds", "0", "--max-steps", 1, "--max-test", 3]
    return {
        "bayesian_lora.safetensors": train,
        "peft/adapter_config.json": partial(train, "--peft", "--overwrite"),
        "metrics.json": partial(run, "evaluate", *asked, *items, "--out", out),
        "reliability.png": partial(run_words, "compare", out, *comparing),
        "a.html": partial(run, "generate", "a", *asked, "--html", out / "a.html"),
    }


def test_neighbors_are_as_they_were_and_a_file_in_the_way_stops_it(commands, tmp_path):
    out = tmp_path / "out"
    for taken, command in commands.items():
        put(out, NEIGHBORS)
        before = tree(out)
        command()
        after = tree(out)
        assert {n: after.get(n) for n in before} == before, taken
        assert after.keys() - before.keys(), taken
        shutil.rmtree(out)
        put(out, [*NEIGHBORS, taken])
        before = tree(out)
        _, told = command(codes=(2,))
        assert Path(taken).name in told or "has an adapter already" in told, taken
        assert len(told.strip().splitlines()) == 1, taken
        assert tree(out) == before, taken
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("command", "model"), [("train", "/nowhere/at/all"), ("compare", "./none"), ("train", "a/b/c")]
)
def test_a_command_that_fails_leaves_no_folder(run_words, command, model, tmp_path):
    out = tmp_path / "new/out"
    _, told = run_words(command, out, "--model", model, codes=(2,))
    assert told.startswith("pyro-blora: ")
    assert model in told
    assert not (tmp_path / "new").exists()
