"""Saving and loading adapters: one safetensors file with JSON in its header; PEFT in and out."""

from pyro_blora.checkpoints.checkpoint import (
    CONFIG,
    WEIGHTS,
    Saved,
    read_config,
    read_pretrained,
    save_pretrained,
    write_atomically,
)
from pyro_blora.checkpoints.peft import PeftAdapter, export_peft, read_peft

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "PeftAdapter",
    "Saved",
    "export_peft",
    "read_config",
    "read_peft",
    "read_pretrained",
    "save_pretrained",
    "write_atomically",
]
