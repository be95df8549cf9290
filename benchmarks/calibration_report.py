"""Tables and pictures of the calibration benchmark, from the probabilities that its cells left."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
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
    evaluate,
    fit_temperature,
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
TITLES = {"lora": "LoRA", "lora-best": "LoRA, best step", "bayesian-lora": "BayesianLoRA(net)"}
PASSES = {  # how they are called and drawn; x is a little beside 1 so that none hides another
    "lora": ("LoRA", 0.85, "s", "#d9484a"),
    "bayesian-lora-mean": ("posterior mean", 1, "v", "#c9872b"),
    "bayesian-lora-distilled": ("distilled", 1.18, "*", "#3a8f5c"),
    "bayesian-lora-4": ("_", 4, "o", "#2f5f94"),
    "bayesian-lora": ("4, 8, 64 draws", 8, "o", "#2f5f94"),
    "bayesian-lora-64": ("_", 64, "o", "#2f5f94"),
}
Pair = tuple[Tensor, Tensor]  # probabilities, labels
Run = dict[str, Pair]  # by data set
Doubts = dict[str, dict[str, Tensor]]  # by data set, and by what measures it; of each item
Lines = Sequence[Mapping[str, Any]]
Key = tuple[str, str, int, str]  # network, task, steps, training items


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of one set of predictions."""
    confidence, predicted = probs.max(-1)
    right = predicted == labels
    return {
        **asdict(evaluate(probs, labels)),
        "chance": ece_by_chance(probs),
        "auroc": auroc(confidence[~right], confidence[right])
        if 0 < right.sum() < len(right)
        else math.nan,
        "aurc": risk_coverage(-confidence, ~right)[2],
    }


Runs = dict[Key, dict[str, dict[int, Run]]]  # by task, method and seed
Doubted = dict[Key, dict[str, dict[int, Doubts]]]


