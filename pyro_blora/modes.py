"""The mode of each module of a network, training or evaluation, put back after use."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["in_mode", "modes_kept"]


@contextmanager
def modes_kept(net: nn.Module) -> Iterator[None]:
    """Within, the modules of ``net`` may be put into any mode; afterwards each is in its own again.

    ``net.train(net.training)`` would not do: a part may have been left in evaluation mode.
    """
    modes = [(module, module.training) for module in net.modules()]
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
    before = net.training
    with modes_kept(net):
        net.train(training)
        try:
            yield
        finally:
            net.train(before)  # some modules do more in it than note the mode
