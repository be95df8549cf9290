"""The default with one setting changed at a time: how far its test NLL depends on each.

    python benchmarks/hyperparameters.py --model minilm --data-dir DATA

`minilm` is a folder with all-MiniLM-L6-v2. A training that is in `cells.jsonl` is not run again.
No default was chosen by these test items.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from calibration_report import BLUE, markdown
from matplotlib.figure import Figure

from pyro_blora import BayesianLoRA, load_task
from pyro_blora.evaluation.comparison import View, scored
from pyro_blora.evaluation.results import versions
from pyro_blora.files import write_file
from pyro_blora.inference import RATES
from pyro_blora.models import KroneckerInducing, LayerGroup
from pyro_blora.network.pretrained import load_for

OUT = Path(__file__).parent / "results" / "hyperparameters"
# The rate is the best of five on validation items, in results/calibration/trials.jsonl
LORA = {"method": "lora", "learning_rates": 1e-3}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # {} is the default
    "LoRA": {"": LORA},
    "LoRA, split": {"": {**LORA, "held_out": 0.125}},
    "training steps": {"100": {"num_steps": 100}, "300": {}, "900": {"num_steps": 900}},
    "draws": {"0": {}, "1": {}, "3": {}, "10": {}, "30": {}},  # of one training
    "rate of the means, times": {
        "1/3": {"learning_rates": RATES["mean"] / 3}, "1": {},
        "3": {"learning_rates": 3 * RATES["mean"]},
    },
    "rank": {"2": {"rank": 2}, "8": {}, "32": {"rank": 32}},
    "sigma, times": {"1/4": {"by": 1 / 4}, "1": {}, "4": {"by": 4}},
    "kl_weight": {"0.1": {"kl_weight": 0.1}, "1": {}, "3": {"kl_weight": 3}},
}  # fmt: skip
DEFAULT = ("draws", "10")
BY_DEFAULT = {"draws": "10", "training steps": "300", "rank": "8"}  # else "1"
PLACES = [(setting, value) for setting, values in SETTINGS.items() for value in values]
COLUMNS = {"acc": ("accuracy %", 100, 1), "nll": ("NLL", 1, 3), "ece": ("ECE %", 100, 1)}
COLUMNS |= {"gap": ("NLL minus the default's", 1, 3), "kl": ("KL, nats", 1, 0)}
COLUMNS |= {"mi": ("mutual information", 1, 4)}
RED = "#d9484a"
LINE: dict[str, Any] = {"color": BLUE, "capsize": 3}


class Scaled(KroneckerInducing):
    """The default prior, whose scales start at a multiple of the usual ones."""

    def __init__(self, *, rank: int = 8, by: float = 1.0) -> None:
        super().__init__(rank=rank)

    def setup(self, group: LayerGroup) -> None:
        """Multiplies what the prior has by default."""
        super().setup(group)
        self.sigma_ = self.by * self.sigma_start


def trained(net: Any, tokenizer: Any, task: Any, setting: str, value: str, seed: int) -> list[Any]:
    """The cells of one training: of the default's, one for each number of draws."""
    how: dict[str, Any] = {"num_steps": 300, "method": "bayesian-lora"} | SETTINGS[setting][value]
    collate, method = task.collator(tokenizer, net=net), how.pop("method")
    is_lora = method == "lora"
    prior = None if is_lora else Scaled(rank=how.pop("rank", 8), by=how.pop("by", 1.0))
    torch.manual_seed(seed)
    blora = BayesianLoRA(net, method=method, prior=prior, likelihood=task.likelihood(collate))
    views = {value: View("last", 0 if is_lora else 10)}
    if setting == "draws":
        views = {count: View("last", int(count)) for count in SETTINGS["draws"]}
    how |= {"collate": collate, "data": {"test": (task.test, collate)}, "seed": seed}
    cells = []
    for result in scored(blora, task, views=views, **how):
        metrics, (prediction, _) = result.metrics["test"], result.predictions["test"]
        mutual = prediction.mutual_information.mean() if prediction.num_samples > 1 else 0
        cell = {"task": task.name, "seed": seed, "setting": setting, "value": result.row}
        cell |= {name: getattr(metrics, name) for name in ("acc", "nll", "ece")}
        cell |= {"kl": result.fitted.history[-1]["kl"], "mi": float(mutual)}
        print(cell, flush=True)
        cells.append({**cell, "seconds": round(result.fitted.seconds), "versions": versions()})
    return cells


