"""Tables and figures of the benchmark of methods, from its cells."""

import base64
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import BLUE, RED, Columns, markdown, mean_of, means
from matplotlib.figure import Figure
from torch import Tensor

from pyro_blora.checkpoints.files import write_file
from pyro_blora.evaluation.metrics import error_of

OURS, LORA = "bayesian-lora", "lora"
RIVALS = {LORA: ("LoRA", RED), "lora-split": ("LoRA, split", "#8c8c8c"), "map": ("MAP", "#c9872b")}
WORDS = {"minilm": "MiniLM", "smollm2": "SmolLM2", "gemma": "Gemma", "ag_news": "AG News"}
WORDS |= {"sst2": "SST-2", "arc_easy": "ARC-Easy"}
COLUMNS: Columns = {"nll": ("NLL", 1, 3), "brier": ("Brier", 1, 3), "acc": ("ACC %", 100, 1)}
COLUMNS |= {"ece": ("ECE %", 100, 1), "chance": ("by chance %", 100, 1)}
HEAD = """# Methods

Mean ± standard error over seeds, the lowest NLL first; a rate with `split` has a temperature from \
an eighth of the training items. By chance: the ECE expected of a calibrated method with the same \
confidences. Sure and wrong: the wrong answers among those of 95 % or more, of all seeds. \
Difference: the NLL minus the default's, ± its standard error over items, and that over items and \
seeds, widened by Student's t so that twice it is a 95 % interval. \
Trials: the settings tried on validation items.
"""

Cell = Mapping[str, Any]
Rows = dict[str, list[Cell]]  # the cells of a method, one for each seed


def rows_of(cells: Collection[Cell], network: str, task: str) -> Rows:
    """The latest test cell of each seed, by method."""
    place = {"network": network, "task": task, "items": "test"}
    found = {(c["method"], c["seed"]): c for c in cells if {**c, **place} == c}
    rows: Rows = {}
    for (method, _), cell in sorted(found.items()):
        rows.setdefault(method, []).append(cell)
    return rows


def nlls(cell: Cell) -> Tensor:
    items = np.frombuffer(base64.b64decode(cell["nlls"]), dtype="<f2")
    return torch.from_numpy(items.astype("f8"))


def gap(rows: Rows, method: str) -> Tensor:
    """The NLL of a method's items minus the default's, of the seeds that both have, S x n."""
    ours = {cell["seed"]: cell for cell in rows[OURS]}
    pairs = [(cell, ours[cell["seed"]]) for cell in rows[method] if cell["seed"] in ours]
    return torch.stack([nlls(cell) - nlls(base) for cell, base in pairs])


def difference(gaps: Sequence[Tensor]) -> str:
    """The mean over tasks, with the errors over items and over items and seeds."""
    mean = float(torch.stack([each.mean() for each in gaps]).mean())
    sampled = [(each.mean(0, keepdim=True), each) for each in gaps]
    errors = [
        sum(float(error_of(pair[k])) ** 2 for pair in sampled) ** 0.5 / len(gaps) for k in (0, 1)
    ]
    return f"{mean:+.3f} ± {errors[0]:.3f} ± {errors[1]:.3f}"


def setting(cell: Cell) -> str:
    parts = dict(cell["setting"])
    rate, split = parts.pop("rate", None), parts.pop("split", False)
    texts = [f"{rate:.0e}"] if rate else []
    texts += ["split"] if split else []
    return ", ".join([*texts, *(f"{k}={v}" for p in parts.values() for k, v in p.items())])


def table(cells: Collection[Cell], network: str, task: str, rows: Rows) -> Iterator[str]:
    """A row for each method."""
    key = {"network": network, "task": task, "items": "validation"}
    tried = {(c["method"], json.dumps(c["setting"])) for c in cells if {**c, **key} == c}
    lines = []
    for method, runs in rows.items():
        line = [
            method,
            setting(runs[0]),
            sum(name == method for name, _ in tried),
            len(runs),
            *means(runs, COLUMNS),
        ]
        line += [f"{sum(r['sure_wrong'] for r in runs)} of {sum(r['sure'] for r in runs)}"]
        away = [{"auroc": r["auroc"]["entropy"]} for r in runs if r["auroc"]]
        line += means(away, {"auroc": ("AUROC", 100, 1)}) if away else [""]
        line += [runs[0]["passes"], runs[0]["numbers"]]
        line += ["" if method == OURS or OURS not in rows else difference([gap(rows, method)])]
        lines.append((mean_of(runs, "nll"), line))
    head = ["method", "setting", "trials", "seeds", *(title for title, _, _ in COLUMNS.values())]
    head += ["sure and wrong", "AUROC % out of scope", "passes", "numbers", "difference"]
    yield from markdown(head, [line for _, line in sorted(lines, key=lambda pair: pair[0])])


