"""``pyro-blora evaluate``: a saved adapter on a test set."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.errors import ConfigurationError

if TYPE_CHECKING:
    from pyro_blora.data import Item
    from pyro_blora.posterior.prediction import Prediction

__all__ = ["run"]


def run(
    adapter: Annotated[Path, typer.Option(help="Folder that `pyro-blora train` wrote.")],
    model: Annotated[
        str | None,
        typer.Option(help="As in train; default: the base that the adapter names, or smollm2."),
    ] = None,
    task: o.TaskName = "facts",
    data_dir: o.DataDir = None,
    max_test: o.MaxTest = None,
    num_samples: o.NumSamples = 10,
    linearised: Annotated[
        bool,
        typer.Option(
            "--linearised",
            help="Draw from the logits' first-order expansion at the posterior mean: one pass of "
            "the network however many draws.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the posterior draws.")] = 0,
    precision: o.Precision = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json and reliability.png.")
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            help="File with a line for each item: id, label, prediction, confidence, entropy and "
            "mutual information in nats, and the probability of each choice.",
        ),
    ] = None,
) -> None:
    """Accuracy and calibration of a saved adapter, and what it does not know.

    The mutual information is the part of the uncertainty that comes from the posterior of the
    weights: high where more training data would help.

    Example: pyro-blora evaluate --adapter out/arc_easy --task arc_easy --data-dir data
    """
    import torch

    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import read_config, write_atomically
    from pyro_blora.data import load_task
    from pyro_blora.evaluation.comparison import item_length, likelihood_for
    from pyro_blora.evaluation.metrics import evaluate
    from pyro_blora.evaluation.plots import reliability_diagram, save_figure
    from pyro_blora.evaluation.predict_dataset import predict_dataset
    from pyro_blora.network.pretrained import load_pretrained

    console = Console(highlight=False)
    saved = read_config(adapter)  # a folder that is none is said before the network is loaded
    data = load_task(task, data_dir=data_dir, max_test=max_test)
    if csv_file is not None and csv_file.is_dir():
        raise ConfigurationError(f"--csv {csv_file} is a folder; name a file in it.")
    for folder in (out, csv_file and csv_file.parent):
        if folder is not None:
            o.check_out(folder)
    precision = o.chosen(precision, console)
    with o.phase("load"):
        net, tokenizer = load_pretrained(model or saved.get("base_model") or "smollm2")
    collate = data.collator(tokenizer)
    blora = BayesianLoRA.from_pretrained(net, adapter, likelihood=likelihood_for(data, collate))
    torch.manual_seed(seed)
    with o.phase("predict"):
        prediction, labels = predict_dataset(
            lambda batch: blora.predict(batch, num_samples, linearised=linearised),
            data.test,
            collate,
            length=item_length,
            device=next(net.parameters()).device,
            precision=precision,
        )
    scores = evaluate(prediction.probs, labels)
    console.print(f"{task}, {scores.n} test items: {scores}")
    own = {name: getattr(prediction, name) for name in ("entropy", "mutual_information")}
    means = {name: float(values.mean()) for name, values in own.items()}
    console.print(
        f"entropy {means['entropy']:.3f} nats, of which {means['mutual_information']:.4f} from the "
        "posterior"
    )
    if csv_file is not None:
        write_atomically(csv_file, lambda path: _write_csv(path, data.test, prediction))
        console.print(f"Written: {csv_file}")
    if out is not None:
        document = {"task": task, "num_samples": num_samples, "precision": precision}
        text = json.dumps({**document, **asdict(scores), **means}, indent=2)
        write_atomically(out / "metrics.json", lambda p: p.write_text(text + "\n", "utf-8"))
        figure = reliability_diagram({task: (prediction.probs, labels)})
        save_figure(figure, out / "reliability.png")
        console.print(f"Written: {out / 'metrics.json'} and {out / 'reliability.png'}")


def _write_csv(path: Path, items: "tuple[Item, ...]", prediction: "Prediction") -> None:
    """A line for each item; a choice that an item does not have is empty."""
    names = ("predictions", "confidence", "entropy", "mutual_information")
    columns = [getattr(prediction, name).tolist() for name in names]
    choices = range(prediction.probs.shape[1])
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "label", "prediction", *names[1:], *(f"p{k}" for k in choices)])
        for item, probs, *own in zip(items, prediction.probs.tolist(), *columns, strict=True):
            lines.writerow([item.id, item.label, *own, *probs[: len(item.choices)]])
