"""How a layer of the network receives its update.

The network is not rebuilt: each adapted layer gets a forward hook, so its parameters, its name, its
class (quantised or not) and its ties stay what they were, and taking the hook off gives the
network back exactly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyro_blora.errors import ConfigurationError
from pyro_blora.update import LayerUpdate

__all__ = ["Adapter", "adapter_of", "without_updates"]


class Adapter:
    """Adds the current update to the output of one layer; without one, the layer is untouched.

    Attributes:
        name: the layer's full name.
        update: what is added, or ``None``.
        rows: the output features that the layer computes, where not all (see ``heads.py``).
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        if adapter_of(module) is not None:
            raise ConfigurationError(
                f"{name} is adapted already; call .unwrap() on the BayesianLoRA that holds it."
            )
        self.name = name
        self.update: LayerUpdate | None = None
        self.rows: Tensor | None = None
        self._handle: RemovableHandle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook: ``output + dW x``."""
        return output if self.update is None else self.update(args[0], output, self.rows)

    def remove(self) -> None:
        """Takes the hook off the layer."""
        self._handle.remove()


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter on ``module``, or ``None``."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, Adapter):
            return hook
    return None


@contextmanager
def without_updates(net: nn.Module) -> Iterator[None]:
    """Within, the layers of ``net`` are as pretrained, whatever update they hold."""
    held = [a for a in map(adapter_of, net.modules()) if a is not None]
    updates = [adapter.update for adapter in held]
    try:
        for adapter in held:
            adapter.update = None
        yield
    finally:
        for adapter, update in zip(held, updates, strict=True):
            adapter.update = update
