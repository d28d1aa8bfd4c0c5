"""Page-locked buffers and a second stream: data on its way to the GPU while the GPU computes.

Leans on CuPy's streams and events, and on `launch` for errors that say what failed. Two events keep the copies and the
computation out of each other's way; see `interface.Staging` for the order of the calls.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import cupyx

from .interface import Staging
from .launch import device_error


class PinnedStaging(Staging):
    """A page-locked host buffer, its twin on the device, and the copies between them on a stream of their own."""

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self.host = cupyx.empty_pinned(shape, dtype)
        self.device = cupy.empty(shape, dtype)
        self._sent = cupy.cuda.Event(disable_timing=True)
        self._released = cupy.cuda.Event(disable_timing=True)
        self.release()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # a device that is lost copies nothing any more
            self._sent.synchronize()  # CuPy's pools would hand on both buffers with a copy still under way

    def free(self) -> None:
        with self._named():
            self._sent.synchronize()

    def send(self, rows: int) -> None:
        with self._named():
            stream = copy_stream(cupy.cuda.device.get_device_id())
            stream.wait_event(self._released)
            self.device[:rows].set(self.host[:rows], stream=stream)
            self._sent.record(stream)

    def receive(self) -> None:
        with self._named():
            cupy.cuda.get_current_stream().wait_event(self._sent)

    def release(self) -> None:
        with self._named():
            self._released.record(cupy.cuda.get_current_stream())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the device as such, with what was copied."""
        try:
            yield
        except Exception as error:
            raise device_error(error, "copy to the device", (self.device,)) from error


@functools.cache
def copy_stream(device: int) -> Any:
    """The stream of a device that copies run in, beside whatever stream computes."""
    return cupy.cuda.Stream(non_blocking=True)
