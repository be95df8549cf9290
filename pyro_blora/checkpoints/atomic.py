"""Files that appear whole or not at all, one by one or several of a folder together."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_atomically", "write_together", "written"]

# Of files that belong together: those being written, and those that only wait to be moved up.
_SAVING, _SAVED = ".saving", ".saved"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside ``path`` and moves into place, so that no half-written file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        Path(name).chmod(0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files of one folder that are read together; other files in it stay as they are.

    All are written to ``folder/.saving``, whose renaming to ``folder/.saved`` is the one moment
    between old and new; then they move up one by one. :func:`written` prefers what has not moved
    yet, so that after a kill at any moment all files are the old ones, or all the new. The next
    call clears up.

    Args:
        folder: made if it is missing. One process at a time may write to it.
        files: contents by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saving = folder / _SAVING
    shutil.rmtree(saving, ignore_errors=True)
    try:
        saving.mkdir()
        for name, content in files.items():
            with (saving / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the name without the content
        _move_up(folder)  # what a killed process left
        saving.rename(folder / _SAVED)
    finally:
        shutil.rmtree(saving, ignore_errors=True)
    _move_up(folder)


def _move_up(folder: Path) -> None:
    saved = folder / _SAVED
    if saved.exists():
        for path in saved.iterdir():
            path.replace(folder / path.name)
        saved.rmdir()


def written(folder: Path, name: str) -> Path:
    """Where the newest complete version of a file of :func:`write_together` lies."""
    waiting = folder / _SAVED / name
    return waiting if waiting.exists() else folder / name
