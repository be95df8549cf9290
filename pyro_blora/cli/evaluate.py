"""``pyro-blora evaluate``: measure a saved adapter on a test set."""

import csv
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import load_task

if TYPE_CHECKING:
    from pyro_blora.data import Item
    from pyro_blora.posterior.prediction import Prediction


def run(
    adapter: o.AdapterFolder,
    model: o.Base = None,
    task: o.OwnTask = None,
    data_dir: o.DataDir = None,
    max_test: o.MaxTest = None,
    num_samples: o.NumSamples = 10,
    seed: o.Seed = 0,
    precision: o.Precision = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for metrics.json, items.csv and plots: reliability, risk and coverage, "
            "and with --ood the uncertainties of both tasks."
        ),
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option(help="An out-of-distribution task, where uncertainty should be higher."),
    ] = None,
) -> None:
    """Measure the accuracy, calibration and uncertainty of a saved adapter.

    The mutual information is the part of the uncertainty that comes from the posterior of the
    weights: how much the draws disagree. It may be highest where the labels are mere noise.

    Example: pyro-blora evaluate --adapter out/arc_easy --task arc_easy --data-dir data
    --ood openbookqa --out out/arc_easy/test
    """
    import torch

    from pyro_blora.checkpoints import read_config
    from pyro_blora.evaluation import metrics as m
    from pyro_blora.evaluation import plots
    from pyro_blora.files import check_free, write_file
    from pyro_blora.options import choose_precision

    console = Console(highlight=False)
    trained_on = read_config(adapter)["notes"].get("task")
    task = o.named(task, trained_on, "--task")
    if trained_on is None and Path(task).is_file():
        warnings.warn(
            f"{adapter} was not made by pyro-blora train, so the fifth of {task} that is tested "
            "may have rows that it was trained on; give a folder whose test file has other rows.",
            stacklevel=2,
        )
    data = load_task(task, data_dir=data_dir, max_test=max_test)
    other = load_task(ood, data_dir=data_dir, max_test=max_test) if ood else None
    foreign, task = other.test if other else (), data.name
    if out is not None:
        more = ("ood.csv", "ood.png") if ood else ()
        check_free(out, "metrics.json", "items.csv", "reliability.png", "risk_coverage.png", *more)
    precision = choose_precision(precision)
    blora = o.load_adapter(adapter, model, data)
    collate = o.collator_for(blora, data)
    if data.template.scoring == "labels" or collate is None:  # score the task's own classes
        foreign = tuple(replace(i, choices=data.test[0].choices, label=0) for i in foreign)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_samples": num_samples, "precision": precision}
    options["collate"] = collate
    with o.phase("predict"):
        prediction, labels = blora.predict_dataset(data.test, **options)
        outside = blora.predict_dataset(foreign, **options)[0] if foreign else None
    scores = m.evaluate(prediction.probs, labels)
    chance = m.ece_by_chance(prediction.probs)
    entropy = float(prediction.entropy.mean())
    information = float(prediction.mutual_information.mean())
    console.print(
        f"{task}, {scores.n} test items: {scores}\n"
        "(expected ECE of a perfectly calibrated adapter with these confidences, by chance: "
        f"{100 * chance:.1f})\n"
        f"entropy {entropy:.3f} nats, of which {information:.4f} from the posterior"
    )
    document = {"task": task, "num_samples": num_samples, "precision": precision, **asdict(scores)}
    document |= {"ece_by_chance": chance, "entropy": entropy, "mutual_information": information}
    doubt, wrong = m.doubts(prediction), prediction.predictions != labels
    document["aurc"] = {name: m.risk_coverage(d, wrong)[2] for name, d in doubt.items()}
    with warnings.catch_warnings():  # if there is no threshold, it is left out
        warnings.simplefilter("ignore")
        limit = m.threshold_for(prediction, labels)
    if kept := float((doubt["entropy"] <= limit).double().mean()):
        document["abstain_above"] = {"entropy": limit, "risk": 0.05, "kept": kept}
        console.print(
            f"{100 * kept:.0f} % of the items have an entropy of at most {limit:.3f} nats; of such "
            "answers at most 5 % are wrong, with 95 % confidence"
        )
    if outside is not None and other is not None:
        found = {name: m.auroc(doubt[name], d) for name, d in m.doubts(outside).items()}
        document["ood"] = {"task": other.name, "n": len(outside), "auroc": found}
        shown = ", ".join(f"{100 * v:.1f} % by {n.replace('_', ' ')}" for n, v in found.items())
        console.print(f"{ood}, {len(outside)} items, AUROC: {shown}")
    if out is None:
        return
    write_file(out / "metrics.json", json.dumps(document, indent=2) + "\n")
    truth = labels.tolist()
    write_file(out / "items.csv", lambda path: _write_csv(path, data.test, truth, prediction))
    figures = {
        "reliability": plots.reliability_diagram({task: (prediction.probs, labels)}),
        "risk_coverage": plots.risk_coverage_diagram(prediction, labels),
    }
    if outside is not None and other is not None:
        others = [item.label for item in foreign]
        write_file(out / "ood.csv", lambda path: _write_csv(path, foreign, others, outside))
        figures["ood"] = plots.ood_diagram(prediction, outside, (task, other.name))
    for name, figure in figures.items():
        plots.save_figure(figure, out / f"{name}.png")
    console.print(f"Written to {out}: metrics.json, items.csv, {', '.join(figures)} (.png)")


def _write_csv(
    path: Path, items: "Sequence[Item]", labels: Sequence[int], prediction: "Prediction"
) -> None:
    """One row per item; the probabilities of absent choices are left empty.

    Labels count the classes as the predictions do, which a network may order otherwise than a task.
    """
    names = ("predictions", "confidence", "entropy", "mutual_information")
    columns = [getattr(prediction, name).tolist() for name in names]
    choices = range(prediction.probs.shape[1])
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "label", "prediction", *names[1:], *(f"p{k}" for k in choices)])
        parts = zip(items, labels, prediction.probs.tolist(), *columns, strict=True)
        for item, label, probs, *own in parts:
            rows.writerow([item.id, label, *own, *probs[: len(item.choices)]])