def read_runs(lines: Sequence[Mapping[str, Any]], out: Path) -> tuple[Runs, Doubted]:
    """Predictions, and the doubts of them; each method also with its temperature."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    doubted: Doubted = defaultdict(lambda: defaultdict(dict))
    with np.load(out / "probabilities.npz") as file:
        arrays = dict(file)
    of_cell: dict[str, list[str]] = defaultdict(list)
    for path in arrays:
        of_cell[path.split("/")[0]].append(path)
    for line in lines:
        data = "all" if line["max_train"] is None else str(line["max_train"])
        name = "-".join(map(str, (line["network"], line["task"], data, line["steps"])))
        paths = of_cell[f"{name}-{line['method']}-{line['seed']}"]
        found = {path.split("/", 1)[1]: torch.from_numpy(arrays[path]) for path in paths}
        sets = {key.split("/")[0] for key in found}
        run = {s: (found[f"{s}/probs"], found[f"{s}/labels"]) for s in sets}
        key = line["network"], line["task"], line["steps"], data
        method, seed = line["method"], line["seed"]
        runs[key][method][seed] = run
        held, labels = run["validation"]
        scale = fit_temperature(held.log(), labels)
        scaled = {s: ((p.log() / scale).softmax(-1), labels) for s, (p, labels) in run.items()}
        runs[key][f"temperature:{method}"][seed] = scaled
        epistemic = {s: found[f"{s}/epistemic"] for s in sets}
        doubted[key][method][seed] = doubts(run, epistemic)
        doubted[key][f"temperature:{method}"][seed] = doubts(scaled, {})
    return runs, doubted


def on_all_tasks(
    runs: Runs,
) -> Iterator[tuple[str, int, str, list[str], dict[str, dict[int, Run]]]]:
    """For each setting its tasks, and the predictions of what has run on all of them."""
    for network, steps, count in sorted({(key[0], *key[2:]) for key in runs}):
        tasks = {
            k[1]: found for k, found in runs.items() if (k[0], *k[2:]) == (network, steps, count)
        }
        if len(tasks) < 2:
            continue
        pooled: dict[str, dict[int, Run]] = {}
        for method in sorted(set.intersection(*(set(found) for found in tasks.values()))):
            seeds = set.intersection(*(set(found[method]) for found in tasks.values()))
            pooled[method] = {
                seed: {task: found[method][seed]["test"] for task, found in tasks.items()}
                for seed in seeds
            }
        yield network, steps, count, sorted(tasks), pooled


def summary(runs: Runs, ours: str, kin: Collection[str]) -> list[str]:
    """Means over the tasks of each number of steps, of the methods that have run on all of them."""
    text = []
    for network, steps, count, tasks, pooled in on_all_tasks(runs):
        several = {name: seeds for name, seeds in pooled.items() if len(seeds) > 1}
        first = {name: {0: seeds[0]} for name, seeds in pooled.items() if 0 in seeds}
        title = f"## {network}: mean over {', '.join(tasks)}"
        text += [f"{title}, {count} training items, {steps} steps", ""]
        text += [*table(several, *tasks), ""] if several else []
        text += ["Of seed 0 alone, so that all are of the same items:", ""]
        text += [*table(first, *tasks), ""]
        text += ["ACC %, NLL and ECE % of each task, mean over the seeds that have run:", ""]
        text += [*each_task({task: runs[network, task, steps, count] for task in tasks}), ""]
        text += [*paired(pooled, ours, kin, *tasks), ""]
    return text


def table(methods: Mapping[str, Mapping[int, Run]], *data: str) -> list[str]:
    """Mean over data sets, and mean and standard error over seeds, a line for each method."""
    rows = ["| method | seeds | " + " | ".join(t for t, _, _ in COLUMNS.values()) + " |"]
    rows.append("|---" * (len(COLUMNS) + 2) + "|")
    found: dict[str, list[dict[str, float]]] = {}
    for name, seeds in methods.items():
        for run in seeds.values():
            if all(d in run for d in data):
                each = [scores(*run[d]) for d in data]
                found.setdefault(name, []).append({key: mean_of(each, key) for key in COLUMNS})
    for name in sorted(found, key=lambda name: mean_of(found[name], "nll")):
        cells = []
        for key, (_, factor, digits) in COLUMNS.items():
            values = factor * torch.tensor([run[key] for run in found[name]], dtype=torch.float64)
            error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
            spread = "" if error is None else f" ± {error:.{digits}f}"
            cells.append(f"{float(values.mean()):.{digits}f}{spread}")
        rows.append(f"| {name} | {len(found[name])} | " + " | ".join(cells) + " |")
    return rows


def each_task(
    tasks: Mapping[str, Mapping[str, Mapping[int, Run]]], *, own: bool = False
) -> list[str]:
    """Accuracy, NLL and ECE of each task's test items, or its ``own``, and the number of seeds."""
    rows = [f"| method | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name in sorted({name for found in tasks.values() for name in found}):
        cells = []
        for task, found in tasks.items():
            each = [scores(*run[task if own else "test"]) for run in found.get(name, {}).values()]
            means = ", ".join(shown(each, key) for key in ("acc", "nll", "ece") if each)
            cells.append(f"{means} ({len(each)})" if each else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def after_steps(lengths: Mapping[int, Mapping[str, Mapping[int, Run]]]) -> list[str]:
    """Test NLL of each seed after trainings of several lengths, of what has run on all of them."""
    methods = sorted(set.intersection(*(set(found) for found in lengths.values())))
    rows = [f"| steps | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for steps, found in sorted(lengths.items()):
        runs = ([scores(*run["test"]) for _, run in sorted(found[m].items())] for m in methods)
        cells = (", ".join(f"{score['nll']:.3f}" for score in run) for run in runs)
        rows.append(f"| {steps} | {' | '.join(cells)} |")
    return rows


def trials_table(trials: Lines) -> list[str]:
    """What was tried, on validation items: a line a trial, the lowest mean NLL first."""
    tasks = sorted({f"{line['network']}, {line['task']}" for line in trials})
    rows = ["| method | " + " | ".join(f"{t}: NLL | ECE % | ACC %" for t in tasks) + " | trained |"]
    rows.append("|---" * (3 * len(tasks) + 2) + "|")
    tried: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = defaultdict(dict)
    for line in trials:
        tried[line["method"], line["trial"]].setdefault(
            f"{line['network']}, {line['task']}", []
        ).append(line)
    order = sorted(tried, key=lambda key: mean_of([*chain(*tried[key].values())], "nll"))
    for method, trial in order:
        found = tried[method, trial]
        cells = []
        for task in tasks:
            own = found.get(task, [])
            cells += [shown(own, key) if own else "" for key in ("nll", "ece", "acc")]
        several = len({t for m, t in tried if m == method}) > 1
        name = f"{method}, trial {trial}" if several else method
        numbers = next(iter(found.values()))[0]["parameters"]
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {numbers:,} |")
    return rows


def shown(runs: Sequence[Mapping[str, float]], key: str) -> str:
    """The mean of a metric, in its column's unit and digits."""
    _, factor, digits = COLUMNS[key]
    return f"{factor * mean_of(runs, key):.{digits}f}"


def mean_of(runs: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def paired(
    methods: Mapping[str, Mapping[int, Run]], ours: str, kin: Collection[str], *data: str
) -> list[str]:
    """The difference of NLL, Brier score and ECE to the three best others, mean over data sets.

    Each is compared on the seeds that both have. There are two errors of the mean: over items, each
    item's differences averaged over seeds first, and over seeds, where there are several.

    """
    found = {}
    for name in set(methods) - {ours, *kin} if ours in methods else ():
        gaps = [
            [_scores(*methods[ours][seed][d]) - _scores(*methods[name][seed][d]) for d in data]
            for seed in sorted(set(methods[ours]) & set(methods[name]))
            if set(data) <= set(methods[ours][seed]) & set(methods[name][seed])
        ]
        if gaps:
            found[name] = [torch.stack(gap) for gap in zip(*gaps, strict=True)]
    rows = []
    for index, title in enumerate(("NLL", "Brier", "ECE")):

        def by_seed(name: str, index: int = index) -> Tensor:
            return torch.stack([gap[:, index].mean(-1) for gap in found[name]]).mean(0)

        behind = sorted(found, key=lambda name: (-float(by_seed(name).mean()), name))
        for other in behind[:3]:
            each = [gap[:, index].mean(0) for gap in found[other]]
            error = sum(float(gap.var()) / len(gap) for gap in each) ** 0.5 / len(data)
            means = by_seed(other)
            text = f"{title} of `{ours}` less that of `{other}`: {float(means.mean()):+.4f}"
            text += f" ± {error:.4f} over items"
            if len(means) > 1:
                text += f", ± {float(means.std()) / len(means) ** 0.5:.4f} over {len(means)} seeds"
            rows.append(text + ".")
    return rows


def _scores(probs: Tensor, labels: Tensor) -> Tensor:
    """NLL and Brier score of each item, and what it adds to the ECE's mean, ``3 x N``.

    The ECE is the mean of confidence less correctness, with the sign that its sum has in the item's
    bin: to first order, where no sign changes, the variance of these is that of the ECE.
    """
    probs = probs.double()
    nll = -probs.gather(1, labels[:, None]).squeeze(1).clamp_min(1e-38).log()
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[1])
    confidence, predicted = probs.max(1)
    gap = confidence - (predicted == labels).double()
    bins = (15 * confidence).ceil().long()
    sign = torch.zeros(16).double().index_add(0, bins, gap).sign()[bins]
    return torch.stack([nll, (probs - one_hot).square().sum(1), sign * gap])


def doubts(run: Mapping[str, Pair], epistemic: Mapping[str, Tensor]) -> Doubts:
    """The doubts of a run's items, in nats.

    Items are those with as many options as the first test item has: more make more entropy.
    The mutual information of a point is zero, and left out.
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
    """A table of the AUROC in % of each doubt for another set's items against the test items.

    Means over seeds; the last column is that over sets, with its standard error over seeds. 50 is
    chance, and below it other sets' items are doubted less. Empty where there is nothing to tell.
    """
    rows: list[tuple[float, str]] = []
    sets = [d for d in sets if all(d in run for seeds in runs.values() for run in seeds.values())]
    for method, seeds in runs.items():
        for kind in KINDS if sets else ():
            asked = [run for run in seeds.values() if all(kind in run[d] for d in ["test", *sets])]
            found = [[100 * auroc(run["test"][kind], run[d][kind]) for d in sets] for run in asked]
            if found:
                each = " | ".join(f"{fmean(column):.1f}" for column in zip(*found, strict=True))
                means = [fmean(row) for row in found]
                spread = f" ± {stdev(means) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
                mean = fmean(means)
                text = f"| {method} | {kind} | {len(means)} | {each} | {mean:.1f}{spread} |"
                rows.append((-mean, text))
    if not rows:
        return []
    head = f"| method | doubt | seeds | {' | '.join(sets)} | mean |"
    return [head, "|---" * (len(sets) + 4) + "|", *(row for _, row in sorted(rows))]


def joined(parts: Iterable[Pair]) -> Pair:
    """The items of several tasks as of one; an option that a task has not has probability zero."""
    probs, labels = zip(*parts, strict=True)
    most = max(p.shape[1] for p in probs)
    pad = torch.nn.functional.pad
    return torch.cat([pad(p, (0, most - p.shape[1])) for p in probs]), torch.cat(labels)


def draw(methods: Mapping[str, Mapping[int, Run]], path: Path, ours: str) -> None:
    """Reliability diagrams, all seeds and tasks together; in the titles the means over tasks."""
    pairs = {
        TITLES.get(name, name): [pair for run in methods[name].values() for pair in run.values()]
        for name in ("lora", ours)
        if methods.get(name)
    }
    figure = reliability_diagram({name: joined(each) for name, each in pairs.items()})
    for axes, each in zip(figure.axes, pairs.values(), strict=False):  # those below have none
        metrics = [asdict(evaluate(*pair)) for pair in each]
        acc, ece, nll = (shown(metrics, key) for key in ("acc", "ece", "nll"))
        axes.set_title(f"ECE {ece} %   ACC {acc} %\nNLL {nll}", fontsize=8)
    figure.savefig(path, dpi=200, bbox_inches="tight")


def draw_nll(methods: Mapping[str, Mapping[int, Run]], path: Path) -> None:
    """NLL on the tests of seed 0, a row a method, the lowest on top; hollow with a temperature."""
    found = {}
    for name, runs in methods.items():
        if 0 in runs and not name.removeprefix("temperature:").startswith("bayesian-lora-"):
            items = [_scores(*pair)[0] for pair in runs[0].values()]
            error = sum(float(x.var() / len(x)) for x in items) ** 0.5 / len(items)
            found[name] = (fmean(float(x.mean()) for x in items), error)
    plain = [name for name in found if ":" not in name]
    plain.sort(key=lambda name: -min(found[name][0], found.get(f"temperature:{name}", (9,))[0]))
    figure = Figure(figsize=(6.4, 0.6 + 0.26 * len(plain)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(plain):
        for which, fill in ((name, None), (f"temperature:{name}", "white")):
            if which in found:
                color = "#d9484a" if fill or name == "lora-best" else "#2f5f94"
                look: dict[str, Any] = {"fmt": "o", "color": color, "markerfacecolor": fill}
                axes.errorbar(found[which][0], row, xerr=found[which][1], capsize=2, **look)
    axes.set_yticks(range(len(plain)), [TITLES.get(name, name) for name in plain])
    axes.set(xlabel="NLL, nats (± standard error over items)")
    axes.grid(axis="x", alpha=0.3)
    for label, color, fill in (
        ("no validation items", "#2f5f94", "#2f5f94"),
        ("best step, by validation items", "#d9484a", "#d9484a"),
        ("temperature, by validation items", "#d9484a", "white"),
    ):
        axes.plot([], [], "o", color=color, markerfacecolor=fill, label=label)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(path, dpi=200, bbox_inches="tight")


def draw_passes(settings: Mapping[str, Mapping[str, Mapping[int, Run]]], path: Path) -> None:
    """NLL less that of 8 draws by passes of each network, mean and standard error over seeds."""
    figure = Figure(figsize=(2.9 * len(settings), 3.2), layout="constrained")
    columns = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, (network, methods) in zip(columns, settings.items(), strict=True):
        found = {name: methods[name] for name in PASSES if methods.get(name)}
        seeds = sorted(set.intersection(*map(set, found.values())))
        nll = {
            name: np.array([fmean(evaluate(*p).nll for p in runs[s].values()) for s in seeds])
            for name, runs in found.items()
        }
        for name, values in nll.items():
            label, count, mark, color = PASSES[name]
            gaps = values - nll["bayesian-lora"]
            error = gaps.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else 0.0
            look: dict[str, Any] = {"fmt": mark, "color": color, "capsize": 3, "label": label}
            axes.errorbar(count, gaps.mean(), error, **look)
        axes.axhline(0, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(xscale="log", xlabel="passes", title=f"{network}\n{len(seeds)} seeds")
        ticks = sorted({round(PASSES[name][1]) for name in nll})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    columns[0].set_ylabel("NLL - NLL of 8 draws, nats")
    figure.legend(
        *columns[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    figure.savefig(path, dpi=200, bbox_inches="tight")


def write_report(
    lines: Lines,
    out: Path,
    ours: str,
    kin: Collection[str],
    published: Mapping[str, Mapping[str, str]],
) -> None:
    """Writes ``report.md``, and pictures of the setting with most tasks and of one pass.

    ``published`` has what papers print of a task, ``"ACC ECE NLL"``, by method and task.
    """
    text = ["# Calibration", "", "Mean ± standard error over seeds, the lowest NLL first.", ""]
    text += ["By chance: the ECE expected of a calibrated method with the same confidences.", ""]
    runs, doubted = read_runs(lines, out)
    text += summary(runs, ours, kin)
    for (network, task, steps, count), methods in sorted(runs.items()):
        which = network, task, count
        title = f"{network}: {task}, {count} training items, {steps} steps"
        some = next(iter(next(iter(methods.values())).values()))
        text += [f"## {title}", "", f"{len(some['test'][1])} items.", "", *table(methods, "test")]
        for name, rows in published.items():
            acc, ece, nll = rows[task].split() if task in rows else ("", "", "")
            text.append(f"| {name}, published | | {acc} | {nll} | {ece} | | | | |")
        text += ["", *paired(methods, ours, kin, "test"), ""]
        runs_of = {key[2]: found for key, found in runs.items() if (*key[:2], key[3]) == which}
        if steps == min(runs_of) < max(runs_of):
            text += [f"## {network}: {task}, {count} training items: NLL by seed", ""]
            text += [*after_steps(runs_of), ""]
        met = [set(run) for seeds in methods.values() for run in seeds.values()]
        away = sorted(set().union(*met) - {"test", "validation"})
        if not away:
            continue
        asked = {
            m: {s: r for s, r in found.items() if set(away) <= set(r)}
            for m, found in methods.items()
        }
        text += [f"## {title}: asked of other sets", "", f"Mean of {', '.join(away)}:", ""]
        text += [*table(asked, *away), "", *paired(asked, ours, kin, *away), ""]
        text += ["ACC %, NLL and ECE %:", "", *each_task({d: asked for d in away}, own=True), ""]
        unsure = {
            method: {seed: found[seed] for seed in asked[method]}
            for method, found in doubted[network, task, steps, count].items()
        }
        text += ["Told from the task's own, AUROC %:", "", *told_apart(unsure, away), ""]
    if pooled := list(on_all_tasks(runs)):
        most = max(pooled, key=lambda one: len(one[3]))
        draw(most[-1], out / "figures" / "reliability.png", ours)
        draw_nll(most[-1], out / "figures" / "nll.png")
    both = ("bayesian-lora", "bayesian-lora-distilled")
    if one_pass := {
        f"{network}, {steps} steps": methods
        for network, steps, _, _, methods in pooled
        if all(methods.get(name) for name in both)
    }:
        draw_passes(one_pass, out / "figures" / "passes.png")
    versions = {json.dumps(line["versions"], sort_keys=True) for line in lines}
    text += ["Versions: " + "; ".join(sorted(versions)), ""]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
