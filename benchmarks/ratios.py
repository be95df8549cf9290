"""Ratios of times that were taken in turn, as a table and as a document."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_blora.evaluation.comparison import versions

__all__ = ["ratio", "rows_of", "table", "take_turns", "write"]


def take_turns(
    runs: Mapping[str, Callable[[int], Any]],
    rounds: int,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, all of them in every round, one after the other.

    Args:
        runs: what to time by name; called with the number of the round.
        rounds: timed rounds.
        warmup: rounds before the clock starts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(index)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(own: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of times that followed one another."""
    low, middle, high = statistics.quantiles(
        [a / b for a, b in zip(own, others, strict=True)], n=4, method="inclusive"
    )
    return {"ratio": middle, "low": low, "high": high}


def rows_of(seconds: Mapping[str, Sequence[float]], others: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each name: its median time, and its ratio to each of ``others``."""
    return [
        {"name": name, "seconds": statistics.median(own)}
        | {f"to {other}": ratio(own, seconds[other]) for other in others}
        for name, own in seconds.items()
    ]


def table(what: str, rows: Sequence[Mapping[str, Any]], others: Sequence[str]) -> str:
    """Rows of :func:`rows_of` in markdown; numbers that they have besides get columns, too."""
    more = [key for key in rows[0] if key not in ("name", "seconds") and key[:3] != "to "]
    head = [what, "s", *(f"ratio to {other} (quartiles)" for other in others), *more]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["name"], f"{row['seconds']:.4f}"]
        for other in others:
            found = row[f"to {other}"]
            cells.append(f"{found['ratio']:.3f} ({found['low']:.3f} - {found['high']:.3f})")
        lines.append([*cells, *(f"{row[key]:.3f}" for key in more)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: Path | None, arguments: Mapping[str, Any], rows: Any) -> None:
    """Puts rows, arguments and versions into a JSON file, where one is asked for."""
    if path is None:
        return
    document = {"versions": versions(), "arguments": dict(arguments), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
