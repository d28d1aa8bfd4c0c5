"""What every reader gives: `RawData`, and the shapes and names that it may have.

Leans on `checks` and NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import checks
from .untrusted import decoder

BUILT_IN = ("digits", "fashion-mnist")

Columns = dict[str, np.ndarray]
PathLike = str | os.PathLike[str]


@dataclass(eq=False)
class RawData:
    """A data set as it was stored, before any preprocessing.

    x: (n, d) array of numbers, or named columns of (n,) each: numbers (missing = NaN) or an object array of str
       (missing = None);
    y: (n,) labels or values, (n, k) values, or None where the source has no target;
    test: the source's own test part, with the same columns, or None.
    """

    x: np.ndarray | Columns
    y: np.ndarray | None = None
    feature_names: list[str] | None = None
    target_name: str | None = None
    name: str = ""
    test: RawData | None = None

    def __len__(self) -> int:
        """The number of rows, n."""
        return len(self.x if isinstance(self.x, np.ndarray) else next(iter(self.x.values())))


def existing(source: str) -> Path:
    """The path of a file or folder that exists; otherwise a FileNotFoundError that suggests a built-in set."""
    file = Path(source)
    if not file.exists():
        hint = checks.nearest(source, BUILT_IN)
        raise FileNotFoundError(f"{source}: no such file or folder{hint} (built-in sets: {', '.join(BUILT_IN)})")
    return file


def inputs(array: np.ndarray, where: str) -> np.ndarray:
    """``array`` as the (n, d) matrix x, its dtype kept: one dimension is one feature, more than two are flattened."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: x must hold real numbers, got dtype {checks.brief(array.dtype)}")
    if array.ndim == 0:
        raise ValueError(f"{where}: x must be (n, d), got a single number")
    return array.reshape(len(array), -1)


def targets_of(array: np.ndarray, n: int, where: str) -> np.ndarray:
    """``array`` as y, (n,) or (n, k); (n, 1) becomes (n,), and bytes become text."""
    if array.dtype.kind == "S":
        with decoder(where, "UTF-8 label"):
            array = np.char.decode(array, "utf-8")
    if array.ndim not in (1, 2):
        raise ValueError(f"{where}: y must be (n,) or (n, k), got shape {array.shape}")
    if len(array) != n:
        raise ValueError(f"{where}: x has {n} rows and y has {len(array)}; they must be the same")
    return array[:, 0] if array.shape[1:] == (1,) else array


def with_test(train: RawData, test: RawData, where: str) -> RawData:
    """``train`` with ``test`` as its test part, once their columns agree."""
    d, d_test = (part.x.shape[1] if isinstance(part.x, np.ndarray) else len(part.x) for part in (train, test))
    if d != d_test:
        raise ValueError(f"{where}: the training part has {d} columns, the test part {d_test}")
    if (train.y is None) != (test.y is None):
        raise ValueError(f"{where}: only the {'training' if test.y is None else 'test'} part has labels")
    test.name = f"{train.name} (test)"
    train.test = test
    return train


def listed(names: Sequence[str], most: int = 20) -> str:
    """``a, b, c``, cut after ``most`` names."""
    shown = (checks.brief(name, 80) for name in names[:most])
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(names) > most else "")
