"""Saving and loading adapters: one safetensors file with JSON in its header; PEFT in and out."""

from pyro_blora.checkpoints.checkpoint import (
    CONFIG,
    WEIGHTS,
    Saved,
    read_config,
    read_pretrained,
    save_pretrained,
)
from pyro_blora.checkpoints.peft import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PeftAdapter,
    export_peft,
    read_peft,
)

__all__ = [
    "CONFIG",
    "PEFT_CONFIG",
    "PEFT_WEIGHTS",
    "WEIGHTS",
    "PeftAdapter",
    "Saved",
    "export_peft",
    "read_config",
    "read_peft",
    "read_pretrained",
    "save_pretrained",
]
