"""The network's own parameters and modes: held still while needed, afterwards as they were."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

__all__ = ["Frozen", "in_mode", "modes_kept"]

# bitsandbytes reads it: whether a 4-bit layer may be packed for the processor, for good, where it
# first runs in evaluation mode; no gradient passes through a packed one.
_MAY_PACK = "support_avx512bf16_for_cpu"


class Frozen:
    """Freezes all of a network until :meth:`thaw`.

    A parameter is known by its module and its name there: sharding and offloading put another
    tensor in its place, and in a part that was compiled its full name is another. 4-bit layers of
    bitsandbytes are kept from being packed, which would cut the gradient off without a word.

    Args:
        net: the network.

    Example::

        frozen = Frozen(net)  # no parameter requires a gradient
        frozen.thaw()  # those do that did before
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
def modes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these modules may be noted to be in any mode; afterwards each is in its own again."""
    modes = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Within, all of ``net`` is in training or evaluation mode; afterwards each part in its own.

    Example::

        with in_mode(net, training=False):
            logits = net(**inputs).logits
    """
    before = {module: module.training for module in net.modules()}
    with modes_kept(before):
        try:
            _put(net, before, dict.fromkeys(before, training))
            yield
        finally:
            _put(net, {module: module.training for module in net.modules()}, before)


def _put(net: nn.Module, now: Mapping[nn.Module, bool], then: Mapping[nn.Module, bool]) -> None:
    """By ``train``, in which some do more than note the mode, where all parts go as one.

    Otherwise part by part: one that was left in another mode than the whole may mind being told.
    """
    mode = then.get(net, net.training)
    ways = ((now.get(part), then.get(part)) for part in net.modules() if part in then)
    if len(set(ways)) == 1:
        net.train(mode)
        return
    net.training = mode
    for child in net.children():
        _put(child, now, then)
