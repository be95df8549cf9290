"""Tables and figures of the calibration benchmark, from the saved probabilities of its cells."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from cells import Columns, markdown, mean_of, means
from matplotlib.figure import Figure
from torch import Tensor

from pyro_blora.evaluation.metrics import (
    auroc,
    ece_by_chance,
    error_of,
    evaluate,
    fit_temperature,
    item_scores,
    risk_coverage,
)
from pyro_blora.evaluation.plots import reliability_diagram, save_figure
from pyro_blora.files import write_file

COLUMNS: Columns = {
    "acc": ("ACC %", 100, 1),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE %", 100, 1),
    "chance": ("by chance %", 100, 1),
    "brier": ("Brier", 1, 3),
    "auroc": ("AUROC %", 100, 1),
    "aurc": ("AURC %", 100, 1),
}
TITLES = {"lora": "LoRA", "lora-split": "LoRA, split", "bayesian-lora": "BayesianLoRA(net)"}
OURS = "bayesian-lora"  # all others are compared with it
BLUE, RED = "#2f5f94", "#d9484a"
RIVALS = {
    "lora": ("LoRA", RED),
    "lora-split": ("LoRA, split", "#8c8c8c"),
    "temperature:lora": ("LoRA + temperature\n(200 more labels)", "#c9872b"),
}
WORDS = {"minilm": "MiniLM", "smollm2": "SmolLM2", "gemma": "Gemma", "ag_news": "AG News"}
WORDS |= {"sst2": "SST-2", "arc_easy": "ARC-Easy"}
HEAD = """# Calibration

Mean ± standard error over seeds, the lowest NLL first.

By chance: the ECE expected of a calibrated method with the same confidences.

Labels beside training: those of the task that the method reads. Those that chose the \
learning rates of the rivals, and all settings of the default, on the development tasks are not \
counted.
"""

Pair = tuple[Tensor, Tensor]  # probabilities, labels


class Run(dict[str, Pair]):
    """What a method predicts under one seed, by data set, and what that needs."""

    def __init__(self, data: Any, labels: int = 0, passes: int = 0, mutual: Any = None) -> None:
        super().__init__(data)
        self.labels, self.passes = labels, passes  # labels beside training
        self.mutual: dict[str, Tensor] = mutual or {}  # the mutual information of each item


Methods = Mapping[str, Mapping[int, Run]]  # by method and seed
Key = tuple[str, str, int, str]  # network, task, steps, training items
Runs = Mapping[Key, dict[str, dict[int, Run]]]


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of one set of predictions."""
    confidence, predicted = probs.max(-1)
    right = predicted == labels
    both = 0 < right.sum() < len(right)
    return {
        **asdict(evaluate(probs, labels)),
        "chance": ece_by_chance(probs),
        "auroc": auroc(confidence[~right], confidence[right]) if both else math.nan,
        "aurc": risk_coverage(-confidence, ~right)[2],
    }


def read_runs(cells: Iterable[Mapping[str, Any]], out: Path) -> Runs:
    """The predictions of all cells, without and with a temperature."""
    arrays: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    with np.load(out / "probabilities.npz") as file:
        for path, array in file.items():
            name, data, kind = path.split("/")
            arrays[name][kind][data] = torch.from_numpy(array)
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        kinds = ("network", "task", "max_train", "steps", "method", "seed")
        network, task, items, steps, method, seed = (cell[kind] for kind in kinds)
        found = arrays["-".join(str(cell[kind]) for kind in kinds)]
        labels, methods = found["labels"], runs[network, task, steps, str(items)]
        scale = fit_temperature(found["probs"]["validation"].log(), labels["validation"])
        count, passes = len(labels["validation"]), cell["passes"]
        pairs = {data: (probs, labels[data]) for data, probs in found["probs"].items()}
        scaled = {data: ((p.log() / scale).softmax(-1), y) for data, (p, y) in pairs.items()}
        beside = count if method.endswith("-best") else 0
        methods[method][seed] = Run(pairs, beside, passes, found["epistemic"])
        methods[f"temperature:{method}"][seed] = Run(scaled, count, passes)
    return runs


