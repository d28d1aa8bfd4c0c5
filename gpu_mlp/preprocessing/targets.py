"""Targets <-> what the network fits: class labels and their codes, values and their scale, and which of the two it is.

Leans on `checks`, `moments`, `states` and `values`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import checks
from . import states
from .moments import Moments, Numbers, Survey
from .values import float_dtype, is_missing, row_name, shown

# --- class labels ----------------------------------------------------------------------------------------------------

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
        values = label_values(y)
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
        values = label_values(y)
        if len(values) and _family(values) != _family(self.classes):
            raise ValueError(f"y: the labels are {_family(self.classes)}, got {_family(values)} ({values[0]!r})")
        code = {label: i for i, label in enumerate(self.classes.tolist())}
        distinct, inverse = np.unique(values, return_inverse=True)
        unseen = [i for i, label in enumerate(distinct.tolist()) if label not in code]
        if unseen:
            row = int(np.isin(inverse, unseen).argmax())
            raise ValueError(
                f"y: {row_name(row)}: unseen label {values.tolist()[row]!r}; "
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
        name, classes = states.fields("labels", state, ("dtype", "classes"))
        if not isinstance(name, str) or name not in LABEL_TYPES:
            raise ValueError(f"labels.dtype: expected one of {', '.join(LABEL_TYPES)}; got {name!r}")
        kind = LABEL_TYPES[name]
        if not isinstance(classes, list) or len(classes) < 2 or any(type(label) is not kind for label in classes):
            raise ValueError(f"labels.classes: expected a list of two {kind.__name__} or more, got {shown(classes)}")
        if not all(low < high for low, high in itertools.pairwise(classes)):
            raise ValueError(f"labels.classes: expected different labels in ascending order, got {shown(classes)}")
        if name == "str" and len(classes) * max(map(len, classes)) > MOST_CHARACTERS:
            name = "object"  # every label of a "str" array takes the room of the longest
        try:
            with np.errstate(over="ignore"):
                array = label_values(np.array(classes, name))
        except OverflowError:
            array = np.zeros(0)
        if array.tolist() != classes:
            raise ValueError(f"labels.classes: not all of them fit {name}: {shown(classes)}")
        return cls(array)


def label_values(y: ArrayLike) -> np.ndarray:
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
            raise ValueError(f"y: {row_name(row)}: {what}; fractions are for regression")
    return values


def _object_labels(values: np.ndarray) -> np.ndarray:
    """An object array of labels of one kind: str stay objects, numbers and booleans get a dtype of their own."""
    for row, value in enumerate(values):
        if is_missing(value):
            raise ValueError(f"y: {row_name(row)}: missing label")
    types = set(map(type, values))
    families = {_family_of(kind) for kind in types}
    labels = values if families == {"text"} else np.array(values.tolist())
    if len(families) > 1 or None in families or (labels.dtype.kind == "O" and families != {"text"}):
        names = ", ".join(sorted(kind.__name__ for kind in types))
        raise ValueError(f"y: expected labels of one kind, text, whole numbers or booleans; got {names}")
    return labels if families == {"text"} else label_values(labels)


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
        values = target_values(y)
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
        out_dtype = float_dtype(dtype)
        values = target_values(y)
        self._check_outputs(values)
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray((values - self.mean) / self.scale, out_dtype)
        if not np.isfinite(out).all():
            row, j = np.argwhere(~np.isfinite(out))[0]
            raise ValueError(f"y: {row_name(row)}: {values[row, j]:g} is too large for {out_dtype}")
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
        mean, scale, ndim = states.fields("target scaler", state, ("mean", "scale", "ndim"))
        if not isinstance(mean, list) or not mean:
            raise ValueError(f"target scaler.mean: expected a list of at least one number, got {shown(mean)}")
        if states.integer("target scaler.ndim", ndim, 1) > 2 or (ndim == 1 and len(mean) != 1):
            raise ValueError(f"target scaler.ndim: expected 1 (for one output) or 2, got {ndim}")
        k = len(mean)
        return cls(states.numbers("target scaler.mean", mean, k), states.scales("target scaler.scale", scale, k), ndim)


def target_numbers(values: np.ndarray) -> Numbers:
    """(n, k) targets as columns that can be surveyed."""
    return Numbers(values, [f"y, output {j}" for j in range(values.shape[1])], len(values))


def target_values(y: ArrayLike) -> np.ndarray:
    """``y`` as (n, k) float64; ValueError for anything but finite real numbers."""
    given = np.asarray(y)
    if given.dtype.kind not in "iuf" or given.ndim not in (1, 2):
        raise ValueError(f"y: expected (n,) or (n, k) real numbers, got {given.dtype} of shape {given.shape}")
    values = given.astype(np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if not np.isfinite(values).all():
        row, j = np.argwhere(~np.isfinite(values))[0]
        what = "missing target (NaN)" if np.isnan(values[row, j]) else "inf is not accepted"
        raise ValueError(f"y: {row_name(row)}, output {j}: {what}")
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
