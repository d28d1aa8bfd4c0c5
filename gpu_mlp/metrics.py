"""What a model is judged by on held-out data: accuracy, top-k accuracy, RMSE and R², summed up chunk by chunk.

A leaf: imports NumPy alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from . import checks


class Metric:
    """A figure of merit of predictions; ``add`` takes chunks, ``value`` is the figure over all of them."""

    name: str
    higher_is_better: ClassVar[bool] = True

    def add(self, y_hat: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any] | None) -> None:
        """Take in ŷ, (rows, n_L), and y, (rows, n_L) or (rows,) labels; weights (rows,)."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def value(self) -> float:
        """The figure; NaN over no rows."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def sums(self) -> NDArray[np.float64]:
        """All that has been taken in, as float64 numbers of one count."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def merge(self, sums: NDArray[np.float64]) -> None:
        """Take in what another accumulator of the same metric has, as its `sums`."""
        raise TypeError(f"{type(self).__name__} is abstract")


class Accuracy(Metric):
    """The weighted share of rows whose class is right.

    With labels or probability rows: the largest of ŷ (with signs: the largest of y). With one output or several
    independent ones: the share of entries on the right side of ``threshold`` (0.5 for probabilities, 0 for hinge
    scores).
    """

    name = "accuracy"

    def __init__(self, k: int = 1, independent: bool = False, threshold: float = 0.5) -> None:
        self._k = k
        self._independent = independent
        self._threshold = threshold
        self._right = self._total = 0.0
        if k > 1:
            self.name = f"top_{k}_accuracy"

    def add(self, y_hat: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any] | None) -> None:
        if self._independent:
            right = ((y_hat > self._threshold) == (y > self._threshold)).mean(axis=1)
        else:
            labels = y if y.ndim == 1 else y.argmax(axis=1)
            if self._k == 1:
                right = y_hat.argmax(axis=1) == labels
            else:
                right = (self._top(y_hat) == labels[:, None]).any(axis=1)
        weight = np.ones(len(right)) if sample_weight is None else sample_weight
        self._right += float(np.dot(right, weight))
        self._total += float(weight.sum())

    def _top(self, y_hat: NDArray[Any]) -> NDArray[np.int64]:
        k = min(self._k, y_hat.shape[1])
        return np.argpartition(-y_hat, k - 1, axis=1)[:, :k]

    def sums(self) -> NDArray[np.float64]:
        return np.array([self._right, self._total])

    def merge(self, sums: NDArray[np.float64]) -> None:
        self._right += float(sums[0])
        self._total += float(sums[1])

    def value(self) -> float:
        return self._right / self._total if self._total else float("nan")


class RMSE(Metric):
    """Root mean squared error: the square root of the weighted mean over rows and outputs of (ŷ − y)²."""

    name = "rmse"
    higher_is_better = False

    def __init__(self) -> None:
        self._square = self._total = 0.0

    def add(self, y_hat: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any] | None) -> None:
        square = np.square(y_hat.astype(np.float64) - y).mean(axis=1)
        weight = np.ones(len(square)) if sample_weight is None else sample_weight
        self._square += float(np.dot(square, weight))
        self._total += float(weight.sum())

    def sums(self) -> NDArray[np.float64]:
        return np.array([self._square, self._total])

    def merge(self, sums: NDArray[np.float64]) -> None:
        self._square += float(sums[0])
        self._total += float(sums[1])

    def value(self) -> float:
        return float(np.sqrt(self._square / self._total)) if self._total else float("nan")


