"""Tables and figures of the calibration benchmark, from the saved probabilities of its cells."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
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
from pyro_blora.evaluation.plots import reliability_diagram

COLUMNS = {  # title, factor, digits
    "acc": ("ACC %", 100, 1),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE %", 100, 1),
    "chance": ("by chance %", 100, 1),
    "brier": ("Brier", 1, 3),
    "auroc": ("AUROC %", 100, 1),
    "aurc": ("AURC %", 100, 1),
}
KINDS = ("entropy", "mutual information")
TITLES = {"lora": "LoRA", "lora-split": "LoRA, split", "bayesian-lora": "BayesianLoRA(net)"}
OURS = "bayesian-lora"  # all others are compared with it
BLUE = "#2f5f94"
RIVALS = {
    "lora": ("LoRA", "#d9484a"),
    "lora-split": ("LoRA, split", "#8c8c8c"),
    "temperature:lora": ("LoRA + temperature\n(200 more labels)", "#c9872b"),
}
WORDS = {"minilm": "MiniLM", "smollm2": "SmolLM2", "gemma": "Gemma", "ag_news": "AG News"}
WORDS |= {"sst2": "SST-2", "arc_easy": "ARC-Easy"}

Pair = tuple[Tensor, Tensor]  # probabilities, labels
Run = dict[str, Pair]  # by data set
Methods = Mapping[str, Mapping[int, Run]]  # by method and seed
Doubts = dict[str, dict[str, Tensor]]  # of each item, by data set and measure
Lines = Sequence[Mapping[str, Any]]
Key = tuple[str, str, int, str]  # network, task, steps, training items
Runs = dict[Key, dict[str, dict[int, Run]]]
Doubted = dict[Key, dict[str, dict[int, Doubts]]]
Needs = dict[str, tuple[int, int]]


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


def read_runs(lines: Lines, out: Path) -> tuple[Runs, Doubted, dict[Key, Needs]]:
    """The predictions of all cells and their doubts, without and with a temperature.

    Last come the labels beside training and the passes of a prediction that each method needs.
    """
    needs: dict[Key, Needs] = defaultdict(dict)
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    doubted: Doubted = defaultdict(lambda: defaultdict(dict))
    of_cell: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    with np.load(out / "probabilities.npz") as file:
        for path, array in file.items():
            cell, data, kind = path.split("/")
            of_cell[cell][data][kind] = torch.from_numpy(array)
    for line in lines:
        count = str(line["max_train"])
        key = line["network"], line["task"], line["steps"], count
        method, seed = line["method"], line["seed"]
        name = "-".join(map(str, (*key[:2], count, line["steps"], method, seed)))
        found = of_cell[name]
        run = {data: (own["probs"], own["labels"]) for data, own in found.items()}
        held, labels = run["validation"]
        scale = fit_temperature(held.log(), labels)
        scaled = {s: ((p.log() / scale).softmax(-1), labels) for s, (p, labels) in run.items()}
        epistemic = {data: own["epistemic"] for data, own in found.items()}
        for shown_as, own, more in (
            (method, run, epistemic),
            (f"temperature:{method}", scaled, {}),
        ):
            runs[key][shown_as][seed] = own
            beside = shown_as != method or method.endswith("-best")
            needs[key][shown_as] = len(labels) if beside else 0, line["passes"]
            doubted[key][shown_as][seed] = doubts(own, more)
    return runs, doubted, needs


def on_all_tasks(
    runs: Runs, apart: Collection[str]
) -> Iterator[tuple[str, int, str, list[str], Methods]]:
    """For each setting its tasks, and the test predictions of the methods that ran on all.

    Tasks that stand ``apart`` are a setting of their own.
    """

    def setting(key: Key) -> tuple[str, int, str, bool]:
        return key[0], *key[2:], key[1] in apart

    for found in sorted({setting(key) for key in runs}):
        network, steps, count, _ = found
        tasks = {key[1]: methods for key, methods in runs.items() if setting(key) == found}
        if len(tasks) < 2:
            continue
        pooled: dict[str, dict[int, Run]] = {}
        for method in sorted(set.intersection(*map(set, tasks.values()))):
            seeds = set.intersection(*(set(methods[method]) for methods in tasks.values()))
            pooled[method] = {
                seed: {task: methods[method][seed]["test"] for task, methods in tasks.items()}
                for seed in seeds
            }
        yield network, steps, count, sorted(tasks), pooled


def add_uniform(methods: dict[str, dict[int, Run]], needs: Needs) -> None:
    """Adds a method without parameters, which gives every option the same probability."""
    plain = [seeds for name, seeds in methods.items() if ":" not in name]
    runs = {seed: run for seeds in plain for seed, run in seeds.items()}
    needs["uniform"] = 0, 0
    methods["uniform"] = {
        seed: {name: ((p > 0) / (p > 0).sum(-1, keepdim=True), y) for name, (p, y) in run.items()}
        for seed, run in runs.items()
    }


def summary(runs: Runs, needs: Mapping[Key, Needs], apart: Collection[str]) -> list[str]:
    """Means over the tasks of each setting, for the methods that have run on all of them."""
    text = []
    for network, steps, count, tasks, pooled in on_all_tasks(runs, apart):
        several = {name: seeds for name, seeds in pooled.items() if len(seeds) > 1}
        first = {name: {0: seeds[0]} for name, seeds in pooled.items() if 0 in seeds}
        all_needs = [needs[network, task, steps, count] for task in tasks]
        most = {name: max(of[name] for of in all_needs) for name in pooled}
        title = f"## {network}: mean over {', '.join(tasks)}"
        text += [f"{title}, {count} training items, {steps} steps", ""]
        text += [*table(most, several, *tasks), ""] if several else []
        text += ["Of seed 0 alone, so that all are of the same items:", ""]
        text += [*table(most, first, *tasks), ""]
        text += ["ACC %, NLL and ECE % of each task, mean over the seeds that have run:", ""]
        text += [*each_task({task: runs[network, task, steps, count] for task in tasks}), ""]
        text += [*paired(pooled, *tasks), ""]
    return text


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    head = list(head)
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|"] + [
        f"| {' | '.join(row)} |" for row in rows
    ]


def table(needs: Needs, methods: Methods, *data: str) -> list[str]:
    """Means over data sets, with the mean and standard error over seeds, by method."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, seeds in methods.items():
        for run in seeds.values():
            if all(d in run for d in data):
                each = [scores(*run[d]) for d in data]
                found[name].append({key: mean_of(each, key) for key in COLUMNS})
    rows = []
    for name in sorted(found, key=lambda name: mean_of(found[name], "nll")):
        rows.append([name, *map(str, needs[name]), str(len(found[name]))])
        for key, (_, factor, digits) in COLUMNS.items():
            values = factor * torch.tensor([run[key] for run in found[name]], dtype=torch.float64)
            error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
            spread = "" if error is None else f" ± {error:.{digits}f}"
            rows[-1].append(f"{float(values.mean()):.{digits}f}{spread}")
    head = ["method", "labels beside training", "passes", "seeds"]
    return markdown([*head, *(title for title, _, _ in COLUMNS.values())], rows)


