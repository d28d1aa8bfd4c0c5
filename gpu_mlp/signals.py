"""Ctrl-C in a training run: looked at between steps, so that no update is left half done.

A leaf: plain Python.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupt_between_steps() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that is looked at between steps, so that no update is left half done."""
    interrupted = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted  # another thread, or a program with a rule of its own for Ctrl-C
        return

    def handle(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
