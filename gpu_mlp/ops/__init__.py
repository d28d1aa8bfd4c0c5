"""Picks the implementation of the operations for a device: NumPy on the CPU, with Numba where it is; CuPy on a GPU."""

from __future__ import annotations

import importlib.util
import logging
import os

from .. import checks
from ..precision import Precision
from .interface import Operations

DEVICES = ("auto", "cpu", "cuda")
_LOG = logging.getLogger("gpu_mlp")


def make(device: str, precision: Precision) -> Operations:
    """The operations of ``device`` at ``precision``; "auto" means the GPU where one is usable.

    Why it is not is logged, and raised as a ValueError for "cuda".
    """
    obstacle = cuda_obstacle() if checks.choice("device", device, DEVICES) != "cpu" else "the CPU was asked for"
    if obstacle and device == "cuda":
        raise ValueError(f"device: 'cuda' cannot be used: {obstacle}")
    if not obstacle:
        from .cuda_ops import CudaOperations

        return CudaOperations(precision)
    if device == "auto":
        _LOG.info("device: cpu (%s)", obstacle)
    if precision.has_shadow or numba_obstacle():
        from .numpy_ops import NumpyOperations

        return NumpyOperations(precision)
    from .numba_ops import NumbaOperations

    return NumbaOperations(precision)


def numba_obstacle() -> str:
    """Why the passes of the CPU are not compiled; an empty string where they are."""
    if os.environ.get("GPU_MLP_NUMBA", "1") == "0":
        return "GPU_MLP_NUMBA is 0"
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed (pip install 'gpu-mlp[cpu]')"
    try:
        from numba import config

        from . import crew  # noqa: F401

        if getattr(config, "DISABLE_JIT", 0):
            return "NUMBA_DISABLE_JIT is set"
    # Numba does not load or finds no folder to keep what it compiles in, or SciPy's BLAS is another than those known
    except (ImportError, RuntimeError, OSError) as error:
        return f"Numba cannot be used ({' '.join(str(error).split())[:200]})"
    return ""


def cuda_obstacle() -> str:
    """Why no GPU can be used, with what to do about it; an empty string where one can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'gpu-mlp[cuda12]')"
    try:
        from .device import obstacle

        return obstacle()
    except Exception as error:  # CuPy itself does not load: a wheel for another CUDA, a library that is missing
        return f"CuPy does not load ({' '.join(str(error).split())[:200]}); see gpu-mlp info"
