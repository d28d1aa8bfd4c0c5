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


def spread(samples: list[float]) -> dict[str, float]:
    """The median of some seconds with the quantiles around it, and how many there were."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    quantiles = {f"q{round(100 * q)}": ordered[round(q * last)] for q in (0.1, 0.25, 0.75, 0.9)}
    return {"median": statistics.median(ordered), **quantiles, "samples": len(ordered)}


def on_device(work: Callable[[], object], samples: int, warm_ups: int = 5) -> list[float]:
    """The seconds that a GPU takes for ``work``, by events around each of ``samples`` calls.

    Nothing is waited for in between, so the host runs ahead and its launches are hidden where the work takes longer
    than they do: some 50 microseconds.
    """
    import cupy

    for _ in range(warm_ups):
        work()
    pairs = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(samples)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    pairs[-1][1].synchronize()
    return [cupy.cuda.get_elapsed_time(start, end) / 1e3 for start, end in pairs]


def on_both_sides(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds of one call of ``work`` out of ``repeats`` in a row: the host's, the GPU's, and from start to end."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.Device().synchronize()
    t0 = time.perf_counter()
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    t1 = time.perf_counter()
    end.synchronize()
    t2 = time.perf_counter()
    device = cupy.cuda.get_elapsed_time(start, end) / 1e3
    return {"host": (t1 - t0) / repeats, "device": device / repeats, "wall": (t2 - t0) / repeats}
