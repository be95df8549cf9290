"""While a training loop runs, what is freed stays with the process; afterwards it goes back."""

import os

import pytest
import tiny
import torch

from pyro_blora.inference import fit, freed_memory
from pyro_blora.inference.freed_memory import freed_memory_kept

resource = pytest.importorskip("resource", reason="page faults are counted on Unix alone")


@pytest.fixture(autouse=True)
def on_glibc(monkeypatch):
    for name in freed_memory._SET_BY_HAND:
        monkeypatch.delenv(name, raising=False)
    if freed_memory._glibc() is None:
        pytest.skip("the C library is not glibc: nothing is done")


def faults():
    """Pages asked for anew while 160 MB in 40 tensors are taken and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(40)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_freed_is_there_for_the_next_step_and_given_back_at_the_end():
    with freed_memory_kept():
        faults()
        again = faults()
        held = resident()
    assert again < 1_000
    assert resident() < held - 100_000_000
    faults()
    assert faults() > 10_000


def test_one_within_another_ends_with_the_outer_one():
    with freed_memory_kept():
        with freed_memory_kept():
            faults()
        assert faults() < 1_000
    with pytest.raises(RuntimeError), freed_memory_kept():
        raise RuntimeError
    faults()
    assert faults() > 10_000


def test_thresholds_in_the_environment_are_left_alone(monkeypatch):
    with freed_memory_kept():
        pass
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "67108864")
    with freed_memory_kept():
        faults()
        assert faults() > 10_000


def test_fit_keeps_it():
    seen = []

    def collate(rows):
        seen.append(faults())
        return tiny.collate(rows)

    fit(tiny.adapted(), tiny.examples(), collate=collate, num_steps=4, progress=False)
    assert max(seen[2:]) < 1_000
