"""4-bit layers that bitsandbytes packs for a processor: no gradient passes through a packed one."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from pyro_blora.errors import ConfigurationError

__all__ = ["watch_packed_layers"]


def watch_packed_layers(net: nn.Module) -> list[RemovableHandle]:
    """Hooks by which packed layers of ``net`` refuse an input that needs a gradient.

    On a processor with AVX512-BF16, bitsandbytes packs a 4-bit layer for good where it first runs
    without gradients in evaluation mode. It says nothing, and what lies below would not be trained.
    Layers below the lowest adapted one may well be packed.
    """
    return [
        module.register_forward_pre_hook(partial(_refuse, name))
        for name, module in net.named_modules()
        if _is_packed(module) or _may_be_packed(module)
    ]


def _may_be_packed(module: nn.Module) -> bool:
    wanted = getattr(module, "support_avx512bf16_for_cpu", False)
    return bool(wanted) and all(p.device.type == "cpu" for p in module.parameters(recurse=False))


def _is_packed(module: nn.Module) -> bool:
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _refuse(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
    if args and args[0].requires_grad and _is_packed(layer):
        raise ConfigurationError(
            f"bitsandbytes has packed the 4-bit weight of {name} for this processor, as it does "
            "when a layer is first evaluated, and no gradient passes through it. Load the network "
            "anew, and call net.train() before it first runs, or set support_avx512bf16_for_cpu = "
            "False on each of its layers."
        )
