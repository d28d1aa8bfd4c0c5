"""Streams, events and graphs of the emulated device.

Work is done at once, unless a stream captures it into a graph, or `Order.lagging` says that a kind of stream does its
work as late as it may: then a wait that was forgotten shows as a stale or an overwritten value. A graph keeps
addresses, not arrays, as a real one does, so that memory which was freed behind its back is missed at the replay.
"""

from __future__ import annotations

import collections
import itertools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

Work = Callable[[], Any]


class CUDARuntimeError(RuntimeError):
    """An error of the CUDA runtime."""

    __module__ = "cupy_backends.cuda.api.runtime"


class Order:
    """Which streams lag: "" (none), "side" (all but the null stream), "null" or "all".

    And what is called with every call that is counted, and before every piece of work.
    """

    lagging = ""
    count: Callable[[str], None] = staticmethod(lambda name: None)
    check: Callable[[], None] = staticmethod(lambda: None)  # raises where the device is broken


class Capture:
    """A graph in the making: its work, and the streams that it began in or that an event has led it into."""

    def __init__(self, origin: Stream) -> None:
        self.origin, self.works = origin, []
        self.streams, self.loose = {origin}, set()  # loose: forked, with work that the origin has not waited for


class Token:
    """A point in a stream's work."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.done = stream, False
        self.capture, self.last = stream._captured, 0

    def __call__(self) -> None:
        self.done = True


class Event:
    """A point in a stream that another may wait for."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self._token: Token | None = None

    @property
    def done(self) -> bool:
        return self._token is None or self._token.done

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current()
        self._token = Token(stream)
        stream.submit(self._token)
        self._token.last = stream._works

    def synchronize(self) -> None:
        Order.count("synchronisations")
        _force(self._token)


class Graph:
    """Work that was captured, to be done again."""

    def __init__(self, works: list[Work]) -> None:
        self._works = works

    def launch(self, stream: Stream | None = None) -> None:
        Order.count("graph launches")
        for work in self._works:
            (stream or current()).submit(work)

    def upload(self, stream: Stream | None = None) -> None:
        pass


class Stream:
    """A queue of work."""

    null: Stream
    stack: ClassVar[list[Stream]]
    living: ClassVar[weakref.WeakValueDictionary[int, Stream]] = weakref.WeakValueDictionary()
    _numbers = itertools.count(0x5000, 16)

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int = 0) -> None:
        self.ptr = 0 if null else next(Stream._numbers)
        self.device_id = 0
        self._queue: collections.deque[Work] = collections.deque()
        self._works = 0  # captured so far
        self._captured: Capture | None = None
        Stream.living[self.ptr] = self

    # --- CuPy's names ---

    def __enter__(self) -> Stream:
        Stream.stack.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        Stream.stack.pop()

    def use(self) -> Stream:
        Stream.stack[-1] = self
        return self

    @property
    def done(self) -> bool:
        return not self._queue

    def synchronize(self) -> None:
        self.refuse_capture("synchronise")
        Order.count("synchronisations")
        self.drain()

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        token = event._token
        if token is not None and token.capture is not None:
            self._follow(token)
        elif self._captured is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureIsolation: the event is not of the capture")
        self.submit(lambda: _force(token))

    def _follow(self, token: Token) -> None:
        """Wait for a point in a capture: a stream that was not in it is from now on."""
        capture = token.capture
        if capture.origin._captured is not capture:
            raise CUDARuntimeError("cudaErrorCapturedEvent: the event is of a capture that has ended")
        if self._captured is None:
            self.drain()
            self._captured = capture
            capture.streams.add(self)
        elif token.last == token.stream._works:
            capture.loose.discard(token.stream)

    def begin_capture(self, mode: Any = None) -> None:
        if self.ptr == 0:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the legacy stream cannot be captured")
        if self._captured is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is capturing already")
        self.drain()
        self._captured = Capture(self)

    def end_capture(self) -> Graph:
        if self._captured is None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is not capturing")
        capture = self._captured
        for stream in capture.streams:
            stream._captured = None
        if capture.loose:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined: a stream that was led into it was not joined")
        return Graph(capture.works)

    def is_capturing(self) -> bool:
        return self._captured is not None

    # --- the emulation ---

    def submit(self, work: Work) -> None:
        """Do ``work`` in this stream: now, when the stream is waited for, or in a graph."""
        Order.check()
        if self._captured is not None:
            self._captured.works.append(work)
            self._works += 1
            if self is not self._captured.origin:
                self._captured.loose.add(self)
        elif Order.lagging in ("all", "side" if self.ptr else "null"):
            self._queue.append(work)
        else:
            self.drain()
            work()

    def drain(self, until: Token | None = None) -> None:
        while self._queue and not (until and until.done):
            self._queue.popleft()()

    def refuse_capture(self, what: str) -> None:
        if self._captured is not None:
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: cannot {what} while the stream captures")


def current() -> Stream:
    """The stream that work goes to."""
    return Stream.stack[-1]


def drain_all() -> None:
    """What cudaDeviceSynchronize waits for."""
    for stream in list(Stream.living.values()):
        stream.drain()


def _force(token: Token | None) -> None:
    if token is not None and not token.done:
        token.stream.drain(token)


Stream.null = Stream(null=True)
Stream.stack = [Stream.null]
