"""What the commands that ask a saved adapter have in common."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyro_blora.cli import _arguments as o
from pyro_blora.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_blora.data import Item, Task
    from pyro_blora.posterior.prediction import Prediction

__all__ = ["AdapterFolder", "OwnTask", "Seed", "base_name", "own_task", "predictor"]


def _check_there(folder: Path) -> Path:
    """Refuses, before torch is imported, what is no folder."""
    if not folder.is_dir():
        raise CheckpointError(
            f"--adapter {folder} is no folder; give one that `pyro-blora train` or `pyro-blora "
            "laplace` wrote, with a bayesian_lora_config.json."
        )
    return folder


AdapterFolder = Annotated[
    Path,
    typer.Option(
        help="Folder that `pyro-blora train` or `pyro-blora laplace` wrote.",
        callback=_check_there,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the posterior draws.")]


OwnTask = Annotated[
    str | None,
    typer.Option(
        help="'facts' (built in), the name of a folder in --data-dir, or one of the hub's sets; "
        "default: what the adapter was trained on."
    ),
]


def own_task(adapter: Path, task: str | None) -> str:
    """The task asked for, or the one that an adapter says it was trained on.

    Raises:
        ConfigurationError: there is neither.
    """
    from pyro_blora.checkpoints import read_config
    from pyro_blora.errors import ConfigurationError

    saved = read_config(adapter)
    found = task or saved.get("notes", {}).get("task")
    if not found:
        raise ConfigurationError(
            f"{adapter} does not say what it was trained on; say what to ask it by --task, such "
            "as --task facts."
        )
    return str(found)


def base_name(adapter: Path, model: str | None) -> str:
    """The base of an adapter: the one asked for, or the one it names.

    Raises:
        ConfigurationError: there is neither.
    """
    from pyro_blora.checkpoints import read_config
    from pyro_blora.errors import ConfigurationError

    saved = read_config(adapter)
    base = model or saved.get("base_model")
    if not base:
        raise ConfigurationError(
            f"{adapter} was trained on a network that has no name on the hub; say where it is by "
            "--model."
        )
    return str(base)


def predictor(
    adapter: Path,
    model: str | None,
    task: "Task",
    *,
    num_samples: int,
    seed: int,
    precision: str,
    linearised: bool | None = None,
) -> "Callable[[Sequence[Item]], tuple[Prediction, Tensor]]":
    """Loads the network and the adapter; what predicts items, as this task has them, and labels."""
    import torch

    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.checkpoints import read_config
    from pyro_blora.evaluation.comparison import item_length, likelihood_for
    from pyro_blora.network.pretrained import load_pretrained

    with o.phase("load"):
        net, tokenizer = load_pretrained(base_name(adapter, model))
    collate = task.collator(tokenizer)
    likelihood: Any = likelihood_for(task, collate)
    saved = read_config(adapter)["likelihood"].get("name")
    if saved == type(likelihood).__name__ == "MultipleChoice":
        likelihood = type(likelihood)  # with the saved options: a task says none of them
    blora = BayesianLoRA.from_pretrained(net, adapter, likelihood=likelihood)
    torch.manual_seed(seed)

    def predict(items: "Sequence[Item]") -> "tuple[Prediction, Tensor]":
        return blora.predict_dataset(
            items,
            collate,
            num_samples,
            linearised=linearised,
            length=item_length,
            precision=precision,
        )

    return predict
