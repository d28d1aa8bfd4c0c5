"""Ctrl-C and SIGTERM in a training run: looked at between steps, so that no update is left half done.

A leaf: plain Python.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_DEFAULT: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interruption(threading.Event):
    """Set by the first signal; ``terminated`` says that it was SIGTERM."""

    terminated = False


@contextmanager
def interrupt_between_steps(terminate: bool = False) -> Iterator[Interruption]:
    """Turn the first Ctrl-C, and with ``terminate`` the first SIGTERM, into an event that is looked at between steps.

    A second Ctrl-C interrupts at once, and a second SIGTERM ends the process. Where the program has rules of its own
    for a signal, and in any thread but the main one, that signal is left alone.
    """
    interruption = Interruption()
    wanted = [signal.SIGINT, *([signal.SIGTERM] if terminate else [])]
    main = threading.current_thread() is threading.main_thread()
    handled = [number for number in wanted if main and signal.getsignal(number) is _DEFAULT[number]]

    def handle(number: int, frame: Any) -> None:
        interruption.terminated = interruption.terminated or number == signal.SIGTERM
        interruption.set()
        signal.signal(number, _DEFAULT[number])

    for number in handled:
        signal.signal(number, handle)
    try:
        yield interruption
    finally:
        for number in handled:
            signal.signal(number, _DEFAULT[number])
