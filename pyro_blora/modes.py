"""The mode of each module of a network, training or evaluation, put back after use."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["modes_kept"]


@contextmanager
def modes_kept(net: nn.Module) -> Iterator[None]:
    """Within, the modules of ``net`` may be put into any mode; afterwards each is in its own again.

    ``net.train(net.training)`` would not do: a part may have been left in evaluation mode.

    Example::

        with modes_kept(net):
            net.eval()
            logits = net(**inputs).logits
    """
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
