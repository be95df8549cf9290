"""A training step's cost against layers, rank, particles, batch and sequence length.

    python benchmarks/scaling.py --out docs/scaling.png --json out/scaling.json
    python benchmarks/scaling.py --axes rank,particles --points 2 --steps 3        # a quick look

A random Llama, adapters on q and v; one quantity varies, the others stay at the values of `BASE`.
Steps of plain LoRA (`peft:read` of step_time.py) and of the method take turns, and a ratio is that
of two steps that follow one another. The second table has what the method does besides running the
network, in processor time, in time within Pyro's own functions, and in counts that no clock enters
(`own_cost.py`).
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from own_cost import own_costs
from ratios import ratio, take_turns, write
from setting import SIZES, batches, network
from step_time import make

BASE = {"layers": 8, "rank": 8, "particles": 8, "rows": 8, "length": 64}
AXES = {
    "layers": (2, 4, 8, 16, 32),
    "rank": (2, 4, 8, 16, 32, 64),
    "particles": (1, 2, 4, 8),
    "rows": (1, 2, 4, 8, 16, 32),
    "length": (16, 32, 64, 128, 256),
}
TITLES = {"layers": "layers", "rank": "rank", "particles": "particles for 8 examples"}
TITLES |= {"rows": "examples, a particle each", "length": "tokens in an example"}
DEPTHS = (30, 60, 120)


def point(arguments: argparse.Namespace, axis: str, value: int) -> dict[str, Any]:
    """Seconds of a step of peft and of the method at one point, in turn, and their ratio."""
    at = {**BASE, axis: value}
    if axis == "rows":
        at["particles"] = value
    base = network(arguments.size, at["layers"])
    steps = {
        name: make(name, copy.deepcopy(base), "float32", at["particles"], at["rank"])
        for name in ("peft:read", arguments.method)
    }
    data = batches(arguments.warmup + arguments.steps, at["rows"], at["length"])
    runs = {name: lambda index, step=step: step(data[index]) for name, step in steps.items()}
    seconds = take_turns(runs, arguments.steps, arguments.warmup)
    plain, own = seconds["peft:read"], seconds[arguments.method]
    row = {"axis": axis, "value": value, "peft": statistics.median(plain)}
    return row | {"method": statistics.median(own)} | ratio(own, plain)


def spread(row: dict[str, Any]) -> str:
    """A ratio with its quartiles."""
    return f"{row['ratio']:.2f} ({row['low']:.2f} - {row['high']:.2f})"


def draw(rows: list[dict[str, Any]], method: str, path: Path) -> None:
    """Seconds of a step above, the ratio below, a column for each quantity."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(
        2, len(axes), figsize=(3.2 * len(axes), 5.2), sharey="row", squeeze=False
    )
    for (top, bottom), axis in zip(panels.T, axes, strict=True):
        own = [row for row in rows if row["axis"] == axis]
        x = [row["value"] for row in own]
        for name, key in (("peft", "peft"), (method, "method")):
            top.plot(x, [1000 * row[key] for row in own], marker="o", label=name)
        bottom.plot(x, [row["ratio"] for row in own], marker="o", color="C1")
        bottom.fill_between(
            x, [row["low"] for row in own], [row["high"] for row in own], color="C1", alpha=0.25
        )
        bottom.axhline(1, color="C0")
        top.set_yscale("log")
        for panel in (top, bottom):
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [str(value) for value in x])
        bottom.set_xlabel(TITLES[axis])
    panels[0, 0].set_ylabel("ms a step")
    panels[1, 0].set_ylabel("ratio to peft (quartiles)")
    panels[1, 0].set_ylim(bottom=0)
    panels[0, 0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the benchmark, prints its tables, draws its figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="width of the network")
    parser.add_argument("--method", default="bayesian-lora", help="recipe or PRIOR+GUIDE")
    parser.add_argument("--axes", default=",".join(AXES), help="quantities to vary")
    parser.add_argument("--points", type=int, help="the first so many values of each alone")
    parser.add_argument("--steps", type=int, default=20, help="timed steps at a point")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--out", type=Path, help="draw the picture here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pyro.settings.set(module_local_params=True)
    print(f"| quantity | value | peft ms | {arguments.method} ms | ratio (quartiles) |")
    print("|---" * 5 + "|")
    rows = []
    with pyro.validation_enabled(False):
        for axis in arguments.axes.split(","):
            for value in AXES[axis][: arguments.points]:
                row = point(arguments, axis, value)
                rows.append(row)
                times = f"{1000 * row['peft']:.1f} | {1000 * row['method']:.1f}"
                print(f"| {axis} | {value} | {times} | {spread(row)} |", flush=True)
    counted = "layers | Pyro sites | torch operators | Python calls"
    print(f"\n| {counted} | CPU ms | ratio | Pyro's own ms | ratio (quartiles) |")
    print("|---" * 8 + "|")
    own = own_costs(arguments.method, DEPTHS, arguments.steps)
    for row in own:
        counts = " | ".join(f"{row[key]:,}" for key in ("layers", "sites", "operators", "calls"))
        inside = row["pyro"]
        times = f"{1000 * row['seconds']:.2f} | {row['ratio']:.2f}"
        print(f"| {counts} | {times} | {1000 * inside['seconds']:.2f} | {spread(inside)} |")
    if arguments.out:
        draw(rows, arguments.method, arguments.out)
    write(arguments.json, vars(arguments), {"base": BASE, "points": rows, "own": own})


if __name__ == "__main__":
    main()