def uniform(run: Run) -> Run:
    """What a method without parameters predicts, which gives every option the same probability."""
    return Run({d: ((p > 0) / (p > 0).sum(-1, keepdim=True), y) for d, (p, y) in run.items()})


def summary(runs: Runs) -> Iterator[str]:
    """Means over the tasks of each setting, for the methods that have run on all of them."""
    for network, steps, count in sorted({(key[0], *key[2:]) for key in runs}):
        keys = sorted(key for key in runs if (key[0], *key[2:]) == (network, steps, count))
        tasks = {key[1]: runs[key] for key in keys}
        if len(tasks) < 2:
            continue
        pooled: dict[str, dict[int, Run]] = {}
        for method in sorted(set.intersection(*map(set, tasks.values()))):
            found = {task: methods[method] for task, methods in tasks.items()}
            for seed in set.intersection(*map(set, found.values())):
                each = {task: own[seed] for task, own in found.items()}
                needs = [(run.labels, run.passes) for run in each.values()]
                run = Run({task: run["test"] for task, run in each.items()}, *max(needs))
                pooled.setdefault(method, {})[seed] = run
        several = {name: seeds for name, seeds in pooled.items() if len(seeds) > 1}
        first = {name: {0: seeds[0]} for name, seeds in pooled.items() if 0 in seeds}
        title = f"## {network}: mean over {', '.join(tasks)}"
        yield from (f"{title}, {count} training items, {steps} steps", "")
        yield from [*table(several, *tasks), ""] if several else []
        yield from ("Of seed 0 alone, so that all are of the same items:", "")
        yield from (*table(first, *tasks), "")
        yield from ("ACC %, NLL and ECE % of each task, mean over the seeds that have run:", "")
        yield from (*each_task({task: (methods, "test") for task, methods in tasks.items()}), "")
        yield from (*paired(pooled, *tasks), "")


def table(methods: Methods, *data: str) -> list[str]:
    """Means over data sets, with the mean and standard error over seeds, by method."""
    rows = []
    for name, seeds in methods.items():
        each = [[scores(*run[d]) for d in data] for run in seeds.values()]
        found = [{key: mean_of(own, key) for key in COLUMNS} for own in each]
        run = next(iter(seeds.values()))
        row = [name, run.labels, run.passes, len(found), *means(found, COLUMNS)]
        rows.append((mean_of(found, "nll"), row))
    head = ["method", "labels beside training", "passes", "seeds"]
    head += [title for title, _, _ in COLUMNS.values()]
    return markdown(head, [row for _, row in sorted(rows, key=lambda pair: pair[0])])


def each_task(columns: Mapping[str, tuple[Methods, str]]) -> list[str]:
    """Accuracy, NLL and ECE on a data set in each column, and the number of seeds."""
    rows = []
    for name in sorted({name for methods, _ in columns.values() for name in methods}):
        rows.append([name])
        for methods, data in columns.values():
            each = [scores(*run[data]) for run in methods.get(name, {}).values()]
            shown = ((key, *COLUMNS[key][1:]) for key in ("acc", "nll", "ece") if each)
            texts = [f"{factor * mean_of(each, key):.{digits}f}" for key, factor, digits in shown]
            rows[-1].append(f"{', '.join(texts)} ({len(each)})" if each else "")
    return markdown(["method", *columns], rows)


def differences(ours: Mapping[int, Run], other: Mapping[int, Run], data: str) -> Tensor:
    """The scores of one method's items minus another's on a data set, seeds x 3 x items."""
    seeds = sorted(s for s in ours.keys() & other.keys() if data in ours[s] and data in other[s])
    found = [item_scores(*ours[seed][data]) - item_scores(*other[seed][data]) for seed in seeds]
    return torch.stack(found) if found else torch.empty(0)


