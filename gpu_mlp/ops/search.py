"""Which of several ways to compute the same is fastest on the device at hand, found by trying each.

Leans on CuPy's graphs and events. A way is timed as training runs it: recorded, and replayed without the host.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cupy

from .launch import device_error

ROUNDS = 7  # in each of which every candidate runs once
SECONDS = 0.5  # on one search; what is left of the rounds is then left out
CONTENDERS = 4  # that stay after the first round
GAIN = 0.02  # by which a later candidate has to be faster than the first, so that noise does not choose

_window = threading.local()  # .state: one of the three below
_OUTSIDE, _TUNED, _SEARCHING = range(3)


@contextmanager
def tuning(searching: bool = False) -> Iterator[None]:
    """Within it, in this thread, work takes the ways that were found fastest; with ``searching`` it looks for them.

    Work outside never does, so that what it gives does not depend on whether a search came before it.
    """
    before = _state()
    _window.state = _SEARCHING if searching else _TUNED
    try:
        yield
    finally:
        _window.state = before


def tuned() -> bool:
    """Whether this is work that takes the fastest ways known."""
    return _state() != _OUTSIDE


def allowed() -> bool:
    """Whether to search now; not where a graph is recorded, which would record the search."""
    return _state() == _SEARCHING and not cupy.cuda.get_current_stream().is_capturing()


def _state() -> int:
    return getattr(_window, "state", _OUTSIDE)


def fastest(candidates: Sequence[Callable[[], None]]) -> int:
    """Which of the candidates takes the least time on the device. Waits for it.

    Each only queues work, and leaves the same in memory however often it has run. The candidates take turns, so that
    each finds the cache as a product of this size leaves it, which is how training finds it: what fits was written
    just before.
    """
    try:
        with tuning():
            times = _times([_recorded(work) for work in candidates])
    except Exception as error:
        raise device_error(error, "a search for the fastest way", ()) from error
    best = min(range(len(times)), key=times.__getitem__)
    return best if times[best] < (1 - GAIN) * times[0] else 0


def _times(launches: Sequence[Callable[[], None]]) -> list[float]:
    """The median seconds of every candidate; infinite for one that fell out after the first rounds."""
    samples: list[list[float]] = [[] for _ in launches]
    running, spent = list(range(len(launches))), 0.0
    for turn in range(ROUNDS):
        found = _one_round([launches[i] for i in running])
        for i, seconds in zip(running, found):
            samples[i].append(seconds)
        spent += sum(found)
        if turn == 1:  # the first warms the caches up
            for taken in samples:
                del taken[0]
            leading = sorted(running, key=lambda i: samples[i][0])[:CONTENDERS]
            running = sorted({0, *leading})  # the first has to be beaten
        if turn > 0 and spent > SECONDS:
            break
    return [statistics.median(taken) if i in running else float("inf") for i, taken in enumerate(samples)]


def _one_round(launches: Sequence[Callable[[], None]]) -> list[float]:
    pairs = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in launches]
    for (start, end), launch in zip(pairs, launches):
        start.record()
        launch()
        end.record()
    pairs[-1][1].synchronize()
    return [cupy.cuda.get_elapsed_time(start, end) / 1e3 for start, end in pairs]


def _recorded(work: Callable[[], None]) -> Callable[[], None]:
    """Something that runs ``work`` as a graph; ``work`` itself where that cannot be recorded."""
    work()  # compiles its kernels and grows its scratch
    try:
        launch: Callable[[], None] = captured(work).launch
        return launch
    except Exception:
        return work


def captured(work: Callable[[], None]) -> Any:
    """The graph of what ``work`` queues."""
    stream = cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
    with stream:
        stream.begin_capture()
        try:
            work()
        finally:
            graph = stream.end_capture()
    return graph
