"""Tables and figures of the calibration benchmark, from the saved probabilities of its cells."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from cells import Columns, markdown, mean_of, means, titles
from matplotlib.figure import Figure
from torch import Tensor

from pyro_blora.checkpoints.files import write_file
from pyro_blora.evaluation import metrics
from pyro_blora.evaluation.plots import reliability_diagram, save_figure
from pyro_blora.prediction import Prediction
from pyro_blora.scores import auroc, ece_by_chance, evaluate, item_scores

COLUMNS: Columns = {"acc": ("ACC %", 100, 1), "nll": ("NLL", 1, 3), "ece": ("ECE %", 100, 1)}
COLUMNS |= {"chance": ("by chance %", 100, 1), "brier": ("Brier", 1, 3)}
COLUMNS |= {"auroc": ("AUROC %", 100, 1), "aurc": ("AURC %", 100, 1)}
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
HEAD = (
    "# Calibration\n\nMean ± standard error over seeds, the lowest NLL first.\n\nBy chance: the "
    "ECE expected of a calibrated method with the same confidences.\n\nLabels beside training: "
    "those of the task that the method reads. Those that chose the learning rates of the rivals, "
    "and all settings of the default, on the development tasks are not counted.\n"
)

Pair = tuple[Tensor, Tensor]  # probabilities, labels


class Run(dict[str, Pair]):
    """What a method predicts under one seed, by data set, and what that needs."""

    def __init__(self, data: Any, labels: int = 0, passes: int = 0, mutual: Any = None) -> None:
        super().__init__(data)
        self.labels, self.passes = labels, passes  # labels beside training
        self.mutual: dict[str, Tensor] = mutual or {}  # the mutual information of each item


Methods = Mapping[str, Mapping[int, Run]]  # by method and seed
Runs = Mapping[Any, dict[str, dict[int, Run]]]  # by network, task, steps and training items


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    confidence, predicted = probs.max(-1)
    right, found = predicted == labels, evaluate(probs, labels)
    found["auroc"] = math.nan
    if 0 < right.sum() < len(right):
        found["auroc"] = auroc(confidence[~right], confidence[right])
    found["aurc"] = metrics.risk_coverage(-confidence, ~right)[2]
    return {**found, "chance": ece_by_chance(probs)}


def read_runs(cells: Iterable[Mapping[str, Any]], out: Path) -> Runs:
    arrays: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    with np.load(out / "probabilities.npz") as file:
        for path, array in file.items():
            name, data, kind = path.split("/")
            arrays[name][kind][data] = torch.from_numpy(array)
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        kinds = ("network", "task", "max_train", "steps", "method", "seed")
        network, task, items, steps, method, seed = key = tuple(cell[kind] for kind in kinds)
        found = arrays["-".join(map(str, key))]
        probs, labels, mutual = (found[kind] for kind in ("probs", "labels", "epistemic"))
        methods, passes = runs[network, task, steps, str(items)], cell["passes"]
        scale = metrics.fit_temperature(probs["validation"].log(), labels["validation"])
        scaled = {data: (p.log() / scale).softmax(-1) for data, p in probs.items()}
        pairs, others = ({d: (p[d], labels[d]) for d in labels} for p in (probs, scaled))
        count = len(labels["validation"])
        beside = count if method.endswith("-best") else 0
        methods[method][seed] = Run(pairs, beside, passes, mutual)
        methods[f"temperature:{method}"][seed] = Run(others, count, passes)
    return runs


def alike(run: Run) -> dict[str, Pair]:
    return {d: ((p > 0) / (p > 0).sum(-1, keepdim=True), y) for d, (p, y) in run.items()}


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
    head = ["method", "labels beside training", "passes", "seeds", *titles(COLUMNS)]
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
    seeds, score = sorted(ours.keys() & other.keys()), item_scores
    return torch.stack([score(*ours[s][data]) - score(*other[s][data]) for s in seeds])


def paired(methods: Methods, *data: str) -> list[str]:
    """The NLL, Brier score and ECE of the default minus those of each other method.

    They are means over the data sets and over the seeds that both methods have. The first error is
    over items, after the differences of an item are averaged over seeds; the second is over seeds.
    """
    rows, ours = [], methods.get(OURS, {})
    for name in [name for name in methods if name != OURS and ours.keys() & methods[name].keys()]:
        gaps = [differences(ours, methods[name], d) for d in data]
        each = torch.stack([gap.mean(-1) for gap in gaps]).mean(0)
        errors = sum(gap.mean(0).var(-1) / gap.shape[-1] for gap in gaps).sqrt() / len(data)
        row = [f"{m:+.4f} ± {e:.4f}" for m, e in zip(each.mean(0), errors, strict=True)]
        if len(each) > 1:
            spread = each.std(0) / len(each) ** 0.5
            row = [f"{text} ± {e:.4f}" for text, e in zip(row, spread, strict=True)]
        rows.append((float(each[:, 0].mean()), [name, str(len(each)), *row]))
    head = [f"`{OURS}` less", "seeds", "NLL ± items ± seeds", "Brier", "ECE"]
    return markdown(head, (row for _, row in sorted(rows, reverse=True))) if rows else []


def doubts(run: Run, kind: str) -> dict[str, Tensor]:
    """The doubts of a run, in nats, by data set; the mutual information if it has any."""
    found, options = {}, int((run["test"][0][0] > 0).sum())
    for data, (probs, _) in run.items():
        alike = (probs > 0).sum(1) == options  # because more options mean more entropy
        if kind == "entropy":
            found[data] = torch.special.entr(probs[alike].double()).sum(1)
        elif data in run.mutual and bool((run.mutual[data][alike] > 0).any()):
            found[data] = run.mutual[data][alike].double()
    return found


def told_apart(methods: Methods, sets: Sequence[str]) -> list[str]:
    """The AUROC in % of each doubt for the items of other sets, and at last the mean over sets."""
    rows: list[tuple[float, str]] = []
    for (method, seeds), kind in product(methods.items(), ("entropy", "mutual information")):
        each = [own for run in seeds.values() if {*sets} <= (own := doubts(run, kind)).keys()]
        runs = [{d: 100 * auroc(own["test"], own[d]) for d in sets} for own in each]
        runs = [{**run, "mean": fmean(run.values())} for run in runs]
        if runs:
            row = [method, kind, str(len(runs)), *(f"{mean_of(runs, d):.1f}" for d in sets)]
            row += means(runs, {"mean": ("mean", 1, 1)})
            rows.append((-mean_of(runs, "mean"), " | ".join(row)))
    return markdown(["method", "doubt", "seeds", *sets, "mean"], ([row] for _, row in sorted(rows)))


def main_tasks(runs: Runs) -> Runs:
    """The tasks of the commonest setting of the default and all rivals, LoRA's worst one first."""
    found = {key: methods for key, methods in runs.items() if {*RIVALS, OURS} <= methods.keys()}
    settings = [key[2:] for key in found]
    main = {key: own for key, own in found.items() if key[2:] == max(settings, key=settings.count)}
    return dict(sorted(main.items(), key=lambda item: -float(gaps_to(item[1], "lora").mean())))


