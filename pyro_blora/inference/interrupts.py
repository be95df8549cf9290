"""Ctrl-C between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["held_interrupts"]


@contextmanager
def held_interrupts(held: bool = True) -> Iterator[list[int]]:
    """Within, the first Ctrl-C is noted in the list and does no more; a second one interrupts.

    Where another handler than Python's own is set, and outside of the main thread, all is left as
    it is.

    Args:
        held: whether to hold them at all.
    """
    noted: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    usual = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if held and usual:
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if held and usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
