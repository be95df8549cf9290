"""The precision of the frozen network: bfloat16 if the device computes in it natively."""

from typing import TYPE_CHECKING, Any

from pyro_blora.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def check_precision(name: str) -> str:
    """Returns ``name``, or raises ConfigurationError unless it is one of ``PRECISIONS``."""
    if name not in PRECISIONS:
        raise ConfigurationError(f"precision must be one of {PRECISIONS}, got {name!r}.")
    return name


def choose_precision(name: str, device: "str | torch.device | None" = None) -> str:
    """The precision that ``"auto"`` means on a device; any other name is returned as is.

    It means bfloat16 on a GPU with native bfloat16 and on a CPU with AMX, else float32.
    """
    if check_precision(name) != "auto":
        return name
    import torch  # not at the top, so that a command checks its options without loading torch

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
