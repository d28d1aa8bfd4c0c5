"""Raw columns and targets -> the arrays the network sees, fitted on the training part and kept in the model as JSON.

Leans on `checks` and NumPy.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import checks

Columns = Mapping[str, np.ndarray]

IMPUTE = ("mean", "median", "most_frequent")
MAX_CATEGORIES = 1000
BLOCK_VALUES = 1 << 20  # float64 copies are made of this many values at a time, 8 MiB


# --- what is common to the fitted objects ----------------------------------------------------------------------------


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Slices that cover ``n`` rows of ``width`` values, each of about BLOCK_VALUES."""
    rows = max(1, BLOCK_VALUES // max(1, width))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def _output_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = "no dtype"
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype: expected float32 or float64, got {dtype!r}")
    result: np.dtype[Any] = np.dtype(name)
    return result


def _fields(kind: str, state: Any, names: Sequence[str]) -> list[Any]:
    """The values of the dict ``state`` in the order of ``names``; ValueError where a name is missing or unknown."""
    if not isinstance(state, dict) or set(state) != set(names):
        found = ", ".join(map(str, state)) or "none" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{kind}: expected a dict of {', '.join(names)}; got {found}")
    return [state[name] for name in names]


def _finite(kind: str, values: Any, length: int) -> np.ndarray:
    """A JSON list of ``length`` finite numbers -> float64 array."""
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"{kind}: expected a list of {length} numbers, got {_brief(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{kind}: expected finite numbers, got {_brief(value)}")
    return np.array(values, np.float64)


def _scales(kind: str, values: Any, length: int) -> np.ndarray:
    scale = _finite(kind, values, length)
    if not (scale > 0).all():
        raise ValueError(f"{kind}: expected numbers above 0, got {scale.min()}")
    return scale


