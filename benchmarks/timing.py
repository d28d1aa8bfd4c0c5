"""How a step is timed against its floor: in turn, so that the ratio survives a noisy machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved_ratio(step: Callable[[], object], floor: Callable[[], object], rounds: int = 25) -> dict[str, float]:
    """Times ``step`` and ``floor`` in turn; the median of their ratio, and the median seconds of each.

    A disturbance hits both members of a pair alike, so the ratio is steadier than either time.
    """
    for _ in range(3):
        floor(), step()
    pairs = []
    for _ in range(rounds):
        t0 = time.perf_counter()
        floor()
        t1 = time.perf_counter()
        step()
        t2 = time.perf_counter()
        pairs.append((t1 - t0, t2 - t1))
    return {
        "ratio": statistics.median(b / a for a, b in pairs),
        "floor": statistics.median(a for a, _ in pairs),
        "step": statistics.median(b for _, b in pairs),
    }
