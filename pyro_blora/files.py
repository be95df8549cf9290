"""Writes files whole or not at all; nothing is deleted."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_blora.errors import ConfigurationError


def check_folder(folder: Path) -> None:
    """Raises ConfigurationError unless files can be written to ``folder``, which may be absent."""
    # tries the nearest existing folder, because another process may be creating the new one
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{folder} must be a folder that can be written, got {error.strerror!r} from the "
            "system; name another folder."
        ) from error


@contextmanager
def _created(folder: Path) -> Iterator[None]:
    """Creates a folder with its parents, and removes the new ones that are empty afterwards."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in new:
            with suppress(OSError):
                place.rmdir()


def write_file(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Writes a text, or lets a function write to a path, beside ``path`` and moves it there."""
    check_folder(path.parent)
    with _created(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as place:
        file = Path(place) / path.name
        if callable(content):
            content(file)
        else:
            file.write_text(content, "utf-8")
        file.chmod(0o644)  # safetensors would let nobody else read it
        file.replace(path)
