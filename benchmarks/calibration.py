"""The calibration of every method on every task: one fair benchmark, resumable cell by cell.

    python benchmarks/calibration.py tune --data-dir DATA    # trials, on validation items alone
    python benchmarks/calibration.py run --data-dir DATA     # the cells that are not there yet
    python benchmarks/calibration.py report                  # tables and pictures of those that are

A cell is a network, a task, a method, a number of steps and a seed: one line of ``cells.jsonl``,
and its probabilities in ``probabilities.npz``; a kill loses the cell at work, and the same command
goes on. Two commands at once want two folders. ``calibration.yaml`` says what is run. Every method
has the same items and budget of steps; those whose trials have run have the one with the lowest
mean NLL on validation items of the network's development tasks. Early stopping and temperatures see
a task's own validation items; test items are scored once.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
import typer
import yaml
from calibration_cell import Cell, Outcome, outcomes
from calibration_report import trials_table, write_report

from pyro_blora.cli.comparison import versions
from pyro_blora.evaluation.metrics import evaluate
from pyro_blora.files import replace_file
from pyro_blora.methods import METHODS
from pyro_blora.network.precision import choose_precision

HERE = Path(__file__).resolve().parent
app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)

Config = Annotated[Path, typer.Option(help="What to run.", exists=True)]
DataDir = Annotated[str | None, typer.Option(help="Folder of TASK/SPLIT.jsonl; default: the hub.")]
Out = Annotated[Path, typer.Option(help="Where results are, and are added.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A few items and steps, to see that it runs.")]
Only = Annotated[
    list[str] | None, typer.Option(help="Networks, methods, tasks or sweeps to run alone.")
]
Seed = Annotated[list[int] | None, typer.Option(help="Seeds to run alone.")]
Model = Annotated[str | None, typer.Option(help="In place of the networks' model.")]
Ours = Annotated[str, typer.Option(help="The method that all others are compared with.")]

SMOKE_STEPS = 4
DEFAULT_CONFIG = HERE / "calibration.yaml"
DEFAULT_OUT = HERE / "results" / "calibration"


def read_settings(config: Path, data_dir: str | None, smoke: bool) -> dict[str, Any]:
    """The settings of a file; ``--smoke`` makes them small."""
    settings: dict[str, Any] = yaml.safe_load(config.read_text("utf-8"))
    if base := settings.pop("extends", None):
        base = yaml.safe_load((config.parent / base).read_text("utf-8"))
        methods = base["methods"] | settings.get("methods", {})
        settings = base | settings | {"methods": methods}
    settings |= {"data_dir": data_dir, "tune": False}
    if smoke:
        settings |= {"max_train": 16, "max_validation": 8, "max_test": 8, "num_samples": 2}
        settings["smoke"] = True
        settings["development"]["steps"] = SMOKE_STEPS
    return settings


def base_of(method: str, settings: Mapping[str, Any]) -> str:
    """The method whose training ``method`` reads."""
    return str(settings["methods"][method].get("of", method))


def changed(settings: dict[str, Any], trials: Mapping[str, int]) -> dict[str, Any]:
    """The settings with the trial that was chosen for each method."""
    settings = copy.deepcopy(settings)
    for name, index in trials.items():
        method = settings["methods"].get(name, {})
        for key, change in (method.get("trials") or [{}])[index].items():
            method[key] = {**method.get(key, {}), **change} if isinstance(change, dict) else change
    return settings


def without_trials(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings, without what else there was to try."""
    return {name: value for name, value in method.items() if name != "trials"}


def trial_key(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What a trial's line is of: a change of steps or settings, not of other trials, is another."""
    settings = without_trials(line["settings"])
    kinds = ("network", "method", "trial", "task", "seed", "steps")
    return tuple(json.dumps(part, sort_keys=True) for part in (*(line[k] for k in kinds), settings))


def chosen_trials(
    settings: dict[str, Any], trials: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, str], int]:
    """The trial of each network and method with the lowest mean NLL on the development tasks.

    Trials that have not run on every development task and seed are no candidates. A network without
    tasks of its own has the choices of the first.
    """
    where = settings["development"]
    tried = {trial_key(line): line["nll"] for line in trials}
    chosen = {}
    for network, method in product(settings["networks"], settings["methods"]):
        of = network if network in where["networks"] else next(iter(where["networks"]))
        pairs = product(where["networks"][of], where["seeds"])
        runs = [{"network": of, "task": task, "seed": seed} for task, seed in pairs]
        base, means = base_of(method, settings), {}
        last = settings["methods"][method].get("state") == "from-lora"  # goes on from its last step
        for trial in range(len(settings["methods"][base].get("trials", []))):
            line = {"method": base if last else method, "trial": trial, "steps": where["steps"]}
            line["settings"] = changed(settings, {base: trial})["methods"][base]
            found = [tried.get(trial_key({**line, **run})) for run in runs]
            if all(nll is not None for nll in found):
                means[trial] = sum(nll for nll in found if nll is not None)
        if means:
            chosen[network, method] = min(means, key=means.__getitem__)
    return chosen