def paired(methods: Methods, *data: str) -> list[str]:
    """The NLL, Brier score and ECE of the default minus those of each other method.

    They are means over the data sets and over the seeds that both methods have. The first error is
    over items, after the differences of an item are averaged over seeds; the second is over seeds.
    """
    rows = []
    for name in set(methods) - {OURS} if OURS in methods else ():
        gaps = [differences(methods[OURS], methods[name], d) for d in data]
        if not len(gaps[0]):
            continue
        each = torch.stack([gap.mean(-1) for gap in gaps]).mean(0)
        errors = sum(gap.mean(0).var(-1) / gap.shape[-1] for gap in gaps).sqrt() / len(data)
        row = [f"{m:+.4f} ± {e:.4f}" for m, e in zip(each.mean(0), errors, strict=True)]
        if len(each) > 1:
            spread = each.std(0) / len(each) ** 0.5
            row = [f"{text} ± {e:.4f}" for text, e in zip(row, spread, strict=True)]
        rows.append((float(each[:, 0].mean()), [name, str(len(each)), *row]))
    head = [f"`{OURS}` less", "seeds", "NLL ± items ± seeds", "Brier", "ECE"]
    return markdown(head, (row for _, row in sorted(rows, reverse=True))) if rows else []


def doubts(run: Run) -> dict[str, dict[str, Tensor]]:
    """The doubts about the items of a run, in nats, by kind and data set.

    Only items with as many options as the first test item count, because more options mean more
    entropy. The mutual information is left out if it is zero, as for a point estimate.
    """
    found: dict[str, dict[str, Tensor]] = {"entropy": {}, "mutual information": {}}
    options = int((run["test"][0][0] > 0).sum())
    for data, (probs, _) in run.items():
        alike = (probs > 0).sum(1) == options
        if bool(alike.any()):
            found["entropy"][data] = torch.special.entr(probs[alike].double()).sum(1)
            mutual = run.mutual.get(data, torch.zeros(len(alike)))[alike].double()
            if bool((mutual > 0).any()):
                found["mutual information"][data] = mutual
    return found


def told_apart(methods: Methods, sets: Sequence[str]) -> list[str]:
    """A table of the AUROC in % of each doubt for the items of other sets against the test items.

    It has means over seeds; the last column is the mean over sets with its standard error over
    seeds. 50 is chance, and below it the other items are doubted less.
    """
    rows: list[tuple[float, str]] = []
    for (method, seeds), kind in product(methods.items(), ("entropy", "mutual information")):
        each = [doubts(run)[kind] for run in seeds.values()]
        found = [
            {d: 100 * auroc(own["test"], own[d]) for d in sets}
            for own in each
            if own.keys() >= {"test", *sets}
        ]
        if found:
            runs = [{**run, "mean": fmean(run.values())} for run in found]
            row = [method, kind, str(len(runs)), *(f"{mean_of(runs, d):.1f}" for d in sets)]
            row += means(runs, {"mean": ("mean", 1, 1)})
            rows.append((-mean_of(runs, "mean"), " | ".join(row)))
    head = ["method", "doubt", "seeds", *sets, "mean"]
    return markdown(head, ([row] for _, row in sorted(rows)))


def main_tasks(runs: Runs) -> Runs:
    """The tasks of the commonest setting on which the default and all of ``RIVALS`` ran.

    The first is the one on which LoRA's NLL is the farthest above the default's.
    """
    found = {key: methods for key, methods in runs.items() if {*RIVALS, OURS} <= methods.keys()}
    settings = [key[2:] for key in found]
    main = {key: own for key, own in found.items() if key[2:] == max(settings, key=settings.count)}
    return dict(sorted(main.items(), key=lambda item: -float(gaps_to(item[1], "lora").mean())))


def gaps_to(methods: Methods, rival: str, data: str = "test") -> Tensor:
    """The NLL of a rival's items minus the default's, seeds x items."""
    return differences(methods[rival], methods[OURS], data)[:, 0]


def draw_reliability(tasks: Runs, network: str, path: Path) -> None:
    """Reliability diagrams of a network, which pool all seeds and its tasks."""

    def pooled(name: str) -> Pair:
        runs = [own[name].values() for key, own in tasks.items() if key[0] == network]
        probs, labels = zip(*(run["test"] for run in chain(*runs)), strict=True)
        most = max(p.shape[1] for p in probs)  # a missing option has probability 0
        pad = torch.nn.functional.pad
        return torch.cat([pad(p, (0, most - p.shape[1])) for p in probs]), torch.cat(labels)

    if any(key[0] == network for key in tasks):
        save_figure(reliability_diagram({t: pooled(name) for name, t in TITLES.items()}), path)


