"""Saving, loading and publishing adapters, and conversion from and to PEFT's format."""

from pyro_blora.checkpoints.checkpoint import (
    CONFIG,
    WEIGHTS,
    Saved,
    push_to_hub,
    read_config,
    read_pretrained,
    save_pretrained,
)
from pyro_blora.checkpoints.peft import PeftAdapter, export_peft, read_peft

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "PeftAdapter",
    "Saved",
    "export_peft",
    "push_to_hub",
    "read_config",
    "read_peft",
    "read_pretrained",
    "save_pretrained",
]
