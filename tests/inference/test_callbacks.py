"""Figures of a training in the logs of others."""

import sys
from types import SimpleNamespace

import pytest
import tiny

from pyro_blora.errors import ConfigurationError
from pyro_blora.inference import logs_to, tensorboard

VALIDATED = {"validation": tiny.examples(4), "validate_every": 2, "num_steps": 3}
WRITER = "torch.utils.tensorboard"


def expected(result):
    """The figures of each step by name, and the validations' losses."""
    found = {n: [(i, f[n]) for i, f in enumerate(result.history, 1)] for n in ("loss", "nll", "kl")}
    return found | {"validation": result.validation}


def test_a_logger_gets_each_step():
    found = {}

    def log(figures, step):
        for name, value in figures.items():
            found.setdefault(name, []).append((step, value))

    result = tiny.train(tiny.adapted(num_data=10), callback=logs_to(log), **VALIDATED)
    assert [step for step, _ in result.validation] == [2, 3]
    assert found == expected(result)


def test_tensorboard_has_each_step_on_disk(monkeypatch, tmp_path):
    """By a writer in the place of torch's, which loses what was not flushed."""
    waiting, found = [], {}

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == tmp_path

        def add_scalar(self, name, value, step):
            waiting.append((name, step, value))

        def flush(self):
            for name, step, value in waiting:
                found.setdefault(name, []).append((step, value))
            waiting.clear()

    monkeypatch.setitem(sys.modules, WRITER, SimpleNamespace(SummaryWriter=SummaryWriter))
    result = tiny.train(tiny.adapted(num_data=10), callback=tensorboard(tmp_path), **VALIDATED)
    assert found == expected(result)


def test_without_tensorboard_the_remedy_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, WRITER, None)
    with pytest.raises(ConfigurationError, match=r"^tensorboard\(\) needs .*pip install"):
        tensorboard(tmp_path)
