"""The calibration of every method on every task: one fair benchmark, resumable cell by cell.

    python benchmarks/calibration.py tune --data-dir DATA    # trials, scored on validation items
    python benchmarks/calibration.py run --data-dir DATA     # the cells that are missing
    python benchmarks/calibration.py report                  # tables and figures of all cells

A cell is a network, a task, a method, a number of steps and a seed. It has one line in
``cells.jsonl``, and its probabilities are in ``probabilities.npz``. A killed command loses the cell
that it was running, and the same command goes on from there; two commands at once need two folders.
``calibration.yaml`` lists what is run. All methods have the same items and the same number of
steps. A method whose trials have run takes the trial with the lowest mean NLL on the validation
items of the network's development tasks, or the one of another network or method that the settings
name. Early stopping and temperatures use the validation items of the task itself; test items are
scored once.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby, product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
import typer
import yaml
from calibration_cell import Cell, Outcome, outcomes
from calibration_report import trials_table, write_report

from pyro_blora.evaluation.results import versions
from pyro_blora.files import write_file
from pyro_blora.options import choose_precision

HERE = Path(__file__).resolve().parent
app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)

Config = Annotated[Path, typer.Option(help="The settings of the benchmark.", exists=True)]
DataDir = Annotated[str | None, typer.Option(help="Folder of TASK/SPLIT.jsonl; default: the hub.")]
Out = Annotated[Path, typer.Option(help="The folder of the results, to which new ones are added.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A few items and steps, as a quick test.")]
Only = Annotated[
    list[str] | None, typer.Option(help="Run these networks, methods, tasks or sweeps alone.")
]
Seed = Annotated[list[int] | None, typer.Option(help="Run these seeds alone.")]

SMOKE_STEPS = 4
DEFAULT_CONFIG = HERE / "calibration.yaml"
DEFAULT_OUT = HERE / "results" / "calibration"

Settings = dict[str, Any]
Line = Mapping[str, Any]
Trials = Mapping[tuple[str, str], int]  # the chosen trial by network and method


def read_settings(config: Path, data_dir: str | None, smoke: bool) -> Settings:
    """The settings of a file, and of the file that it extends; ``smoke`` makes them small."""
    settings: Settings = yaml.safe_load(config.read_text("utf-8"))
    if base := settings.pop("extends", None):
        base = yaml.safe_load((config.parent / base).read_text("utf-8"))
        methods = base["methods"] | settings.get("methods", {})
        settings = base | settings | {"methods": methods}
    settings |= {"data_dir": data_dir, "tune": False, "smoke": smoke}
    if smoke:
        settings |= {"max_train": 16, "max_validation": 8, "max_test": 8, "num_samples": 2}
        settings["development"]["steps"] = SMOKE_STEPS
    return settings


def base_of(method: str, settings: Settings) -> str:
    """The method whose training a method uses."""
    return str(settings["methods"][method].get("of", method))


def with_trial(settings: Settings, name: str, trial: int | None) -> Settings:
    """The settings with the changes that a trial of a method makes."""
    settings = copy.deepcopy(settings)
    method = settings["methods"][name]
    for key, change in method["trials"][trial].items() if trial is not None else ():
        method[key] = {**method.get(key, {}), **change} if isinstance(change, dict) else change
    return settings


def without_trials(method: Line) -> Settings:
    """The settings of a method, without its list of trials."""
    return {name: value for name, value in method.items() if name != "trials"}


def trial_of(cell: Cell, trial: int, settings: Settings) -> Settings:
    """What identifies the line of a trial."""
    place = {name: getattr(cell, name) for name in ("network", "task", "method", "steps", "seed")}
    base = base_of(cell.method, settings)
    return {**place, "trial": trial, "settings": with_trial(settings, base, trial)["methods"][base]}


def trial_key(line: Line) -> str:
    """A key of a trial's line: with other steps or settings it is another trial."""
    kinds = ("network", "task", "method", "steps", "seed", "trial")
    found = {kind: line[kind] for kind in kinds} | {"of": without_trials(line["settings"])}
    return json.dumps(found, sort_keys=True)


