"""Rows of a comparison, their table and their files."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pyro_blora.checkpoints import write_atomically
from pyro_blora.errors import ConfigurationError
from pyro_blora.evaluation.plots import reliability_diagram, save_figure

__all__ = ["PREDICTIONS", "RESULTS", "Row", "draw", "read", "table", "versions", "write"]

RESULTS = "results.json"
PREDICTIONS = "predictions.safetensors"


@dataclass
class Row:
    """One method under one seed; the columns of ``results.json``."""

    method: str
    seed: int
    acc: float
    ece: float
    nll: float
    brier: float
    n_test: int
    train_seconds: float
    trainable_parameters: int
    probs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The row without its predictions."""
        return {k: v for k, v in self.__dict__.items() if k not in ("probs", "labels")}


def table(rows: Sequence[Row], title: str) -> Table:
    """Mean and standard deviation over seeds, a line for each method."""
    view = Table(title=title)
    view.add_column("method", overflow="fold")
    for name in ("ACC %", "ECE %", "NLL", "Brier", "train s", "parameters"):
        view.add_column(name, justify="right")
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]

        def cell(values: list[float], digits: int) -> str:
            numbers = torch.tensor(values, dtype=torch.float64)
            spread = f" ± {float(numbers.std()):.{digits}f}" if len(values) > 1 else ""
            return f"{float(numbers.mean()):.{digits}f}{spread}"

        view.add_row(
            method,
            cell([100 * row.acc for row in own], 1),
            cell([100 * row.ece for row in own], 1),
            cell([row.nll for row in own], 3),
            cell([row.brier for row in own], 3),
            cell([row.train_seconds for row in own], 0),
            f"{own[0].trainable_parameters:,}",
        )
    return view


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
    """Writes ``results.json`` and the rows' predictions, each file whole or not at all."""
    folder = Path(folder)
    document = {
        "rows": [row.as_dict() for row in rows],
        "versions": versions(),
        "settings": settings,
    }
    text = json.dumps(document, indent=2) + "\n"
    tensors: dict[str, Tensor] = {}
    for row in rows:
        name = f"{row.method}, seed {row.seed}"
        tensors |= {f"{name}: probs": row.probs, f"{name}: labels": row.labels}
    data = save({name: tensor.clone() for name, tensor in tensors.items()})
    # The predictions first, so that no row in results.json is without
    write_atomically(folder / PREDICTIONS, lambda path: path.write_bytes(data))
    write_atomically(folder / RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def read(settings: dict[str, Any], folder: str | Path) -> list[Row]:
    """The rows that a run with the same settings and versions left in ``folder``, or none.

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
    differ = [key for key in made | found if made.get(key) != found.get(key)]
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
    rows = []
    for row in document["rows"]:
        name = f"{row['method']}, seed {row['seed']}"
        if f"{name}: probs" in tensors:
            probs, labels = tensors[f"{name}: probs"], tensors[f"{name}: labels"]
            rows.append(Row(**row, probs=probs, labels=labels))
    return rows


def draw(rows: Sequence[Row], folder: str | Path) -> None:
    """Draws ``reliability.png``, which pools the predictions of all seeds."""
    pooled = {}
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        pooled[method] = (torch.cat([r.probs for r in own]), torch.cat([r.labels for r in own]))
    save_figure(reliability_diagram(pooled), Path(folder) / "reliability.png")
