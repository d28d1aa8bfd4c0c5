"""Streams, events and graphs of the emulated device.

Work is done at once, unless a stream captures it into a graph, or `Order.lagging` says that a kind of stream does its
work as late as it may: then a wait that was forgotten shows as a stale or an overwritten value. A graph keeps
addresses, not arrays, as a real one does, so that memory which was freed behind its back is missed at the replay. A
stream that waits for an event of a capture joins it, and has to be waited for before the capture ends; at a replay it
is a stream of the graph's own, which may lag as any other.
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
    clock = 0.0  # seconds that the device has worked, by what the tests say a piece of work takes
    count: Callable[[str], None] = staticmethod(lambda name: None)
    check: Callable[[], None] = staticmethod(lambda: None)  # raises where the device is broken


class Token:
    """A point in a stream's work."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.done, self.time = stream, False, 0.0
        self.capture = stream._capture

    def __call__(self) -> None:
        self.done, self.time = True, Order.clock


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

    def synchronize(self) -> None:
        Order.count("synchronisations")
        _force(self._token)


def elapsed(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events that are done."""
    if not (start_event._token and end_event._token and start_event._token.done and end_event._token.done):
        raise CUDARuntimeError("cudaErrorNotReady: device not ready")
    return (end_event._token.time - start_event._token.time) * 1e3


class Wait:
    """A stream's work that waits for a point in another's."""

    def __init__(self, token: Token | None) -> None:
        self.token = token

    def __call__(self) -> None:
        _force(self.token)


class Capture:
    """What is captured: work in the order in which it was queued, each with its stream."""

    def __init__(self, origin: Stream) -> None:
        self.origin, self.open = origin, True
        self.works: list[tuple[Stream, Work]] = []

    def unjoined(self) -> bool:
        """Whether a stream has work that the origin does not wait for."""
        last = {stream: i for i, (stream, work) in enumerate(self.works) if not isinstance(work, Token)}
        waited = [work.token for stream, work in self.works if stream is self.origin and isinstance(work, Wait)]
        joined = {token.stream: i for i, (_, token) in enumerate(self.works) if token in waited}
        return any(joined.get(stream, -1) < i for stream, i in last.items() if stream is not self.origin)


class Graph:
    """Work that was captured, to be done again."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def launch(self, stream: Stream | None = None) -> None:
        Order.count("graph launches")
        streams = {self._capture.origin: stream or current()}
        tokens: dict[Token, Token] = {}
        for where, work in self._capture.works:
            if where not in streams:
                streams[where] = Stream(non_blocking=True)
            if isinstance(work, Token):
                tokens[work] = work = Token(streams[where])
            elif isinstance(work, Wait) and work.token in tokens:
                work = Wait(tokens[work.token])
            streams[where].submit(work)

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
        self._capture: Capture | None = None
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
        theirs = None if token is None else token.capture
        if theirs is not None and self._capture is None and theirs.open:
            self._capture = theirs
        elif theirs is not self._capture:
            raise CUDARuntimeError("cudaErrorStreamCaptureIsolation: the event is not of this capture")
        self.submit(Wait(token))

    def begin_capture(self, mode: Any = None) -> None:
        if self.ptr == 0:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the legacy stream cannot be captured")
        if self._capture is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is capturing already")
        self.drain()
        self._capture = Capture(self)

    def end_capture(self) -> Graph:
        capture = self._capture
        if capture is None or capture.origin is not self:
            raise CUDARuntimeError("cudaErrorIllegalState: the stream is not capturing")
        for stream in {self, *(stream for stream, _ in capture.works)}:
            stream._capture = None
        capture.open = False
        if capture.unjoined():
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined: a stream was not joined before the capture ended")
        return Graph(capture)

    def is_capturing(self) -> bool:
        return self._capture is not None

    # --- the emulation ---

    def submit(self, work: Work) -> None:
        """Do ``work`` in this stream: now, when the stream is waited for, or in a graph."""
        Order.check()
        if self._capture is not None:
            self._capture.works.append((self, work))
        elif Order.lagging in ("all", "side" if self.ptr else "null"):
            self._queue.append(work)
        else:
            self.drain()
            work()

    def drain(self, until: Token | None = None) -> None:
        while self._queue and not (until and until.done):
            self._queue.popleft()()

    def refuse_capture(self, what: str) -> None:
        if self._capture is not None:
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
