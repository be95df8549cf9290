"""The network's own parameters: frozen while an adapter is on it, afterwards as they were."""

from torch import nn

from pyro_blora.network.packed_weight import Unpacked

__all__ = ["Frozen"]


class Frozen:
    """Freezes all of a network until :meth:`thaw`.

    A parameter is known by its module and its name there: sharding and offloading put another
    tensor in its place, and in a part that was compiled its full name is another.

    Its 4-bit layers stay as gradients need them.

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
        self._unpacked = Unpacked(net)

    def thaw(self) -> None:
        """Each parameter requires a gradient as it did; those that came later stay as they are."""
        for module, name, trained in self._before:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(trained)
        self._unpacked.release()