def each_task(tasks: Mapping[str, Methods], *, own: bool = False) -> list[str]:
    """Accuracy, NLL and ECE by task on its test items, or on its ``own``, and the seeds."""
    rows = []
    for name in sorted({name for found in tasks.values() for name in found}):
        rows.append([name])
        for task, found in tasks.items():
            each = [scores(*run[task if own else "test"]) for run in found.get(name, {}).values()]
            means = ", ".join(shown(each, key) for key in ("acc", "nll", "ece") if each)
            rows[-1].append(f"{means} ({len(each)})" if each else "")
    return markdown(["method", *tasks], rows)


def after_steps(lengths: Mapping[int, Methods]) -> list[str]:
    """Test NLL of each seed by the length of the training, for methods that ran at all lengths."""
    methods = sorted(set.intersection(*(set(found) for found in lengths.values())))
    rows = []
    for steps, found in sorted(lengths.items()):
        runs = ([scores(*run["test"]) for _, run in sorted(found[m].items())] for m in methods)
        rows.append([str(steps), *(", ".join(f"{s['nll']:.3f}" for s in run) for run in runs)])
    return markdown(["steps", *methods], rows)


def trials_table(trials: Lines) -> list[str]:
    """All trials on validation items, the lowest mean NLL first."""
    tried: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = defaultdict(dict)
    for line in trials:
        place = f"{line['network']}, {line['task']}"
        tried[line["method"], line["trial"]].setdefault(place, []).append(line)
    tasks = sorted({place for found in tried.values() for place in found})
    rows = []
    for method, trial in sorted(
        tried, key=lambda key: mean_of([*chain(*tried[key].values())], "nll")
    ):
        found = tried[method, trial]
        several = len({t for m, t in tried if m == method}) > 1
        rows.append([f"{method}, trial {trial}" if several else method])
        for own in (found.get(task, []) for task in tasks):
            rows[-1] += [shown(own, key) if own else "" for key in ("nll", "ece", "acc")]
        rows[-1].append(f"{next(chain(*found.values()))['parameters']:,}")
    heads = [(f"{task}: NLL", "ECE %", "ACC %") for task in tasks]
    return markdown(["method", *chain(*heads), "trained"], rows)


