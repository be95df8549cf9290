"""Importing the library changes nothing outside of it, says nothing, and finds every name."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import logging, os, sys, warnings
import gpytorch, linear_operator, pyro, sklearn.metrics, torch, transformers
import pyro.infer.autoguide, pyro.nn, pyro.optim
import linear_operator.operators, linear_operator.utils.cholesky

def state():
    return {
        "settings": repr(sorted(pyro.settings.get().items())),
        "store": list(pyro.get_param_store().keys()),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "torch rng": torch.get_rng_state().tolist(),
        "warnings": repr(warnings.filters),
        "environment": dict(os.environ),
        "logging": (logging.root.level, list(map(repr, logging.root.handlers))),
        "verbosity": transformers.logging.get_verbosity(),
    }

before = state()
from pyro_blora import *  # all of it: names are imported on first use
after = state()
assert before == after, [name for name in before if before[name] != after[name]]
assert not {"models", "guides"} & set(sys.modules)

import pyro_blora
assert set(pyro_blora.__all__) <= set(dir(pyro_blora)) & {*globals(), "__version__"}
assert not hasattr(pyro_blora, "nothing")
from pyro_blora.data import *
"""


@pytest.mark.slow
def test_importing_changes_no_global_state_and_makes_no_second_copy():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    # A warning at import would be one that every user sees; torch's own of its script is not ours
    lines = [line for line in done.stderr.splitlines() if "torch.jit.script" not in line]
    assert (done.returncode, lines) == (0, [])
