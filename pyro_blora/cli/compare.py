"""``pyro-blora compare``: methods side by side on one task."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import load_task
from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import BEST, METHODS, check_method


def run(
    model: o.Model = "smollm2",
    task: o.TaskName = "facts",
    data_dir: o.DataDir = None,
    methods: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join((*METHODS, BEST))}; pairs "
            "such as Subspace+FullRank or my_module:MyPrior+MeanField; temperature:NAME for any of "
            "them with a temperature by the validation items ('temperature': of lora), split:NAME "
            "with one by an eighth of the training items, on which NAME then does not train; "
            "distilled:NAME for those that have draws."
        ),
    ] = "lora,split:lora,temperature,bayesian-lora",
    seeds: Annotated[str, typer.Option(help="Seeds: one run of every method for each.")] = "0,1,2",
    max_steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 300,
    batch_size: o.BatchSize = 8,
    max_train: o.MaxTrain = 400,
    max_validation: o.MaxValidation = 200,
    max_test: o.MaxTest = None,
    rank: o.Rank = None,
    target_modules: o.Targets = "q_proj,v_proj",
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

    Every method has the same data, budget and scoring. NLL, ECE (15 bins), Brier score and accuracy
    are those of the probabilities over the candidate answers. `lora` is plain LoRA at its last
    step, `lora-best` at its best validation step. `temperature` is `lora` with its logits scaled on
    validation items, and `split:lora` is scaled on an eighth of the training items, which it does
    not train on. The others are priors and guides of this library (see --methods). The table says
    how many labeled items each row needs beside the training items.

    Each row is saved when it is done. After an interruption the same command goes on; other
    --methods or --seeds with the same --out train only what is missing.

    Example: pyro-blora compare --task arc_easy --data-dir data --seeds 0,1,2 --out out/arc_easy
    """
    settings = {name: value for name, value in locals().items() if name not in ("out", "overwrite")}
    names = o.listed(methods, "--methods")
    try:
        runs = tuple(int(part) for part in o.listed(seeds, "--seeds"))
    except ValueError as error:
        raise ConfigurationError(
            f"--seeds must be numbers such as 0,1,2, got {seeds!r}."
        ) from error
    for name in names:
        check_method(name)
    load_task(task, data_dir=data_dir)  # bad data is refused before torch is imported
    from pyro_blora.cli import comparison
    from pyro_blora.files import check_free
    from pyro_blora.network.pretrained import load_pretrained
    from pyro_blora.options import choose_precision

    console = Console(highlight=False)
    settings |= {
        "data_dir": None if data_dir is None else str(data_dir),
        "methods": names,
        "seeds": runs,
        "target_modules": o.listed(target_modules, "--target-modules"),
        "precision": choose_precision(precision),
    }
    check_free(out, comparison.RESULTS, comparison.PREDICTIONS, comparison.DIAGRAM)
    rows = [] if overwrite else comparison.read(settings, out)
    done = {(row.method, row.seed): row for row in rows}
    asked = list(dict.fromkeys(product(names, runs)))
    there = [key for key in asked if key in done]
    if there:
        console.print(f"{len(there)} of {len(asked)} rows are in {out} already")
    if len(there) < len(asked):
        with o.phase("load"):
            net, tokenizer = load_pretrained(model)
        for row in comparison.compare(settings, net, tokenizer, done=there, phase=o.phase):
            done[row.method, row.seed] = row
            comparison.write(list(done.values()), settings, out)
            console.print(
                f"{row.method}, seed {row.seed}: ACC {row.acc:.1%}, ECE {row.ece:.1%}, "
                f"NLL {row.nll:.3f}, Brier {row.brier:.3f} on {row.n_test} test items"
            )
    shown = [done[key] for key in asked]
    comparison.draw(shown, out)
    count = len(set(runs))
    title = f"{model} on {task}" + (f": mean ± deviation over {count} seeds" if count > 1 else "")
    console.print(comparison.table(shown, title))
    console.print(f"Written: {out / comparison.RESULTS} and {out / comparison.DIAGRAM}")