def shown(runs: Sequence[Mapping[str, float]], key: str) -> str:
    """The mean of a metric, in the unit and with the digits of its column."""
    _, factor, digits = COLUMNS[key]
    return f"{factor * mean_of(runs, key):.{digits}f}"


def mean_of(runs: Sequence[Mapping[str, float]], key: str) -> float:
    """The mean of a metric."""
    return sum(run[key] for run in runs) / len(runs)


def differences(
    ours: Mapping[int, Run], other: Mapping[int, Run], data: str, seeds: Iterable[int]
) -> Tensor:
    """The scores of one method's items minus another's on a data set, seeds x 3 x items."""
    found = [item_scores(*ours[seed][data]) - item_scores(*other[seed][data]) for seed in seeds]
    return torch.stack(found)


def paired(methods: Methods, *data: str) -> list[str]:
    """The NLL, Brier score and ECE of the default minus those of each other method.

    They are means over the data sets and over the seeds that both methods have. The first error is
    over items, after the differences of an item are averaged over seeds; the second is over seeds.
    """
    ours, rows = methods.get(OURS, {}), []
    for name in set(methods) - {OURS} if ours else ():
        seeds = [s for s in ours if set(data) <= set(ours[s]) & set(methods[name].get(s, ()))]
        if not seeds:
            continue
        gaps = [differences(ours, methods[name], d, seeds) for d in data]
        means = torch.stack([gap.mean(-1) for gap in gaps]).mean(0)
        errors = sum(gap.mean(0).var(-1) / gap.shape[-1] for gap in gaps).sqrt() / len(data)
        row = [f"{m:+.4f} ± {e:.4f}" for m, e in zip(means.mean(0), errors, strict=True)]
        if len(seeds) > 1:
            spread = means.std(0) / len(seeds) ** 0.5
            row = [f"{cell} ± {e:.4f}" for cell, e in zip(row, spread, strict=True)]
        rows.append((float(means[:, 0].mean()), [name, str(len(seeds)), *row]))
    head = [f"`{OURS}` less", "seeds", "NLL ± items ± seeds", "Brier", "ECE"]
    return markdown(head, (row for _, row in sorted(rows, reverse=True))) if rows else []


def doubts(run: Mapping[str, Pair], epistemic: Mapping[str, Tensor]) -> Doubts:
    """The doubts about the items of a run, in nats.

    Only items with as many options as the first test item count, because more options mean more
    entropy. The mutual information is left out if it is zero, as for a point estimate.
    """
    found: Doubts = defaultdict(dict)
    options = int((run["test"][0][0] > 0).sum())
    for name, (probs, _) in run.items():
        alike = (probs > 0).sum(1) == options
        if not bool(alike.any()):
            continue
        found[name]["entropy"] = torch.special.entr(probs[alike].double()).sum(1)
        mutual = epistemic.get(name, torch.zeros(len(alike)))[alike].double()
        if bool((mutual > 0).any()):
            found[name]["mutual information"] = mutual
    return found


def told_apart(runs: Mapping[str, Mapping[int, Doubts]], sets: Sequence[str]) -> list[str]:
    """A table of the AUROC in % of each doubt for the items of other sets against the test items.

    It has means over seeds; the last column is the mean over sets with its standard error over
    seeds. 50 is chance, and below it the other items are doubted less. Empty without other sets.
    """
    rows: list[tuple[float, str]] = []
    sets = [d for d in sets if all(d in run for seeds in runs.values() for run in seeds.values())]
    for (method, seeds), kind in product(runs.items(), KINDS if sets else ()):
        asked = [run for run in seeds.values() if all(kind in run[d] for d in ["test", *sets])]
        found = [[100 * auroc(run["test"][kind], run[d][kind]) for d in sets] for run in asked]
        if found:
            each = [f"{fmean(column):.1f}" for column in zip(*found, strict=True)]
            means = [fmean(row) for row in found]
            spread = f" ± {stdev(means) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
            mean = fmean(means)
            row = [method, kind, str(len(means)), *each, f"{mean:.1f}{spread}"]
            rows.append((-mean, " | ".join(row)))
    head = ["method", "doubt", "seeds", *sets, "mean"]
    return markdown(head, ([row] for _, row in sorted(rows))) if rows else []


