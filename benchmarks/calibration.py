"""The calibration of every method on every task: one fair benchmark, resumable cell by cell.

    python benchmarks/calibration.py tune --data-dir DATA    # trials, on validation items alone
    python benchmarks/calibration.py run --data-dir DATA     # the cells that are not there yet
    python benchmarks/calibration.py report                  # tables and pictures of those that are

A cell is a method, a task, a number of steps and a seed: one line of ``cells.jsonl`` and one file
of probabilities; a kill loses the cell at work, and the same command goes on. ``calibration.yaml``
says what is run. Every method has the same items, budget of steps and number of trials; trials are
chosen by the mean NLL on validation items of the development tasks, and then hold for all tasks.
Early stopping and temperatures see a task's own validation items; test items are scored once.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from calibration_cell import Cell, Outcome, outcomes
from calibration_report import trials_table, write_report

from pyro_blora.checkpoints import write_atomically
from pyro_blora.evaluation.metrics import evaluate
from pyro_blora.evaluation.results import versions
from pyro_blora.network.pretrained import load_pretrained

HERE = Path(__file__).resolve().parent
app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)

Config = Annotated[Path, typer.Option(help="What to run.", exists=True)]
DataDir = Annotated[str | None, typer.Option(help="Folder of TASK/SPLIT.jsonl; default: the hub.")]
Out = Annotated[Path, typer.Option(help="Where results are, and are added.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A few items and steps, to see that it runs.")]
Only = Annotated[list[str] | None, typer.Option(help="Methods, tasks or sweeps to run alone.")]
Ours = Annotated[str, typer.Option(help="The method that all others are compared with.")]
Ray = Annotated[bool, typer.Option("--ray", help="Spread cells over a Ray cluster (pip: ray).")]

DEFAULT_CONFIG = HERE / "calibration.yaml"
DEFAULT_OUT = HERE / "results" / "calibration"


def read_settings(config: Path, data_dir: str | None, smoke: bool) -> dict[str, Any]:
    """The settings of a file; ``--smoke`` makes them small."""
    settings: dict[str, Any] = yaml.safe_load(config.read_text("utf-8"))
    settings |= {"data_dir": data_dir, "tune": False}
    if smoke:
        settings |= {"max_train": 16, "max_validation": 8, "max_test": 8, "num_samples": 2}
        settings["smoke"] = True
    return settings


def cells_of(settings: Mapping[str, Any], only: Sequence[str] | None) -> list[Cell]:
    """The cells of all sweeps, in order, each once."""
    found = {}
    for sweep, spec in settings["sweeps"].items():
        for task in spec["tasks"]:
            for seed in spec["seeds"]:
                for steps in spec["steps"]:
                    for method in spec.get("methods", settings["methods"]):
                        count = spec.get("max_train", settings["max_train"])
                        steps = 4 if settings.get("smoke") else steps
                        named = {sweep, task, method}
                        if not only or named & set(only):
                            found[Cell(task, method, steps, seed, count)] = None
    return list(found)


def changed(settings: dict[str, Any], trials: Mapping[str, int]) -> dict[str, Any]:
    """The settings with the trial that was chosen for each method."""
    settings = copy.deepcopy(settings)
    for name, index in trials.items():
        method = settings["methods"].get(name, {})
        for key, change in (method.get("trials") or [{}])[index].items():
            if key in ("prior", "guide"):  # {class: options}
                next(iter(method[key].values())).update(change)
            else:
                method[key] = {**method.get(key, {}), **change} if key == "fit" else change
    return settings


def shared(cells: Sequence[Cell], settings: Mapping[str, Any]) -> list[list[Cell]]:
    """Cells in groups that share one training."""

    def training(cell: Cell) -> tuple[Any, ...]:
        base = settings["methods"][cell.method].get("of", cell.method)
        return (cell.seed, cell.task, cell.steps, str(cell.max_train), base)

    return [list(group) for _, group in groupby(sorted(cells, key=training), key=training)]


def results(
    groups: Sequence[Sequence[Cell]], settings: dict[str, Any], ray: bool
) -> Iterator[Outcome]:
    """The outcomes of all groups, here or on a cluster, each as soon as it is there."""
    if not ray:
        net, tokenizer = load_pretrained(settings["model"])
        for group in groups:
            yield from outcomes(group, settings, net, tokenizer)
        return
    import ray as cluster

    @cluster.remote  # type: ignore[untyped-decorator]
    def work(group: Sequence[Cell]) -> list[Outcome]:
        net, tokenizer = load_pretrained(settings["model"])
        return list(outcomes(group, settings, net, tokenizer))

    waiting = [work.remote(group) for group in groups]
    while waiting:
        (ready, *_), waiting = cluster.wait(waiting)
        yield from cluster.get(ready)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that a kill has cut is taken off."""
    text = path.read_text("utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def keep(outcome: Outcome, settings: Mapping[str, Any], trial: int | None, out: Path) -> None:
    """Writes a cell's probabilities, and then its line, without which they are nothing."""
    arrays = {}
    for kind in ("probs", "labels", "epistemic"):
        tensors = getattr(outcome, kind)
        arrays |= {f"{name}/{kind}": tensor.numpy() for name, tensor in tensors.items()}

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(out / "probabilities" / f"{outcome.cell}.npz", save)
    line: dict[str, Any] = {
        **vars(outcome.cell),
        "trial": trial,
        "metrics": {
            name: asdict(evaluate(probs, outcome.labels[name]))
            for name, probs in outcome.probs.items()
        },
        "parameters": outcome.parameters,
        "seconds": round(outcome.seconds, 1),
        "settings": settings["methods"][outcome.cell.method],
        "versions": {**versions(), "threads": torch.get_num_threads()},
    }
    append(out / "cells.jsonl", line)
    print(f"{outcome.cell}: {line['metrics']['test']}")


@app.command()
def tune(
    config: Config = DEFAULT_CONFIG,
    data_dir: DataDir = None,
    out: Out = DEFAULT_OUT,
    only: Only = None,
    smoke: Smoke = False,
) -> None:
    """Tries each method's trials on the development tasks; trials.jsonl has what came out."""
    settings = read_settings(config, data_dir, smoke) | {"tune": True}
    where, out = settings["development"], out / "trials.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(t["method"], t["trial"], t["task"], t["seed"]) for t in lines(out)}
    net, tokenizer = load_pretrained(settings["model"])
    steps = 4 if smoke else where["steps"]
    for method, spec in settings["methods"].items():
        for trial in range(len(spec.get("trials", []))):
            for task, seed in ((t, s) for t in where["tasks"] for s in where["seeds"]):
                chosen = not only or {method, task} & set(only)
                if (method, trial, task, seed) in done or not chosen:
                    continue
                cell = Cell(task, method, steps, seed, settings["max_train"])
                tried = changed(settings, {method: trial})
                (outcome,) = outcomes([cell], tried, net, tokenizer)
                found = evaluate(outcome.probs["validation"], outcome.labels["validation"])
                line = {"method": method, "trial": trial, "task": task, "seed": seed}
                line |= {"steps": steps, **asdict(found), "parameters": outcome.parameters}
                line |= {"settings": tried["methods"][method], "versions": versions()}
                print(f"{method}, trial {trial}, {task}, seed {seed}: {found}")
                append(out, line)


def chosen_trials(out: Path) -> dict[str, int]:
    """The trial of each method with the lowest mean NLL on the development tasks."""
    tried: dict[str, dict[int, list[float]]] = {}
    for line in lines(out / "trials.jsonl"):
        tried.setdefault(line["method"], {}).setdefault(line["trial"], []).append(line["nll"])
    most = {method: max(map(len, trials.values())) for method, trials in tried.items()}
    return {
        method: min(
            (trial for trial, nlls in trials.items() if len(nlls) == most[method]),
            key=lambda trial: sum(trials[trial]) / len(trials[trial]),
        )
        for method, trials in tried.items()
    }


@app.command()
def run(
    config: Config = DEFAULT_CONFIG,
    data_dir: DataDir = None,
    out: Out = DEFAULT_OUT,
    only: Only = None,
    smoke: Smoke = False,
    ray: Ray = False,
) -> None:
    """Runs the cells that are not there yet, with each method's chosen trial."""
    out.mkdir(parents=True, exist_ok=True)
    trials = chosen_trials(out)
    settings = changed(read_settings(config, data_dir, smoke), trials)
    cells = cells_of(settings, only)
    done = {
        Cell(*(line[k] for k in Cell.__dataclass_fields__)) for line in lines(out / "cells.jsonl")
    }
    groups = shared([cell for cell in cells if cell not in done], settings)
    print(
        f"{len(cells)} cells, {len(done & set(cells))} of them there, {len(groups)} trainings to go"
    )
    for outcome in results(groups, settings, ray):
        base = settings["methods"][outcome.cell.method].get("of", outcome.cell.method)
        keep(outcome, settings, trials.get(base), out)


@app.command()
def report(out: Out = DEFAULT_OUT, ours: Ours = "fisher") -> None:
    """Prints the trials; writes report.md and the pictures of the cells that are there."""
    if trials := lines(out / "trials.jsonl"):
        print("\n".join(trials_table(trials)))
    if cells := lines(out / "cells.jsonl"):
        write_report(cells, out, ours)


if __name__ == "__main__":
    app()
