"""The mode of each module of a network, training or evaluation, put back after use."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

__all__ = ["in_mode", "modes_kept"]


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
