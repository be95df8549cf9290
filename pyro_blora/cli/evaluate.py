"""``pyro-blora evaluate``: a saved adapter on a test set."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import load_task

if TYPE_CHECKING:
    from pyro_blora.data import Item, Task
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
            help="Folder for metrics.json, items.csv and pictures: reliability, risk and coverage, "
            "and with --ood the uncertainties of both tasks."
        ),
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option(help="A task that the adapter was not trained on: is its uncertainty higher?"),
    ] = None,
) -> None:
    """Measure the accuracy, calibration and uncertainty of a saved adapter.

    The mutual information is the part of the uncertainty that comes from the posterior of the
    weights: how much the draws disagree, which they may do most where labels are mere noise.

    Example: pyro-blora evaluate --adapter out/arc_easy --task arc_easy --data-dir data
    --ood openbookqa --out out/arc_easy/test
    """
    from pyro_blora.checkpoints import read_config
    from pyro_blora.evaluation import metrics as m
    from pyro_blora.evaluation import plots
    from pyro_blora.files import check_free, write_file
    from pyro_blora.network.precision import choose_precision

    console = Console(highlight=False)
    saved = read_config(adapter)
    task = o.named(task, saved.get("notes", {}).get("task"), "--task")
    data = load_task(task, data_dir=data_dir, max_test=max_test)
    foreign = _foreign(ood, data, data_dir, max_test)
    if out is not None:
        more = ("ood.csv", "ood.png") if foreign else ()
        check_free(out, "metrics.json", "items.csv", "reliability.png", "risk_coverage.png", *more)
    base = o.named(model, saved.get("base_model"), "--model")
    given: dict[str, Any] = {"num_samples": num_samples, "precision": choose_precision(precision)}
    predict = o.predictor(adapter, base, data, seed=seed, **given)
    with o.phase("predict"):
        prediction, labels = predict(data.test)
        outside = predict(foreign)[0] if foreign else None
    scores = m.evaluate(prediction.probs, labels)
    chance = m.ece_by_chance(prediction.probs)
    console.print(f"{task}, {scores.n} test items: {scores}")
    console.print(
        "(the ECE expected of a perfectly calibrated adapter with these confidences, by chance: "
        f"{100 * chance:.1f})"
    )
    own = {name: getattr(prediction, name) for name in ("entropy", "mutual_information")}
    means = {name: float(values.mean()) for name, values in own.items()}
    console.print(
        f"entropy {means['entropy']:.3f} nats, of which {means['mutual_information']:.4f} from the "
        "posterior"
    )
    doubt, wrong = m.doubts(prediction), prediction.predictions != labels
    document = {"task": task, **given, **asdict(scores), "ece_by_chance": chance, **means}
    document["aurc"] = {name: m.risk_coverage(d, wrong)[2] for name, d in doubt.items()}
    if outside is not None:
        found = {name: m.auroc(doubt[name], d) for name, d in m.doubts(outside).items()}
        document["ood"] = {"task": ood, "n": len(outside), "auroc": found}
        told = ", ".join(f"{100 * v:.1f} % by {n.replace('_', ' ')}" for n, v in found.items())
        console.print(f"{ood}, {len(outside)} items, told apart (AUROC): {told}")
    if out is None:
        return
    write_file(out / "metrics.json", json.dumps(document, indent=2) + "\n")
    write_file(out / "items.csv", lambda path: _write_csv(path, data.test, prediction))
    pictures = {
        "reliability": plots.reliability_diagram({task: (prediction.probs, labels)}),
        "risk_coverage": plots.risk_coverage_diagram(prediction, labels),
    }
    if outside is not None:
        write_file(out / "ood.csv", lambda path: _write_csv(path, foreign, outside))
        pictures["ood"] = plots.ood_diagram(prediction, outside, (task, str(ood)))
    for name, figure in pictures.items():
        plots.save_figure(figure, out / f"{name}.png")
    console.print(f"Written to {out}: metrics.json, items.csv, {', '.join(pictures)} (.png)")


def _foreign(
    name: str | None, task: "Task", data_dir: Path | None, most: int | None
) -> "tuple[Item, ...]":
    """The test items of another task, as this one asks: label words are its own."""
    if name is None:
        return ()
    items = load_task(name, data_dir=data_dir, max_test=most).test
    if task.template.scoring == "labels":
        return tuple(replace(i, choices=task.test[0].choices, label=0) for i in items)
    return items


def _write_csv(path: Path, items: "Sequence[Item]", prediction: "Prediction") -> None:
    """A line for each item; a choice that an item does not have is empty."""
    names = ("predictions", "confidence", "entropy", "mutual_information")
    columns = [getattr(prediction, name).tolist() for name in names]
    choices = range(prediction.probs.shape[1])
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "label", "prediction", *names[1:], *(f"p{k}" for k in choices)])
        for item, probs, *own in zip(items, prediction.probs.tolist(), *columns, strict=True):
            lines.writerow([item.id, item.label, *own, *probs[: len(item.choices)]])