def summary(tasks: Mapping[str, Rows]) -> Iterator[str]:
    """Means over the tasks of a network, of the methods that ran on all of them."""
    lines = []
    for method in set.intersection(*map(set, tasks.values())):
        every = [cell for rows in tasks.values() for cell in rows[method]]
        gaps = [gap(rows, method) for rows in tasks.values()] if method != OURS else []
        sure = f"{sum(c['sure_wrong'] for c in every)} of {sum(c['sure'] for c in every)}"
        line = [method, *(f"{f * mean_of(every, k):.{d}f}" for k, (_, f, d) in COLUMNS.items())]
        passes = " to ".join(map(str, sorted({cell["passes"] for cell in every})))  # by classes
        line += [sure, passes, difference(gaps) if gaps else ""]
        lines.append((mean_of(every, "nll"), line))
    head = ["method", *(title for title, _, _ in COLUMNS.values()), "sure and wrong", "passes"]
    yield from markdown([*head, "difference"], [line for _, line in sorted(lines)])


def draw_panels(axis: Any, tasks: Mapping[str, Rows]) -> None:
    """How far the test NLL of each rival lies above the default's, with 95 % intervals."""
    axis.axvline(0, color=BLUE, linewidth=2)
    for row, rows in enumerate(tasks.values()):
        for k, (name, (title, color)) in enumerate(RIVALS.items()):
            if name not in rows:
                continue
            gaps, at = gap(rows, name), row + 0.24 * (k - 1)
            mean = float(gaps.mean())
            # thick over items, and thin over items and seeds
            for sampled, width in (gaps.mean(0, keepdim=True), 3.5), (gaps, 1.2):
                error = 2 * float(error_of(sampled))
                axis.plot([mean - error, mean + error], [at, at], color=color, linewidth=width)
            label = None if title in axis.get_legend_handles_labels()[1] else title
            axis.plot(mean, at, "o", color=color, label=label)
    nlls = {title: mean_of(rows[OURS], "nll") for title, rows in tasks.items()}
    axis.set_yticks(range(len(tasks)), [f"{t}\n(default: {nll:.3f})" for t, nll in nlls.items()])
    axis.set(xlabel="test NLL above the default's (nats)", ylim=(len(tasks) - 0.5, -0.5))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axis.locator_params(axis="x", nbins=6)
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=3, frameon=False)


def draw_costs(axis: Any, rows: Rows, title: str) -> None:
    """The NLL of each method by the passes of a prediction."""
    for method, runs in rows.items():
        x, y = runs[0]["passes"], mean_of(runs, "nll")
        color = BLUE if method.endswith(OURS) else RED if method.startswith(LORA) else "#8c8c8c"
        axis.plot(x, y, "o", color=color)
        axis.annotate(method, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=6)
    axis.set(title=title, xlabel="passes of a prediction", ylabel="test NLL (nats)", xscale="log")


def draw_sure(axis: Any, rows: Rows, title: str) -> None:
    """The share of wrong answers among those of 95 % or more."""
    shares = {
        m: sum(r["sure_wrong"] for r in runs) / n
        for m, runs in rows.items()
        if (n := sum(r["sure"] for r in runs))
    }
    names = sorted(shares, key=lambda name: shares[name])
    colors = [BLUE if name == OURS else RED if name == LORA else "#b8b8b8" for name in names]
    axis.barh(names, [100 * shares[name] for name in names], color=colors)
    axis.axvline(5, color="black", linewidth=0.8)
    axis.tick_params(axis="y", labelsize=6)
    axis.set(title=title, xlabel="wrong among answers of 95 % or more, %")


def write_report(cells: Collection[Cell], settings: Mapping[str, Any], out: Path) -> None:
    """Writes the report and its figures."""
    text, drawn = [HEAD], []
    for network, where in settings["networks"].items():
        found = {task: rows_of(cells, network, task) for task in where["tasks"]}
        tasks = {task: rows for task, rows in found.items() if rows}
        rivaled = {task: rows for task, rows in tasks.items() if LORA in rows}
        if len(rivaled) > 1:
            text += [f"## {network}: mean over {', '.join(rivaled)}", "", *summary(rivaled), ""]
        for task, rows in tasks.items():
            spec = where["tasks"][task]
            developed = " of a task on which settings of the default were chosen"
            marked = developed if spec.get("development") else ""
            title = f"## {network}: {task}, {spec['rows']} training items, {spec['steps']} steps"
            text += [title, "", f"{len(nlls(next(iter(rows.values()))[0]))} items{marked}.", ""]
            text += [*table(cells, network, task, rows), ""]
            shown = f"{WORDS.get(network, network)}, {WORDS.get(task, task)}"
            drawn.append((shown, rows))
    versions = {json.dumps(cell["versions"], sort_keys=True) for cell in cells}
    text += ["Versions: " + "; ".join(sorted(versions)), ""]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    panels = Figure(figsize=(5, 4.6), dpi=200, layout="constrained")
    beside = {t: rows for t, rows in drawn if OURS in rows and RIVALS.keys() & rows.keys()}
    draw_panels(panels.subplots(), beside)
    write_file(out / "figures" / "panels.png", panels.savefig)
    for name, draw in (("costs", draw_costs), ("sure", draw_sure)):
        figure = Figure(figsize=(4.2 * len(drawn), 4.5), dpi=150, layout="constrained")
        for axis, (title, rows) in zip(
            figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True
        ):
            draw(axis, rows, title)
        write_file(out / "figures" / f"{name}.png", figure.savefig)
