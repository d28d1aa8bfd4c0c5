"""Preprocessing fitted to data that is read in pieces: the same numbers as from all of it at once, up to rounding.

Leans on the rooms of `preprocessing`, whose two passes these are. Between them the pieces are forgotten: what is kept
is as large as a row, and the different texts and labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .preprocessing import MAX_CATEGORIES, Columns, Labels, Preprocessor, TargetScaler
from .preprocessing.categories import Category
from .preprocessing.columns import Inputs, column_label, refuse_missing
from .preprocessing.moments import Moments, Survey
from .preprocessing.targets import label_values, target_numbers, target_values

MOST_LABELS = 100_000  # of a classification; more is the mistake of taking values for classes


class InputsFit:
    """`Preprocessor.fit` by pieces: ``look`` at each of them, then ``measure`` each of them, then `result`."""

    def __init__(
        self, feature_names: Sequence[str] | None, standardize: bool, impute: str | None, most: int = MAX_CATEGORIES
    ) -> None:
        self._names = None if feature_names is None else list(feature_names)
        self._standardize, self._impute, self._most = standardize, impute, most
        self._survey: Survey | None = None
        self._moments: Moments | None = None

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure."""
        return self._standardize

    def look(self, x: NDArray[Any] | Columns) -> None:
        """The first pass: which columns there are, what is missing, sums and bounds, and the texts."""
        inputs = Inputs.of(x, self._names)
        if self._survey is None:
            self._begin(inputs)
        assert self._survey is not None
        self._survey.add(inputs.numbers(self._text))
        for j in self._text:
            texts = inputs.texts(j)
            self._counts[j].update(text for text in texts if text is not None)
            self._missing[j] += texts.count(None)
            if len(self._counts[j]) > self._most:
                self._category(j)  # refuses it now, before more of it is gathered

    def _begin(self, inputs: Inputs) -> None:
        _, self._d = inputs.shape
        self._text = inputs.text
        self._counts: dict[int, Counter[str]] = {j: Counter() for j in self._text}
        self._missing = dict.fromkeys(self._text, 0)
        labels = inputs.numbers(self._text).labels
        if labels and self._impute in ("median", "most_frequent"):
            raise ValueError(
                f"impute: {self._impute!r} needs all the values of a column at once, and a data set that is read in "
                "pieces never has them; use impute='mean'"
            )
        self._survey = Survey(labels)

    def _category(self, j: int) -> Category:
        assert self._survey is not None
        label = column_label(self._names, j)
        return Category.fit(j, label, self._counts[j], self._survey.rows, self._impute, self._most)

    def _settle(self) -> Survey:
        """What the first pass has found, once it is seen to be all right."""
        survey = self._survey
        if survey is None:
            raise ValueError("x: expected at least one row")
        if self._moments is None:
            if self._impute is None:
                missing = [self._missing[j] for j in self._text]
                refuse_missing(survey.rows, self._names, self._text, missing, survey.missing)
            self._fills = None if self._impute is None else survey.fills(None)
            self._moments = Moments(survey, self._fills)
        return survey

    def measure(self, x: NDArray[Any] | Columns) -> None:
        """The second pass: the deviations."""
        self._settle()
        assert self._moments is not None
        self._moments.add(Inputs.of(x, self._names).numbers(self._text))

    def result(self) -> Preprocessor:
        """What `Preprocessor.fit` would have found."""
        m = len(self._settle().labels)
        assert self._moments is not None
        mean, scale = self._moments.result() if self._standardize else (np.zeros(m), np.ones(m))
        categorical = tuple(self._category(j) for j in self._text)
        return Preprocessor(
            self._d, self._names, self._standardize, self._impute, mean, scale, self._fills, categorical
        )


class LabelsFit:
    """`Labels.fit` by pieces: the union of their labels."""

    measures = False

    def __init__(self) -> None:
        self._found: set[Any] = set()
        self._dtype: np.dtype[Any] | None = None

    def look(self, y: NDArray[Any]) -> None:
        """Gather the labels of a piece."""
        values = label_values(y)
        self._dtype = values.dtype if self._dtype is None else np.promote_types(self._dtype, values.dtype)
        self._found.update(values.tolist())
        if len(self._found) > MOST_LABELS:
            raise ValueError(f"y: more than {MOST_LABELS} different labels; are they values? Then say task regression")

    def measure(self, y: NDArray[Any]) -> None:
        """There is no second pass."""

    def result(self) -> Labels:
        """The labels of all pieces."""
        return Labels.fit(np.array(sorted(self._found), self._dtype))


class ScalerFit:
    """`TargetScaler.fit` by pieces."""

    def __init__(self, standardize: bool) -> None:
        self.measures = standardize
        self._survey: Survey | None = None
        self._moments: Moments | None = None

    def look(self, y: NDArray[Any]) -> None:
        """The first pass: sums and bounds."""
        numbers = target_numbers(target_values(y))
        if self._survey is None:
            self._survey, self._ndim = Survey(numbers.labels), 1 if y.ndim == 1 else 2
        self._survey.add(numbers)

    def measure(self, y: NDArray[Any]) -> None:
        """The second pass: the deviations."""
        assert self._survey is not None
        self._moments = self._moments or Moments(self._survey, None)
        self._moments.add(target_numbers(target_values(y)))

    def result(self) -> TargetScaler:
        """What `TargetScaler.fit` would have found."""
        assert self._survey is not None
        k = len(self._survey.labels)
        mean, scale = (np.zeros(k), np.ones(k)) if self._moments is None else self._moments.result()
        return TargetScaler(mean, scale, self._ndim)
