"""Predictions for a whole data set."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import Batch
from pyro_blora.network.precision import choose_precision
from pyro_blora.posterior.bayesian_lora_model import to_device
from pyro_blora.posterior.prediction import Prediction

__all__ = ["predict_dataset"]


def predict_dataset(
    predict: Callable[[Batch], Prediction],
    data: Sequence[Any],
    collate: Callable[[list[Any]], Batch],
    *,
    batch_size: int = 16,
    length: Callable[[Any], int] | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
    progress: bool | None = None,
    description: str = "predict",
) -> tuple[Prediction, Tensor]:
    """The predictive distribution of every example, none dropped, in the order of ``data``.

    Args:
        predict: the prediction of one batch, such as ``blora.predict``.
        data: the examples.
        collate: makes a batch of a list of examples; its ``labels`` are passed through.
        batch_size: examples at once.
        length: the length of an example; batches of like lengths waste no padding.
        device: where the network is. Default: where ``predict`` has its adapter, if it is a method
            of one; else the accelerator if there is one, or the CPU.
        precision: ``"float32"``, ``"bfloat16"`` (autocast), or ``"auto"``, as in ``fit``.
        progress: whether to show a progress bar; ``None`` shows it on a terminal.
        description: what the progress bar says.

    Returns:
        The prediction, ``S x N x K``, and the labels, ``N``.

    Raises:
        BatchError: the data set is empty, or its batches have no labels.
        ConfigurationError: the precision is unknown.
    """
    usual: Any = torch.accelerator.current_accelerator(True) or "cpu"
    adapter = getattr(predict, "__self__", None)
    device = torch.device(device or getattr(adapter, "device", usual))
    autocast = choose_precision(precision, device) == "bfloat16"
    if not len(data):
        raise BatchError("There is nothing to predict: the data set is empty.")
    order = list(range(len(data)))
    if length is not None:
        order.sort(key=lambda i: length(data[i]))
    predictions, labels = [], []
    hide = None if progress is None else not progress
    starts = tqdm(range(0, len(order), batch_size), desc=description, disable=hide, unit="batch")
    for start in starts:
        batch = to_device(collate([data[i] for i in order[start : start + batch_size]]), device)
        if "labels" not in batch:
            raise BatchError(
                "predict_dataset needs labels in a batch; for data without them call "
                "blora.predict(batch) yourself."
            )
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            predictions.append(predict(batch))
        labels.append(batch["labels"].cpu())
    back = torch.tensor(order).argsort()
    joined = Prediction.cat(predictions)
    return Prediction(joined.samples.cpu()[:, back]), torch.cat(labels)[back]
