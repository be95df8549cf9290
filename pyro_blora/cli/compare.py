"""``pyro-blora compare``: methods side by side on one task."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import load_task
from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import KINDS, METHODS, get_method, kind_of


def run(
    model: o.Model = "smollm2",
    task: o.TaskName = "facts",
    data_dir: o.DataDir = None,
    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(METHODS)}; pairs such as Subspace+FullRank or "
            "my_module:MyPrior+MeanField; and KIND:NAME for each of them: "
            + "; ".join(f"{kind}:NAME, {told}" for kind, told in KINDS.items())
            + "."
        ),
    ] = "lora,split:lora,temperature:lora,bayesian-lora",
    seeds: Annotated[str, typer.Option(help="Seeds: one run of every method for each.")] = "0,1,2",
    max_steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 300,
    batch_size: o.BatchSize = 8,
    max_train: o.MaxTrain = 400,
    max_validation: o.MaxValidation = 200,
    max_test: o.MaxTest = None,
    rank: o.Rank = None,
    target_modules: o.Targets = None,
    num_samples: o.NumSamples = 10,
    lora_lr: Annotated[
        float | None,
        typer.Option(help="The learning rate of lora; default: the method's."),
    ] = None,
    precision: o.Precision = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, predictions and a diagram.")
    ] = Path("out/compare"),
    overwrite: o.Overwrite = False,
) -> None:
    """Fine-tune a model by each method and compare accuracy and calibration on the test set.

    Every method gets the same data, budget and scoring. NLL, ECE (15 bins), Brier score and
    accuracy are those of the probabilities over the candidate answers or classes. The table says
    how each row's temperature was fitted, how many labels the row needs beyond the training items,
    and its NLL minus that of the first row, item by item, with the error over items and seeds.

    Each row is saved when it is done. After an interruption the same command continues; other
    --methods or --seeds with the same --out train only what is missing.

    Example: pyro-blora compare --task arc_easy --data-dir data --seeds 0,1,2 --out out/arc_easy
    """
    names = o.listed(methods, "--methods")
    try:
        runs = tuple(int(part) for part in o.listed(seeds, "--seeds"))
    except ValueError as error:
        raise ConfigurationError(
            f"--seeds must be numbers such as 0,1,2, got {seeds!r}."
        ) from error
    for name in names:
        get_method(kind_of(name)[1])
    load_task(task, data_dir=data_dir)  # bad data is refused before torch is imported
    from pyro_blora.evaluation import comparison

    console = Console(highlight=False)
    own = {}
    if lora_lr is not None:
        own["lora"] = replace(METHODS["lora"], learning_rates={"mean": lora_lr})

    def told(row: comparison.Row) -> None:
        console.print(
            f"{row.method}, seed {row.seed}: ACC {row.acc:.1%}, ECE {row.ece:.1%}, "
            f"NLL {row.nll:.3f}, Brier {row.brier:.3f} on {row.n_test} test items"
        )

    found = comparison.compare(
        model,
        task,
        names,
        own=own,
        seeds=runs,
        num_steps=max_steps,
        max_train=max_train,
        max_validation=max_validation,
        max_test=max_test,
        data_dir=data_dir,
        rank=rank,
        target_modules=target_modules and o.listed(target_modules, "--target-modules"),
        num_samples=num_samples,
        precision=precision,
        out=out,
        overwrite=overwrite,
        callback=told,
        phase=o.phase,
        batch_size=batch_size,
    )
    console.print(found)
    console.print(f"Written: {out / comparison.RESULTS} and {out / comparison.DIAGRAM}")
