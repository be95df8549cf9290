"""Joins the results.json of several `pyro-blora compare` runs into one Markdown table.

Usage: python benchmarks/results_table.py out/arc_easy-0 out/arc_easy-1 out/arc_easy-2

The runs must differ in their seeds alone; the table has mean and standard deviation over seeds.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

COLUMNS = (("acc", "ACC %", 100, 1), ("ece", "ECE %", 100, 1), ("nll", "NLL", 1, 3))
COLUMNS += (("brier", "Brier", 1, 3), ("train_seconds", "train s", 1, 0))


def joined(folders: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """The rows of all runs, their common settings and versions."""
    files = [Path(folder) / "results.json" for folder in folders]
    for file in files:
        if not file.is_file():
            raise SystemExit(f"{file} is not there; name the folders that `--out` named")
    documents = [json.loads(file.read_text("utf-8")) for file in files]
    settings = [{k: v for k, v in d["settings"].items() if k != "seeds"} for d in documents]
    if any(s != settings[0] for s in settings) or any(
        d["versions"] != documents[0]["versions"] for d in documents
    ):
        raise SystemExit("the runs differ in more than their seeds; run them again alike")
    rows = [row for d in documents for row in d["rows"]]
    keys = [(row["method"], row["seed"]) for row in rows]
    if len(set(keys)) < len(keys):
        raise SystemExit("a seed occurs twice")
    return rows, settings[0], documents[0]["versions"]


def cell(values: list[float], scale: float, digits: int) -> str:
    scaled = [scale * v for v in values]
    spread = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{spread}"


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    rows, settings, versions = joined(sys.argv[1:])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    print("| " + " | ".join(["method", *(title for _, title, _, _ in COLUMNS)]) + " | parameters |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        cells = [cell([r[key] for r in own], scale, digits) for key, _, scale, digits in COLUMNS]
        print("| " + " | ".join([method, *cells, f"{own[0]['trainable_parameters']:,}"]) + " |")
    settings = {k: v for k, v in settings.items() if k != "data_dir"}
    print(f"\nSeeds {seeds}, {rows[0]['n_test']} test items. Settings: {json.dumps(settings)}.")
    print("Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".")


if __name__ == "__main__":
    main()
