"""Picks the implementation of the operations for a device: NumPy on the CPU, CuPy on an NVIDIA GPU."""

from __future__ import annotations

import importlib.util

from .. import checks
from ..precision import Precision
from .interface import Operations

DEVICES = ("auto", "cpu", "cuda")


def make(device: str, precision: Precision) -> Operations:
    """The operations of ``device`` at ``precision``.

    "auto" means the CPU as long as the CUDA implementation has been run in emulation only.
    """
    if checks.choice("device", device, DEVICES) == "cuda":
        obstacle = cuda_obstacle()
        if obstacle:
            raise ValueError(f"device: 'cuda' cannot be used: {obstacle}")
        from .cuda_ops import CudaOperations

        return CudaOperations(precision)
    from .numpy_ops import NumpyOperations

    return NumpyOperations(precision)


def cuda_obstacle() -> str:
    """Why no GPU can be used, with what to do about it; an empty string where one can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'gpu-mlp[cuda12]')"
    from .launch import device_count

    try:
        count = device_count()
    except Exception as error:  # CuPy's own error types differ by what is missing: driver, device, library
        return f"CuPy finds no usable driver ({' '.join(str(error).split())}); install or update the NVIDIA driver"
    return "" if count else "the driver finds no device"
