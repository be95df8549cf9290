"""Heads of the network that are trained whole, as points: PEFT's ``modules_to_save``."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.quantised import is_quantised
from pyro_blora.network.targets import body_of, head_names, matches, name_in_base

__all__ = ["TrainedHeads", "heads_to_train"]


def heads_to_train(
    net: nn.Module, modules_to_save: Sequence[str] | None, targets: Iterable[str], new_head: bool
) -> list[str]:
    """Full names of the modules to train as points: those that ``modules_to_save`` ends.

    Where it is ``None`` and the likelihood reads a head that may be new (``new_head``), the heads
    that hold none of the adapted layers, ``targets``.

    Raises:
        ConfigurationError: a name is no module's, or is that of a part of the network's body or of
            an adapted layer.
    """
    targets = tuple(targets)
    if modules_to_save is None:
        heads = head_names(net) if new_head else []
        adapted = [head for head in heads if any(_within(t, head) for t in targets)]
        parts = [head for head in adapted if head not in targets]
        if parts:
            warnings.warn(
                f"target_modules adapts layers of {', '.join(parts)}, a head of the network, so "
                "nothing trains the rest of it: if it is new, leave those layers out with "
                "exclude_modules, and the head is trained whole.",
                stacklevel=4,
            )
        return [head for head in heads if head not in adapted]
    found = [name for name, _ in net.named_modules() if name and matches(name, modules_to_save)]
    body = body_of(net)
    for name in modules_to_save:
        chosen = [f for f in found if matches(f, [name])]
        what = None if chosen else "no module of the network"
        if body and any(_within(f, body) or _within(body, f) for f in chosen):
            what = f"part of the network's body, {body}, which is adapted by target_modules"
        elif any(_within(t, f) or _within(f, t) for f in chosen for t in targets):
            what = "adapted already, by target_modules"
        if what is not None:
            raise ConfigurationError(
                f"modules_to_save={list(modules_to_save)}: {name} is {what}. Name heads, of "
                f"{head_names(net)}, that target_modules does not."
            )
    return [f for f in found if not any(f != other and _within(f, other) for other in found)]


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


class TrainedHeads(PyroModule):
    """Trained copies, in single precision, of the tensors of some modules of the network.

    Within :meth:`in_place` they stand for the network's own, which stay frozen and as they were.
    One value serves every row of a batch, whichever particle sees it.

    Raises:
        ConfigurationError: a module, of those of these full ``names``, is quantised or offloaded.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.roles: dict[str, str] = {}
        self._owners: dict[str, tuple[str, nn.Module, str]] = {}
        for head in names:
            for path, owner in net.get_submodule(head).named_modules(prefix=head):
                if "original_module" in path.split("."):  # PEFT's wrapper keeps the untrained one
                    continue
                away = hasattr(owner, "_hf_hook") and any(p.is_meta for p in owner.parameters())
                if is_quantised(owner) or away:
                    raise ConfigurationError(
                        f"{path} is {'offloaded' if away else 'quantised'} and cannot be "
                        "trained; load the network with it whole, or pass modules_to_save=()."
                    )
                for name, own in owner.named_parameters(recurse=False):
                    attribute = name_in_base(f"{path}.{name}").replace(".", "_")
                    self._owners[attribute] = f"{path}.{name}", owner, name
                    self.roles[attribute] = "head"
                    dtype = torch.promote_types(own.dtype, torch.float32)
                    setattr(self, attribute, PyroParam(own.detach().to(dtype, copy=True)))

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by their full names in the network."""
        return {full: getattr(self, name) for name, (full, _, _) in self._owners.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the network computes with the trained tensors; its own must not be sharded."""
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        for full, owner, name in self._owners.values():
            parameters: dict[str, Any] = owner._parameters
            before.append((parameters, name, parameters[name]))
            if hasattr(parameters[name], "full_tensor"):
                raise ConfigurationError(
                    f"{full} is sharded and cannot be trained: call fully_shard on the blocks of "
                    "the network, not on all of it, or pass modules_to_save=()."
                )
        try:
            for attribute, (parameters, name, own) in zip(self._owners, before, strict=True):
                parameters[name] = getattr(self, attribute).to(own.device, own.dtype)
            yield
        finally:
            for parameters, name, own in before:
                parameters[name] = own
