"""Writes files whole or not at all, and replaces and removes only those that this library wrote.

A manifest in each folder names them. A call that would replace a user's file raises an error
before it writes anything.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_blora.errors import ConfigurationError

MANIFEST = ".pyro_blora.json"


def own_files(folder: Path) -> set[str]:
    """The names of the files in ``folder`` that this library wrote, from its manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return set()
    with suppress(ValueError, TypeError):
        names = json.loads(path.read_text("utf-8"))
        plain = (name == Path(name).name and name not in ("", "..") for name in names)
        if isinstance(names, list) and all(plain):
            return set(names)
    raise ConfigurationError(
        f"{path} must be a list of plain file names, got something else; remove it, after which "
        "the files beside it count as your own."
    )


def check_free(folder: Path, *names: str) -> None:
    """Raises ConfigurationError if these files cannot be written, or would replace a user's."""
    own = own_files(folder)
    for name in names:
        if os.path.lexists(folder / name) and name not in own:
            raise ConfigurationError(
                f"{folder / name} must be absent or written by pyro_blora and listed in {MANIFEST} "
                "beside it, got another file; move it away, or name another folder."
            )
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


def replace_file(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Writes a file beside ``path`` and moves it there, so that nobody sees half of it."""
    with _created(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as place:
        file = Path(place) / path.name
        if callable(content):
            content(file)
        else:
            file.write_text(content, "utf-8")
        file.chmod(0o644)  # safetensors would let nobody else read it
        file.replace(path)


def write_file(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Writes a text, or lets a function write to a path, and adds the file to the manifest."""
    check_free(path.parent, path.name)
    replace_file(path, content)
    claim(path.parent, own_files(path.parent) | {path.name})


def claim(folder: Path, names: set[str]) -> None:
    """Writes ``names`` as the manifest of a folder; without names, removes the manifest."""
    if not names:
        (folder / MANIFEST).unlink(missing_ok=True)
    elif names != own_files(folder):
        replace_file(folder / MANIFEST, json.dumps(sorted(names)) + "\n")


def remove_own(folder: Path, names: Iterable[str]) -> None:
    """Removes the named files and subfolders that this library wrote, and the folder if empty."""
    own = own_files(folder)
    gone = own.intersection(names)
    for name in gone:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            remove_own(path, own_files(path))
        else:
            path.unlink(missing_ok=True)
    claim(folder, own - gone)
    if gone and own == gone:
        with suppress(OSError):
            folder.rmdir()
