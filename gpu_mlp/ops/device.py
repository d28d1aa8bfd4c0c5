"""What there is to compute on: whether a GPU can be used, why not, and what it is.

Leans on CuPy, on `launch` for a kernel to try, and on `gemm` for the way to cuBLAS.
"""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np

from ..parallel.ranks import local_rank
from . import gemm, launch

OLDEST = 70  # compute capability × 10 that the kernels are compiled for


def take_own(count: int) -> None:
    """Of the ``count`` devices of a machine use the one that the launcher's number of this process says.

    A device that the program has chosen itself stays.
    """
    if count > 1 and cupy.cuda.runtime.getDevice() == 0:
        cupy.cuda.Device(local_rank() % count).use()


@functools.cache
def obstacle() -> str:
    """Why CuPy cannot use a GPU, with what to do about it; an empty string where a kernel was compiled and ran."""
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return _no_device(runtime, error)
    if not count:
        return "the driver finds no NVIDIA GPU"
    take_own(count)  # before anything is allocated on another
    capability = cupy.cuda.Device().compute_capability
    if int(capability) < OLDEST:
        return f"the GPU has compute capability {capability}; the kernels need {OLDEST} or later"
    try:
        probe = cupy.zeros(1, np.float64)
        launch.launch(
            launch.kernel("flat.cu", "set_state", "float32", 1), launch.ONE_THREAD, (np.int32(0), np.float64(1), probe)
        )
        return "" if float(probe[0]) == 1 else "a kernel that was tried did not do its work"
    except Exception as error:  # no compiler, no headers, no memory, ...: whatever it is, it is the reason
        hint = "pip install 'gpu-mlp[cuda12]' brings CUDA's libraries along"
        return f"a kernel could not be compiled and run: {_line(error)} ({hint})"


def _no_device(runtime: Any, error: Exception) -> str:
    """Why the driver gives no device."""
    try:
        driver, needed = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except Exception:
        driver, needed = 0, 0
    if not driver:
        return "no NVIDIA driver is loaded; install one"
    if driver // 1000 < needed // 1000:
        needs = f"it is for CUDA {_version(driver)}, CuPy is for {_version(needed)}"
        return f"the NVIDIA driver is too old: {needs}; update it"
    return f"the driver gives no GPU: {_line(error)}"


def describe() -> dict[str, str]:
    """The current device and the libraries that drive it, for a reader; only where there is no `obstacle`."""
    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    free, total = device.mem_info
    major = int(device.compute_capability) // 10
    facts = {
        "GPU": f"{properties['name'].decode()}, compute capability {major}.{int(device.compute_capability) % 10}, "
        f"{launch.processors()} multiprocessors, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        "CUDA": f"driver {_version(runtime.driverGetVersion())}, runtime {_version(runtime.runtimeGetVersion())}",
        "CuPy": cupy.__version__,
    }
    graphs = (
        "nvmath-python, in CUDA graphs"
        if gemm.binding().in_graphs
        else "CuPy, not in CUDA graphs (pip install nvmath-python)"
    )
    return {**facts, "cuBLAS": f"through {graphs}", "GEMMs": _gemms()}


def _gemms() -> str:
    """How an algorithm is chosen for a product."""
    library = gemm.binding().lt
    if library is None:
        return "cublasGemmEx, by its own choice of algorithm"
    if library.choices.path is None:
        return f"cublasLt {library.version}, by the algorithm that it proposes first"
    return f"cublasLt {library.version}, by the fastest algorithm, kept in {library.choices.path}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
