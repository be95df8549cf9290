"""The global random numbers of torch, Python and numpy, to be kept in a file."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_states", "set_random_states"]


def random_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Python's and numpy's state, which JSON holds; torch's, and that of all CUDA devices, if used.

    Args:
        device: where the model lies.
    """
    kind, numbers, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    numpy = [kind, np.asarray(numbers).tolist(), *rest]
    return {"python": random.getstate(), "numpy": numpy}, states


def set_random_states(generators: dict[str, Any], states: dict[str, Tensor]) -> None:
    """Sets what :func:`random_states` gave, of as many CUDA devices as there are.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is no such state.
    """
    version, numbers, spare = generators["python"]
    random.setstate((version, tuple(numbers), spare))
    np.random.set_state(tuple(generators["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{i}"], i)
