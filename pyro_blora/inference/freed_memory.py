"""Memory that one training step frees, kept for the next.

On a CPU, torch's memory comes from the C library, and the GNU one hands what a step frees back to
the system, only to ask for it again in the next step, a page at a time.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["freed_memory_kept"]

# Of malloc.h, what mallopt sets
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
# What is set afterwards: where glibc's thresholds end when it raises them by itself
_MMAP_AFTER, _TRIM_AFTER = 32 << 20, 64 << 20
_ONE_GIB = 1 << 30
_FREE = threading.Lock()  # held while somebody keeps memory
_SET_BY_HAND = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, the process keeps the memory that it frees; at the end it gives all of it back.

    A training step on a CPU takes a few hundredths less time, or much less where its tensors are
    large. What steps of other lengths have left behind is held beside, so that the most memory at
    once may be a tenth more. The whole process is concerned. Nothing is done within another such
    block, where the C library is not glibc, and where the environment sets its thresholds:
    ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``.

    Example::

        with freed_memory_kept():
            for batch in data:
                step(batch)
    """
    libc = None if any(name in os.environ for name in _SET_BY_HAND) else _glibc()
    if libc is None or not _FREE.acquire(blocking=False):
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    # What is larger is unmapped when freed. Versions before 2.35 refuse so large a threshold
    if not libc.mallopt(_MMAP_THRESHOLD, _ONE_GIB):
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_AFTER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_AFTER)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_AFTER)
        libc.malloc_trim(0)
        _FREE.release()


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is the GNU one."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
