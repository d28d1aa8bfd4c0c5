"""Streams beside the current one: where work runs that does not wait for what is queued after it.

Leans on CuPy's streams and events, which a graph that is being recorded takes along, and on `gemm` for a workspace of
their own. Whoever starts work beside has the current stream wait for it, so that nothing is left behind in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cupy

from . import gemm
from .launch import device_error


@contextmanager
def _told() -> Iterator[None]:
    """Within it an error of CUDA's becomes a DeviceError."""
    try:
        yield
    except Exception as error:
        raise device_error(error, "the order of two streams", ()) from error


class Beside:
    """One stream beside whichever is current: `mark` a point, `queue` work that waits for it, then `join`."""

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._begun, self._ended = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self._busy = False

    def mark(self) -> None:
        """What is queued beside waits for what has been queued so far."""
        with _told():
            self._begun.record()

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Within it work goes to the stream beside."""
        with _told():
            self._stream.wait_event(self._begun)
        with self._stream, gemm.binding().aside():
            yield
            with _told():
                self._ended.record(self._stream)
        self._busy = True

    def join(self) -> None:
        """What is queued from now on waits for what was queued beside."""
        if self._busy:
            with _told():
                cupy.cuda.get_current_stream().wait_event(self._ended)
            self._busy = False
