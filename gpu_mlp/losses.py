"""The losses L(ŷ, y): one class each, with the value and the gradient in one pass, and the fused output pairs.

A leaf: imports NumPy and the scratch type of the activations. A loss works on a block of rows:

- ``loss.rows(y_hat, y, g, t)`` returns L of every row and writes g = ∂L/∂ŷ; ``g`` may be scratch, never ``y_hat``.
- ``FUSED[output, loss](loss, z, y, g, t)`` does the same from z, stable and without ŷ: g = ∂L/∂z.

``y`` is (rows, n_L) real, or (rows,) int64 class labels where the loss takes them; losses over real targets are
means over the outputs, so that L does not grow with n_L. The mean over the batch is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from . import checks
from .activations import ACTIVATIONS, Array, Range, Scratch

# What each range is contained in: a probability is positive, a positive number is real.
_CONTAINED: dict[str, tuple[str, ...]] = {
    "real": ("real",),
    "positive": ("real", "positive"),
    "unit": ("real", "positive", "unit"),
    "simplex": ("real", "positive", "unit", "simplex"),
    "log_simplex": ("real", "log_simplex"),
}


class Loss:
    """L(ŷ, y) of one sample.

    ``domain`` is the range that ŷ must lie in; an output activation with another range is refused.
    """

    name: ClassVar[str]
    domain: ClassVar[Range] = "real"
    takes_labels: ClassVar[bool] = False

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        """L of every row, (rows,); writes g = ∂L/∂ŷ, (rows, n_L)."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def check_output(self, output: str, n_outputs: int) -> None:
        """A ValueError where this loss means nothing on that output activation, saying what to use."""
        if self.domain not in _CONTAINED[ACTIVATIONS[output].range]:
            fitting = [a.name for a in ACTIVATIONS.values() if self.domain in _CONTAINED[a.range]]
            raise ValueError(
                f"loss: {self.name} needs an output in its domain ({self.domain}), which output={output!r} is not; "
                f"use output={' or '.join(map(repr, fitting))}{self._alternative(output)}"
            )

    def _alternative(self, output: str) -> str:
        others = [loss for (f, loss) in FUSED if f == output]
        return f", or loss={others[0]!r} with output={output!r}" if others else ""

    def check_targets(self, y: NDArray[Any], n_outputs: int) -> NDArray[Any]:
        """``y`` as (batch, n_L) numbers, finite; (batch,) is taken as (batch, 1) where there is one output."""
        if y.dtype.kind not in "buif" and y.dtype.name != "bfloat16":
            raise TypeError(f"y: expected numbers for loss {self.name!r}, got dtype {y.dtype}")
        if y.ndim == 1 and n_outputs == 1:
            y = y[:, None]
        if y.ndim != 2 or y.shape[1] != n_outputs:
            raise ValueError(f"y: expected shape (batch, {n_outputs}) for loss {self.name!r}, got {y.shape}")
        if y.dtype.kind not in "bui" and not np.isfinite(y).all():
            raise ValueError(f"y: {_first_bad(~np.isfinite(y))} is not finite")
        self.check_values(y)
        return y

    def check_values(self, y: NDArray[Any]) -> None:
        """A ValueError for finite targets that this loss has no value for."""

    def label_weights(self, y: NDArray[Any]) -> Array | None:
        """The weight that each row's class gives it in the mean, (rows,), or None where all are 1."""
        return None


def _smallest(y_hat: Array) -> float:
    """What a probability counts as at least: one that underflowed to 0 keeps a finite cost and gradient."""
    return float(np.finfo(y_hat.dtype).tiny)


def _below_one(y_hat: Array) -> float:
    """What 1 − ŷ counts as at least: the distance from 1 to the number below it, which rounding may have taken."""
    return float(np.finfo(y_hat.dtype).eps) / 2


def _first_bad(bad: NDArray[np.bool_]) -> str:
    row = np.argwhere(bad)[0]
    return f"row {row[0]}" + (f", output {row[1]}" if len(row) > 1 else "")


# --- real targets: means over the outputs ----------------------------------------------------------------------