def _whole(kind: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{kind}: expected an integer of at least {minimum}, got {_brief(value)}")
    return value


def _flag(kind: str, value: Any) -> bool:
    if value is not True and value is not False:
        raise ValueError(f"{kind}: expected true or false, got {value!r}")
    return bool(value)


def _strings(kind: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{kind}: expected a list of strings, got {_brief(values)}")
    if len(set(values)) != len(values):
        raise ValueError(f"{kind}: expected different strings, got {_brief(values)}")
    return values


def _brief(value: Any) -> str:
    text = f"{len(value)} of them: {value!r}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _row(index: int) -> str:
    return f"row {index} (counting from 0)"


def _is_missing(value: Any) -> bool:
    """None, or a NaN of any float type."""
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


# --- numbers: mean and standard deviation without a float64 copy -----------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    """The numeric part of the input: a matrix, or some columns of a table, read as float64 a block of rows at a time.

    source: (n, m) array, or m arrays of (n,); labels: what an error calls each of the m columns.
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
        """The present (not NaN) values of column j, float64."""
        column = self.source[:, j] if isinstance(self.source, np.ndarray) else self.source[j]
        values = column.astype(np.float64)
        return values[~np.isnan(values)]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        return ((rows, self.block(rows)) for rows in _blocks(self.n, len(self.labels)))


class Survey:
    """One pass over columns: rows, and of the values that are there missing, total, low and high, (m,) each."""

    def __init__(self, labels: list[str]) -> None:
        m = len(labels)
        self.labels, self.rows = labels, 0
        self.missing, self.total = np.zeros(m, np.int64), np.zeros(m)
        self.low, self.high = np.full(m, np.inf), np.full(m, -np.inf)

    def add(self, numbers: _Numbers) -> Survey:
        """Count, sum and bounds of every column; inf is refused with its row and column."""
        for rows, block in numbers.blocks():
            if np.isinf(block).any():
                row, j = np.argwhere(np.isinf(block))[0]
                raise ValueError(f"{_row(rows.start + row)}, {self.labels[j]}: inf is not accepted")
            self.missing += np.isnan(block).sum(axis=0)
            with np.errstate(over="ignore"):  # a sum that overflows is refused with the name of its column
                self.total += np.nansum(block, axis=0)
            self.low = np.fmin(self.low, np.fmin.reduce(block, axis=0))
            self.high = np.fmax(self.high, np.fmax.reduce(block, axis=0))
        self.rows += numbers.n
        return self

    def fills(self, choose: Callable[[int], float] | None) -> np.ndarray:
        """What stands in for a missing value: the (m,) means, or what ``choose`` says of each column."""
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


def _fills(numbers: _Numbers, survey: Survey, impute: str) -> np.ndarray:
    """The (m,) means, medians or most frequent values (the smallest of a tie)."""
    choose = {"mean": None, "median": np.median, "most_frequent": _mode}[impute]
    return survey.fills(None if choose is None else lambda j: float(choose(numbers.column(j))))


def _mode(values: np.ndarray) -> float:
    distinct, counts = np.unique(values, return_counts=True)
    return float(distinct[counts.argmax()])


class Moments:
    """A second pass over columns: their mean and standard deviation once missing values are filled.

    Two passes, sum (x - mean)² corrected by the rounding of the mean: exact to the last digits for any offset. The
    deviations are taken in units of the span of their column, so that no square over- or underflows.
    """

    def __init__(self, survey: Survey, fills: np.ndarray | None) -> None:
        self._survey, missing, low = survey, survey.missing, survey.low
        fill = low if fills is None else fills  # with no fills nothing is missing, and the sums below add zeros
        constant = (low == survey.high) & ((missing == 0) | (fill == low))
        with np.errstate(over="ignore", invalid="ignore"):
            self._mean = np.where(constant, low, (survey.total + missing * fill) / survey.rows)
            self._span = np.where(constant, 1.0, survey.high - low)
            filled = (fill - self._mean) / self._span
            self._drift, self._square = missing * filled, missing * filled**2

    def add(self, numbers: _Numbers) -> Moments:
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
        """Mean and scale, (m,) each; the scale of a constant column is 1."""
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


# --- categories ------------------------------------------------------------------------------------------------------


def _texts(label: str, column: np.ndarray) -> list[str | None]:
    """A column of text as str, None where missing."""
    if column.dtype.kind == "U":
        texts: list[str | None] = column.tolist()
        return texts
    texts = [None if _is_missing(value) else value for value in column]
    for row, value in enumerate(texts):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{_row(row)}, {label}: expected text, got {value!r}")
    return texts


@dataclass(frozen=True)
class _Category:
    """A one-hot column: its place in the input, its sorted categories, and what stands in for a missing value."""

    column: int
    categories: tuple[str, ...]
    fill: str | None

    @classmethod
    def fit(cls, column: int, label: str, values: np.ndarray, impute: str | None, most: int) -> _Category:
        counts = Counter(text for text in _texts(label, values) if text is not None)
        return cls.of(column, label, counts, len(values), impute, most)

    @classmethod
    def of(
        cls, column: int, label: str, counts: Mapping[str, int], rows: int, impute: str | None, most: int
    ) -> _Category:
        """From how often each text is in so many rows."""
        if not counts:
            raise ValueError(f"{label}: no value at all to impute from; leave the column out")
        if len(counts) > most:
            raise ValueError(
                f"{label}: {len(counts)} different texts in {rows} rows (such as {min(counts)!r}) would make as "
                f"many inputs; leave an identifier out, correct a mistyped number, or raise max_categories={most}"
            )
        frequent = min(counts, key=lambda text: (-counts[text], text))
        return cls(column, tuple(sorted(counts)), None if impute is None else frequent)

    def codes(self, label: str, values: np.ndarray) -> np.ndarray:
        """(n,) int64 indices into the categories; missing and unseen are filled, or refused where there is no fill."""
        known: dict[Any, int] = {text: code for code, text in enumerate(self.categories)}
        fill = -1 if self.fill is None else known[self.fill]
        if values.dtype.kind in "biuf":
            known = self._by_number()
            texts: list[Any] = [None if _is_missing(value) else value for value in values.tolist()]
        else:
            texts = list(_texts(label, values))
        codes = np.array([known.get(text, fill) for text in texts], np.int64)
        if (codes < 0).any():
            row = int((codes < 0).argmax())
            what = "missing value" if texts[row] is None else f"unseen category {texts[row]!r}"
            raise ValueError(
                f"{_row(row)}, {label}: {what}; fit with impute= to accept it "
                f"(known: {', '.join(self.categories[:20])}{', ...' if len(self.categories) > 20 else ''})"
            )
        return codes

    def _by_number(self) -> dict[Any, int]:
        """Number -> code, for a file whose rows happen to spell only the numbers of a column such as 1, 2, 3+."""
        codes: dict[float, list[int]] = {}
        for code, text in enumerate(self.categories):
            with contextlib.suppress(ValueError):
                codes.setdefault(float(text), []).append(code)
        return {number: same[0] for number, same in codes.items() if len(same) == 1}  # not "1" beside "1.0"


# --- the preprocessor ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Preprocessor:
    """x -> the (n, n_features_out) matrix of the network: impute, standardize numbers, one-hot text.

    A number x becomes (x - mean) / scale; a text becomes one column per category, 1 in its own; the columns keep the
    order of the input. Make one with `fit`, or with `from_dict` from what `to_dict` gave.
    """

    n_features_in: int
    feature_names: list[str] | None
    standardize: bool
    impute: str | None
    mean: np.ndarray  # of the m numeric columns, float64
    scale: np.ndarray
    fill: np.ndarray | None
    categorical: tuple[_Category, ...]

    @classmethod
    def fit(
        cls,
        x: np.ndarray | Columns,
        *,
        feature_names: Sequence[str] | None = None,
        standardize: bool = True,
        impute: str | None = None,
        max_categories: int = MAX_CATEGORIES,
    ) -> Preprocessor:
        """Learn from the training part.

        x: (n, d) numbers, or a dict of columns (n,), numbers (missing = NaN) or text (missing = None).
        feature_names: the names of the d columns; for a dict, which of its columns to use and in which order.
        impute: what a missing number becomes: "mean", "median" or "most_frequent" (always so for text); with None a
        missing value is a ValueError. Raises ValueError too for inf, for no rows and for more than
        ``max_categories`` texts in one column.
        """
        checks.boolean("standardize", standardize)
        checks.integer("max_categories", max_categories, minimum=1)
        if impute is not None:
            checks.choice("impute", impute, IMPUTE)
        names = _names(x, feature_names)
        columns = _columns(x, names)
        n, d = _size(columns)
        if n == 0 or d == 0:
            raise ValueError(f"x: expected at least one row and one column, got {n} rows and {d} columns")
        text = [j for j in range(d) if isinstance(columns, list) and columns[j].dtype.kind in "OU"]
        numbers = _numbers(columns, names, text)
        survey = Survey(numbers.labels).add(numbers)
        if impute is None:
            missing_texts = [_texts(_label(names, j), columns[j]).count(None) for j in text]
            _refuse_missing(n, names, text, missing_texts, survey.missing)
        fill = None if impute is None else _fills(numbers, survey, impute)
        m = len(numbers.labels)
        mean, scale = Moments(survey, fill).add(numbers).result() if standardize else (np.zeros(m), np.ones(m))
        categorical = tuple(_Category.fit(j, _label(names, j), columns[j], impute, max_categories) for j in text)
        return cls(d, names, standardize, impute, mean, scale, fill, categorical)

    @property
    def feature_names_out(self) -> list[str]:
        """The names of the output columns: ``age``, ``colour=red``; ``x0``, ``x1``, ... where the input has none."""
        categories = {category.column: category.categories for category in self.categorical}
        names = self.feature_names or [f"x{j}" for j in range(self.n_features_in)]
        return [
            out
            for j, name in enumerate(names)
            for out in ([f"{name}={text}" for text in categories[j]] if j in categories else [name])
        ]

    @property
    def n_features_out(self) -> int:
        """The number of output columns: one for a number, one per category for a text."""
        return len(self.mean) + sum(len(category.categories) for category in self.categorical)

    def transform(self, x: np.ndarray | Columns, dtype: DTypeLike = np.float32) -> np.ndarray:
        """x as fitted -> (n, n_features_out) array, C order, of ``dtype`` float32 or float64.

        The arithmetic is float64, rounded once. A dict may hold other columns too: they are ignored. Raises
        ValueError, naming row and column, for a column that is not there, inf, a value too large for ``dtype`` and,
        unless an ``impute`` was set, a missing value or an unseen category.
        """
        out_dtype = _output_dtype(dtype)
        columns = self._columns(x)
        text = [category.column for category in self.categorical]
        numbers = _numbers(columns, self.feature_names, text)
        out = np.zeros((numbers.n, self.n_features_out), out_dtype)
        number_columns, first_columns = self._layout()
        for rows, block in numbers.blocks():
            if self.fill is not None:
                np.copyto(block, self.fill, where=np.isnan(block))
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused just below
                block -= self.mean
                block /= self.scale
                rounded = block.astype(out_dtype, copy=False)
            if not np.isfinite(rounded).all():
                raise _not_finite(numbers, rows, rounded)
            out[rows, number_columns] = rounded
        for category, first in zip(self.categorical, first_columns, strict=True):
            codes = category.codes(_label(self.feature_names, category.column), columns[category.column])
            out[np.arange(numbers.n), first + codes] = 1
        return out

    def _columns(self, x: np.ndarray | Columns) -> np.ndarray | list[np.ndarray]:
        """The fitted columns of ``x``, in the order of the fit."""
        if isinstance(x, Mapping):
            if self.feature_names is None:
                raise ValueError("x: fitted on a matrix without column names, got named columns; pass an (n, d) matrix")
            return _columns(x, self.feature_names)
        if self.categorical:
            raise ValueError("x: fitted on a table with text columns; pass a dict of columns, not an array")
        matrix = _columns(x, None)
        if _size(matrix)[1] != self.n_features_in:
            raise ValueError(f"x: expected {self.n_features_in} columns, as at the fit, got {_size(matrix)[1]}")
        return matrix

    def _layout(self) -> tuple[slice | np.ndarray, list[int]]:
        """Where the output has the numeric columns, and where each one-hot group begins."""
        if not self.categorical:
            return slice(None), []
        widths = np.ones(self.n_features_in, np.int64)
        for category in self.categorical:
            widths[category.column] = len(category.categories)
        first = np.cumsum(widths) - widths
        text = [category.column for category in self.categorical]
        return np.delete(first, text), first[text].tolist()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; floats come back to the bit."""
        return {
            "n_features_in": self.n_features_in,
            "feature_names": self.feature_names,
            "standardize": self.standardize,
            "impute": self.impute,
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "fill": None if self.fill is None else self.fill.tolist(),
            "categorical": [
                {"column": category.column, "categories": list(category.categories), "fill": category.fill}
                for category in self.categorical
            ],
        }

    @classmethod
    def from_dict(cls, state: Any) -> Preprocessor:
        """The inverse of `to_dict`; ValueError for a field that is missing, unknown, of another type or impossible."""
        names = ("n_features_in", "feature_names", "standardize", "impute", "mean", "scale", "fill", "categorical")
        d, feature_names, standardize, impute, mean, scale, fill, groups = _fields("preprocessor", state, names)
        d = _whole("preprocessor.n_features_in", d, 1)
        if feature_names is not None and len(_strings("preprocessor.feature_names", feature_names)) != d:
            raise ValueError(f"preprocessor.feature_names: expected {d} names, got {len(feature_names)}")
        if impute is not None and impute not in IMPUTE:
            raise ValueError(f"preprocessor.impute: expected null or one of {', '.join(IMPUTE)}, got {impute!r}")
        if not isinstance(groups, list) or (groups and feature_names is None):
            raise ValueError(f"preprocessor.categorical: expected a list, empty without feature names; got {groups!r}")
        categorical = tuple(_category_from_dict(group, d, impute) for group in groups)
        places = [category.column for category in categorical]
        if places != sorted(set(places)):
            raise ValueError(f"preprocessor.categorical: expected ascending columns, got {places}")
        m = d - len(places)
        if (fill is None) != (impute is None):
            raise ValueError(
                f"preprocessor.fill: expected {'null' if impute is None else 'numbers'}, got {_brief(fill)}"
            )
        return cls(
            d,
            None if feature_names is None else list(feature_names),
            _flag("preprocessor.standardize", standardize),
            impute,
            _finite("preprocessor.mean", mean, m),
            _scales("preprocessor.scale", scale, m),
            None if fill is None else _finite("preprocessor.fill", fill, m),
            categorical,
        )


def _category_from_dict(state: Any, d: int, impute: str | None) -> _Category:
    kind = "preprocessor.categorical"
    column, texts, fill = _fields(kind, state, ("column", "categories", "fill"))
    categories = _strings(f"{kind}.categories", texts)
    if _whole(f"{kind}.column", column, 0) >= d:
        raise ValueError(f"{kind}.column: expected an index below {d}, got {column}")
    if not categories or categories != sorted(categories):
        raise ValueError(f"{kind}.categories: expected sorted strings, at least one, got {_brief(categories)}")
    if (fill is None) != (impute is None) or (fill is not None and fill not in categories):
        raise ValueError(f"{kind}.fill: expected {'null' if impute is None else 'one of the categories'}, got {fill!r}")
    return _Category(column, tuple(categories), fill)


def _names(x: np.ndarray | Columns, feature_names: Sequence[str] | None) -> list[str] | None:
    """The column names to fit on: those given, or those of the dict."""
    if feature_names is None:
        return list(x) if isinstance(x, Mapping) else None
    names = list(feature_names)
    if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"feature_names: expected different strings, got {_brief(names)}")
    if not isinstance(x, Mapping) and np.ndim(x) == 2 and np.shape(x)[1] != len(names):
        raise ValueError(f"feature_names: {len(names)} names for {np.shape(x)[1]} columns")
    return names


def _label(names: list[str] | None, j: int) -> str:
    """What an error calls column j."""
    return f"column {j}" if names is None else f"column {names[j]!r}"


def _columns(x: np.ndarray | Columns, names: list[str] | None) -> np.ndarray | list[np.ndarray]:
    """``x`` checked: an (n, d) array of real numbers, or the named columns of a table, (n,) each."""
    if not isinstance(x, Mapping):
        matrix = np.asarray(x)
        if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
            raise ValueError(
                f"x: expected an (n, d) array of real numbers, or a dict of columns; got {matrix.dtype} "
                f"of shape {matrix.shape}"
            )
        return matrix
    assert names is not None  # a table always comes with the names that were fitted
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


def _size(columns: np.ndarray | list[np.ndarray]) -> tuple[int, int]:
    """(n, d)."""
    if isinstance(columns, np.ndarray):
        return columns.shape[0], columns.shape[1]
    return (len(columns[0]) if columns else 0), len(columns)


def _numbers(columns: np.ndarray | list[np.ndarray], names: list[str] | None, text: Sequence[int]) -> _Numbers:
    """The columns that are not ``text``; a column of nothing but missing values counts as numbers."""
    n, d = _size(columns)
    numeric = sorted(set(range(d)).difference(text))
    labels = [_label(names, j) for j in numeric]
    if isinstance(columns, np.ndarray):
        return _Numbers(columns, labels, n)
    return _Numbers([_as_numbers(label, columns[j]) for label, j in zip(labels, numeric, strict=True)], labels, n)


def _as_numbers(label: str, column: np.ndarray) -> np.ndarray:
    """A column that was numeric at the fit."""
    if column.dtype.kind in "biuf":
        return column
    numbers = np.full(len(column), np.nan)
    for row, text in enumerate(_texts(label, column)):
        if text is None:
            continue
        try:
            numbers[row] = float(text)
        except ValueError:
            raise ValueError(f"{_row(row)}, {label}: expected a number, as at the fit, got {text!r}") from None
    return numbers


def _refuse_missing(
    n: int, names: list[str] | None, text: list[int], missing_texts: list[int], missing: np.ndarray
) -> None:
    """ValueError naming every column with missing values and how many of ``n``, in the order of the columns."""
    d = len(text) + len(missing)
    counts = np.zeros(d, np.int64)
    counts[text] = missing_texts
    counts[np.delete(np.arange(d), text)] = missing
    if counts.any():
        listed = [f"{_label(names, j)} ({counts[j]} of {n})" for j in np.flatnonzero(counts).tolist()]
        more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
        raise ValueError(
            f"missing values in {', '.join(listed[:20])}{more}; "
            "use impute='mean', 'median' or 'most_frequent' to fill them"
        )


def _not_finite(numbers: _Numbers, rows: slice, rounded: np.ndarray) -> ValueError:
    """The complaint about the first value of a block that came out NaN or inf."""
    i, j = np.argwhere(~np.isfinite(rounded))[0]
    value = numbers.block(rows)[i, j]
    where = f"{_row(rows.start + i)}, {numbers.labels[j]}"
    if math.isnan(value):
        return ValueError(f"{where}: missing value (NaN); fit with impute= to fill it")
    if math.isinf(value):
        return ValueError(f"{where}: inf is not accepted")
    return ValueError(f"{where}: {value:g} is too large for {rounded.dtype}")


# --- labels ----------------------------------------------------------------------------------------------------------

MOST_CHARACTERS = 1 << 22  # of a fixed-width array of labels in a file
LABEL_TYPES: dict[str, type] = {  # the Python type, in JSON, of the labels of each dtype
    **dict.fromkeys(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"), int),
    **dict.fromkeys(("float16", "float32", "float64"), float),
    **dict.fromkeys(("str", "object"), str),
    "bool": bool,
}


@dataclass(frozen=True, eq=False)
class Labels:
    """Class labels <-> codes 0..k-1, in the sorted order of the labels.

    classes: (k,) the labels: integers, integral floats, booleans or str, in the dtype they came in.
    """

    classes: np.ndarray

    @classmethod
    def fit(cls, y: ArrayLike) -> Labels:
        """The distinct labels of ``y`` (n,); ValueError for a missing label, and for fewer than two classes."""
        values = _label_values(y)
        if len(values) == 0:
            raise ValueError("y: expected at least one label, got none")
        classes = np.array(sorted(set(values.tolist())), values.dtype)
        if len(classes) == 1:
            raise ValueError(f"y: only one class, {classes.tolist()[0]!r}, in {len(values)} rows: nothing to learn")
        return cls(classes)

    def __len__(self) -> int:
        """The number of classes, k."""
        return len(self.classes)

    def encode(self, y: ArrayLike) -> np.ndarray:
        """Labels (n,) -> int64 codes (n,); ValueError naming a label that was not there at the fit.

        Numbers are compared as numbers: 3 and 3.0 are the same label; text, numbers and booleans never are.
        """
        values = _label_values(y)
        if len(values) and _family(values) != _family(self.classes):
            raise ValueError(f"y: the labels are {_family(self.classes)}, got {_family(values)} ({values[0]!r})")
        code = {label: i for i, label in enumerate(self.classes.tolist())}
        distinct, inverse = np.unique(values, return_inverse=True)
        unseen = [i for i, label in enumerate(distinct.tolist()) if label not in code]
        if unseen:
            row = int(np.isin(inverse, unseen).argmax())
            raise ValueError(
                f"y: {_row(row)}: unseen label {values.tolist()[row]!r}; "
                f"known: {', '.join(map(repr, self.classes[:20].tolist()))}{', ...' if len(self) > 20 else ''}"
            )
        codes: np.ndarray = np.array([code[label] for label in distinct.tolist()], np.int64)[inverse]
        return codes

    def decode(self, codes: ArrayLike) -> np.ndarray:
        """Codes (n,) -> the labels (n,), in the dtype of those that were fitted."""
        indices = np.asarray(codes)
        if indices.dtype.kind not in "iu" and indices.size:
            raise ValueError(f"codes: expected integers, got {indices.dtype}")
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise ValueError(f"codes: expected 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")
        labels: np.ndarray = self.classes[indices.astype(np.int64)]
        return labels

    def to_dict(self) -> dict[str, Any]:
        """The classes as JSON values, with their dtype."""
        dtype = {"U": "str", "O": "object"}.get(self.classes.dtype.kind, self.classes.dtype.name)
        return {"dtype": dtype, "classes": self.classes.tolist()}

    @classmethod
    def from_dict(cls, state: Any) -> Labels:
        """The inverse of `to_dict`; ValueError for a field that is missing, unknown, of another type or impossible."""
        name, classes = _fields("labels", state, ("dtype", "classes"))
        if not isinstance(name, str) or name not in LABEL_TYPES:
            raise ValueError(f"labels.dtype: expected one of {', '.join(LABEL_TYPES)}; got {name!r}")
        kind = LABEL_TYPES[name]
        if not isinstance(classes, list) or len(classes) < 2 or any(type(label) is not kind for label in classes):
            raise ValueError(f"labels.classes: expected a list of two {kind.__name__} or more, got {_brief(classes)}")
        if not all(low < high for low, high in itertools.pairwise(classes)):
            raise ValueError(f"labels.classes: expected different labels in ascending order, got {_brief(classes)}")
        if name == "str" and len(classes) * max(map(len, classes)) > MOST_CHARACTERS:
            name = "object"  # every label of a "str" array takes the room of the longest
        try:
            with np.errstate(over="ignore"):
                array = _label_values(np.array(classes, name))
        except OverflowError:
            array = np.zeros(0)
        if array.tolist() != classes:
            raise ValueError(f"labels.classes: not all of them fit {name}: {_brief(classes)}")
        return cls(array)


def _label_values(y: ArrayLike) -> np.ndarray:
    """``y`` as an (n,) array of labels of one kind; ValueError, naming the row, for a missing or a fractional one."""
    values = np.asarray(y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "biufUO":
        raise ValueError(f"y: expected (n,) labels, got {values.dtype} of shape {values.shape}")
    if values.dtype.kind == "O":
        return _object_labels(values)
    if values.dtype.kind == "f":
        if values.dtype.itemsize > 8:
            values = values.astype(np.float64)
        for row in np.flatnonzero(~np.isfinite(values) | (values != np.trunc(values))).tolist():
            what = "missing label" if np.isnan(values[row]) else f"the label {values[row]} is not a whole number"
            raise ValueError(f"y: {_row(row)}: {what}; fractions are for regression")
    return values


def _object_labels(values: np.ndarray) -> np.ndarray:
    """An object array of labels of one kind: str stay objects, numbers and booleans get a dtype of their own."""
    for row, value in enumerate(values):
        if _is_missing(value):
            raise ValueError(f"y: {_row(row)}: missing label")
    types = set(map(type, values))
    families = {_family_of(kind) for kind in types}
    labels = values if families == {"text"} else np.array(values.tolist())
    if len(families) > 1 or None in families or (labels.dtype.kind == "O" and families != {"text"}):
        names = ", ".join(sorted(kind.__name__ for kind in types))
        raise ValueError(f"y: expected labels of one kind, text, whole numbers or booleans; got {names}")
    return labels if families == {"text"} else _label_values(labels)


def _family_of(kind: type) -> str | None:
    """What labels of a type are; those of one family can be compared with each other."""
    if issubclass(kind, str):
        return "text"
    if issubclass(kind, (bool, np.bool_)):
        return "booleans"
    return "numbers" if issubclass(kind, (int, float, np.integer, np.floating)) else None


def _family(labels: np.ndarray) -> str | None:
    return "text" if labels.dtype.kind == "O" else _family_of(labels.dtype.type)


# --- targets of a regression -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TargetScaler:
    """Regression targets <-> what the network fits: (y - mean) / scale, by output.

    mean, scale: (k,) float64; ndim: of the y that was fitted, and of what `inverse` gives back.
    """

    mean: np.ndarray
    scale: np.ndarray
    ndim: int

    @classmethod
    def fit(cls, y: ArrayLike, standardize: bool = True) -> TargetScaler:
        """Learn from y, (n,) or (n, k) finite numbers; with ``standardize=False`` mean is 0 and scale 1."""
        checks.boolean("standardize", standardize)
        values = _target_values(y)
        if values.size == 0:
            raise ValueError(f"y: expected at least one value, got shape {np.shape(y)}")
        k = values.shape[1]
        numbers = target_numbers(values)
        mean, scale = np.zeros(k), np.ones(k)
        if standardize:
            mean, scale = Moments(Survey(numbers.labels).add(numbers), None).add(numbers).result()
        return cls(mean, scale, 1 if np.ndim(y) == 1 else 2)

    def __len__(self) -> int:
        """The number of outputs, k."""
        return len(self.mean)

    def transform(self, y: ArrayLike, dtype: DTypeLike = np.float32) -> np.ndarray:
        """y (n,) or (n, k) -> (n, k) array of ``dtype`` float32 or float64, C order."""
        out_dtype = _output_dtype(dtype)
        values = _target_values(y)
        self._check_outputs(values)
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray((values - self.mean) / self.scale, out_dtype)
        if not np.isfinite(out).all():
            row, j = np.argwhere(~np.isfinite(out))[0]
            raise ValueError(f"y: {_row(row)}: {values[row, j]:g} is too large for {out_dtype}")
        return out

    def inverse(self, y_hat: ArrayLike) -> np.ndarray:
        """The network's (n, k) output, or (n,) where k is 1 -> float64 in the units and dimensions of the fitted y."""
        values = np.asarray(y_hat, np.float64)
        values = values[:, None] if values.ndim == 1 else values
        self._check_outputs(values)
        y: np.ndarray = values * self.scale + self.mean
        return y[:, 0] if self.ndim == 1 else y

    def _check_outputs(self, values: np.ndarray) -> None:
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise ValueError(f"y: expected {len(self.mean)} outputs, as at the fit, got shape {values.shape}")

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; floats come back to the bit."""
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist(), "ndim": self.ndim}

    @classmethod
    def from_dict(cls, state: Any) -> TargetScaler:
        """The inverse of `to_dict`; ValueError for a field that is missing, unknown, of another type or impossible."""
        mean, scale, ndim = _fields("target scaler", state, ("mean", "scale", "ndim"))
        if not isinstance(mean, list) or not mean:
            raise ValueError(f"target scaler.mean: expected a list of at least one number, got {_brief(mean)}")
        if _whole("target scaler.ndim", ndim, 1) > 2 or (ndim == 1 and len(mean) != 1):
            raise ValueError(f"target scaler.ndim: expected 1 (for one output) or 2, got {ndim}")
        k = len(mean)
        return cls(_finite("target scaler.mean", mean, k), _scales("target scaler.scale", scale, k), ndim)


def target_numbers(values: np.ndarray) -> _Numbers:
    """(n, k) targets as columns that can be surveyed."""
    return _Numbers(values, [f"y, output {j}" for j in range(values.shape[1])], len(values))


def _target_values(y: ArrayLike) -> np.ndarray:
    """``y`` as (n, k) float64; ValueError for anything but finite real numbers."""
    given = np.asarray(y)
    if given.dtype.kind not in "iuf" or given.ndim not in (1, 2):
        raise ValueError(f"y: expected (n,) or (n, k) real numbers, got {given.dtype} of shape {given.shape}")
    values = given.astype(np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if not np.isfinite(values).all():
        row, j = np.argwhere(~np.isfinite(values))[0]
        what = "missing target (NaN)" if np.isnan(values[row, j]) else "inf is not accepted"
        raise ValueError(f"y: {_row(row)}, output {j}: {what}")
    return values


# --- which task ------------------------------------------------------------------------------------------------------


def infer_task(y: ArrayLike) -> Literal["classification", "regression"]:
    """What ``y``, (n,) or (n, k), is most likely for.

    Text, booleans and objects are classes; several columns, and any fraction, are values. Whole numbers (floats too)
    with k different ones in n rows are classes where

    - k <= 2; or
    - k <= 20 and n >= 2k: few, and they repeat; or
    - k <= sqrt(n) and they are 0..k-1 or 1..k without a gap: codes, for a measured number has gaps.

    Else (ages, prices) they are values. NaN is passed over. The rule is a guess: let the user overrule it.
    """
    values = np.asarray(y)
    if values.size == 0 or values.ndim not in (1, 2) or values.dtype.kind not in "biufUSO":
        raise ValueError(f"y: expected (n,) or (n, k) labels or values, got {values.dtype} of shape {values.shape}")
    if values.ndim == 2 and values.shape[1] > 1:
        return "regression"
    if values.dtype.kind in "bUSO":
        return "classification"
    present = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if values.dtype.kind == "f" and not (np.isfinite(present) & (present == np.trunc(present))).all():
        return "regression"
    distinct = np.unique(present)
    k, n = len(distinct), present.size
    repeated = k <= 20 and 2 * k <= n
    coded = k > 0 and distinct[0] in (0, 1) and distinct[-1] - distinct[0] == k - 1 and k * k <= n
    return "classification" if k <= 2 or repeated or coded else "regression"
