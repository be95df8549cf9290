"""Which precision the frozen network runs in: bfloat16 where the machine at hand is faster so."""

import time
from functools import lru_cache
from typing import TYPE_CHECKING

from pyro_blora.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["PRECISIONS", "check_precision", "choose_precision"]

PRECISIONS = ("auto", "float32", "bfloat16")


def check_precision(name: str) -> str:
    """Returns ``name``, or raises ConfigurationError where it is none of ``PRECISIONS``."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"precision={name!r} is not one of {PRECISIONS}.")
    return name


def choose_precision(name: str, device: "str | torch.device | None" = None) -> str:
    """What ``"auto"`` stands for on a device; any other precision is itself.

    On a graphics card that is bfloat16 where the card has it. On a processor a small product is
    timed in both, once for each process: a flag says what instructions there are, not that they
    are faster.

    Args:
        name: one of ``PRECISIONS``.
        device: where the network is. Default: the accelerator if there is one, or the CPU.
    """
    if check_precision(name) != "auto":
        return name
    import torch  # here, so that a command can check its options without it

    found = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return "bfloat16" if _bfloat16_pays(torch.device(found).type) else "float32"


@lru_cache
def _bfloat16_pays(kind: str) -> bool:
    import torch

    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        supported = getattr(getattr(torch, kind, None), "is_bf16_supported", None)
        return supported is not None and bool(supported())

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(128, 256, dtype=dtype, device="cpu")
        w = torch.ones(256, 256, dtype=dtype, device="cpu")
        times = []
        for _ in range(6):  # the first finds its kernel
            start = time.perf_counter()
            torch.mm(x, w)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with torch.autocast("cpu", enabled=False):
        return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)
