"""How work is timed: in turn with what it is compared with, so that a ratio survives a noisy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

SETTLE_SECONDS = 0.03  # the threads of a BLAS or of OpenMP spin for so long after their work, and would disturb the next


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
    """Give the threads of what ran before the time to fall asleep."""
    time.sleep(SETTLE_SECONDS)
