"""Tensors in a file, checked as they are read."""

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pyro_blora.errors import CheckpointError

__all__ = ["read_tensors"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing, corrupt, or holds what is not finite.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; save the adapter again.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is corrupt or incomplete ({error}); save it again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} has values that are not finite.")
    return tensors
