"""Mean and standard deviation of columns of numbers in two passes, without a float64 copy of them all.

Leans on `values`. Each pass takes the rows in as many parts as they come in: `Survey` first, then `Moments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .values import row_name

BLOCK_VALUES = 1 << 20  # float64 copies are made of this many values at a time, 8 MiB


@dataclass(frozen=True)
class Numbers:
    """Columns of numbers: a matrix, or those of a table, read as float64 a block of rows at a time.

    source: (n, m) array of real numbers of any dtype, or m arrays of (n,); labels: what an error calls each of the m
    columns.
    """

    source: np.ndarray | list[np.ndarray]
    labels: list[str]
    n: int

    def block(self, rows: slice) -> np.ndarray:
        """Rows as a fresh (rows, m) float64 array."""
        if isinstance(self.source, np.ndarray):
            return self.source[rows].astype(np.float64)
        block = np.empty((rows.stop - rows.start, len(self.source)), np.float64)
        for j, column in enumerate(self.source):
            block[:, j] = column[rows]
        return block

    def column(self, j: int) -> np.ndarray:
        """The present (not NaN) values of column j, (present,) float64."""
        column = self.source[:, j] if isinstance(self.source, np.ndarray) else self.source[j]
        values = column.astype(np.float64)
        return values[~np.isnan(values)]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows, as slices and their blocks of about BLOCK_VALUES each."""
        step = max(1, BLOCK_VALUES // max(1, len(self.labels)))
        slices = (slice(start, min(start + step, self.n)) for start in range(0, self.n, step))
        return ((rows, self.block(rows)) for rows in slices)


class Survey:
    """A first pass over columns: how many rows there are, and of each column what is missing and what its values span.

    missing: (m,) int64; total, low, high: (m,) float64, of the values that are there.
    """

    def __init__(self, labels: list[str]) -> None:
        m = len(labels)
        self.labels, self.rows = labels, 0
        self.missing, self.total = np.zeros(m, np.int64), np.zeros(m)
        self.low, self.high = np.full(m, np.inf), np.full(m, -np.inf)

    def add(self, numbers: Numbers) -> Survey:
        """Count, sum and bounds of every column; inf is refused with its row and column."""
        for rows, block in numbers.blocks():
            if np.isinf(block).any():
                row, j = np.argwhere(np.isinf(block))[0]
                raise ValueError(f"{row_name(rows.start + row)}, {self.labels[j]}: inf is not accepted")
            self.missing += np.isnan(block).sum(axis=0)
            with np.errstate(over="ignore"):  # a sum that overflows is refused with the name of its column
                self.total += np.nansum(block, axis=0)
            self.low = np.fmin(self.low, np.fmin.reduce(block, axis=0))
            self.high = np.fmax(self.high, np.fmax.reduce(block, axis=0))
        self.rows += numbers.n
        return self

    def fills(self, choose: Callable[[int], float] | None) -> np.ndarray:
        """What stands in for a missing value: (m,) float64, the means or what ``choose`` says of each column."""
        empty = [self.labels[j] for j in np.flatnonzero(self.missing == self.rows)]
        if empty:
            raise ValueError(f"{', '.join(empty)}: no value at all to impute from; leave the column out")
        if choose is None:
            fills = self.total / (self.rows - self.missing)
            for j in np.flatnonzero(~np.isfinite(fills)).tolist():
                raise ValueError(f"{self.labels[j]}: values up to {self.high[j]:g} overflow in float64")
        else:
            fills = np.array([choose(j) for j in range(len(self.labels))], np.float64)
        return np.where(self.low == self.high, self.low, fills)  # a mean may be an ulp off its constant column


class Moments:
    """A second pass over columns: their mean and standard deviation once missing values are filled.

    Two passes, sum (x - mean)² corrected by the rounding of the mean: exact to the last digits for any offset. The
    deviations are taken in units of the span of their column, so that no square over- or underflows.
    """

    def __init__(self, survey: Survey, fills: np.ndarray | None) -> None:
        """survey: of the same rows; fills: (m,) float64, or None where nothing is missing."""
        self._survey, missing, low = survey, survey.missing, survey.low
        fill = low if fills is None else fills  # with no fills nothing is missing, and the sums below add zeros
        constant = (low == survey.high) & ((missing == 0) | (fill == low))
        with np.errstate(over="ignore", invalid="ignore"):
            self._mean = np.where(constant, low, (survey.total + missing * fill) / survey.rows)
            self._span = np.where(constant, 1.0, survey.high - low)
            filled = (fill - self._mean) / self._span
            self._drift, self._square = missing * filled, missing * filled**2

    def add(self, numbers: Numbers) -> Moments:
        """Take in rows that the survey has seen."""
        for _, block in numbers.blocks():
            with np.errstate(over="ignore", invalid="ignore"):
                block -= self._mean
                block /= self._span
                if self._survey.missing.any():
                    block[np.isnan(block)] = 0.0
                self._drift += block.sum(axis=0)
                self._square += np.einsum("ij,ij->j", block, block)
        return self

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scale, (m,) float64 each; the scale of a constant column is 1."""
        survey, n = self._survey, self._survey.rows
        with np.errstate(over="ignore", invalid="ignore"):
            mean = self._mean + self._drift / n * self._span
            scale = self._span * np.sqrt(np.maximum(self._square - self._drift**2 / n, 0.0) / n)
        too_large = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(scale)))
        if too_large.size:
            j = int(too_large[0])
            low, high = survey.low[j], survey.high[j]
            raise ValueError(f"{survey.labels[j]}: values from {low:g} to {high:g} overflow in float64")
        return mean, np.where(scale == 0, 1.0, scale)
