"""Asking a network what it can do, where no declaration of its architecture tells."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyro_blora.layers import without_updates
from pyro_blora.pretrained_weight import is_quantised
from pyro_blora.targets import device_of

__all__ = ["agree", "answer", "asked"]


@contextmanager
def asked(net: nn.Module) -> Iterator[None]:
    """Within, ``net`` is as pretrained: no dropout, no updates, no gradients, no autocast.

    Quantised layers stay in the mode they are in, for some are packed anew, once and for all, when
    first evaluated.
    """
    modes = [(module, module.training) for module in net.modules()]
    device = device_of(net.modules())
    try:
        for module, _ in modes:
            if not is_quantised(module):
                module.training = False
        with torch.no_grad(), torch.autocast(device.type, enabled=False), without_updates(net):
            yield
    finally:
        for module, training in modes:
            module.training = training


def answer(question: Callable[[], Tensor]) -> Tensor | None:
    """What the network answers; ``None`` where it refuses the input, in whatever way."""
    try:
        return question()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def agree(given: Tensor | None, expected: Tensor | None) -> bool:
    """Whether there are two answers, and they are the same but for rounding.

    Relative to what varies in ``expected``: 1e-4, and 0.03 in half precision.
    """
    if given is None or expected is None:
        return False
    half = expected.dtype in (torch.float16, torch.bfloat16)
    scale = (expected - expected.mean()).norm()
    return bool((given - expected).norm() <= (0.03 if half else 1e-4) * scale)
