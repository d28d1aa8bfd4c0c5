"""Checks of what a caller passes in: every refusal names the argument, what came and what is accepted.

A leaf: imports NumPy alone, and every room may lean on it.
"""

from __future__ import annotations

import difflib
import itertools
import math
import numbers
import operator
import re
from collections.abc import Iterable
from typing import Any

import numpy as np


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'relu'?` for the known name closest to ``name``, or an empty string."""
    few = itertools.islice(known, 2000)  # a table from a stranger may have a million
    close = difflib.get_close_matches(str(name).lower(), few, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def choice(argument: str, name: Any, known: Iterable[str]) -> str:
    """``name`` if it is one of ``known``; otherwise a ValueError that suggests the nearest one."""
    known = list(known)
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a name, got {type(name).__name__}; known: {', '.join(known)}")
    if name not in known:
        raise ValueError(f"{argument}: unknown name {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return name


def brief(found: Any, most: int = 300) -> str:
    """A stranger's text, or an error about it, as one line of bounded length that can be printed anywhere."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(found)[: 2 * most].split()))
    return text if len(text) <= most else text[:most] + "…"


def integer(argument: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """``value`` as an int within the bounds (both included)."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument}: expected an integer, got the bool {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}: expected an integer, got {value!r} ({type(value).__name__})") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{argument}: expected an integer of at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{argument}: expected an integer of at most {maximum}, got {number}")
    return number


def real(
    argument: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    open_minimum: bool = False,
    open_maximum: bool = False,
) -> float:
    """``value`` as a finite float within the bounds (each included unless it is declared open)."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.floating, np.integer)):
        raise TypeError(f"{argument}: expected a number, got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    accepted = _interval(minimum, maximum, open_minimum, open_maximum)
    too_low = minimum is not None and (number < minimum or (open_minimum and number == minimum))
    too_high = maximum is not None and (number > maximum or (open_maximum and number == maximum))
    if not math.isfinite(number) or too_low or too_high:
        raise ValueError(f"{argument}: expected a finite number{accepted}, got {number}")
    return number


def _interval(minimum: float | None, maximum: float | None, open_minimum: bool, open_maximum: bool) -> str:
    if minimum is None and maximum is None:
        return ""
    left = "(-inf" if minimum is None else f"{'(' if open_minimum else '['}{minimum:g}"
    right = "inf)" if maximum is None else f"{maximum:g}{')' if open_maximum else ']'}"
    return f" in {left}, {right}"


SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i)?)?b?", re.IGNORECASE)


def size(argument: str, value: Any) -> int:
    """``value`` as bytes: a positive integer, or text such as 512MiB (1024s) or 1.5GB (1000s)."""
    if not isinstance(value, str):
        return integer(argument, value, 1)
    found = SIZE.fullmatch(value.strip())
    if not found:
        raise ValueError(f"{argument}: expected a size such as 512MiB or 2GiB, got {value!r}")
    number, letter, binary = found.groups()
    power = 0 if letter is None else "kmgt".index(letter.lower()) + 1
    return integer(argument, int(float(number) * (1024 if binary else 1000) ** power), 1)


def shown_size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def boolean(argument: str, value: Any) -> bool:
    """``value`` if it is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument}: expected True or False, got {value!r} ({type(value).__name__})")
    return bool(value)


def matrix(argument: str, value: Any, columns: int | None = None, look: bool = True) -> np.ndarray:
    """``value`` as a (batch, columns) array of real numbers, in the dtype it came in; batch may be 0.

    look: whether the numbers have to be finite; without it somebody else looks.
    """
    unmasked(argument, value)
    array = np.asarray(value)
    shape(argument, array, columns)
    if look:
        finite(argument, array)
    return array


def shape(argument: str, array: Any, columns: int | None = None) -> None:
    """An error unless ``array``, of whatever library, is a (batch, columns) array of real numbers."""
    if array.dtype.kind not in "buif" and array.dtype.name != "bfloat16":
        raise TypeError(f"{argument}: expected real numbers, got dtype {array.dtype}")
    wanted = "(batch, n)" if columns is None else f"(batch, {columns})"
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        hint = f"; for one sample use {argument}[None, :]" if array.shape == (columns,) else ""
        raise ValueError(f"{argument}: expected shape {wanted}, got {array.shape}{hint}")


def target_shape(argument: str, array: Any, rows: int, outputs: int, labels: bool) -> None:
    """An error unless ``array`` is (rows, outputs) real numbers, or with ``labels`` also (rows,) integers."""
    if labels and array.shape == (rows,) and array.dtype.kind in "iu":
        return
    if array.shape != (rows, outputs) or array.dtype.kind not in "buif":
        or_labels = f", or ({rows},) integer labels" if labels else ""
        raise ValueError(
            f"{argument}: expected shape ({rows}, {outputs}){or_labels}, got {array.dtype} of shape {array.shape}"
        )


def on_host(argument: str, value: Any) -> None:
    """A TypeError for an array in a GPU's memory, where one in the host's is needed."""
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(
            f"{argument}: is on a GPU and the network on the CPU; copy it there first, or use device='cuda'"
        )


def unmasked(argument: str, value: Any) -> None:
    """A ValueError for a masked array in which anything is masked: the mask would be lost without a word."""
    if np.ma.isMaskedArray(value) and np.ma.is_masked(value):
        raise ValueError(
            f"{argument}: {int(np.ma.getmaskarray(value).sum())} values are masked; fill them or leave their rows out"
        )


def fits(argument: str, array: np.ndarray, dtype: np.dtype) -> None:
    """A ValueError for finite numbers that are too large for ``dtype``, the float type they are about to be cast to."""
    if array.dtype == dtype or not array.size or np.can_cast(array.dtype, dtype, "safe") or dtype.name not in LARGEST:
        return
    limit = LARGEST[dtype.name]
    if max(float(array.max()), -float(array.min())) > limit:
        bad = np.argwhere(np.abs(array.astype(np.float64)) > limit)[0]
        value = float(array[tuple(bad)])
        raise ValueError(f"{argument}: {_where(bad)} is {value:g}, too large for {dtype.name} (at most {limit:g})")


def all_finite(array: np.ndarray) -> bool:
    """Whether no number of ``array`` is NaN or infinite; one pass without a temporary settles nearly every case."""
    if array.dtype.kind in "bui" or not array.size:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum()  # not BLAS's product with itself: its threads would go on spinning beside ours
        return math.isfinite(float(total)) or bool(np.isfinite(array).all())


def _where(index: np.ndarray) -> str:
    return ", ".join(f"{axis} {i}" for axis, i in zip(("row", "column"), index))


LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": float(np.finfo(np.float32).max)}


def finite(argument: str, array: np.ndarray) -> None:
    """A ValueError that names the first entry of ``array`` that is NaN or infinite."""
    if not all_finite(array):
        first = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{argument}: {_where(first)} is {array[tuple(first)]}; every value must be finite")


def sample_weight(value: Any, rows: int, whole: bool = True) -> np.ndarray | None:
    """``value`` as (rows,) finite float64 weights ≥ 0, or None; of a ``whole`` data set not all are 0."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "buif":
        raise TypeError(f"sample_weight: expected real numbers, got dtype {array.dtype}")
    if array.shape != (rows,):
        raise ValueError(f"sample_weight: expected shape ({rows},), one a sample, got {array.shape}")
    finite("sample_weight", array)
    if (array < 0).any():
        raise ValueError(f"sample_weight: row {int(np.argmax(array < 0))} is negative ({array.min()})")
    if whole and rows and not array.any():
        raise ValueError("sample_weight: every weight is 0; at least one must be positive")
    return array.astype(np.float64, copy=False)
