"""The JSON that a fitted object is made from again: every field of it is checked, for it may come from a stranger.

Leans on `values`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .values import shown


def fields(kind: str, state: Any, names: Sequence[str]) -> list[Any]:
    """The values of the dict ``state`` in the order of ``names``; ValueError where a name is missing or unknown."""
    if not isinstance(state, dict) or set(state) != set(names):
        found = ", ".join(map(str, state)) or "none" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{kind}: expected a dict of {', '.join(names)}; got {found}")
    return [state[name] for name in names]


def numbers(kind: str, values: Any, length: int) -> np.ndarray:
    """A JSON list of ``length`` finite numbers -> (length,) float64 array."""
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{kind}: expected a list of {length} numbers, got {shown(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{kind}: expected finite numbers, got {shown(value)}")
    return np.array(values, np.float64)


def scales(kind: str, values: Any, length: int) -> np.ndarray:
    """A JSON list of ``length`` finite numbers above 0 -> (length,) float64 array."""
    scale = numbers(kind, values, length)
    if not (scale > 0).all():
        raise ValueError(f"{kind}: expected numbers above 0, got {scale.min()}")
    return scale


def integer(kind: str, value: Any, minimum: int) -> int:
    """A JSON integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{kind}: expected an integer of at least {minimum}, got {shown(value)}")
    return value


def flag(kind: str, value: Any) -> bool:
    """A JSON true or false."""
    if value is not True and value is not False:
        raise ValueError(f"{kind}: expected true or false, got {value!r}")
    return bool(value)


def strings(kind: str, values: Any) -> list[str]:
    """A JSON list of different strings."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{kind}: expected a list of strings, got {shown(values)}")
    if len(set(values)) != len(values):
        raise ValueError(f"{kind}: expected different strings, got {shown(values)}")
    return values