@dataclass(frozen=True)
class MSE(Loss):
    """Mean squared error: L = mean_j (ŷ_j − y_j)²."""

    name = "mse"
    factor: ClassVar[float] = 1.0

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        n = y_hat.shape[1]
        np.subtract(y_hat, y, out=g)
        value = np.einsum("ij,ij->i", g, g) * (self.factor / n)
        np.multiply(g, 2 * self.factor / n, out=g)
        return value


@dataclass(frozen=True)
class HalfMSE(MSE):
    """Half the mean squared error, scikit-learn's squared loss: L = ½ mean_j (ŷ_j − y_j)²."""

    name = "half_mse"
    factor = 0.5


@dataclass(frozen=True)
class MAE(Loss):
    """Mean absolute error: L = mean_j |ŷ_j − y_j|, with the derivative 0 at 0."""

    name = "mae"

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        n = y_hat.shape[1]
        np.subtract(y_hat, y, out=g)
        np.abs(g, out=t.a)
        np.sign(g, out=g)
        np.multiply(g, 1 / n, out=g)
        return t.a.sum(axis=1) / n


@dataclass(frozen=True)
class Huber(Loss):
    """Mean over j of ½d² for |d| ≤ δ, δ(|d| − δ/2) beyond, with d = ŷ_j − y_j (Huber, 1964; torch's HuberLoss)."""

    name = "huber"
    delta: float = 1.0

    def __post_init__(self) -> None:
        checks.real("delta", self.delta, 0, open_minimum=True)

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        n = y_hat.shape[1]
        np.subtract(y_hat, y, out=t.a)
        np.clip(t.a, -self.delta, self.delta, out=g)  # g is the derivative, and |g| (|d| − |g| / 2) the value
        np.abs(t.a, out=t.a)
        np.abs(g, out=t.b)
        np.multiply(t.b, 0.5, out=t.c)
        np.subtract(t.a, t.c, out=t.a)
        value = np.einsum("ij,ij->i", t.a, t.b) / n
        np.multiply(g, 1 / n, out=g)
        return value


@dataclass(frozen=True)
class LogCosh(Loss):
    """L = mean_j log cosh(ŷ_j − y_j), computed as |d| + log1p(exp(−2|d|)) − log 2."""

    name = "log_cosh"

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        n = y_hat.shape[1]
        np.subtract(y_hat, y, out=g)
        np.abs(g, out=t.a)
        np.multiply(t.a, -2, out=t.b)
        np.exp(t.b, out=t.b)
        np.log1p(t.b, out=t.b)
        np.add(t.a, t.b, out=t.a)
        np.tanh(g, out=g)
        np.multiply(g, 1 / n, out=g)
        return t.a.sum(axis=1) / n - float(np.log(2))


@dataclass(frozen=True)
class Poisson(Loss):
    """Poisson deviance without its constant: L = mean_j (ŷ_j − y_j log ŷ_j); ŷ is the rate, y ≥ 0 the count."""

    name = "poisson"
    domain = "positive"

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        n = y_hat.shape[1]
        np.maximum(y_hat, math.sqrt(_smallest(y_hat)), out=t.a)  # the root: y may be many, and y / ŷ stays finite
        np.log(t.a, out=t.b)
        np.multiply(t.b, y, out=t.b)
        np.subtract(y_hat, t.b, out=t.b)
        np.divide(y, t.a, out=g, casting="same_kind")
        np.subtract(1, g, out=g)
        np.multiply(g, 1 / n, out=g)
        return t.b.sum(axis=1) / n

    def check_values(self, y: NDArray[Any]) -> None:
        if (y < 0).any():
            raise ValueError(f"y: {_first_bad(y < 0)} is negative, and loss 'poisson' takes counts or rates ≥ 0")


def _check_clip(clip: Any) -> None:
    checks.real("clip", clip, 0, 0.5, open_maximum=True)


