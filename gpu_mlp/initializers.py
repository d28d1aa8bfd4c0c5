"""Initial weights: Glorot, He, LeCun and orthogonal, drawn from a NumPy generator on every device.

A leaf. Drawing in float64 and casting gives the same weights on CPU and GPU and in every precision.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from . import checks

Initializer = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]


def _uniform(variance: Callable[[int, int], float]) -> Initializer:
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
        bound = np.sqrt(3 * variance(*shape))
        return rng.uniform(-bound, bound, shape)

    return draw


def _normal(variance: Callable[[int, int], float]) -> Initializer:
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
        return rng.normal(0, np.sqrt(variance(*shape)), shape)

    return draw


def _orthogonal(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Rows (or columns, whichever are fewer) are orthonormal; uniform over such matrices (Saxe et al., 2013)."""
    n_out, n_in = shape
    a = rng.normal(size=(max(shape), min(shape)))
    q, r = np.linalg.qr(a)
    q *= np.sign(np.diag(r))  # makes the distribution uniform (Mezzadri, 2007)
    return np.ascontiguousarray(q if n_out >= n_in else q.T)


def _glorot(n_out: int, n_in: int) -> float:
    return 2 / (n_in + n_out)  # Glorot and Bengio, 2010


def _he(n_out: int, n_in: int) -> float:
    return 2 / n_in  # He et al., 2015


def _lecun(n_out: int, n_in: int) -> float:
    return 1 / n_in  # LeCun et al., Efficient BackProp, 1998


INITIALIZERS: dict[str, Initializer] = {
    "glorot_uniform": _uniform(_glorot),
    "glorot_normal": _normal(_glorot),
    "he_uniform": _uniform(_he),
    "he_normal": _normal(_he),
    "lecun_uniform": _uniform(_lecun),
    "lecun_normal": _normal(_lecun),
    "orthogonal": _orthogonal,
}


def get(name: str | Initializer, auto: str) -> Initializer:
    """The initializer called ``name``; "auto" means ``auto``, the one that the layer's activation asks for.

    A callable ``(rng, (n_out, n_in)) -> (n_out, n_in) array`` is taken as it is.
    """
    if callable(name):
        return name
    if name == "auto":
        name = auto
    return INITIALIZERS[checks.choice("init", name, ["auto", *INITIALIZERS])]
