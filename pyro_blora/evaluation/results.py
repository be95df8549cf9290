"""Rows of a comparison, their table and their files."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pyro_blora.checkpoints import write_atomically
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.plots import reliability_diagram, save_figure
from pyro_blora.network.precision import check_precision

__all__ = [
    "PREDICTIONS",
    "RESULTS",
    "Row",
    "draw",
    "read",
    "recorded_precision",
    "table",
    "versions",
    "write",
]

RESULTS = "results.json"
PREDICTIONS = "predictions.safetensors"
_PREDICTED = ("probs", "labels")  # the columns of this file


@dataclass
class Row:
    """One method under one seed: the columns of ``results.json``, and the predictions."""

    method: str
    seed: int
    acc: float
    ece: float
    nll: float
    brier: float
    n_test: int
    train_seconds: float
    trainable_parameters: int
    probs: Tensor
    labels: Tensor


def table(rows: Sequence[Row], title: str) -> Table:
    """Mean and standard deviation over seeds, a line for each method."""
    columns = {
        "ACC %": ("acc", 100, 1),
        "ECE %": ("ece", 100, 1),
        "NLL": ("nll", 1, 3),
        "Brier": ("brier", 1, 3),
        "train s": ("train_seconds", 1, 0),
    }
    view = Table(title=title)
    view.add_column("method", overflow="fold")
    for name in (*columns, "parameters"):
        view.add_column(name, justify="right")
    for method, own in _by_method(rows).items():
        cells = []
        for key, factor, digits in columns.values():
            values = [factor * getattr(row, key) for row in own]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        view.add_row(method, *cells, f"{own[0].trainable_parameters:,}")
    return view


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return found


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("pyro-blora", "torch", "pyro-ppl", "gpytorch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(rows: Sequence[Row], settings: dict[str, Any], folder: str | Path) -> None:
    """Writes ``results.json`` and the rows' predictions, each file whole or not at all.

    The methods and seeds of ``settings`` are written as those that have rows.
    """
    folder = Path(folder)
    there = {
        "methods": list(_by_method(rows)),
        "seeds": list(dict.fromkeys(row.seed for row in rows)),
    }
    written: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for row in rows:
        columns = dict(vars(row))
        tensors |= {_entry(columns, key): columns.pop(key).clone() for key in _PREDICTED}
        written.append(columns)
    document = {"rows": written, "versions": versions(), "settings": settings | there}
    text, data = json.dumps(document, indent=2) + "\n", save(tensors)
    # The predictions first, so that no row in results.json is without
    write_atomically(folder / PREDICTIONS, lambda path: path.write_bytes(data))
    write_atomically(folder / RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def recorded_precision(folder: str | Path) -> str:
    """The precision of the rows in ``folder``, or ``"auto"``.

    Asked again, ``"auto"`` may find the other one faster, and the rows be another run's.
    """
    try:
        text = (Path(folder) / RESULTS).read_text(encoding="utf-8")
        return check_precision(json.loads(text)["settings"]["precision"])
    except (OSError, ValueError, LookupError, TypeError):
        return "auto"


def read(settings: dict[str, Any], folder: str | Path) -> list[Row]:
    """The rows that runs with the same settings and versions left in ``folder``, or none.

    Methods and seeds may be others: a row depends on its own alone.

    Raises:
        ConfigurationError: there is a ``results.json`` that was made otherwise.
    """
    path = Path(folder) / RESULTS
    if not os.path.lexists(path):
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {**document["versions"], **document["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        document, found = {}, {}
    made = json.loads(json.dumps({**versions(), **settings}))
    keys = [key for key in made | found if key not in ("methods", "seeds")]
    differ = [key for key in keys if made.get(key) != found.get(key)]
    if differ:
        what = f"made with another {', '.join(differ)}" if found else "which cannot be read"
        raise ConfigurationError(
            f"--out {folder} has a {RESULTS} already, {what}; name another folder, or add "
            "--overwrite."
        )
    try:
        tensors = load_file(Path(folder) / PREDICTIONS)
    except (OSError, SafetensorError):
        return []
    return [
        Row(**{**row, **{key: tensors[_entry(row, key)] for key in _PREDICTED}})
        for row in document["rows"]
        if _entry(row, "probs") in tensors
    ]


def _entry(row: dict[str, Any], key: str) -> str:
    return f"{row['method']}, seed {row['seed']}: {key}"


def draw(rows: Sequence[Row], folder: str | Path) -> None:
    """Draws ``reliability.png``, which pools the predictions of all seeds."""
    pooled = {
        method: (torch.cat([row.probs for row in own]), torch.cat([row.labels for row in own]))
        for method, own in _by_method(rows).items()
    }
    save_figure(reliability_diagram(pooled), Path(folder) / "reliability.png")
