"""4-bit layers that bitsandbytes packs for a processor: no gradient passes through a packed one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from pyro_blora.errors import ConfigurationError
from pyro_blora.network.adapter import entering

__all__ = ["Unpacked", "is_packed"]

_FLAG = "support_avx512bf16_for_cpu"


class Unpacked:
    """Keeps bitsandbytes from packing the 4-bit layers of a network, until :meth:`release`.

    On a processor with AVX512-BF16 it packs a layer for good where that first runs in evaluation
    mode, in a prediction say, and what lies below would not be trained any more. Layers that were
    packed before refuse an input that needs a gradient.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        layers = [(name, layer) for name, layer in net.named_modules() if hasattr(layer, _FLAG)]
        self._before = [(layer, getattr(layer, _FLAG)) for _, layer in layers]
        self._watches = [
            layer.register_forward_pre_hook(partial(_refuse, name), with_kwargs=True)
            for name, layer in layers
        ]
        for _, layer in layers:
            setattr(layer, _FLAG, False)

    def release(self) -> None:
        """Each layer may be packed as it might before."""
        for layer, flag in self._before:
            setattr(layer, _FLAG, flag)
        for watch in self._watches:
            watch.remove()


def is_packed(weight: Any) -> bool:
    """Whether bitsandbytes has packed this weight, in an order that it cannot read itself."""
    state = getattr(weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _refuse(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if is_packed(layer.weight) and entering(args, kwargs).requires_grad:
        raise ConfigurationError(
            f"bitsandbytes has packed the 4-bit weight of {name} for this processor, as it does "
            "when a layer first runs in evaluation mode, and no gradient passes through it. Load "
            "the network anew, and wrap it before it runs."
        )
