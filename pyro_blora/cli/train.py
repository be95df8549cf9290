"""``pyro-blora train``: fine-tune one Bayesian adapter and save it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pyro_blora.cli import _arguments as o
from pyro_blora.data import load_task
from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import check_method


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
            help="Optimizer steps; 0 for laplace-lora, tfb and other post-hoc guides around the "
            "LoRA of --from-peft.",
            min=0,
        ),
    ] = 300,
    batch_size: o.BatchSize = 8,
    max_train: o.MaxTrain = None,
    max_validation: o.MaxValidation = 200,
    rank: o.Rank = None,
    target_modules: o.Targets = "q_proj,v_proj",
    top: Annotated[
        int | None,
        typer.Option(help="Adapt only this many top blocks, and no head; default: all.", min=1),
    ] = None,
    from_peft: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a LoRA that PEFT wrote: the posterior mean starts there, on its layers "
            "and with its rank, or a larger --rank."
        ),
    ] = None,
    precision: o.Precision = "auto",
    peft: Annotated[
        bool, typer.Option(help="Also write the posterior mean as a PEFT adapter to OUT/peft.")
    ] = False,
    save_every: Annotated[
        int, typer.Option(help="Steps between savings of the run's state, in OUT/training.", min=1)
    ] = 50,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was stopped, from OUT/training."),
    ] = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Fine-tune a model by SVI over Bayesian-LoRA updates and save the adapter.

    Writes safetensors and JSON; the base model is not copied. Read it back with
    `pyro-blora evaluate --adapter OUT` or BayesianLoRA.from_pretrained(OUT). OUT also
    has a model card with the data's size, ELBO and validation.

    Example: pyro-blora train --task arc_easy --data-dir data --out out/arc_easy

    Adapters in the upper blocks alone train and predict in a fraction of the
    time: add --top 10.

    If the run is stopped or killed, the same command with --resume goes on.

    A trained PEFT LoRA gets a posterior, without steps, by
    --from-peft DIR --method laplace-lora --max-steps 0.
    """
    if from_peft is not None and top is not None:
        raise ConfigurationError("--top is not for --from-peft, which has its own layers.")
    if resume and overwrite:
        raise ConfigurationError(
            "--resume goes on, --overwrite begins anew: leave one of them out."
        )
    check_method(method)
    data = load_task(
        task, data_dir=data_dir, max_train=max_train, max_validation=max_validation, seed=seed
    )
    import torch

    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS, read_peft
    from pyro_blora.data.items import item_length
    from pyro_blora.files import check_free, own_files, remove_own
    from pyro_blora.inference import finish, fit
    from pyro_blora.inference.resume import STATE
    from pyro_blora.methods import get_method
    from pyro_blora.network.pretrained import load_pretrained

    run_dir, made, console = out / "training", get_method(method), Console(highlight=False)
    state = run_dir / STATE
    if not (overwrite or resume):
        what = "a run that was stopped; add --resume to go on" if state.exists() else ""
        what = "an adapter already; name another folder" if (out / WEIGHTS).exists() else what
        if what:
            raise ConfigurationError(f"--out {out} has {what}, or add --overwrite.")
    check_free(out, WEIGHTS, CONFIG)
    check_free(run_dir, *([] if resume else [STATE]))
    if peft:
        check_free(out / "peft", PEFT_WEIGHTS, PEFT_CONFIG)
    lora = None if from_peft is None else read_peft(from_peft)
    if lora is not None:
        model, rank = model or lora.base, rank or lora.rank
    with o.phase("load"):
        net, tokenizer = load_pretrained(model or "smollm2")
    collate = data.collator(tokenizer)
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "method": made,
        "prior": made.prior_of(rank),
        "guide": made.guide_of(),
        # a LoRA that was trained on these items would teach a scale what it has memorized
        "likelihood": data.likelihood(collate, "fixed" if lora else made.scale),
    }
    if from_peft is None:
        targets = o.listed(target_modules, "--target-modules")
        layers = None
        if top is not None:
            config: Any = net.config
            depth = config.get_text_config().num_hidden_layers
            layers = range(max(0, depth - top), depth)
        blora = BayesianLoRA(net, target_modules=targets, layers_to_transform=layers, **parts)
    else:
        blora = BayesianLoRA.from_peft(net, from_peft, **parts)
    console.print(blora)
    if overwrite:
        remove_own(run_dir, [STATE])
    elif resume and not state.exists():
        console.print(f"{run_dir} has no run to go on with: this one begins")
    reading: dict[str, Any] = {"collate": collate, "length": item_length}
    reading |= {"batch_size": batch_size, "precision": precision}
    result = None
    with o.phase(f"train {method}, seed {seed}"):
        if max_steps:
            result = fit(
                blora,
                data.train,
                validation=data.validation or None,
                validate_every=max_steps,  # at the end alone, by as many draws as a prediction has
                num_steps=max_steps,
                seed=seed,
                checkpoint_dir=run_dir,
                save_every=save_every,
                resume=resume,
                **reading,
            )
        else:
            finish(blora, data.train, **reading)
    if result is not None:
        console.print(result)
        for step, nll in result.validation:
            console.print(f"step {step}: NLL {nll:.3f} on {len(data.validation)} validation items")
    about = {"task": task, "method": method, "seed": seed}
    blora.save_pretrained(out, result=result, notes=about)
    if peft:
        blora.export_peft(out / "peft")
    elif overwrite:  # the adapter that it was of is gone
        remove_own(out / "peft", own_files(out / "peft"))
    console.print(f"Written: {out}")