class R2(Metric):
    """The coefficient of determination, 1 − Σ(ŷ − y)² / Σ(y − ȳ)², the mean over the outputs.

    As scikit-learn's r2_score: an output whose y is constant counts as 1 where ŷ is exact and as 0 elsewhere.
    """

    name = "r2"

    def __init__(self, n_outputs: int = 1) -> None:
        self._total = 0.0
        self._residual = np.zeros(n_outputs)
        self._mean = np.zeros(n_outputs)
        self._spread = np.zeros(n_outputs)  # Σ w (y − ȳ)², by the pairwise update of Chan, Golub and LeVeque, 1979

    def add(self, y_hat: NDArray[Any], y: NDArray[Any], sample_weight: NDArray[Any] | None) -> None:
        if not len(y):
            return
        y = y.astype(np.float64)
        weight = (np.ones(len(y)) if sample_weight is None else sample_weight)[:, None]
        total = float(weight.sum())
        if not total:
            return
        mean = (weight * y).sum(axis=0) / total
        residual = (weight * np.square(y_hat - y)).sum(axis=0)
        self._take(total, residual, mean, (weight * np.square(y - mean)).sum(axis=0))

    def _take(self, total: float, residual: Any, mean: Any, spread: Any) -> None:
        """Take in some rows of weight ``total``, by what the attributes have of them."""
        shift = mean - self._mean
        self._residual = self._residual + residual
        self._spread = self._spread + spread + np.square(shift) * (self._total * total / (self._total + total))
        self._mean = self._mean + shift * (total / (self._total + total))
        self._total += total

    def sums(self) -> NDArray[np.float64]:
        return np.concatenate([[self._total], self._residual, self._mean, self._spread])

    def merge(self, sums: NDArray[np.float64]) -> None:
        if sums[0]:
            self._take(float(sums[0]), *sums[1:].reshape(3, -1))

    def value(self) -> float:
        if not self._total:
            return float("nan")
        constant = self._spread == 0
        r2 = 1 - self._residual / np.where(constant, 1, self._spread)
        return float(np.where(constant, np.where(self._residual == 0, 1.0, 0.0), r2).mean())


NAMES = ("accuracy", "top_K_accuracy", "rmse", "r2")


def make(name: str, loss: str, n_outputs: int, labels: bool = False) -> Metric:
    """A new accumulator of the metric called ``name`` for predictions of a network trained with ``loss``.

    ``labels`` says that the targets are class labels rather than rows of numbers.
    """
    top = re.fullmatch(r"top_(\d+)_accuracy", name) if isinstance(name, str) else None
    if top:
        k = checks.integer("metrics (k)", int(top[1]), 1, n_outputs)
        if loss not in ("cross_entropy", "nll") or k < 1:
            raise ValueError(f"metrics: {name} needs classes, and loss {loss!r} has none")
        return Accuracy(k)
    checks.choice("metrics", name, NAMES)
    if name == "top_K_accuracy":
        raise ValueError("metrics: put a number for K, as in top_5_accuracy")
    if name in ("rmse", "r2"):
        if labels:
            raise ValueError(
                f"metrics: {name} needs numbers, and the targets are class labels; known for them: accuracy"
            )
        return RMSE() if name == "rmse" else R2(n_outputs)
    if loss in ("cross_entropy", "nll") or (loss == "hinge" and n_outputs > 1):
        return Accuracy()
    if loss == "binary_cross_entropy":
        return Accuracy(independent=True)
    if loss == "hinge":
        return Accuracy(independent=True, threshold=0.0)
    raise ValueError(f"metrics: accuracy needs classes, and loss {loss!r} has none; known for it: rmse, r2")


def default(loss: str, n_outputs: int) -> tuple[str, ...]:
    """The metrics that are reported where none are named."""
    if loss in ("cross_entropy", "nll"):
        return ("accuracy", "top_5_accuracy") if n_outputs > 20 else ("accuracy",)
    if loss in ("binary_cross_entropy", "hinge"):
        return ("accuracy",)
    return ("rmse", "r2")


def chosen(names: Sequence[str] | None, loss: str, n_outputs: int, labels: bool) -> tuple[str, ...]:
    """``names``, each tried out before any work, or the `default` ones; ``labels`` as in `make`."""
    if isinstance(names, str):
        raise TypeError(f"metrics: expected a list of names, got the string {names!r}")
    wanted = default(loss, n_outputs) if names is None else tuple(names)
    for name in wanted:
        make(name, loss, n_outputs, labels)
    return wanted
