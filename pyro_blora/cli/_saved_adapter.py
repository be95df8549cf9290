"""What the commands that ask a saved adapter have in common."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyro_blora.cli import _arguments as o

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_blora.data import Item, Task
    from pyro_blora.posterior.prediction import Prediction

__all__ = ["AdapterFolder", "Seed", "predictor"]

AdapterFolder = Annotated[Path, typer.Option(help="Folder that `pyro-blora train` wrote.")]
Seed = Annotated[int, typer.Option(help="Seed of the posterior draws.")]


def predictor(
    adapter: Path,
    model: str,
    task: "Task",
    *,
    num_samples: int,
    seed: int,
    precision: str,
    linearised: bool = False,
) -> "Callable[[Sequence[Item]], tuple[Prediction, Tensor]]":
    """Loads the network and the adapter; what predicts items, as this task has them, and labels."""
    import torch

    from pyro_blora.bayesian_lora import BayesianLoRA
    from pyro_blora.evaluation.comparison import item_length, likelihood_for
    from pyro_blora.evaluation.predict_dataset import predict_dataset
    from pyro_blora.network.pretrained import load_pretrained

    with o.phase("load"):
        net, tokenizer = load_pretrained(model)
    collate = task.collator(tokenizer)
    blora = BayesianLoRA.from_pretrained(net, adapter, likelihood=likelihood_for(task, collate))
    torch.manual_seed(seed)

    def predict(items: "Sequence[Item]") -> "tuple[Prediction, Tensor]":
        return predict_dataset(
            lambda batch: blora.predict(batch, num_samples, linearised=linearised),
            items,
            collate,
            length=item_length,
            device=next(net.parameters()).device,
            precision=precision,
        )

    return predict
