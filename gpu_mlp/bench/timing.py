"""How work is timed: in turn with what it is compared with, so that a ratio survives a noisy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

# Threads of a BLAS or of OpenMP wait for more work by spinning, OpenBLAS's for 0.1 s, and would slow down the next.
LOOK_SECONDS, MOST_LOOKS, ASLEEP = 0.01, 50, 0.1


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The median of some numbers with the quantiles around it, and how many there were."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    quantiles = {f"q{round(100 * q)}": ordered[round(q * last)] for q in (0.1, 0.25, 0.75, 0.9)}
    return {"median": statistics.median(ordered), **quantiles, "samples": len(ordered)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios of samples that were taken in the same round: not the ratio of two medians."""
    return spread([a / b for a, b in zip(above, below)])


def repeated(work: Callable[[], object], wait: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of one call of ``work`` out of ``repeats`` in a row: until all was done, and until all was asked for."""
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    asked = time.perf_counter()
    wait()
    return (time.perf_counter() - started) / repeats, (asked - started) / repeats


def settle() -> None:
    """Wait until this process does nothing any more."""
    for _ in range(MOST_LOOKS):
        busy, started = time.process_time(), time.perf_counter()
        time.sleep(LOOK_SECONDS)
        if time.process_time() - busy < ASLEEP * (time.perf_counter() - started):
            return
