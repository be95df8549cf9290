"""Whatever writes leaves the files of others as they were, and stops where one is in its way."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny
from matplotlib.figure import Figure
from neighbors import NEIGHBORS, put, tree
from torch.utils.data import DataLoader

from pyro_blora.checkpoints import peft
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.evaluation.plots import save_figure
from pyro_blora.files import MANIFEST, check_free, own_files, remove_own, write_file
from pyro_blora.likelihoods import CausalLM

pytest.importorskip("peft")
ADAPTER = ("bayesian_lora.safetensors", "bayesian_lora_config.json")
PEFT = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def blora():
    return tiny.adapted(num_data=10)


def text(folder):
    """An adapter of text whose export has a temperature, in the file of a network's own."""
    made = tiny.adapted(likelihood=CausalLM(num_data=10))
    made.distill(DataLoader([tiny.texts()], batch_size=None), num_samples=4)
    made.export_peft(folder)


def with_trainer(folder):
    options = {"max_steps": 1, "save_steps": 1, "save_strategy": "steps"}
    tiny.trainer(folder / "t", tiny.adapted(), tiny.examples(), **options).train()


# What writes, and a file in whose place it may not write
WRITERS = {
    "save_pretrained": (lambda b, folder: b.save_pretrained(folder), ADAPTER),
    "export_peft": (lambda b, folder: b.export_peft(folder), (*PEFT, "one_pass.json")),
    "draws": (lambda b, folder: b.export_peft(folder, num_samples=2), ("1/one_pass.json",)),
    "text": (lambda b, folder: text(folder), ("generation_config.json", "one_pass.json")),
    "Trainer": (lambda b, folder: with_trainer(folder), ("t/checkpoint-1/" + ADAPTER[0],)),
    "figure": (lambda b, folder: save_figure(Figure(), folder / "x.png"), ("x.png",)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_neighbors_are_as_they_were_and_a_second_time_it_is_its_own(name, blora, tmp_path):
    put(tmp_path, NEIGHBORS)
    before = tree(tmp_path)
    write, _ = WRITERS[name]
    for _ in range(1 if name == "fit" else 2):  # which refuses a state that is there
        write(blora, tmp_path)
        after = tree(tmp_path)
        assert {n: after.get(n) for n in before} == before
    new = after.keys() - before.keys()
    assert new
    assert all((tmp_path / n).stat().st_mode & 0o044 == 0o044 for n in new)  # read by servers, too


@pytest.mark.parametrize(
    ("name", "taken"), [(name, taken) for name, (_, places) in WRITERS.items() for taken in places]
)
def test_a_file_in_the_way_stops_it_before_anything_is_written(name, taken, blora, tmp_path):
    put(tmp_path, [*NEIGHBORS, taken])
    before = tree(tmp_path)
    with pytest.raises((ConfigurationError, CheckpointError)) as error:
        WRITERS[name][0](blora, tmp_path)
    assert Path(taken).parts[-1 if name != "draws" else 0] in str(error.value)
    assert "\n" not in str(error.value)
    after = tree(tmp_path)
    if name == "Trainer":  # which writes a state of its own
        after = {path: data for path, data in after.items() if path in before}
    assert after == before


def test_an_export_removes_what_an_export_left_and_its_manifest_names(blora, tmp_path):
    blora.export_peft(tmp_path / "loras", num_samples=9)
    blora.export_peft(tmp_path / "loras/20")  # one that is no draw
    put(tmp_path / "loras/3", ["notes.txt"])
    blora.export_peft(tmp_path / "loras", num_samples=2)
    assert tiny.written(tmp_path / "loras") == {"0", "1", "3", "20"}
    assert tiny.written(tmp_path / "loras/3") == {"notes.txt"}
    assert set(PEFT) < tiny.written(tmp_path / "loras/20")


def test_draws_and_a_mean_do_not_stay_beside_each_other(blora, tmp_path):
    for first, then, left in ((3, 0, {*PEFT, "one_pass.json", "README.md"}), (0, 3, set("012"))):
        blora.export_peft(tmp_path / str(first), num_samples=first)
        blora.export_peft(tmp_path / str(first), num_samples=then)
        assert tiny.written(tmp_path / str(first)) == left


def test_draws_that_were_interrupted_are_written_again(blora, tmp_path, monkeypatch):
    own, calls = peft.write_tensors, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(peft, "write_tensors", stopped)
    with pytest.raises(KeyboardInterrupt):
        blora.export_peft(tmp_path, num_samples=3)
    blora.export_peft(tmp_path, num_samples=3)
    assert tiny.written(tmp_path) == set("012")


@pytest.mark.parametrize(
    "wrong", ['["../precious.txt"]', '[".."]', "{}", '"notes.txt"', "[1]", "["]
)
def test_no_path_is_taken_from_a_file(wrong, blora, tmp_path):
    put(tmp_path, ["precious.txt", "out/notes.txt"])
    (tmp_path / "out" / MANIFEST).write_text(wrong)
    (tmp_path / "out/one_pass.json").write_text(json.dumps({"in": "../precious.txt"}))
    before = tree(tmp_path)
    for call in (
        partial(blora.export_peft, tmp_path / "out"),
        partial(remove_own, tmp_path / "out", []),
    ):
        with pytest.raises(ConfigurationError, match="must be a list of plain file names"):
            call()
    assert tree(tmp_path) == before
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(ConfigurationError, match=r"one_pass\.json must be absent"):
        blora.export_peft(tmp_path / "out")


def test_a_folder_that_cannot_be_is_told_before_and_none_is_left(blora, tmp_path):
    put(tmp_path, ["file"])
    before = tree(tmp_path)
    with pytest.raises(ConfigurationError, match="file/below must be a folder that can"):
        blora.save_pretrained(tmp_path / "file/below")
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a/b/c", lambda path: 1 / 0)
    assert tree(tmp_path) == before
    write_file(tmp_path / "a/b/c", "text")
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):  # and an old file stays whole
        write_file(tmp_path / "a/b/c", lambda path: path.write_text("new") / 0)
    assert tree(tmp_path) == before
    remove_own(tmp_path / "a/b", own_files(tmp_path / "a/b"))
    assert not (tmp_path / "a/b").exists()


def test_a_check_makes_no_folder_that_another_process_may_be_in(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("a folder is made"))
    check_free(tmp_path / "a/b", "c")
