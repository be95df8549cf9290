"""Whatever writes leaves the files of others as they were, and no LoRA of theirs is replaced."""

import pytest
import tiny
from matplotlib.figure import Figure
from neighbors import NEIGHBORS, put, tree
from torch.utils.data import DataLoader

from pyro_blora.checkpoints import peft
from pyro_blora.checkpoints.files import write_file
from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.evaluation.plots import save_figure
from pyro_blora.likelihoods import CausalLM

pytest.importorskip("peft")
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


WRITERS = {
    "save_pretrained": lambda b, folder: b.save_pretrained(folder),
    "export_peft": lambda b, folder: b.export_peft(folder),
    "draws": lambda b, folder: b.export_peft(folder, num_samples=2),
    "text": lambda b, folder: text(folder),
    "Trainer": lambda b, folder: with_trainer(folder),
    "figure": lambda b, folder: save_figure(Figure(), folder / "x.png"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_neighbors_are_as_they_were_and_a_second_time_it_is_its_own(name, blora, tmp_path):
    put(tmp_path, NEIGHBORS)
    before = tree(tmp_path)
    for _ in range(2):
        WRITERS[name](blora, tmp_path)
        after = tree(tmp_path)
        assert {n: after.get(n) for n in before} == before
    new = after.keys() - before.keys()
    assert new
    assert all((tmp_path / n).stat().st_mode & 0o044 == 0o044 for n in new)  # read by servers, too


@pytest.mark.parametrize("taken", [*PEFT, f"1/{PEFT[0]}"])
def test_a_lora_of_somebody_else_is_not_replaced(taken, blora, tmp_path):
    put(tmp_path, [*NEIGHBORS, taken])
    before = tree(tmp_path)
    with pytest.raises((ConfigurationError, CheckpointError), match="adapter_"):
        blora.export_peft(tmp_path, num_samples=2 if "/" in taken else 0)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("first", "then"), [(3, 0), (0, 3), (3, 2)])
def test_exports_that_would_be_read_together_do_not_meet(first, then, blora, tmp_path):
    blora.export_peft(tmp_path, num_samples=first)
    before = tree(tmp_path)
    with pytest.raises(ConfigurationError, match="must have no earlier export"):
        blora.export_peft(tmp_path, num_samples=then)
    assert tree(tmp_path) == before
    blora.export_peft(tmp_path, num_samples=first or 0)


def test_draws_that_were_interrupted_are_written_again(blora, tmp_path, monkeypatch):
    own, calls = peft.write_tensors, []

    def stopped(*arguments):
        calls.append(1)
        return 1 / 0 if len(calls) == 2 else own(*arguments)

    monkeypatch.setattr(peft, "write_tensors", stopped)
    with pytest.raises(ZeroDivisionError):
        blora.export_peft(tmp_path, num_samples=3)
    blora.export_peft(tmp_path, num_samples=3)
    assert tiny.written(tmp_path) == set("012")


def test_what_cannot_be_written_leaves_no_folder_and_the_old_file(blora, tmp_path):
    put(tmp_path, ["file"])
    before = tree(tmp_path)
    with pytest.raises(ConfigurationError, match="must be a folder"):
        blora.save_pretrained(tmp_path / "file/below")
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a/b/c", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "file", lambda path: path.write_text("new") / 0)
    assert tree(tmp_path) == before