def joined(parts: Iterable[Pair]) -> Pair:
    """The items of several tasks as one set; the probability of a missing option is zero."""
    probs, labels = zip(*parts, strict=True)
    most = max(p.shape[1] for p in probs)
    pad = torch.nn.functional.pad
    return torch.cat([pad(p, (0, most - p.shape[1])) for p in probs]), torch.cat(labels)


def draw(runs: Runs, network: str, path: Path) -> None:
    """Reliability diagrams of a network, which pool all seeds and the tasks of one setting.

    A network with a single task has none.
    """
    settings: dict[tuple[int, str], list[Methods]] = defaultdict(list)
    for key, methods in runs.items():
        if key[0] == network and {"lora", OURS} <= set(methods):
            settings[key[2:]].append(methods)
    most = max(settings.values(), key=len, default=[])
    if len(most) > 1:
        pairs = {
            title: joined(run["test"] for methods in most for run in methods[name].values())
            for name, title in TITLES.items()
            if all(name in methods for methods in most)
        }
        reliability_diagram(pairs).savefig(path, dpi=200, bbox_inches="tight")


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
    seeds = sorted(methods[rival].keys() & methods[OURS].keys())
    return differences(methods[rival], methods[OURS], data, seeds)[:, 0]


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


def write_report(lines: Lines, out: Path, apart: Collection[str]) -> None:
    """Writes ``report.md``, reliability diagrams of networks, and a picture of all tasks.

    Tasks that stand ``apart`` are compared with a uniform answer, and are in no mean of other
    tasks.
    """
    text = ["# Calibration", "", "Mean ± standard error over seeds, the lowest NLL first.", ""]
    text += ["By chance: the ECE expected of a calibrated method with the same confidences.", ""]
    text += [
        "Labels beside training: those of the task that the method reads. Those that chose the "
        "learning rates of the rivals, and all settings of the default, on the development tasks "
        "are not counted.",
        "",
    ]
    runs, doubted, needs = read_runs(lines, out)
    for key in runs:
        if key[1] in apart:
            add_uniform(runs[key], needs[key])
    text += summary(runs, needs, apart)
    for (network, task, steps, count), methods in sorted(runs.items()):
        which, needed = (network, task, count), needs[network, task, steps, count]
        title = f"{network}: {task}, {count} training items, {steps} steps"
        some = next(iter(next(iter(methods.values())).values()))
        text += [
            f"## {title}",
            "",
            f"{len(some['test'][1])} items.",
            "",
            *table(needed, methods, "test"),
        ]
        text += ["", *paired(methods, "test"), ""]
        runs_of = {key[2]: found for key, found in runs.items() if (*key[:2], key[3]) == which}
        if steps == min(runs_of) < max(runs_of):
            text += [f"## {network}: {task}, {count} training items: NLL by seed", ""]
            text += [*after_steps(runs_of), ""]
        met = [set(run) for seeds in methods.values() for run in seeds.values() if len(run) > 2]
        away = sorted(set.intersection(*met) - {"test", "validation"}) if met else []
        if not away:
            continue
        asked = {
            m: {s: r for s, r in found.items() if set(away) <= set(r)}
            for m, found in methods.items()
        }
        text += [f"## {title}: asked of other sets", "", f"Mean of {', '.join(away)}:", ""]
        text += [*table(needed, asked, *away), "", *paired(asked, *away), ""]
        text += ["ACC %, NLL and ECE %:", "", *each_task({d: asked for d in away}, own=True), ""]
        unsure = {
            method: {seed: found[seed] for seed in asked[method]}
            for method, found in doubted[network, task, steps, count].items()
        }
        text += ["Told from the task's own, AUROC %:", "", *told_apart(unsure, away), ""]
    (out / "figures").mkdir(exist_ok=True)
    learned = {key: methods for key, methods in runs.items() if key[1] not in apart}
    for network in {key[0] for key in learned}:
        draw(learned, network, out / "figures" / f"{network}.png")
    if tasks := main_tasks(learned):
        figure = Figure(figsize=(5, 3.8), dpi=200, layout="constrained")
        draw_panels(figure.subplots(), tasks)
        figure.savefig(out / "figures" / "panels.png")
    versions = {json.dumps(line["versions"], sort_keys=True) for line in lines}
    text += ["Versions: " + "; ".join(sorted(versions)), ""]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
