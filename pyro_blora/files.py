"""The files that this library writes: it replaces and removes those that a manifest says are its.

Another file where one is to be written stops the call before anything is written.
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
    """The names in ``folder`` that this library wrote, by the manifest there."""
    path = folder / MANIFEST
    if not path.exists():
        return set()
    with suppress(ValueError, TypeError):
        names = json.loads(path.read_text("utf-8"))
        plain = (name == Path(name).name and name not in ("", "..") for name in names)
        if isinstance(names, list) and all(plain):
            return set(names)
    raise ConfigurationError(
        f"{path} must be a list of plain file names, got something else; remove it, and the files "
        "beside it count as your own."
    )


def check_free(folder: Path, *names: str) -> None:
    """Raises an error, before anything is written, where these files cannot be or are another's."""
    own = own_files(folder)
    for name in names:
        if os.path.lexists(folder / name) and name not in own:
            raise ConfigurationError(
                f"{folder / name} must be free or a file that pyro_blora wrote, as {MANIFEST} "
                "beside it tells, got another one; move it away, or name another folder."
            )
    # nothing is made and removed here: another process may be writing into a new folder already
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{folder} must be a folder that can be written, got {error.strerror!r} from the "
            "system; name another folder."
        ) from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Within, a folder is there; afterwards those that were made for it go again if empty."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for place in new:
            with suppress(OSError):
                place.rmdir()


def replace_file(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Writes beside ``path`` and moves into place, so that no half-written file is ever seen."""
    with _made(path.parent):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            if callable(content):
                content(Path(name))
            else:
                Path(name).write_text(content, "utf-8")
            Path(name).chmod(0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


def write_file(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Writes a text, or what a function writes to the path it is given, whole or not at all.

    The file must be free or the library's own, and is named in the manifest from then on.
    """
    check_free(path.parent, path.name)
    replace_file(path, content)
    claim(path.parent, own_files(path.parent) | {path.name})


def claim(folder: Path, names: set[str]) -> None:
    """Makes ``names`` the manifest of a folder, which has none where it names nothing."""
    if not names:
        (folder / MANIFEST).unlink(missing_ok=True)
    elif names != own_files(folder):
        replace_file(folder / MANIFEST, json.dumps(sorted(names)) + "\n")


def remove_own(folder: Path, names: Iterable[str]) -> None:
    """Removes those of these files, and folders of files, that this library wrote.

    A folder that has no other file goes, too.
    """
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
