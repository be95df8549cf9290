"""The calibration of every method on every task: one fair benchmark, resumable cell by cell.

    python benchmarks/calibration.py tune --data-dir DATA    # trials, scored on validation items
    python benchmarks/calibration.py run --data-dir DATA     # the cells that are missing
    python benchmarks/calibration.py report                  # tables and figures of all cells

A cell is a network, a task, a number of training items, a number of steps, a method and a seed. A
command goes on where it was killed; two at once need two folders. ``calibration.yaml`` lists what
is run. All methods have the same items and steps. One whose trials have run takes that with the
lowest mean NLL on the validation items of the network's development tasks. Early stopping and
temperatures use the validation items of the task itself; test items are scored once.
"""

import json
import random
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby, product, starmap
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import typer
import yaml
from calibration_report import write_report
from cells import Cells
from methods import network_of as packaged_network
from other_layers import Dropout
from torch import nn

from pyro_blora.checkpoints.files import write_file
from pyro_blora.data import Item, Task, load_task
from pyro_blora.evaluation.comparison import Result, entry, train_and_score
from pyro_blora.guides import Delta
from pyro_blora.methods import METHODS, Method
from pyro_blora.network.pretrained import choose_precision, load_for
from pyro_blora.network.targets import is_classifier

HERE = Path(__file__).resolve().parent
app = typer.Typer(add_completion=False, rich_markup_mode=None)
KNOWN = {**METHODS, "zero-shot": METHODS["lora"]}  # without a step
KNOWN["dropout"] = Method("dropout", Dropout(), Delta(), held_out=0.0, num_samples=10)

Settings = dict[str, Any]


class Cell(namedtuple("Cell", "network task max_train steps method seed")):
    """The key of one line of the results."""

    __str__ = lambda self: "-".join(map(str, self))  # noqa: E731


Job = tuple[Cell, Settings]  # a cell and the settings of its method


def read_settings(config: Path, data_dir: str | None, smoke: bool) -> Settings:
    """The settings of a file, and of the file that it extends; ``smoke`` makes them small."""
    settings: Settings = yaml.safe_load(config.read_text("utf-8"))
    if base := settings.pop("extends", None):
        base = yaml.safe_load((config.parent / base).read_text("utf-8"))
        settings = base | settings | {"methods": base["methods"] | settings["methods"]}
    settings["data_dir"] = data_dir
    if smoke:
        settings |= {"max_train": 16, "max_validation": 8, "max_test": 8, "num_samples": 2}
        settings["development"]["steps"] = 4
        for sweep in settings["sweeps"].values():
            sweep |= {"steps": [4], "max_train": 16}
    return settings


def specs_of(settings: Settings, method: str) -> list[Settings]:
    """The usual settings of what is trained for a method, and then those of its trials."""
    methods = settings["methods"]
    usual = dict(methods[methods[method].get("of", method)])
    changes = [change.items() for change in usual.pop("trials", [])]
    trials = [{**usual, **{k: {**usual.get(k, {}), **v} for k, v in each}} for each in changes]
    return [usual, *trials]


def spec_in(line: Mapping[str, Any]) -> Settings:
    # the first lines have all trials beside the settings
    return {name: value for name, value in line["settings"].items() if name != "trials"}


def trial_key(place: Mapping[str, Any], spec: Settings) -> str:
    kinds = ("network", "task", "steps", "method", "seed")
    return json.dumps([*(place[kind] for kind in kinds), spec], sort_keys=True)


def trials_of(settings: Settings, network: str, method: str) -> list[list[Job]]:
    where, items = settings["development"], settings["max_train"]
    places = [*product(where["networks"].get(network, ()), where["seeds"])]
    cells = [Cell(network, task, items, where["steps"], method, seed) for task, seed in places]
    return [[(cell, spec) for cell in cells] for spec in specs_of(settings, method)[1:]]