def kin_of(ours: str, settings: Mapping[str, Any]) -> set[str]:
    """Ours and the methods of the same prior, as they are and with a temperature."""

    def prior(name: str) -> str:
        spec = settings["methods"][base_of(name, settings)]
        known = METHODS.get(spec.get("method", base_of(name, settings)))
        return known.prior if known else ""

    names = {name for name in settings["methods"] if prior(name) == prior(ours)}
    return names | {f"temperature:{name}" for name in names}


def narrowed(only: Sequence[str] | None, *kinds: Iterable[str]) -> Callable[..., bool]:
    """Whether names, one of each kind, are what ``only`` has of their kind, or it has none."""
    asked = [set(only or ()) & set(kind) for kind in kinds]
    if unknown := set(only or ()) - set().union(*asked):
        raise typer.BadParameter(f"--only: {sorted(unknown)} are not among what can be run.")
    return lambda *names: all(not a or n in a for n, a in zip(names, asked, strict=True))


def cells_of(settings: Mapping[str, Any], only: Sequence[str] | None) -> list[Cell]:
    """The cells of all sweeps, in order, each once; ``only`` narrows what it names a kind of."""
    found = {}
    sweeps = settings["sweeps"]
    tasks = {task for sweep in sweeps.values() for task in sweep["tasks"]}
    asked = narrowed(only, sweeps, settings["networks"], tasks, settings["methods"])
    for sweep, spec in settings["sweeps"].items():
        kinds = (spec[kind] for kind in ("networks", "tasks", "seeds", "steps"))
        methods = spec.get("methods", settings["methods"])
        for network, task, seed, steps, method in product(*kinds, methods):
            if settings.get("smoke"):
                steps = SMOKE_STEPS
            if asked(sweep, network, task, method):
                found[Cell(network, task, method, steps, seed, settings["max_train"])] = None
    return list(found)


Group = tuple[list[Cell], dict[str, Any]]  # cells of one training, and its settings
Trials = Mapping[tuple[str, str], int]  # what was chosen, by network and method


def shared(cells: Sequence[Cell], settings: dict[str, Any], trials: Trials) -> list[Group]:
    """Cells in groups that share one training: one network, task, seed, method and trial of it."""

    def training(cell: Cell) -> tuple[Any, ...]:
        base, trial = base_of(cell.method, settings), trials.get((cell.network, cell.method), -1)
        data = (cell.network, cell.seed, cell.task, cell.steps, str(cell.max_train))
        return (*data, base, trial)

    groups = []
    for (*_, base, trial), group in groupby(sorted(cells, key=training), key=training):
        groups.append((list(group), changed(settings, {base: trial} if trial >= 0 else {})))
    return groups


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that a kill has cut is taken off."""
    text = path.read_text("utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def is_of_other_settings(line: Mapping[str, Any], settings: dict[str, Any], trials: Trials) -> bool:
    """Whether a cell's line was written with other settings of its method than these."""
    base = base_of(line["method"], settings)
    key = line["network"], line["method"]
    trial = {base: trials[key]} if key in trials else {}
    now = changed(settings, trial)["methods"][base]
    return without_trials(now) != without_trials(line["settings"])


def commit() -> str:
    """The commit of the code at work, with a mark where files differ from it; or nothing."""
    told = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(told, capture_output=True, text=True, check=False).stdout.strip()


