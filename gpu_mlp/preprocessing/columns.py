"""The columns of an input, checked: which there are, what they are called, and which hold numbers and which text.

Leans on `checks`, `moments` and `values`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import checks
from .moments import Numbers
from .values import is_missing, row_name, shown

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """A matrix, or the chosen columns of a table; make one with `of`, which checks them.

    columns: (n, d) array of real numbers, or d arrays of (n,), numbers or text; names: of the d columns, where they
    have any.
    """

    columns: np.ndarray | list[np.ndarray]
    names: list[str] | None

    @classmethod
    def of(cls, x: np.ndarray | Columns, names: list[str] | None) -> Inputs:
        """An (n, d) array, or of a dict of columns (n,) those that are named, in that order; it may hold others."""
        if not isinstance(x, Mapping):
            return cls(_matrix(x), names)
        assert names is not None  # a table always comes with the names that were fitted
        return cls(_table(x, names), names)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        if isinstance(self.columns, np.ndarray):
            return self.columns.shape[0], self.columns.shape[1]
        return (len(self.columns[0]) if self.columns else 0), len(self.columns)

    @property
    def text(self) -> list[int]:
        """Which columns hold text."""
        if isinstance(self.columns, np.ndarray):
            return []
        return [j for j, column in enumerate(self.columns) if column.dtype.kind in "OU"]

    def label(self, j: int) -> str:
        """What an error calls column j."""
        return column_label(self.names, j)

    def texts(self, j: int) -> list[str | None]:
        """The n texts of column j, None where missing."""
        return texts_of(self.label(j), self.columns[j])

    def numbers(self, text: Sequence[int]) -> Numbers:
        """The columns that are not ``text``, which is what the fit found; text in them is read as numbers."""
        n, d = self.shape
        numeric = sorted(set(range(d)).difference(text))
        labels = [self.label(j) for j in numeric]
        if isinstance(self.columns, np.ndarray):
            return Numbers(self.columns, labels, n)
        return Numbers([_as_numbers(label, self.columns[j]) for label, j in zip(labels, numeric)], labels, n)


def names_of(x: np.ndarray | Columns, feature_names: Sequence[str] | None) -> list[str] | None:
    """The names of the columns to fit on: those given, or those of the dict."""
    if feature_names is None:
        return list(x) if isinstance(x, Mapping) else None
    names = list(feature_names)
    if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"feature_names: expected different strings, got {shown(names)}")
    if not isinstance(x, Mapping) and np.ndim(x) == 2 and np.shape(x)[1] != len(names):
        raise ValueError(f"feature_names: {len(names)} names for {np.shape(x)[1]} columns")
    return names


def column_label(names: list[str] | None, j: int) -> str:
    """What an error calls column j."""
    return f"column {j}" if names is None else f"column {names[j]!r}"


def texts_of(label: str, column: np.ndarray) -> list[str | None]:
    """A column of text, (n,) str or object, as n str, None where missing; ValueError for anything else in it."""
    if column.dtype.kind == "U":
        texts: list[str | None] = column.tolist()
        return texts
    texts = [None if is_missing(value) else value for value in column]
    for row, value in enumerate(texts):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{row_name(row)}, {label}: expected text, got {value!r}")
    return texts


def refuse_missing(
    n: int, names: list[str] | None, text: list[int], missing_texts: list[int], missing_numbers: np.ndarray
) -> None:
    """ValueError naming every column with missing values and how many of ``n``, in the order of the columns.

    missing_texts: of each of the ``text`` columns; missing_numbers: (m,) integers, of the others.
    """
    d = len(text) + len(missing_numbers)
    counts = np.zeros(d, np.int64)
    counts[text] = missing_texts
    counts[np.delete(np.arange(d), text)] = missing_numbers
    if counts.any():
        listed = [f"{column_label(names, j)} ({counts[j]} of {n})" for j in np.flatnonzero(counts).tolist()]
        more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
        raise ValueError(
            f"missing values in {', '.join(listed[:20])}{more}; "
            "use impute='mean', 'median' or 'most_frequent' to fill them"
        )


def _matrix(x: np.ndarray) -> np.ndarray:
    matrix = np.asarray(x)
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        raise ValueError(
            f"x: expected an (n, d) array of real numbers, or a dict of columns; got {matrix.dtype} "
            f"of shape {matrix.shape}"
        )
    return matrix


def _table(x: Columns, names: list[str]) -> list[np.ndarray]:
    missing = [name for name in names if name not in x]
    if missing:
        raise ValueError(f"x: no column {', '.join(map(repr, missing))}{checks.nearest(missing[0], map(str, x))}")
    columns = [np.asarray(x[name]) for name in names]
    for name, column in zip(names, columns, strict=True):
        if column.ndim != 1 or column.dtype.kind not in "biufOU":
            raise ValueError(
                f"column {name!r}: expected (n,) numbers or text, got {column.dtype} of shape {column.shape}"
            )
        if len(column) != len(columns[0]):
            raise ValueError(f"column {name!r}: {len(column)} rows, but column {names[0]!r} has {len(columns[0])}")
    return columns


def _as_numbers(label: str, column: np.ndarray) -> np.ndarray:
    """A column that was numeric at the fit: as it is, or (n,) float64 of its texts, NaN where missing."""
    if column.dtype.kind in "biuf":
        return column
    numbers = np.full(len(column), np.nan)
    for row, text in enumerate(texts_of(label, column)):
        if text is None:
            continue
        try:
            numbers[row] = float(text)
        except ValueError:
            raise ValueError(f"{row_name(row)}, {label}: expected a number, as at the fit, got {text!r}") from None
    return numbers
