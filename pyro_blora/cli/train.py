"""``pyro-blora train``: fine-tune one Bayesian adapter and save it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import load_task
from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import get_method


def run(
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    model: o.Base = None,
    task: o.TaskName = "facts",
    data_dir: o.DataDir = None,
    method: o.Method = "bayesian-lora",
    seed: Annotated[int, typer.Option(help="Seed of the data's order and all draws.")] = 0,
    max_steps: Annotated[
        int,
        typer.Option(
            help="Optimizer steps; 0 for a Laplace guide, such as that of laplace-lora, around the "
            "LoRA of --from-peft.",
            min=0,
        ),
    ] = 300,
    batch_size: o.BatchSize = 8,
    max_train: o.MaxTrain = None,
    max_validation: o.MaxValidation = 200,
    rank: o.Rank = None,
    target_modules: o.Targets = None,
    top: Annotated[
        int | None,
        typer.Option(help="Adapt only this many top blocks, and no head. Default: all.", min=1),
    ] = None,
    from_peft: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a LoRA that PEFT wrote. The posterior mean starts there, on the same "
            "layers and with the LoRA's rank, or a larger --rank."
        ),
    ] = None,
    precision: o.Precision = "auto",
    peft: Annotated[
        bool, typer.Option(help="Also write the posterior mean as a PEFT adapter to OUT/peft.")
    ] = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Fine-tune a model with a Bayesian adapter and save the adapter.

    Writes safetensors, JSON and a model card; the base model is not copied. Read the adapter back
    with `pyro-blora evaluate --adapter OUT` or BayesianLoRA.from_pretrained(OUT).

    Example: pyro-blora train --task arc_easy --data-dir data --out out/arc_easy

    Adapting only the upper blocks takes a fraction of the time, also to predict: add --top 10.

    To give a trained PEFT LoRA a posterior without any steps, use
    --from-peft DIR --method laplace-lora --max-steps 0.
    """
    if from_peft is not None and top is not None:
        raise ConfigurationError("--top cannot be used with --from-peft, which has its own layers.")
    made = get_method(method)
    data = load_task(
        task, data_dir=data_dir, max_train=max_train, max_validation=max_validation, seed=seed
    )
    import torch

    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS, read_peft
    from pyro_blora.files import check_free, own_files, remove_own
    from pyro_blora.inference import finish, fit
    from pyro_blora.network.pretrained import load_for

    console = Console(highlight=False)
    if not overwrite and (out / WEIGHTS).exists():
        raise ConfigurationError(
            f"--out {out} has an adapter already; name another folder, or add --overwrite."
        )
    check_free(out, WEIGHTS, CONFIG)
    if peft:
        check_free(out / "peft", PEFT_WEIGHTS, PEFT_CONFIG)
    if from_peft is not None:
        model = model or read_peft(from_peft).base
    with o.phase("load"):
        net, tokenizer = load_for(model or "smollm2", len(data.test[0].choices), seed)
    collate = data.collator(tokenizer, net=net)
    torch.manual_seed(seed)
    if from_peft is None:
        layers = None
        if top is not None:
            config: Any = net.config
            depth = config.get_text_config().num_hidden_layers
            layers = range(max(0, depth - top), depth)
        blora = BayesianLoRA(
            net,
            target_modules=target_modules and o.listed(target_modules, "--target-modules"),
            layers_to_transform=layers,
            method=made,
            rank=rank,
            likelihood=data.likelihood(collate),
        )
    else:
        blora = BayesianLoRA.from_peft(
            net,
            from_peft,
            method=made,
            prior=None if rank is None else made.prior_of(rank),
            likelihood=data.likelihood(collate),
        )
    console.print(blora)
    reading: dict[str, Any] = {"collate": collate, "batch_size": batch_size}
    reading["precision"] = precision
    result = None
    with o.phase(f"train {method}, seed {seed}"):
        if max_steps:
            result = fit(
                blora,
                data.train,
                validation=data.validation or None,
                validate_every=max_steps,  # once, at the end
                num_steps=max_steps,
                seed=seed,
                **reading,
            )
        else:
            finish(blora, data.train, **reading)
    if result is not None:
        console.print(result)
        for step, nll in result.validation:
            console.print(f"step {step}: NLL {nll:.3f} on {len(data.validation)} validation items")
    blora.save_pretrained(out, result=result, notes={"task": task, "method": method, "seed": seed})
    if peft:
        blora.export_peft(out / "peft")
    elif overwrite:  # an export of the replaced adapter would be stale
        remove_own(out / "peft", own_files(out / "peft"))
    console.print(f"Written: {out}")
