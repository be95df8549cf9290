"""``pyro-blora evaluate``: a saved adapter on a test set."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from pyro_blora.bayesian_lora import BayesianLoRA
from pyro_blora.checkpoints import read_config, write_atomically
from pyro_blora.cli import _options as o
from pyro_blora.comparison import item_length, likelihood_for
from pyro_blora.data import load_task
from pyro_blora.inference import predict_dataset
from pyro_blora.metrics import evaluate
from pyro_blora.plots import reliability_diagram, save_figure
from pyro_blora.pretrained import load_pretrained

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
) -> None:
    """Accuracy and calibration of a saved adapter, and what it does not know.

    The mutual information is the part of the uncertainty that comes from the posterior of the
    weights: high where more training data would help.

    Example: pyro-blora evaluate --adapter out/arc_easy --task arc_easy --data-dir data
    """
    console = Console()
    read_config(adapter)  # a folder that is none is said before the network is loaded
    data = load_task(task, data_dir=data_dir, max_test=max_test)
    precision = o.chosen(precision, console)
    net, tokenizer = load_pretrained(model)
    collate = data.collator(tokenizer)
    blora = BayesianLoRA.from_pretrained(net, adapter, likelihood=likelihood_for(data, collate))
    torch.manual_seed(seed)
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
    console.print(
        f"entropy {float(prediction.entropy.mean()):.3f} nats, of which "
        f"{float(prediction.mutual_information.mean()):.4f} from the posterior",
        highlight=False,
    )
    if out is not None:
        text = json.dumps({"task": task, "num_samples": num_samples, **scores.as_dict()}, indent=2)
        write_atomically(out / "metrics.json", lambda p: p.write_text(text + "\n", "utf-8"))
        figure = reliability_diagram({task: (prediction.probs, labels)})
        save_figure(figure, out / "reliability.png")
        console.print(f"Written: {out / 'metrics.json'} and {out / 'reliability.png'}")