def chosen_trials(settings: Settings, trials: Iterable[Line]) -> dict[tuple[str, str], int]:
    """The trial of each network and method with the lowest mean NLL on the development tasks.

    A trial that has not run on all of these tasks does not count. A network may take the choices of
    another one, that of its ``like``, and some of another method.
    """
    where = settings["development"]
    tried = {trial_key(line): line["nll"] for line in trials}
    chosen = {}
    for network, method in product(settings["networks"], settings["methods"]):
        of = settings["networks"][network].get("like", network)
        base = base_of(method, settings)
        starts_from_lora = settings["methods"][method].get("kind") == "from-lora"
        tuned = base if starts_from_lora else method
        tuned = settings["networks"][of].get("choices", {}).get(tuned, tuned)
        places = [*product(where["networks"].get(of, ()), where["seeds"])]
        cells = [Cell(of, task, tuned, where["steps"], seed, None) for task, seed in places]
        means = {}
        for trial in range(len(settings["methods"][base].get("trials", []))):
            keys = [trial_key(trial_of(cell, trial, settings)) for cell in cells]
            if keys and tried.keys() >= set(keys):
                means[trial] = fmean(tried[key] for key in keys)
        if means:
            chosen[network, method] = min(means, key=means.__getitem__)
    return chosen


def narrowed(only: Sequence[str] | None, *kinds: Iterable[str]) -> Callable[..., bool]:
    """Tells whether names, one of each kind, are in ``only``, if it has any of their kind."""
    asked = [set(only or ()) & set(kind) for kind in kinds]
    if unknown := set(only or ()) - set().union(*asked):
        raise typer.BadParameter(f"--only must name what can be run, got {sorted(unknown)}.")
    return lambda *names: all(not a or n in a for n, a in zip(names, asked, strict=True))


def cells_of(settings: Settings, only: Sequence[str] | None) -> list[Cell]:
    """The cells of all sweeps in order, each once."""
    found, sweeps = {}, settings["sweeps"]
    tasks = {task for sweep in sweeps.values() for task in sweep["tasks"]}
    asked = narrowed(only, sweeps, settings["networks"], tasks, settings["methods"])
    for sweep, spec in sweeps.items():
        kinds = (spec[kind] for kind in ("networks", "tasks", "seeds", "steps"))
        methods = spec.get("methods", settings["methods"])
        items = (
            settings["max_train"]
            if settings["smoke"]
            else spec.get("max_train", settings["max_train"])
        )
        for network, task, seed, steps, method in product(*kinds, methods):
            if asked(sweep, network, task, method):
                count = SMOKE_STEPS if settings["smoke"] else steps
                found[Cell(network, task, method, count, seed, items)] = None
    return list(found)


