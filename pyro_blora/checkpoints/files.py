"""Writes files whole or not at all; nothing is deleted."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_blora.errors import ConfigurationError


def check_folder(folder: Path) -> Path:
    """The nearest existing folder; raises ConfigurationError unless it can be written to."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return existing
    except OSError as error:
        raise ConfigurationError(
            f"{folder} must be a folder that can be written, got {error.strerror!r}; name another."
        ) from error


def write_file(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Writes a text, or what a function writes to a path, and moves the file to ``path``."""
    with tempfile.TemporaryDirectory(dir=check_folder(path.parent), prefix=".") as place:
        file = Path(place) / path.name
        if callable(content):
            content(file)
        else:
            file.write_text(content, "utf-8")
        file.chmod(0o644)  # safetensors would let nobody else read it
        path.parent.mkdir(parents=True, exist_ok=True)
        file.replace(path)
