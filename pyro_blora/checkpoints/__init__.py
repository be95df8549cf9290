"""Saving and loading adapters: safetensors for numbers, JSON for the rest, nothing is unpickled."""

from pyro_blora.checkpoints.atomic import write_atomically, write_together, written
from pyro_blora.checkpoints.files import CONFIG, WEIGHTS, read_config
from pyro_blora.checkpoints.peft_export import export_peft
from pyro_blora.checkpoints.peft_import import PeftAdapter, read_peft
from pyro_blora.checkpoints.saved import Saved, read_pretrained, save_pretrained

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
    "write_together",
    "written",
]