def _clip_logarithm(log_y_hat: Array, clip: float) -> None:
    """log ŷ ← log of ŷ clipped to [clip, 1 − clip], in place; 0 leaves it alone."""
    if clip:
        np.clip(log_y_hat, math.log(clip), math.log1p(-clip), out=log_y_hat)


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """L = −mean_j (y_j log ŷ_j + (1 − y_j) log(1 − ŷ_j)); ŷ a probability, y in [0, 1]; book section 6.2.2.2.

    In L, not in its gradient, ŷ counts as within [clip, 1 − clip]: scikit-learn's log loss, with ``clip`` the eps of
    the type.
    """

    name = "binary_cross_entropy"
    domain = "unit"
    clip: float = 0.0

    def __post_init__(self) -> None:
        _check_clip(self.clip)

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        n = y_hat.shape[1]
        np.subtract(1, y_hat, out=t.b)
        np.maximum(t.b, _below_one(y_hat), out=t.b)
        np.maximum(y_hat, _smallest(y_hat), out=t.a)
        np.multiply(t.a, t.b, out=t.c)
        np.subtract(y_hat, y, out=g)
        np.divide(g, t.c, out=g)
        np.multiply(g, 1 / n, out=g)
        np.log(t.a, out=t.a)
        np.log(t.b, out=t.b)
        for logarithm in (t.a, t.b):
            _clip_logarithm(logarithm, self.clip)
        np.subtract(t.a, t.b, out=t.a)
        np.multiply(t.a, y, out=t.a)
        np.add(t.a, t.b, out=t.a)
        return t.a.sum(axis=1) / -n

    def check_values(self, y: NDArray[Any]) -> None:
        bad = (y < 0) | (y > 1)
        if bad.any():
            raise ValueError(f"y: {_first_bad(bad)} is outside [0, 1], which loss 'binary_cross_entropy' needs")


# --- class labels, or one probability row a sample ---------------------------------------------------------------


class _Categorical(Loss):
    """What the losses over classes share: labels or rows, and a weight for each class."""

    takes_labels = True
    class_weight: Sequence[float] | None
    label_smoothing = 0.0
    clip = 0.0

    def _check_class_weight(self) -> None:
        if self.class_weight is None:
            return
        weights = tuple(checks.real("class_weight", w, 0) for w in self.class_weight)
        if not any(weights):
            raise ValueError("class_weight: at least one weight must be positive")
        object.__setattr__(self, "class_weight", weights)

    def check_output(self, output: str, n_outputs: int) -> None:
        super().check_output(output, n_outputs)
        if n_outputs < 2:
            raise ValueError(
                f"loss: {self.name} needs at least 2 outputs, one a class, got 1; "
                "for two classes on one output use output='sigmoid' with loss='binary_cross_entropy'"
            )
        if self.class_weight is not None and len(self.class_weight) != n_outputs:
            raise ValueError(f"class_weight: expected {n_outputs} weights, one a class, got {len(self.class_weight)}")

    def check_targets(self, y: NDArray[Any], n_outputs: int) -> NDArray[Any]:
        """``y`` as (batch,) int64 labels in 0..n_L − 1, or as (batch, n_L) rows that sum to 1."""
        if y.ndim == 1:
            return check_labels(y, n_outputs)
        return super().check_targets(y, n_outputs)

    def check_values(self, y: NDArray[Any]) -> None:
        check_probability_rows(y)

    def label_weights(self, y: NDArray[Any]) -> Array | None:
        if self.class_weight is None or y.ndim != 1:
            return None
        return np.asarray(self.class_weight, np.float64)[y]

    def _target(self, y: NDArray[Any], like: Array, out: Array) -> None:
        """The weighted target rows w ⊙ ((1 − ε) y + ε / n), (rows, n), from labels or rows."""
        n = like.shape[1]
        if y.ndim == 1:
            out[...] = 0
            out[np.arange(len(y)), y] = 1
        else:
            out[...] = y
        if self.label_smoothing:
            np.multiply(out, 1 - self.label_smoothing, out=out)
            np.add(out, self.label_smoothing / n, out=out)
        if self.class_weight is not None:
            np.multiply(out, np.asarray(self.class_weight, like.dtype), out=out)


