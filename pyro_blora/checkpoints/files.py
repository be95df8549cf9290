"""The two files of an adapter: their names, their format, and whether they are as saved."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pyro_blora.checkpoints.atomic import written
from pyro_blora.errors import CheckpointError, first_line
from pyro_blora.network.pretrained import ADAPTER

__all__ = [
    "CONFIG",
    "FORMAT",
    "OF_BASE",
    "WEIGHTS",
    "as_files",
    "read_config",
    "read_tensors",
    "read_weights",
]

CONFIG = ADAPTER
WEIGHTS = "bayesian_lora.safetensors"
FORMAT = 1
OF_BASE = "base."  # how the names of the base's fingerprint begin, beside the adapter's tensors


def as_files(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """The contents of both files; the first has a checksum of both."""
    weights = safetensors.torch.save(tensors)
    text = json.dumps({**config, "sha256": _digest(config, weights)}, indent=2) + "\n"
    return {WEIGHTS: weights, CONFIG: text.encode()}


def _digest(config: Mapping[str, Any], weights: bytes) -> str:
    said = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode() + weights).hexdigest()


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter's folder says of it, without reading its tensors.

    Raises:
        CheckpointError: the file is missing, corrupt or of another format.
    """
    path = written(Path(folder), CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(_no_adapter(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({first_line(error)}); save it again."
        ) from error
    parts = {"format": int, "layers": dict, "prior": dict, "guide": dict, "likelihood": dict}
    for key, kind in parts.items():
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise CheckpointError(f"{path} lacks {key!r}; it is not what save_pretrained writes.")
    heads = config.get("modules_to_save", [])
    if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
        raise CheckpointError(f"{path}: modules_to_save is no list of names; save it again.")
    if config["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {config['format']}, this version reads {FORMAT}; "
            f"install the version that wrote it ({config.get('pyro_blora')})."
        )
    return config


def _no_adapter(path: Path) -> str:
    what = f"{path} does not exist; give"
    if (path.parent / "adapter_config.json").exists():
        what = (
            f"{path.parent} is a PEFT adapter, a point without a posterior; begin with it by "
            "BayesianLoRA.from_peft, load it by peft.PeftModel.from_pretrained, or give"
        )
    elif (path.parent / "config.json").exists():
        what = f"{path.parent} is a network, no adapter; wrap it by BayesianLoRA(net), or give"
    return f"{what} a folder that save_pretrained or pyro-blora train wrote."


def read_weights(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the adapter, those of the base's fingerprint among them.

    Raises:
        CheckpointError: the file is missing or corrupt, a number is not finite, or one of the two
            files was changed after it was saved.
    """
    path = written(folder, WEIGHTS)
    tensors = read_tensors(path, of_others=OF_BASE)
    if config.get("sha256", "") not in ("", _digest(config, path.read_bytes())):
        raise CheckpointError(
            f"{folder}: {CONFIG} or {WEIGHTS} is not as it was saved: their sha256 differs. Save "
            f'the adapter again; to change {CONFIG} by hand, take its line "sha256" out.'
        )
    return tensors


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
