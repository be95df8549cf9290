"""The default with one setting changed at a time: how far its test NLL depends on each.

    python benchmarks/hyperparameters.py --model minilm --data-dir DATA

`minilm` is a folder with all-MiniLM-L6-v2. A training that is in `cells.jsonl` is not run again.
No default was chosen by these test items.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cells import BLUE, RED, Cells, Columns, error_of_mean, markdown, mean_of, means, titles
from matplotlib.figure import Figure

from pyro_blora import BayesianLoRA, load_task
from pyro_blora.checkpoints.files import write_file
from pyro_blora.data import Task
from pyro_blora.evaluation.comparison import View, scored
from pyro_blora.inference import RATES
from pyro_blora.models import KroneckerInducing
from pyro_blora.network.pretrained import load_for

TASK, SEEDS, STEPS = "sst2", (0, 1, 2), 300
# The rate was the best of five on validation items
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
COLUMNS: Columns = {"acc": ("accuracy %", 100, 1), "nll": ("NLL", 1, 3), "ece": ("ECE %", 100, 1)}
COLUMNS |= {"gap": ("NLL minus the default's", 1, 3), "kl": ("KL, nats", 1, 0)}
COLUMNS |= {"mi": ("mutual information", 1, 4)}


def trained(net: Any, tokenizer: Any, task: Task, setting: str, value: str, seed: int) -> Iterator:
    """The cells of one training: of the default's, one for each number of draws."""
    how = {"num_steps": STEPS, "method": "bayesian-lora", "rank": 8, "by": 1}
    how |= SETTINGS[setting][value]
    method, rank, by = how.pop("method"), how.pop("rank"), how.pop("by")
    collate = task.collator(tokenizer, net=net)
    torch.manual_seed(seed)
    blora = BayesianLoRA(net, method=method, rank=rank, likelihood=task.likelihood(collate))
    for prior in blora.model.children():
        if isinstance(prior, KroneckerInducing):
            prior.sigma_ = by * prior.sigma_start
    views = {value: View("last", 0 if "LoRA" in setting else 10)}
    if setting == "draws":
        views = {count: View("last", int(count)) for count in SETTINGS["draws"]}
    how |= {"collate": collate, "data": {"test": (task.test, collate)}, "seed": seed}
    for result in scored(blora, task, views=views, **how):
        metrics, (prediction, _) = result.metrics["test"], result.predictions["test"]
        mutual = prediction.mutual_information.mean() if prediction.num_samples > 1 else 0
        cell = {"task": task.name, "seed": seed, "setting": setting, "value": result.row}
        cell |= {name: getattr(metrics, name) for name in ("acc", "nll", "ece")}
        cell |= {"kl": result.fitted.history[-1]["kl"], "mi": float(mutual)}
        print(cell, flush=True)
        yield {**cell, "seconds": round(result.fitted.seconds)}


def of(cells: list[Any], setting: str, value: str) -> list[dict[str, Any]]:
    """The cells of a value, with the NLL's difference from the default's, that of ten draws."""
    place = (setting, value) if SETTINGS[setting][value] or setting == "draws" else DEFAULT
    usual = {c["seed"]: c["nll"] for c in cells if (c["setting"], c["value"]) == DEFAULT}
    found = [cell for cell in cells if (cell["setting"], cell["value"]) == place]
    return [{**cell, "gap": cell["nll"] - usual[cell["seed"]]} for cell in found]


def report(cells: list[Any]) -> str:
    rows = []
    for setting, value in PLACES:
        columns = {k: v for k, v in COLUMNS.items() if "LoRA" not in setting or k[0] not in "km"}
        row = [setting, value, *means(of(cells, setting, value), columns)]
        rows.append(row + [""] * (len(COLUMNS) - len(columns)))
    lines = ["# Hyperparameters", "", "Mean ± standard error over seeds; 300 steps and 10 draws."]
    lines += ["", f"## minilm: {TASK}, one setting changed", ""]
    lines += [f"{len({cell['seed'] for cell in cells})} seeds.", ""]
    return "\n".join([*lines, *markdown(["setting", "value", *titles(COLUMNS)], rows), ""])


def picture(cells: list[Any]) -> Figure:
    figure = Figure(figsize=(4.6, 5.8), layout="constrained")
    panels = figure.subplots(3, 2, sharey=True).flat
    for axes, (setting, values) in zip(panels, list(SETTINGS.items())[2:], strict=True):
        found = [of(cells, setting, value) for value in values]
        nlls, errors = ([f(runs, "nll") for runs in found] for f in (mean_of, error_of_mean))
        line: dict[str, Any] = {"fmt": "o-", "mfc": "white", "color": BLUE, "capsize": 3}
        axes.errorbar(range(len(values)), nlls, errors, **line)
        at = list(values).index(BY_DEFAULT.get(setting, "1"))
        axes.plot(at, nlls[at], "o", color=BLUE, markersize=8, zorder=3, label="default")
        for rival, dash in {"LoRA": "--", "LoRA, split": ":"}.items():
            level = mean_of(of(cells, rival, ""), "nll")
            axes.axhline(level, color=RED, linestyle=dash, label=rival)
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
    out: Path = Path(__file__).parent / "results" / "hyperparameters",
) -> None:
    """Trains what is missing, and writes the cells, the report and the picture."""
    cells = Cells(out / "cells.jsonl")
    for seed in SEEDS:
        task = load_task(TASK, data_dir=data_dir, seed=seed, max_train=400, max_test=600)
        for setting, value in PLACES:
            is_new = SETTINGS[setting][value] or (setting, value) == DEFAULT
            if is_new and not cells.has(seed=seed, setting=setting, value=value):
                pair = load_for(model, len(task.test[0].choices), seed)
                for cell in list(trained(*pair, task, setting, value, seed)):
                    cells.add(cell)
    write_file(out / "report.md", report(cells))
    write_file(out / "figures" / "hyperparameters.png", partial(picture(cells).savefig, dpi=160))


if __name__ == "__main__":
    typer.run(main)
