"""Batches of tensors: moved to a device, and repeated."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_blora.errors import BatchError
from pyro_blora.likelihoods import Batch


def repeat_batch(batch: Batch, times: int) -> dict[str, Any]:
    """The batch repeated ``times`` times, so that each particle or draw sees all its examples."""
    return {
        key: value.repeat(times, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch on ``device``, with its lists and arrays of numbers as tensors."""
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"A batch must be a mapping of tensors by name, got a {type(batch).__name__}; make one "
            "from examples with a collator, such as task.collator(tokenizer)(items)."
        )
    return {key: _on_device(value, device) for key, value in batch.items()}


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | np.ndarray):
        arrays = isinstance(value, list) and any(isinstance(row, np.ndarray) for row in value)
        with suppress(TypeError, ValueError, RuntimeError):  # of texts or ragged rows
            value = torch.tensor(np.asarray(value) if arrays else value)
    return value.to(device) if isinstance(value, Tensor) else value
