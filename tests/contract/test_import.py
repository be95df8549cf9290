"""Importing the library changes nothing outside of it, and its tree keeps to the house rules."""

import configparser
import json
import subprocess
import sys
from pathlib import Path

import pyro_blora

ROOT = Path(pyro_blora.__file__).resolve().parent.parent
PACKAGES = [ROOT / name for name in ("pyro_blora", "models", "guides")]
SOURCES = sorted(
    # the links pyro_blora/models and pyro_blora/guides lead to what is listed here anyhow
    {path.resolve() for package in PACKAGES for path in package.rglob("*.py")}
)

PROBE = """
import importlib, json, logging, os, pkgutil, random, sys, warnings
import gpytorch, linear_operator, numpy, pyro, torch, torchmetrics, transformers
import pyro.infer.autoguide, pyro.nn, pyro.optim
import linear_operator.operators, linear_operator.utils.cholesky

def state():
    loggers = {
        name: (logger.level, logger.propagate, logger.disabled, list(map(repr, logger.handlers)))
        for name, logger in [("", logging.root), *logging.root.manager.loggerDict.items()]
        if isinstance(logger, logging.Logger)
    }
    return {
        "settings": repr(sorted(pyro.settings.get().items())),
        "store": repr(list(pyro.get_param_store().keys())),
        "dtype": str(torch.get_default_dtype()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": repr(random.getstate()),
        "numpy rng": repr(numpy.random.get_state()),
        "warnings": repr(warnings.filters),
        "environment": dict(os.environ),
        "path": sys.path,
        "verbosity": transformers.logging.get_verbosity(),
        "loggers": loggers,
    }

def changes(before, after):
    found = [key for key in before if key != "loggers" and before[key] != after[key]]
    for name, handlers in after["loggers"].items():
        known = before["loggers"].get(name)
        ours = name.startswith("pyro_blora") and handlers[3]
        if ours or (known is not None and known != handlers):
            found.append(f"logger {name}")
    return found

before = json.loads(json.dumps(state()))
from pyro_blora import *  # all of it: names are imported on first use
top = changes(before, json.loads(json.dumps(state())))
print(json.dumps({"top": top, "bare": [m for m in ("models", "guides") if m in sys.modules]}))
"""


def test_importing_changes_no_global_state_and_makes_no_second_copy():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    # A warning at import would be one that every user sees; torch's own of its script is not ours
    told = [line for line in done.stderr.splitlines() if "torch.jit.script" not in line]
    assert "Warning" not in "".join(told), done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"top": [], "bare": []}


def test_no_file_is_longer_than_600_lines():
    """That none imports bare models or guides, and that each has a docstring, ruff sees."""
    assert len(SOURCES) > 30
    assert [path for path in SOURCES if len(path.read_text().splitlines()) > 600] == []


def test_every_package_is_installed():
    """An editable install, and the tests, would not miss one."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in {path.parent for path in SOURCES if path.name == "__init__.py"}
    }
    found = {f"pyro_blora.{name}" if name in ("models", "guides") else name for name in found}
    assert set(setup["options"]["packages"].split()) == found
