"""A column of text as one input per category.

Leans on `columns`, `states` and `values`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import states
from .columns import texts_of
from .values import is_missing, row_name, shown


@dataclass(frozen=True)
class Category:
    """A one-hot column: its place in the input, its sorted categories, and what stands in for a missing value."""

    column: int
    categories: tuple[str, ...]
    fill: str | None

    @classmethod
    def fit(
        cls, column: int, label: str, counts: Mapping[str, int], rows: int, impute: str | None, most: int
    ) -> Category:
        """From how often each text is in so many rows; ValueError where there are none, or more than ``most``."""
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
        """(n,) int64 indices into the categories; missing and unseen are filled, or refused where there is no fill.

        values: (n,) text, or numbers where a file happens to spell only those of a column such as 1, 2, 3+.
        """
        known: dict[Any, int] = {text: code for code, text in enumerate(self.categories)}
        fill = -1 if self.fill is None else known[self.fill]
        if values.dtype.kind in "biuf":
            known = self._by_number()
            texts: list[Any] = [None if is_missing(value) else value for value in values.tolist()]
        else:
            texts = list(texts_of(label, values))
        codes = np.array([known.get(text, fill) for text in texts], np.int64)
        if (codes < 0).any():
            row = int((codes < 0).argmax())
            what = "missing value" if texts[row] is None else f"unseen category {texts[row]!r}"
            raise ValueError(
                f"{row_name(row)}, {label}: {what}; fit with impute= to accept it "
                f"(known: {', '.join(self.categories[:20])}{', ...' if len(self.categories) > 20 else ''})"
            )
        return codes

    def _by_number(self) -> dict[Any, int]:
        """Number -> code."""
        codes: dict[float, list[int]] = {}
        for code, text in enumerate(self.categories):
            with contextlib.suppress(ValueError):
                codes.setdefault(float(text), []).append(code)
        return {number: same[0] for number, same in codes.items() if len(same) == 1}  # not "1" beside "1.0"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {"column": self.column, "categories": list(self.categories), "fill": self.fill}

    @classmethod
    def from_dict(cls, state: Any, d: int, impute: str | None) -> Category:
        """The inverse of `to_dict`, of an input of ``d`` columns; ValueError for an impossible field."""
        kind = "preprocessor.categorical"
        column, texts, fill = states.fields(kind, state, ("column", "categories", "fill"))
        categories = states.strings(f"{kind}.categories", texts)
        if states.integer(f"{kind}.column", column, 0) >= d:
            raise ValueError(f"{kind}.column: expected an index below {d}, got {column}")
        if not categories or categories != sorted(categories):
            raise ValueError(f"{kind}.categories: expected sorted strings, at least one, got {shown(categories)}")
        if (fill is None) != (impute is None) or (fill is not None and fill not in categories):
            expected = "null" if impute is None else "one of the categories"
            raise ValueError(f"{kind}.fill: expected {expected}, got {fill!r}")
        return cls(column, tuple(categories), fill)
