"""The cells of a benchmark, which are lines of JSON in a file, and tables of their means."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import torch

from pyro_blora.evaluation.results import versions

BLUE, RED = "#2f5f94", "#d9484a"  # of ours, and of LoRA
Columns = Mapping[str, tuple[str, float, int]]  # title, factor and digits by the key of a metric


class Cells(list[dict[str, Any]]):
    """The cells of a file, to which new ones are added; a line that a kill cut short is removed."""

    def __init__(self, path: Path) -> None:
        self.path, text = path, path.read_text("utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, "utf-8")
        super().__init__(map(json.loads, whole.splitlines()))
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        # Noted at the start, because files of the checkout may change in the course of a run
        found = {**versions(), "commit": commit, "threads": torch.get_num_threads()}
        self.made_by = {"versions": found, "command": shlex.join(sys.argv)}

    def has(self, **key: Any) -> bool:
        """Whether there is a cell with these entries."""
        return any(all(cell[name] == value for name, value in key.items()) for cell in self)

    def add(self, cell: Mapping[str, Any]) -> None:
        """Adds a cell with the versions and the command that made it, and writes its line."""
        self.append({**cell, **self.made_by})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self[-1]) + "\n")


def titles(columns: Columns) -> list[str]:
    return [title for title, _, _ in columns.values()]


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head, *lines = [f"| {' | '.join(map(str, row))} |" for row in [head, *rows]]
    return [head, "|---" * head.count(" | ") + "|---|", *lines]


def mean_of(runs: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def error_of_mean(runs: Sequence[Mapping[str, float]], key: str) -> float:
    return stdev(run[key] for run in runs) / len(runs) ** 0.5 if len(runs) > 1 else 0.0


def means(runs: Sequence[Mapping[str, float]], columns: Columns) -> list[str]:
    """The mean of each column over runs, with its standard error if there are several."""
    texts = []
    for key, (_, factor, digits) in columns.items():
        error = f" ± {factor * error_of_mean(runs, key):.{digits}f}" if len(runs) > 1 else ""
        texts.append(f"{factor * mean_of(runs, key):.{digits}f}{error}")
    return texts