def draw_panels(axis: Any, tasks: Runs) -> None:
    """How far the test NLL of each rival lies above that of the default, task by task.

    Bars are 95 % intervals, thick ones over items and thin ones over items and seeds.
    """
    rows = list[str]()
    axis.axvline(0, color=BLUE, linewidth=2)
    bold: dict[str, Any] = {"color": BLUE, "ha": "center", "fontweight": "bold"}
    axis.text(0, -0.58, f"{TITLES[OURS]}, the default", **bold)
    for (network, task, *_), methods in tasks.items():
        for k, (name, (title, color)) in enumerate(RIVALS.items()):
            gaps = gaps_to(methods, name)
            mean, row = float(gaps.mean()), len(rows) + 0.24 * (k - 1)
            for sampled, width in (gaps.mean(0, keepdim=True), 3.5), (gaps, 1.2):
                error = 2 * float(error_of(sampled))
                axis.plot([mean - error, mean + error], [row, row], color=color, linewidth=width)
            axis.plot(mean, row, "o", color=color, label=None if rows else title)
        nll = fmean(scores(*run["test"])["nll"] for run in methods[OURS].values())
        where = f"{WORDS.get(network, network)}, {WORDS.get(task, task)}"
        rows.append(f"{where}\n(default: {nll:.3f})")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("test NLL above the default's (nats)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axis.legend(loc="lower right", frameon=False, handletextpad=0)


def sections(runs: Runs) -> Iterator[str]:
    """Each task with each setting, and what its adapters answer to the questions of other sets."""
    for (network, task, steps, count), methods in sorted(runs.items()):
        title = f"{network}: {task}, {count} training items, {steps} steps"
        items = len(next(iter(next(iter(methods.values())).values()))["test"][1])
        yield from (f"## {title}", "", f"{items} items.", "", *table(methods, "test"))
        yield from ("", *paired(methods, "test"), "")
        met = [set(run) for seeds in methods.values() for run in seeds.values() if len(run) > 2]
        if not met or not (away := sorted(set.intersection(*met) - {"test", "validation"})):
            continue
        asked: dict[str, dict[int, Run]] = {}
        for method, seeds in methods.items():
            if kept := {seed: run for seed, run in seeds.items() if run.keys() >= {*away}}:
                asked[method] = kept
        yield from (f"## {title}: asked of other sets", "", f"Mean of {', '.join(away)}:", "")
        yield from (*table(asked, *away), "", *paired(asked, *away), "")
        yield from ("ACC %, NLL and ECE %:", "", *each_task({d: (asked, d) for d in away}), "")
        yield from ("Told from the task's own, AUROC %:", "", *told_apart(asked, away), "")


def write_report(cells: Collection[Mapping[str, Any]], out: Path, apart: Collection[str]) -> None:
    """Writes ``report.md``, a reliability diagram of SmolLM2, and a picture of all tasks.

    Tasks that stand ``apart`` are compared with a uniform answer, and are in no mean of other
    tasks.
    """
    runs = read_runs(cells, out)
    for key, methods in runs.items():
        if key[1] in apart:
            seeds = next(iter(methods.values()))
            methods["uniform"] = {seed: uniform(run) for seed, run in seeds.items()}
    learned = {key: methods for key, methods in runs.items() if key[1] not in apart}
    text = [HEAD, *summary(learned), *sections(runs)]
    versions = {json.dumps(cell["versions"], sort_keys=True) for cell in cells}
    text += ["Versions: " + "; ".join(sorted(versions)), ""]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    if tasks := main_tasks(learned):
        draw_reliability(tasks, "smollm2", out / "figures" / "smollm2.png")
        figure = Figure(figsize=(5, 3.8), dpi=200, layout="constrained")
        draw_panels(figure.subplots(), tasks)
        write_file(out / "figures" / "panels.png", figure.savefig)
