"""The network's own parameters and modes: held still while needed, afterwards as they were."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["Frozen", "evaluated", "in_mode"]

# bitsandbytes reads it: whether a 4-bit layer may be packed for the processor, for good, where it
# first runs in evaluation mode; no gradient passes through a packed one.
_MAY_PACK = "support_avx512bf16_for_cpu"


class Frozen:
    """Freezes all of a network until :meth:`thaw`, and keeps bitsandbytes from packing its layers.

    A parameter is known by its module and its name there: sharding and offloading put another
    tensor in its place, and in a part that was compiled its full name is another.
    """

    def __init__(self, net: nn.Module) -> None:
        self._before = [
            (module, name, parameter.requires_grad)
            for module in net.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        net.requires_grad_(False)
        self._packs = [(m, getattr(m, _MAY_PACK)) for m in net.modules() if hasattr(m, _MAY_PACK)]
        for module, _ in self._packs:
            setattr(module, _MAY_PACK, False)

    def thaw(self) -> None:
        """Each parameter requires a gradient as it did; those that came later stay as they are."""
        for module, name, trained in self._before:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(trained)
        for module, packs in self._packs:
            setattr(module, _MAY_PACK, packs)


@contextmanager
def evaluated(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these modules alone are noted to be in evaluation mode."""
    before = {module: module.training for module in modules}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def in_mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Within, all of ``net`` is in training or evaluation mode; afterwards each part in its own.

    By ``train``, in which some modules do more than note the mode; afterwards a whole of one mode
    is told of it, and a whole of two only its parts.
    """
    before = {module: module.training for module in net.modules()}
    try:
        net.train(training)
        yield
    finally:
        for module, mode in before.items():  # from the whole to its parts
            if module.training == mode:
                continue
            if all(before.get(part, mode) == mode for part in module.modules()):
                module.train(mode)
            else:
                module.training = mode
