"""What a checkpoint says of the base network: its name, its kind, and the layers in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_blora.errors import CheckpointError, ConfigurationError
from pyro_blora.network.pretrained import load_network, name_of
from pyro_blora.network.targets import layer_shape, name_in_base

__all__ = ["base_of", "load_base", "names_in"]


def base_of(net: nn.Module) -> dict[str, Any]:
    """Name, class, dtype and, of a classifier, number of classes of a base network."""
    bare: Any = net
    if hasattr(net, "get_base_model"):  # a PeftModel
        bare = bare.get_base_model()
    kind: dict[str, Any] = {"class": type(bare).__name__}
    if isinstance(getattr(bare, "dtype", None), torch.dtype):
        kind["dtype"] = str(bare.dtype).removeprefix("torch.")
    if kind["class"].endswith("ForSequenceClassification"):
        kind["num_labels"] = bare.config.num_labels
    return {"base_model": name_of(bare), "base": kind}


def load_base(config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The base network, by its saved name.

    Raises:
        CheckpointError: it has none, cannot be had by it, or is no network of the saved class.
    """
    name, kind = config.get("base_model"), config.get("base")
    kind = kind if isinstance(kind, dict) else {}
    wanted, dtype = kind.get("class"), getattr(torch, str(kind.get("dtype")), None)
    own = f"load it yourself, and pass it: BayesianLoRA.from_pretrained(net, {str(folder)!r})."
    if not name or not isinstance(name, str):
        what = f"a {wanted}, " if wanted else ""
        raise CheckpointError(f"{folder}: its base, {what}has no name on the hub; {own}")
    try:
        net = load_network(
            name,
            num_labels=kind.get("num_labels"),
            dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
        )
    except ConfigurationError as error:
        raise CheckpointError(f"{folder}: its base does not load: {error}") from error
    if wanted not in (None, type(net).__name__):
        raise CheckpointError(
            f"{folder}: its base is a {wanted}, and {name!r} loads as a {type(net).__name__}; {own}"
        )
    return net


def names_in(net: nn.Module, wanted: Mapping[str, Any], told: str) -> list[str]:
    """The full names in ``net`` of layers and heads of its base.

    They differ where ``net`` is a ``PeftModel``.

    Args:
        net: the network.
        wanted: names in the base, each with its ``[d_out, d_in]``, or ``None`` for any shape.
        told: the beginning of the message of an error.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    here: dict[str, str] = {}
    for name, _ in net.named_modules():
        here.setdefault(name_in_base(name), name)  # the outermost of what PEFT wraps
    names = []
    for base, shape in wanted.items():
        name = here.get(name_in_base(base))
        found = None if name is None else layer_shape(net.get_submodule(name))
        if name is None or (shape is not None and list(found or ()) != shape):
            what = "has no such layer" if found is None else f"has it as {found[0]} x {found[1]}"
            raise CheckpointError(
                f"{told} with {base} of {shape or 'its own'}; {type(net).__name__} {what}. Load "
                "the base it was made for."
            )
        names.append(name)
    return names