def shared(
    cells: Sequence[Cell], settings: Settings, trials: Trials
) -> list[tuple[list[Cell], Settings]]:
    """Cells in groups that share one training and one trial of it, with their settings."""

    def training(cell: Cell) -> tuple[Any, ...]:
        base, trial = base_of(cell.method, settings), trials.get((cell.network, cell.method))
        data = (cell.network, cell.seed, cell.task, cell.steps, str(cell.max_train))
        return (*data, base, -1 if trial is None else trial)

    groups = groupby(sorted(cells, key=training), key=training)
    return [
        (list(group), with_trial(settings, base, trial if trial >= 0 else None))
        for (*_, base, trial), group in groups
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that a kill cut short is removed."""
    text = path.read_text("utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, line: Line) -> None:
    """Adds a line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def commit() -> str:
    """The commit of the code, with a mark if files differ from it; empty outside of git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def keep(outcome: Outcome, settings: Settings, trial: int | None, out: Path, code: str) -> None:
    """Writes the probabilities of a cell, and then its line, which tells that they are there."""
    cell, result, file = outcome.cell, outcome.result, out / "probabilities.npz"

    def save(path: Path) -> None:
        if file.exists():
            shutil.copyfile(file, path)
        with ZipFile(path, "a", ZIP_DEFLATED) as archive:
            for name, (prediction, labels) in result.predictions.items():
                arrays = {"probs": prediction.probs, "labels": labels}
                arrays["epistemic"] = prediction.mutual_information
                for kind, tensor in arrays.items():
                    with archive.open(f"{cell}/{name}/{kind}.npy", "w") as array:
                        np.save(array, tensor.numpy())

    write_file(file, save)
    line: Settings = {
        **vars(cell),
        "trial": trial,
        "metrics": {name: asdict(found) for name, found in result.metrics.items()},
        "parameters": result.blora.trainable_parameters,
        "passes": result.passes,
        "seconds": round(result.fitted.seconds, 1),
        "settings": settings["methods"][base_of(cell.method, settings)],
        "made": outcome.made,
        "versions": {**versions(), "commit": code, "threads": torch.get_num_threads()},
        "precision": choose_precision("auto"),
    }
    append(out / "cells.jsonl", line)
    print(f"{cell}: {line['metrics']['test']}", flush=True)


@app.command()
def tune(
    config: Config = DEFAULT_CONFIG,
    data_dir: DataDir = None,
    out: Out = DEFAULT_OUT,
    only: Only = None,
    smoke: Smoke = False,
) -> None:
    """Tries the trials of each method on the development tasks, and writes trials.jsonl."""
    settings = read_settings(config, data_dir, smoke) | {"tune": True}
    where, methods, out = settings["development"], settings["methods"], out / "trials.jsonl"
    places = [(network, task) for network, tasks in where["networks"].items() for task in tasks]
    asked = narrowed(only, where["networks"], methods, {task for _, task in places})
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {trial_key(line) for line in lines(out)}
    for base, spec in methods.items():
        family = [name for name in methods if base_of(name, settings) == base]
        family = [name for name in family if methods[name].get("kind") != "from-lora"]
        trials = range(len(spec.get("trials", [])))
        for trial, (network, task), seed in product(trials, places, where["seeds"]):
            cells = [
                Cell(network, task, name, where["steps"], seed, settings["max_train"])
                for name in family
                if asked(network, name, task)
            ]
            cells = [c for c in cells if trial_key(trial_of(c, trial, settings)) not in done]
            tried = with_trial(settings, base, trial)
            for outcome in outcomes(cells, tried) if cells else ():
                found = outcome.result.metrics["validation"]
                line = trial_of(outcome.cell, trial, settings) | asdict(found)
                line |= {
                    "parameters": outcome.result.blora.trainable_parameters,
                    "versions": versions(),
                }
                append(out, line)
                print(f"{outcome.cell}, trial {trial}: {found}", flush=True)


@app.command()
def run(
    config: Config = DEFAULT_CONFIG,
    data_dir: DataDir = None,
    out: Out = DEFAULT_OUT,
    only: Only = None,
    smoke: Smoke = False,
    seed: Seed = None,
) -> None:
    """Runs the cells that are missing, with the chosen trial of each method."""
    out.mkdir(parents=True, exist_ok=True)
    code, settings = commit(), read_settings(config, data_dir, smoke)  # before files may change
    trials = chosen_trials(settings, lines(out / "trials.jsonl"))
    cells = [cell for cell in cells_of(settings, only) if not seed or cell.seed in seed]
    there = {
        Cell(*(line[key.name] for key in fields(Cell))): without_trials(line["settings"])
        for line in lines(out / "cells.jsonl")
    }
    old, groups = [], []
    for group, used in shared(cells, settings, trials):
        now = without_trials(used["methods"][base_of(group[0].method, settings)])
        old += [str(cell) for cell in group if there.get(cell, now) != now]
        if missing := [cell for cell in group if cell not in there]:
            groups.append((missing, used))
    done = sum(cell in there for cell in cells)
    print(f"{len(cells)} cells, {done} of them there, {len(groups)} trainings to go")
    usual = {c.method for c in cells if (c.network, c.method) not in trials}
    usual = {m for m in usual if "trials" in settings["methods"][base_of(m, settings)]}
    if usual:
        print(f"At their usual rates, because trials of them are missing: {sorted(usual)}")
    if old:
        print(f"Run with other settings than now; delete their lines to run them again: {old}")
    for group, used in groups:
        for outcome in outcomes(group, used):
            cell = outcome.cell
            keep(outcome, used, trials.get((cell.network, cell.method)), out, code)


@app.command()
def report(config: Config = DEFAULT_CONFIG, out: Out = DEFAULT_OUT) -> None:
    """Prints the trials, and writes report.md and the figures of all cells."""
    if trials := lines(out / "trials.jsonl"):
        print("\n".join(trials_table(trials)))
    if cells := lines(out / "cells.jsonl"):
        settings = read_settings(config, None, False)
        write_report(cells, out, settings["sweeps"].get("cannot", {}).get("tasks", []))


if __name__ == "__main__":
    app()
