"""What errors of this package say of a single value, when it is missing, and the dtypes that arrays come out in.

A leaf: imports NumPy alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


def row_name(index: int) -> str:
    """What an error calls a row."""
    return f"row {index} (counting from 0)"


def shown(value: Any) -> str:
    """A value in an error: at most 80 characters, and of a list how long it is."""
    text = f"{len(value)} of them: {value!r}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_missing(value: Any) -> bool:
    """None, or a NaN of any float type."""
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """``dtype`` if it is float32 or float64; otherwise a ValueError."""
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = "no dtype"
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype: expected float32 or float64, got {dtype!r}")
    result: np.dtype[Any] = np.dtype(name)
    return result
