"""Saving and loading adapters: safetensors for numbers, JSON for the rest, nothing is unpickled."""

from pyro_blora.checkpoints.atomic import write_atomically
from pyro_blora.checkpoints.peft_export import export_peft
from pyro_blora.checkpoints.peft_import import PeftAdapter, read_peft
from pyro_blora.checkpoints.saved import (
    CONFIG,
    WEIGHTS,
    Saved,
    read_config,
    read_pretrained,
    save_pretrained,
)

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