def check_labels(y: NDArray[Any], n_classes: int) -> NDArray[np.int64]:
    """Class labels as int64 in 0..n_classes − 1."""
    if y.dtype.kind not in "bui":
        raise TypeError(f"y: expected integer class labels 0..{n_classes - 1}, got dtype {y.dtype}")
    if y.size and (y.min() < 0 or y.max() >= n_classes):
        row = int(np.flatnonzero((y < 0) | (y >= n_classes))[0])
        raise ValueError(f"y: label {y[row]} in row {row} is outside 0..{n_classes - 1}, one a network output")
    return y.astype(np.int64, copy=False)


def check_probability_rows(y: NDArray[Any]) -> None:
    """A ValueError for rows that are not probabilities."""
    if (y < 0).any():
        raise ValueError(f"y: {_first_bad(y < 0)} is negative, not a probability")
    off = np.abs(y.sum(axis=1, dtype=np.float64) - 1) > 1e-3
    if off.any():
        row = int(np.flatnonzero(off)[0])
        raise ValueError(f"y: row {row} sums to {float(y[row].sum()):g}; a row of class probabilities sums to 1")


@dataclass(frozen=True)
class CrossEntropy(_Categorical):
    """L = −Σ_c w_c t_c log ŷ_c over a probability row ŷ; book section 6.2.2.3.

    t is the label's row (or the given row) smoothed: t = (1 − ε) y + ε / n. As in torch's CrossEntropyLoss, the
    class weights multiply every term, and with labels the batch mean divides by Σ_i w_{y_i}. In L, not in its
    gradient, ŷ counts as within [clip, 1 − clip]: scikit-learn's log loss, with ``clip`` the eps of the type.
    """

    name = "cross_entropy"
    domain = "simplex"
    label_smoothing: float = 0.0
    class_weight: Sequence[float] | None = None
    clip: float = 0.0

    def __post_init__(self) -> None:
        checks.real("label_smoothing", self.label_smoothing, 0, 1)
        _check_clip(self.clip)
        self._check_class_weight()

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        self._target(y, y_hat, t.a)
        np.maximum(y_hat, _smallest(y_hat), out=t.b)
        np.divide(t.a, t.b, out=g)
        np.negative(g, out=g)
        np.log(t.b, out=t.b)
        _clip_logarithm(t.b, self.clip)
        return -np.einsum("ij,ij->i", t.a, t.b)


@dataclass(frozen=True)
class NLL(_Categorical):
    """Negative log-likelihood: L = −Σ_c w_c y_c ŷ_c over a row ŷ of log-probabilities."""

    name = "nll"
    domain = "log_simplex"
    class_weight: Sequence[float] | None = None

    def __post_init__(self) -> None:
        self._check_class_weight()

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        self._target(y, y_hat, g)
        np.negative(g, out=g)
        return np.einsum("ij,ij->i", g, y_hat)