def chosen_specs(settings: Settings, lines: Cells) -> dict[tuple[str, str], Settings]:
    """The settings by network and method of the trial that is best on all development tasks."""
    tried, chosen = {trial_key(line, spec_in(line)): line["nll"] for line in lines}, {}
    for network, method in product(settings["networks"], settings["methods"]):
        of = settings["networks"][network].get("like", network)
        tuned, means = settings["networks"][of].get("choices", {}).get(method, method), {}
        for trial, jobs in enumerate(trials_of(settings, of, tuned), 1):
            keys = [trial_key(cell._asdict(), spec) for cell, spec in jobs]
            if keys and tried.keys() >= set(keys):
                means[trial] = fmean(tried[key] for key in keys)
        if means:
            chosen[network, method] = specs_of(settings, method)[min(means, key=means.get)]
    return chosen


def narrowed(jobs: Sequence[Job], only: Sequence[str] | None) -> list[Job]:
    """The jobs whose network, task and method are in ``only``, if it names any of the kind."""
    kept, unknown = list(jobs), set(only or ())
    for kind in ("network", "task", "method"):
        if names := {getattr(cell, kind) for cell, _ in jobs} & set(only or ()):
            kept = [job for job in kept if getattr(job[0], kind) in names]
            unknown -= names
    if unknown:
        raise typer.BadParameter(f"--only must name what can be run, got {sorted(unknown)}.")
    return kept


@lru_cache(maxsize=1)
def network_of(model: str, classes: int, seed: int) -> tuple[nn.Module, Any]:
    """A network and its tokenizer."""
    net = packaged_network(model)
    return load_for(net, classes, seed) if isinstance(net, str) else net


def results_of(jobs: Iterable[Job], settings: Settings, *, test: bool) -> Iterator[tuple]:
    """Each cell with its settings and result; those that share a training follow one another."""
    methods = settings["methods"]

    def training(job: Job) -> tuple[Any, ...]:
        cell, spec = job
        base = methods[cell.method].get("of", cell.method)
        return *cell._replace(method=base), json.dumps(spec, sort_keys=True)

    for (*key, _), group in groupby(sorted(jobs, key=training), key=training):
        cells, (spec, *_) = zip(*group, strict=True)
        base = Cell(*key)  # of the method that is trained
        kinds = [methods[cell.method].get("kind") for cell in cells]
        rows = [f"{kind}:{base.method}" if kind else base.method for kind in kinds]
        for result in train(rows, base, spec, settings, test=test):
            yield cells[rows.index(result.row)], spec, result


def train(
    rows: Sequence[str], cell: Cell, spec: Settings, settings: Settings, *, test: bool
) -> Iterator[Result]:
    """The results of cells that share one training; the items are the same for every method."""
    settings = settings | settings["networks"][cell.network]

    def task_of(name: str) -> Task:
        limits = {"max_train": cell.max_train, "max_validation": settings["max_validation"]}
        return load_task(name, data_dir=settings["data_dir"], seed=cell.seed, **limits)

    def tested(task: Task) -> list[Item]:  # the same items for every cell
        items = list(task.test)
        random.Random(0).shuffle(items)
        return items[: settings["max_test"]]

    task = task_of(cell.task)
    head = (len(task.test[0].choices), cell.seed) if settings["model"] == "minilm" else (0, 0)
    net, tokenizer = network_of(settings["model"], *head)
    collate = task.collator(tokenizer, 64 if is_classifier(net) else 512, net)
    data: dict[str, Any] = {"validation": (task.validation, collate)}
    if test:
        data["test"] = (tested(task), collate)
        for other in map(task_of, settings["out_of_distribution"].get(cell.task, [])):
            items = tested(other)[: settings["max_out_of_distribution"]]
            data[other.name] = (items, other.collator(tokenizer))
    method, blocks = KNOWN[spec.get("method", cell.method)], settings["blocks"]
    parts = {
        part: type(template)(**{**template.options(), **spec.get(part, {})})
        for part, template in (("prior", method.prior), ("guide", method.guide))
    }
    entries = [entry(row, [replace(method, name=cell.method, **parts)]) for row in rows]
    layers = list(range(net.config.num_hidden_layers))[-blocks:] if blocks else None
    how = {key: settings[key] for key in ("num_samples", "rank", "target_modules", "batch_size")}
    how |= {"validate_every": settings["best_every"], "layers_to_transform": layers}
    how["num_steps"] = 0 if cell.method == "zero-shot" else cell.steps * spec.get("passes", 1)
    how |= {"collate": collate, "data": data, "seed": cell.seed}
    yield from train_and_score(net, task, entries, **how, **spec.get("fit", {}))


