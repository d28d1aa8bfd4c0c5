"""A GPU as the measurements need it: events around work on it, a cache that is empty, its memory, and its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def on_device(work: Callable[[], object], samples: int, warm_ups: int = 5, flush: bool = True) -> list[float]:
    """The seconds that a GPU takes for ``work``, by events around each of ``samples`` calls.

    Nothing is waited for in between, so the host runs ahead and its launches are hidden where the work takes longer
    than they do: some 50 microseconds. With ``flush`` the second-level cache is overwritten before each.
    """
    import cupy

    swept = _larger_than_the_cache() if flush else None
    for _ in range(warm_ups):
        work()
    pairs = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(samples)]
    for start, end in pairs:
        if swept is not None:
            swept.fill(0)
        start.record()
        work()
        end.record()
    pairs[-1][1].synchronize()
    return [cupy.cuda.get_elapsed_time(start, end) / 1e3 for start, end in pairs]


def _larger_than_the_cache() -> Any:
    import cupy

    return cupy.empty(2 * int(cupy.cuda.Device().attributes["L2CacheSize"]), cupy.uint8)


def wait() -> None:
    """Until the GPU has done all that it was asked for."""
    import cupy

    cupy.cuda.Device().synchronize()


def free_bytes() -> int:
    """Memory that nobody has taken."""
    import cupy

    return int(cupy.cuda.runtime.memGetInfo()[0])


def taken_bytes() -> int:
    """What CuPy holds of the GPU's memory, and cuBLAS's workspace; what it holds and does not need is given back."""
    import cupy

    from ..ops import gemm

    workspace = getattr(gemm.binding(), "_workspace", None)  # of a size that is the same whatever is computed
    pool = cupy.get_default_memory_pool()
    return int(pool.total_bytes()) + (0 if workspace is None else int(workspace.nbytes))


def release() -> None:
    """Give memory back that CuPy keeps for later."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()


def facts() -> dict[str, Any]:
    """What the runtime says of the device."""
    import cupy

    from ..ops import gemm

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        "device": properties["name"].decode(),
        "compute_capability": str(cupy.cuda.Device().compute_capability),
        "multiprocessors": int(properties["multiProcessorCount"]),
        "cache_bytes": int(cupy.cuda.Device().attributes["L2CacheSize"]),
        "device_memory_bytes": int(cupy.cuda.runtime.memGetInfo()[1]),
        "driver_api": cupy.cuda.runtime.driverGetVersion(),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "graphs": bool(gemm.binding().in_graphs),
    }