@dataclass(frozen=True)
class Hinge(Loss):
    """L = mean_j max(0, 1 − y_j ŷ_j) with y_j ∈ {−1, +1}; a class label means +1 there and −1 elsewhere."""

    name = "hinge"
    takes_labels = True

    def rows(self, y_hat: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
        n = y_hat.shape[1]
        if y.ndim == 1:
            g[...] = 1
            g[np.arange(len(y)), y] = -1
        else:
            np.negative(y, out=g, casting="unsafe")
        np.multiply(g, y_hat, out=t.a)
        np.add(t.a, 1, out=t.a)
        np.multiply(g, np.greater(t.a, 0, out=t.mask), out=g)
        np.maximum(t.a, 0, out=t.a)
        np.multiply(g, 1 / n, out=g)
        return t.a.sum(axis=1) / n

    def check_targets(self, y: NDArray[Any], n_outputs: int) -> NDArray[Any]:
        """``y`` as (batch, n_L) signs, or (batch,) labels where there are two outputs or more."""
        if y.ndim == 1 and n_outputs > 1:
            return check_labels(y, n_outputs)
        return super().check_targets(y, n_outputs)

    def check_values(self, y: NDArray[Any]) -> None:
        bad = (y != 1) & (y != -1)
        if bad.any():
            raise ValueError(f"y: {_first_bad(bad)} is {y[tuple(np.argwhere(bad)[0])]}; loss 'hinge' needs −1 or +1")


# --- the pairs that are computed from z --------------------------------------------------------------------------

Fused = Callable[[Any, Array, NDArray[Any], Array, Scratch], Array]


def _softmax_cross_entropy(loss: _Categorical, z: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
    """L = Σt · log Σexp z − ⟨t, z⟩ and g = Σt · softmax(z) − t, with the row maximum subtracted from z."""
    np.subtract(z, z.max(axis=1, keepdims=True), out=t.b)
    np.exp(t.b, out=g)
    total = g.sum(axis=1)
    loss._target(y, z, t.a)
    mass = t.a.sum(axis=1)
    np.multiply(g, (mass / total)[:, None], out=g)
    np.subtract(g, t.a, out=g)
    if loss.clip:
        np.subtract(t.b, np.log(total)[:, None], out=t.b)
        _clip_logarithm(t.b, loss.clip)
        return -np.einsum("ij,ij->i", t.a, t.b)
    return mass * np.log(total) - np.einsum("ij,ij->i", t.a, t.b)


def _sigmoid_binary_cross_entropy(loss: BinaryCrossEntropy, z: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
    """L = mean_j [softplus(z_j) − y_j z_j] and g = (σ(z) − y) / n"""
    n = z.shape[1]
    value = _clipped_binary_cross_entropy(loss, z, y, g, t) if loss.clip else None
    ACTIVATIONS["softplus"].f(z, t.b, t)
    np.multiply(z, y, out=t.a)
    np.subtract(t.b, t.a, out=t.b)
    ACTIVATIONS["sigmoid"].f(z, g, t)
    np.subtract(g, y, out=g)
    np.multiply(g, 1 / n, out=g)
    return t.b.sum(axis=1) / n if value is None else value


def _clipped_binary_cross_entropy(
    loss: BinaryCrossEntropy, z: Array, y: NDArray[Any], s: Array, t: Scratch
) -> NDArray[Any]:
    """L = −mean_j [y_j log σ(z_j) + (1 − y_j) log σ(−z_j)], both logarithms clipped; ``s`` is scratch."""
    n = z.shape[1]
    softplus = ACTIVATIONS["softplus"].f
    np.negative(z, out=s)
    softplus(s, t.b, t)
    np.negative(t.b, out=s)  # log σ(z)
    _clip_logarithm(s, loss.clip)
    value = np.einsum("ij,ij->i", s, y)
    softplus(z, t.b, t)
    np.negative(t.b, out=t.b)  # log σ(−z)
    _clip_logarithm(t.b, loss.clip)
    np.subtract(1, y, out=s, casting="same_kind")
    value += np.einsum("ij,ij->i", t.b, s)
    return value / -n


def _exp_poisson(loss: Loss, z: Array, y: NDArray[Any], g: Array, t: Scratch) -> Array:
    """L = mean_j [exp(z_j) − y_j z_j] and g = (exp(z) − y) / n"""
    n = z.shape[1]
    np.exp(z, out=g)
    np.multiply(z, y, out=t.a)
    np.subtract(g, t.a, out=t.a)
    np.subtract(g, y, out=g)
    np.multiply(g, 1 / n, out=g)
    return t.a.sum(axis=1) / n


FUSED: dict[tuple[str, str], Fused] = {
    ("softmax", "cross_entropy"): _softmax_cross_entropy,
    ("log_softmax", "nll"): _softmax_cross_entropy,
    ("sigmoid", "binary_cross_entropy"): _sigmoid_binary_cross_entropy,
    ("exp", "poisson"): _exp_poisson,
}

LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (MSE, HalfMSE, MAE, Huber, LogCosh, Poisson, BinaryCrossEntropy, CrossEntropy, NLL, Hinge)
}

# The loss that goes with an output activation when none is named: its negative log-likelihood.
DEFAULT_LOSS = {"softmax": "cross_entropy", "log_softmax": "nll", "sigmoid": "binary_cross_entropy", "exp": "poisson"}


def get(loss: str | Loss) -> Loss:
    """The loss called ``loss``, with its defaults, or ``loss`` itself."""
    if isinstance(loss, Loss):
        return loss
    return LOSSES[checks.choice("loss", loss, LOSSES)]()