def save_probabilities(cell: Cell, result: Result, file: Path) -> None:
    arrays = dict(np.load(file)) if file.exists() else {}
    for name, (prediction, labels) in result.predictions.items():
        mutual = prediction.mutual_information
        found = {"probs": prediction.probs, "labels": labels, "epistemic": mutual}
        arrays |= {f"{cell}/{name}/{kind}": tensor.numpy() for kind, tensor in found.items()}
    write_file(file, lambda path: np.savez_compressed(path, **arrays))


def tune(settings: Settings, out: Path, only: Sequence[str] | None) -> None:
    lines = Cells(out / "trials.jsonl")
    pairs = product(settings["development"]["networks"], settings["methods"])
    jobs = narrowed([job for pair in pairs for job in chain(*trials_of(settings, *pair))], only)
    done = {trial_key(line, spec_in(line)) for line in lines}
    new = [(c, spec) for c, spec in jobs if trial_key(c._asdict(), spec) not in done]
    for cell, spec, result in results_of(new, settings, test=False):
        lines.add({**cell._asdict(), "settings": spec, **result.metrics["validation"]})
        print(f"{cell}, {spec}: {result.metrics['validation']}", flush=True)


def run(settings: Settings, out: Path, only: Sequence[str] | None) -> None:
    lines, jobs = Cells(out / "cells.jsonl"), {}
    chosen = chosen_specs(settings, Cells(out / "trials.jsonl"))
    for sweep in settings["sweeps"].values():
        sweep = {"methods": settings["methods"], **sweep}
        sweep["max_train"] = [sweep.get("max_train", settings["max_train"])]
        kinds = ("networks", "tasks", "max_train", "steps", "methods", "seeds")
        for cell in starmap(Cell, product(*(sweep[kind] for kind in kinds))):
            jobs[cell] = chosen.get((cell.network, cell.method), specs_of(settings, cell.method)[0])
    jobs = dict(narrowed([*jobs.items()], only))
    there = {Cell(*(line[k] for k in Cell._fields)): spec_in(line) for line in lines}
    print(f"{len(jobs)} cells, {len(jobs.keys() & there.keys())} of them there")
    usual = {c.method for c in jobs if (c.network, c.method) not in chosen}
    if usual := sorted(method for method in usual if specs_of(settings, method)[1:]):
        print(f"At their usual rates, because trials of them are missing: {usual}")
    if old := [str(cell) for cell, spec in jobs.items() if there.get(cell, spec) != spec]:
        print(f"Run with other settings than now; delete their lines to run them again: {old}")
    new = [job for job in jobs.items() if job[0] not in there]
    for cell, spec, result in results_of(new, settings, test=True):
        # The line comes last, because it says that the probabilities are there
        save_probabilities(cell, result, out / "probabilities.npz")
        line = {**cell._asdict(), "settings": spec, "passes": result.passes}
        line["metrics"] = dict(result.metrics)
        line |= {"seconds": round(result.fitted.seconds, 1), "precision": choose_precision("auto")}
        lines.add(line)
        print(f"{cell}: {result.metrics['test']}", flush=True)


@app.command(help=__doc__)
def main(
    what: Literal["tune", "run", "report"],
    config: Annotated[Path, typer.Option(help="The settings.")] = HERE / "calibration.yaml",
    data_dir: Annotated[str | None, typer.Option(help="The tasks; default: the hub.")] = None,
    out: Annotated[Path, typer.Option(help="Results.")] = HERE / "results" / "calibration",
    only: Annotated[list[str] | None, typer.Option(help="Networks, methods or tasks.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few items and steps.")] = False,
) -> None:
    settings = read_settings(config, data_dir, smoke)
    if what == "report":
        apart = settings["sweeps"].get("cannot", {}).get("tasks", [])
        return write_report(Cells(out / "cells.jsonl"), out, apart)
    (tune if what == "tune" else run)(settings, out, only)


if __name__ == "__main__":
    app()