def gaps_to(methods: Methods, rival: str, data: str = "test") -> Tensor:
    return differences(methods[rival], methods[OURS], data)[:, 0]


def draw_reliability(tasks: Runs, network: str, path: Path) -> None:
    pairs = {}
    for name, title in TITLES.items():
        runs = chain(*(own[name].values() for key, own in tasks.items() if key[0] == network))
        if found := [(Prediction(run["test"][0][None]), run["test"][1]) for run in runs]:
            predictions, labels = zip(*found, strict=True)
            pairs[title] = Prediction.cat(predictions).probs, torch.cat(labels)
    if pairs:
        save_figure(reliability_diagram(pairs), path)


def draw_panels(axis: Any, tasks: Runs) -> None:
    """How far the test NLL of each rival lies above the default's, with 95 % intervals."""
    rows: list[str] = []
    axis.axvline(0, color=BLUE, linewidth=2)
    bold: dict[str, Any] = {"color": BLUE, "ha": "center", "fontweight": "bold"}
    axis.text(0, -0.58, f"{TITLES[OURS]}, the default", **bold)
    for (network, task, *_), methods in tasks.items():
        for k, (name, (title, color)) in enumerate(RIVALS.items()):
            gaps = gaps_to(methods, name)
            mean, row = float(gaps.mean()), len(rows) + 0.24 * (k - 1)
            # thick over items, and thin over items and seeds
            for sampled, width in (gaps.mean(0, keepdim=True), 3.5), (gaps, 1.2):
                error = 2 * float(metrics.error_of(sampled))
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
        every = [run for seeds in methods.values() for run in seeds.values()]
        yield from (f"## {title}", "", f"{len(every[0]['test'][1])} items.", "")
        yield from (*table(methods, "test"), "", *paired(methods, "test"), "")
        if away := sorted(set.intersection(*map(set, every)) - {"test", "validation"}):
            yield from (f"## {title}: asked of other sets", "", f"Mean of {', '.join(away)}:", "")
            yield from (*table(methods, *away), "", *paired(methods, *away), "")
            yield from ("ACC %, NLL and ECE %:", "")
            yield from (*each_task({data: (methods, data) for data in away}), "")
            yield from ("Told from the task's own, AUROC %:", "", *told_apart(methods, away), "")


def write_report(cells: Collection[Mapping[str, Any]], out: Path, apart: Collection[str]) -> None:
    """Writes the report and its figures; tasks that stand ``apart`` are in no mean of others."""
    runs = read_runs(cells, out)
    for key, methods in runs.items():
        if key[1] in apart:
            seeds = next(iter(methods.values()))  # of any, for the same probability of each option
            methods["uniform"] = {seed: Run(alike(run)) for seed, run in seeds.items()}
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
