"""``pyro-blora evaluate``: a saved adapter on a test set."""

import csv
import io
import json
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
    model: o.Model = "smollm2",
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

    console = Console()
    read_config(adapter)  # a folder that is none is said before the network is loaded
    data = load_task(task, data_dir=data_dir, max_test=max_test)
    if csv_file is not None and csv_file.is_dir():
        raise ConfigurationError(f"--csv {csv_file} is a folder; name a file in it.")
    for folder in ([] if out is None else [out]) + ([] if csv_file is None else [csv_file.parent]):
        o.check_out(folder)
    precision = o.chosen(precision, console)
    with o.phase("load"):
        net, tokenizer = load_pretrained(model)
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
    console.print(f"{task}, {scores.n} test items: {scores}", highlight=False)
    means = {
        "entropy": float(prediction.entropy.mean()),
        "mutual_information": float(prediction.mutual_information.mean()),
    }
    console.print(
        f"entropy {means['entropy']:.3f} nats, of which {means['mutual_information']:.4f} from the "
        "posterior",
        highlight=False,
    )
    if csv_file is not None:
        rows = _csv(data.test, prediction)
        write_atomically(csv_file, lambda p: p.write_text(rows, encoding="utf-8", newline=""))
        console.print(f"Written: {csv_file}")
    if out is not None:
        document = {"task": task, "num_samples": num_samples, "precision": precision}
        text = json.dumps({**document, **scores.as_dict(), **means}, indent=2)
        write_atomically(out / "metrics.json", lambda p: p.write_text(text + "\n", "utf-8"))
        figure = reliability_diagram({task: (prediction.probs, labels)})
        save_figure(figure, out / "reliability.png")
        console.print(f"Written: {out / 'metrics.json'} and {out / 'reliability.png'}")


def _csv(items: "tuple[Item, ...]", prediction: "Prediction") -> str:
    """A line for each item; a choice that an item does not have is empty."""
    text = io.StringIO()
    lines = csv.writer(text)
    probs = prediction.probs.tolist()
    columns = ("id", "label", "prediction", "confidence", "entropy", "mutual_information")
    lines.writerow([*columns, *(f"p{k}" for k in range(prediction.probs.shape[1]))])
    figures = zip(
        prediction.predictions.tolist(),
        prediction.confidence.tolist(),
        prediction.entropy.tolist(),
        prediction.mutual_information.tolist(),
        strict=True,
    )
    for item, own, row in zip(items, figures, probs, strict=True):
        lines.writerow([item.id, item.label, *own, *row[: len(item.choices)]])
    return text.getvalue()