def append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def keep(
    outcome: Outcome, settings: Mapping[str, Any], trial: int | None, out: Path, code: str
) -> None:
    """Writes a cell's probabilities, and then its line, without which they are nothing."""
    file = out / "probabilities.npz"

    def save(path: Path) -> None:
        if file.exists():
            shutil.copyfile(file, path)
        with ZipFile(path, "a", ZIP_DEFLATED) as archive:
            for kind in ("probs", "labels", "epistemic"):
                for name, tensor in getattr(outcome, kind).items():
                    with archive.open(f"{outcome.cell}/{name}/{kind}.npy", "w") as array:
                        np.save(array, tensor.numpy())

    replace_file(file, save)
    line: dict[str, Any] = {
        **vars(outcome.cell),
        "trial": trial,
        "metrics": {
            name: asdict(evaluate(probs, outcome.labels[name]))
            for name, probs in outcome.probs.items()
        },
        "parameters": outcome.parameters,
        "seconds": round(outcome.seconds, 1),
        "settings": settings["methods"][base_of(outcome.cell.method, settings)],
        "made": outcome.made,
        "versions": {**versions(), "commit": code, "threads": torch.get_num_threads()},
        "precision": choose_precision("auto"),
    }
    append(out / "cells.jsonl", line)
    print(f"{outcome.cell}: {line['metrics']['test']}", flush=True)


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
    tasks = {task for tasks in where["networks"].values() for task in tasks}
    asked = narrowed(only, where["networks"], settings["methods"], tasks)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {trial_key(line) for line in lines(out)}
    for base, spec in settings["methods"].items():
        family = [name for name in settings["methods"] if base_of(name, settings) == base]
        for trial in range(len(spec.get("trials", []))):
            tried = changed(settings, {base: trial})
            places = [(n, task) for n, tasks in where["networks"].items() for task in tasks]
            for (network, task), seed in product(places, where["seeds"]):
                cells = []
                place = {"network": network, "trial": trial, "task": task, "seed": seed}
                for name in family if asked(network, base, task) else []:
                    line = {**place, "method": name, "steps": where["steps"]}
                    line |= {"settings": tried["methods"][base]}
                    state = settings["methods"][name].get("state")
                    if state != "from-lora" and trial_key(line) not in done:
                        count = settings["max_train"]
                        cells.append(Cell(network, task, name, where["steps"], seed, count))
                for outcome in outcomes(cells, tried) if cells else ():
                    cell = outcome.cell
                    found = evaluate(outcome.probs["validation"], outcome.labels["validation"])
                    line = {**place, "method": cell.method, "steps": cell.steps, **asdict(found)}
                    line |= {"parameters": outcome.parameters}
                    line |= {"settings": tried["methods"][base], "versions": versions()}
                    print(f"{cell.method}, trial {trial}, {task}, seed {seed}: {found}", flush=True)
                    append(out, line)


@app.command()
def run(
    config: Config = DEFAULT_CONFIG,
    data_dir: DataDir = None,
    out: Out = DEFAULT_OUT,
    only: Only = None,
    smoke: Smoke = False,
    seed: Seed = None,
    model: Model = None,
) -> None:
    """Runs the cells that are not there yet, with each method's chosen trial."""
    out.mkdir(parents=True, exist_ok=True)
    code, settings = commit(), read_settings(config, data_dir, smoke)  # before files may change
    for network in settings["networks"].values() if model else ():
        network["model"] = model
    trials = chosen_trials(settings, lines(out / "trials.jsonl"))
    cells = [cell for cell in cells_of(settings, only) if not seed or cell.seed in seed]
    there = {
        Cell(*(line[k] for k in Cell.__dataclass_fields__)): line
        for line in lines(out / "cells.jsonl")
    }
    done = [cell for cell in cells if cell in there]
    groups = shared([cell for cell in cells if cell not in there], settings, trials)
    print(f"{len(cells)} cells, {len(done)} of them there, {len(groups)} trainings to go")
    if old := [str(cell) for cell in done if is_of_other_settings(there[cell], settings, trials)]:
        print(f"Run with other settings than now; delete their lines to run them again: {old}")
    for group, used in groups:
        for outcome in outcomes(group, used):
            cell = outcome.cell
            keep(outcome, used, trials.get((cell.network, cell.method)), out, code)


@app.command()
def report(
    config: Config = DEFAULT_CONFIG,
    out: Out = DEFAULT_OUT,
    ours: Ours = "bayesian-lora",
    model: Model = None,
) -> None:
    """Prints the trials; writes report.md and the pictures of the cells that are there."""
    if trials := lines(out / "trials.jsonl"):
        print("\n".join(trials_table(trials)))
    if cells := lines(out / "cells.jsonl"):
        settings = read_settings(config, None, False)
        used = {model or network["model"] for network in settings["networks"].values()}
        tasks = settings["sweeps"]["table"]["tasks"]
        published = {
            name: dict(zip(tasks, row, strict=True))
            for of in used
            for name, row in settings.get("published", {}).get(of, {}).items()
        }
        write_report(cells, out, ours, kin_of(ours, settings), published)


if __name__ == "__main__":
    app()
