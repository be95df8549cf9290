"""Tensors in a file, checked as they are read."""

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pyro_blora.errors import CheckpointError, first_line

__all__ = ["read_tensors"]


def read_tensors(path: Path, *, of_others: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        path: the file.
        of_others: how the names of tensors begin that may be infinite. Default: none may.

    Raises:
        CheckpointError: it is missing, corrupt, or holds what is not finite.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; save the adapter again.") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is corrupt or incomplete ({first_line(error)}); save it again."
        ) from error
    for name, tensor in tensors.items():
        own = of_others is None or not name.startswith(of_others)
        if own and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} has values that are not finite.")
    return tensors