def of(cells: list[Any], setting: str, value: str, column: str) -> tuple[float, float]:
    """The mean over seeds and its standard error; the default's is that of its ten draws."""
    place = (setting, value) if SETTINGS[setting][value] or setting == "draws" else DEFAULT
    found = {at: [c for c in cells if (c["setting"], c["value"]) == at] for at in (place, DEFAULT)}
    values = [cell["nll" if column == "gap" else column] for cell in found[place]]
    if column == "gap":
        values = [own - c["nll"] for own, c in zip(values, found[DEFAULT], strict=True)]
    return mean(values), stdev(values) / len(values) ** 0.5 if values[1:] else 0.0


def report(cells: list[Any]) -> str:
    """A table for each task."""
    lines = ["# Hyperparameters", "", "Mean ± standard error over seeds; 300 steps and 10 draws."]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own, rows = [cell for cell in cells if cell["task"] == task], []
        for place in PLACES:
            rows.append([*place])
            for column, (_, factor, digits) in COLUMNS.items():
                middle, error = (factor * part for part in of(own, *place, column))
                told = f"{middle:.{digits}f} ± {error:.{digits}f}"
                rows[-1].append("" if column in ("kl", "mi") and "LoRA" in place[0] else told)
        lines += ["", f"## minilm: {task}, one setting changed", ""]
        lines += [f"{len({cell['seed'] for cell in own})} seeds.", ""]
        lines += markdown(["setting", "value", *(title for title, _, _ in COLUMNS.values())], rows)
    return "\n".join(lines) + "\n"


def picture(cells: list[Any]) -> Figure:
    """The NLL by the value of each setting, beside LoRA's."""
    figure = Figure(figsize=(4.6, 5.8), layout="constrained")
    panels = figure.subplots(3, 2, sharey=True).flat
    for axes, (setting, values) in zip(panels, list(SETTINGS.items())[2:], strict=True):
        middles, errors = zip(*(of(cells, setting, at, "nll") for at in values), strict=True)
        axes.errorbar(range(len(values)), middles, errors, fmt="o-", mfc="white", **LINE)
        at = list(values).index(BY_DEFAULT.get(setting, "1"))
        axes.plot(at, middles[at], "o", color=BLUE, markersize=8, zorder=3, label="default")
        for rival, dash in {"LoRA": "--", "LoRA, split": ":"}.items():
            axes.axhline(of(cells, rival, "", "nll")[0], color=RED, linestyle=dash, label=rival)
        axes.set_xticks(range(len(values)), values)
        axes.set_xlabel(setting)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Four settings can spoil the default", fontsize=11)
    figure.supylabel("test NLL")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, columnspacing=1)
    return figure


def main(
    model: Annotated[str, typer.Option(help="all-MiniLM-L6-v2, as a folder or by its name.")],
    data_dir: Annotated[Path | None, typer.Option(help="The tasks' folders.")] = None,
    out: Path = OUT,
    tasks: str = "sst2",
    seeds: str = "0,1,2",
) -> None:
    """Trains what is missing, and writes the cells, the report and the picture."""
    file = out / "cells.jsonl"
    cells = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(c["task"], c["seed"], c["setting"], c["value"]) for c in cells}
    for name in tasks.split(","):
        for seed in map(int, seeds.split(",")):
            task = load_task(name, data_dir=data_dir, seed=seed, max_train=400, max_test=600)
            for place in PLACES:
                is_new = SETTINGS[place[0]][place[1]] or place == DEFAULT
                if is_new and (name, seed, *place) not in done:
                    pair = load_for(model, len(task.test[0].choices), seed)
                    cells += trained(*pair, task, *place, seed)
                    write_file(file, "".join(json.dumps(cell) + "\n" for cell in cells))
    write_file(out / "report.md", report(cells))
    figure, path = picture(cells), out / "figures" / "hyperparameters.png"
    write_file(path, lambda file: figure.savefig(file, dpi=160))


if __name__ == "__main__":
    typer.run(main)
