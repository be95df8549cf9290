"""Which precision the frozen network runs in: bfloat16 where the device is made for it."""

from typing import TYPE_CHECKING, Any

from pyro_blora.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def check_precision(name: str) -> str:
    """Returns ``name``, or raises ConfigurationError where it is none of ``PRECISIONS``."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"precision must be one of {PRECISIONS}, got {name!r}.")
    return name


def choose_precision(name: str, device: "str | torch.device | None" = None) -> str:
    """What ``"auto"`` stands for on a device; any other precision is itself.

    That is bfloat16 on a graphics card that has it, and on a processor with AMX.
    """
    if check_precision(name) != "auto":
        return name
    import torch  # here, so that a command can check its options without it

    found = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return "bfloat16" if _bfloat16_pays(torch.device(found).type) else "float32"


def _bfloat16_pays(kind: str) -> bool:
    import torch

    if kind == "cpu":
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
        return bool(capabilities().get("amx_bf16"))
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(getattr(torch, kind, None), "is_bf16_supported", None)
    return supported is not None and bool(supported())
