"""The inputs of the network from raw columns: missing values filled, numbers standardized, text one-hot.

Leans on `checks`, `columns`, `categories`, `moments`, `states` and `values`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import checks
from . import states
from .categories import Category
from .columns import Columns, Inputs, names_of, refuse_missing
from .moments import Moments, Numbers, Survey
from .values import float_dtype, row_name, shown

IMPUTE = ("mean", "median", "most_frequent")
MAX_CATEGORIES = 1000


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
    mean: np.ndarray  # (m,) float64, of the numeric columns; so are scale and fill
    scale: np.ndarray
    fill: np.ndarray | None
    categorical: tuple[Category, ...]

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
        inputs = Inputs.of(x, names_of(x, feature_names))
        n, d = inputs.shape
        if n == 0 or d == 0:
            raise ValueError(f"x: expected at least one row and one column, got {n} rows and {d} columns")
        text = inputs.text
        numbers = inputs.numbers(text)
        survey = Survey(numbers.labels).add(numbers)
        if impute is None:
            missing_texts = [inputs.texts(j).count(None) for j in text]
            refuse_missing(n, inputs.names, text, missing_texts, survey.missing)
        fill = None if impute is None else _fills(numbers, survey, impute)
        m = len(numbers.labels)
        mean, scale = Moments(survey, fill).add(numbers).result() if standardize else (np.zeros(m), np.ones(m))
        categorical = []
        for j in text:
            counts = Counter(value for value in inputs.texts(j) if value is not None)
            categorical.append(Category.fit(j, inputs.label(j), counts, n, impute, max_categories))
        return cls(d, inputs.names, standardize, impute, mean, scale, fill, tuple(categorical))

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

    def layout(self) -> tuple[slice | np.ndarray, list[int]]:
        """Where the output has the m numeric columns, a slice or (m,) int64, and where each one-hot group begins."""
        if not self.categorical:
            return slice(None), []
        widths = np.ones(self.n_features_in, np.int64)
        for category in self.categorical:
            widths[category.column] = len(category.categories)
        first = np.cumsum(widths) - widths
        text = [category.column for category in self.categorical]
        return np.delete(first, text), first[text].tolist()

    def transform(self, x: np.ndarray | Columns, dtype: DTypeLike = np.float32) -> np.ndarray:
        """x as fitted -> (n, n_features_out) array, C order, of ``dtype`` float32 or float64.

        The arithmetic is float64, rounded once. A dict may hold other columns too: they are ignored. Raises
        ValueError, naming row and column, for a column that is not there, inf, a value too large for ``dtype`` and,
        unless an ``impute`` was set, a missing value or an unseen category.
        """
        out_dtype = float_dtype(dtype)
        inputs = self._inputs(x)
        numbers = inputs.numbers([category.column for category in self.categorical])
        out = np.zeros((numbers.n, self.n_features_out), out_dtype)
        number_columns, first_columns = self.layout()
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
            codes = category.codes(inputs.label(category.column), inputs.columns[category.column])
            out[np.arange(numbers.n), first + codes] = 1
        return out

    def _inputs(self, x: np.ndarray | Columns) -> Inputs:
        """The fitted columns of ``x``, in the order of the fit."""
        if isinstance(x, Mapping):
            if self.feature_names is None:
                raise ValueError("x: fitted on a matrix without column names, got named columns; pass an (n, d) matrix")
            return Inputs.of(x, self.feature_names)
        if self.categorical:
            raise ValueError("x: fitted on a table with text columns; pass a dict of columns, not an array")
        inputs = Inputs.of(x, self.feature_names)
        _, d = inputs.shape
        if d != self.n_features_in:
            raise ValueError(f"x: expected {self.n_features_in} columns, as at the fit, got {d}")
        return inputs

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
            "categorical": [category.to_dict() for category in self.categorical],
        }

    @classmethod
    def from_dict(cls, state: Any) -> Preprocessor:
        """The inverse of `to_dict`; ValueError for a field that is missing, unknown, of another type or impossible."""
        names = ("n_features_in", "feature_names", "standardize", "impute", "mean", "scale", "fill", "categorical")
        d, feature_names, standardize, impute, mean, scale, fill, groups = states.fields("preprocessor", state, names)
        d = states.integer("preprocessor.n_features_in", d, 1)
        if feature_names is not None and len(states.strings("preprocessor.feature_names", feature_names)) != d:
            raise ValueError(f"preprocessor.feature_names: expected {d} names, got {len(feature_names)}")
        if impute is not None and impute not in IMPUTE:
            raise ValueError(f"preprocessor.impute: expected null or one of {', '.join(IMPUTE)}, got {impute!r}")
        if not isinstance(groups, list) or (groups and feature_names is None):
            raise ValueError(f"preprocessor.categorical: expected a list, empty without feature names; got {groups!r}")
        categorical = tuple(Category.from_dict(group, d, impute) for group in groups)
        places = [category.column for category in categorical]
        if places != sorted(set(places)):
            raise ValueError(f"preprocessor.categorical: expected ascending columns, got {places}")
        m = d - len(places)
        if (fill is None) != (impute is None):
            raise ValueError(
                f"preprocessor.fill: expected {'null' if impute is None else 'numbers'}, got {shown(fill)}"
            )
        return cls(
            d,
            None if feature_names is None else list(feature_names),
            states.flag("preprocessor.standardize", standardize),
            impute,
            states.numbers("preprocessor.mean", mean, m),
            states.scales("preprocessor.scale", scale, m),
            None if fill is None else states.numbers("preprocessor.fill", fill, m),
            categorical,
        )


def _fills(numbers: Numbers, survey: Survey, impute: str) -> np.ndarray:
    """The (m,) means, medians or most frequent values (the smallest of a tie)."""
    choose = {"mean": None, "median": np.median, "most_frequent": _mode}[impute]
    return survey.fills(None if choose is None else lambda j: float(choose(numbers.column(j))))


def _mode(values: np.ndarray) -> float:
    distinct, counts = np.unique(values, return_counts=True)
    return float(distinct[counts.argmax()])


def _not_finite(numbers: Numbers, rows: slice, rounded: np.ndarray) -> ValueError:
    """The complaint about the first value of a block that came out NaN or inf."""
    i, j = np.argwhere(~np.isfinite(rounded))[0]
    value = numbers.block(rows)[i, j]
    where = f"{row_name(rows.start + i)}, {numbers.labels[j]}"
    if math.isnan(value):
        return ValueError(f"{where}: missing value (NaN); fit with impute= to fill it")
    if math.isinf(value):
        return ValueError(f"{where}: inf is not accepted")
    return ValueError(f"{where}: {value:g} is too large for {rounded.dtype}")
