"""``pyro-blora laplace``: a trained LoRA becomes a Bayesian adapter, without training."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.errors import ConfigurationError, DataError
from pyro_blora.methods import check_method

__all__ = ["run"]


def run(
    adapter: Annotated[Path, typer.Option(help="Folder of a LoRA that PEFT wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the Bayesian adapter.")],
    model: o.Base = None,
    task: o.TaskName = "facts",
    data_dir: o.DataDir = None,
    method: Annotated[
        str,
        typer.Option(
            help="'laplace-lora', 'tfb', or a pair PRIOR+Laplace or PRIOR+Isotropic, with a prior "
            "that can start at an adapter: KroneckerInducing, FactorInducing, GaussianFactors, "
            "Subspace."
        ),
    ] = "laplace-lora",
    batch_size: o.BatchSize = 8,
    max_train: o.MaxTrain = None,
    max_validation: o.MaxValidation = 200,
    seed: Annotated[int, typer.Option(help="Seed of which items are held out.")] = 0,
    precision: o.Precision = "auto",
    overwrite: o.Overwrite = False,
) -> None:
    """Give a trained PEFT LoRA a posterior around it, by one pass over the training set.

    The posterior mean is the LoRA itself. Read it back with `pyro-blora evaluate --adapter OUT`
    or BayesianLoRA.from_pretrained(net, OUT).

    Example: pyro-blora laplace --adapter my_lora --task arc_easy --data-dir data --out out/laplace
    """
    o.check_task(task, data_dir)
    check_method(method)
    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import read_peft
    from pyro_blora.data import load_task
    from pyro_blora.evaluation.comparison import item_length, likelihood_for
    from pyro_blora.guides._post_hoc import PostHoc
    from pyro_blora.inference import bayesianize
    from pyro_blora.methods import get_method
    from pyro_blora.network.pretrained import load_pretrained, shape_only

    made = get_method(method)
    guide = made.guide_of()
    if not isinstance(guide, PostHoc):
        raise ConfigurationError(
            f"--method {method} is trained; choose laplace-lora, tfb or a pair with Laplace or "
            f"Isotropic, or go on from the adapter by `pyro-blora train --from-peft {adapter}`."
        )
    o.check_free(out, overwrite=overwrite)
    lora = read_peft(adapter)
    base = model or lora.base or "smollm2"
    data = load_task(
        task, data_dir=data_dir, max_train=max_train, max_validation=max_validation, seed=seed
    )
    if not data.train:
        raise DataError(f"task {task!r} has no train split; choose another")
    prior = made.prior_of(lora.rank)
    parts: dict[str, Any] = {"method": made, "prior": prior, "guide": guide}
    BayesianLoRA.from_peft(shape_only(base), adapter, **parts).unwrap()
    o.check_out(out)
    console = Console(highlight=False)
    precision = o.chosen(precision, console)
    with o.phase("load"):
        net, tokenizer = load_pretrained(base)
    collate = data.collator(tokenizer)
    with o.phase(method):
        blora = bayesianize(
            net,
            adapter,
            data=data.train,
            collate=collate,
            **parts,
            likelihood=likelihood_for(data, collate, "fixed"),
            length=item_length,
            batch_size=batch_size,
            precision=precision,
        )
    console.print(blora)
    blora.save_pretrained(out, notes={"task": task, "method": method, "seed": seed})
    console.print(f"Written: {out}")
