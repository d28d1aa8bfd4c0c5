"""The activation functions: one table row each, with f, f′, what f′ reads, and the range of f.

A leaf: imports NumPy (and SciPy for erf). The device functions of the same names are in `kernels/activations.cuh`.

Every function works on a block of float32 or float64 and allocates nothing of the block's size:

- ``f(z, h, t)`` writes h = f(z); ``h`` may be ``z`` itself.
- ``df(g, s, t)`` turns g = ∂J/∂h into g ⊙ f′ in place, reading ``s``: h or z as the table says.
  Row-wise functions apply their Jacobian instead: g ← (∂h/∂z)ᵀ g, one sample a row.
- ``t`` is scratch of the block's shape.

Where f has a kink, f′ takes PyTorch's value there (relu′(0) = 0, and so on).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import checks

Array = NDArray[np.floating]

SELU_SCALE = 1.0507009873554804934193349852946  # Klambauer et al., Self-Normalizing Neural Networks, 2017
SELU_ALPHA = 1.6732632423543772848170429916717
LEAKY_SLOPE = 0.01
GELU_TANH_CUBIC = 0.044715  # Hendrycks and Gimpel, Gaussian Error Linear Units, 2016
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


class Scratch(NamedTuple):
    """Temporaries of one block's shape: three of its dtype and one mask."""

    a: Array
    b: Array
    c: Array
    mask: NDArray[np.bool_]


Forward = Callable[[Array, Array, Scratch], None]
Gradient = Callable[[Array, Array, Scratch], None]
Range = Literal["real", "positive", "unit", "simplex", "log_simplex"]


@dataclass(frozen=True)
class Activation:
    """One row of the table.

    ``reads`` is what f′ is computed from: "h" (nothing more is kept), "z" (z is kept too) or "none".
    ``range`` is what a loss may take for granted about f's values: "positive" (0, ∞), "unit" (0, 1),
    "simplex" (a probability row) or "log_simplex" (its logarithm); anything else is "real".
    ``kinks`` are the z at which f′ jumps, for finite differences to stay away from.
    """

    name: str
    f: Forward
    df: Gradient
    reads: Literal["h", "z", "none"]
    range: Range = "real"
    rowwise: bool = False
    init: str = "he_uniform"
    kinks: tuple[float, ...] = ()


# --- identity and the piecewise linear family ------------------------------------------------------------------


def _identity(z: Array, h: Array, t: Scratch) -> None:
    if h is not z:
        h[...] = z


def _identity_gradient(g: Array, s: Array, t: Scratch) -> None:
    pass


def _relu(z: Array, h: Array, t: Scratch) -> None:
    np.maximum(z, 0, out=h)


def _relu_gradient(g: Array, h: Array, t: Scratch) -> None:
    np.multiply(g, np.greater(h, 0, out=t.mask), out=g)


def _leaky_relu(z: Array, h: Array, t: Scratch) -> None:
    np.multiply(z, LEAKY_SLOPE, out=t.a)
    np.maximum(z, t.a, out=h)


def _leaky_relu_gradient(g: Array, h: Array, t: Scratch) -> None:
    np.multiply(np.greater(h, 0, out=t.mask), 1 - LEAKY_SLOPE, out=t.a, casting="unsafe")
    np.add(t.a, LEAKY_SLOPE, out=t.a)
    np.multiply(g, t.a, out=g)


def _relu6(z: Array, h: Array, t: Scratch) -> None:
    np.clip(z, 0, 6, out=h)


def _hardtanh(z: Array, h: Array, t: Scratch) -> None:
    np.clip(z, -1, 1, out=h)


def _hardsigmoid(z: Array, h: Array, t: Scratch) -> None:
    """clip(z / 6 + 1/2, 0, 1)"""
    np.multiply(z, 1 / 6, out=h)
    np.add(h, 0.5, out=h)
    np.clip(h, 0, 1, out=h)


def _between(low: float, high: float, slope: float = 1.0) -> Gradient:
    """f′ = slope inside the open interval, 0 elsewhere. Reads z, since h at a limit may have been rounded."""

    def gradient(g: Array, z: Array, t: Scratch) -> None:
        np.multiply(g, np.greater(z, low, out=t.mask), out=g)
        np.multiply(g, np.less(z, high, out=t.mask), out=g)
        if slope != 1.0:
            np.multiply(g, slope, out=g)

    return gradient


def _hardswish(z: Array, h: Array, t: Scratch) -> None:
    """z · clip(z / 6 + 1/2, 0, 1)"""
    _hardsigmoid(z, t.a, t)
    np.multiply(z, t.a, out=h)


def _hardswish_gradient(g: Array, z: Array, t: Scratch) -> None:
    """0 up to −3, z / 3 + 1/2 between, 1 from 3 on"""
    np.multiply(z, 1 / 3, out=t.a)
    np.add(t.a, 0.5, out=t.a)
    np.copyto(t.a, 1, where=np.greater_equal(z, 3, out=t.mask))
    np.copyto(t.a, 0, where=np.less_equal(z, -3, out=t.mask))
    np.multiply(g, t.a, out=g)


def _relu_squared(z: Array, h: Array, t: Scratch) -> None:
    np.maximum(z, 0, out=h)
    np.multiply(h, h, out=h)


def _relu_squared_gradient(g: Array, z: Array, t: Scratch) -> None:
    np.maximum(z, 0, out=t.a)
    np.multiply(t.a, 2, out=t.a)
    np.multiply(g, t.a, out=g)


# --- the exponential family ------------------------------------------------------------------------------------


def _elu(z: Array, h: Array, t: Scratch) -> None:
    """max(z, 0) + expm1(min(z, 0)); celu is the same function at α = 1"""
    np.minimum(z, 0, out=t.a)
    np.expm1(t.a, out=t.a)
    np.maximum(z, 0, out=h)
    np.add(h, t.a, out=h)


def _elu_gradient(g: Array, h: Array, t: Scratch) -> None:
    """1 where h > 0, else exp(z) = h + 1"""
    np.minimum(h, 0, out=t.a)
    np.add(t.a, 1, out=t.a)
    np.multiply(g, t.a, out=g)


def _selu(z: Array, h: Array, t: Scratch) -> None:
    np.minimum(z, 0, out=t.a)
    np.expm1(t.a, out=t.a)
    np.multiply(t.a, SELU_ALPHA, out=t.a)
    np.maximum(z, 0, out=h)
    np.add(h, t.a, out=h)
    np.multiply(h, SELU_SCALE, out=h)


def _selu_gradient(g: Array, h: Array, t: Scratch) -> None:
    """scale where h > 0, else scale · α · exp(z) = h + scale · α"""
    np.minimum(h, 0, out=t.a)
    np.add(t.a, SELU_SCALE * SELU_ALPHA, out=t.a)
    np.copyto(t.a, SELU_SCALE, where=np.greater(h, 0, out=t.mask))
    np.multiply(g, t.a, out=g)


def _exp(z: Array, h: Array, t: Scratch) -> None:
    np.exp(z, out=h)


def _exp_gradient(g: Array, h: Array, t: Scratch) -> None:
    np.multiply(g, h, out=g)


def _sigmoid(z: Array, h: Array, t: Scratch) -> None:
    """1 / (1 + e) for z ≥ 0 and e / (1 + e) below, with e = exp(−|z|), which never overflows"""
    np.greater_equal(z, 0, out=t.mask)
    np.abs(z, out=t.c)
    np.negative(t.c, out=t.c)
    np.exp(t.c, out=t.c)
    np.maximum(t.c, t.mask, out=h)
    np.add(t.c, 1, out=t.c)
    np.divide(h, t.c, out=h)


def _sigmoid_gradient(g: Array, h: Array, t: Scratch) -> None:
    """h (1 − h)"""
    np.subtract(1, h, out=t.a)
    np.multiply(t.a, h, out=t.a)
    np.multiply(g, t.a, out=g)


def _tanh(z: Array, h: Array, t: Scratch) -> None:
    np.tanh(z, out=h)


def _tanh_gradient(g: Array, h: Array, t: Scratch) -> None:
    """1 − h² = (1 − h) (1 + h), which keeps its digits where h is close to ±1"""
    np.subtract(1, h, out=t.a)
    np.add(1, h, out=t.b)
    np.multiply(t.a, t.b, out=t.a)
    np.multiply(g, t.a, out=g)


def _softplus(z: Array, h: Array, t: Scratch) -> None:
    """log(1 + exp z) = max(z, 0) + log1p(exp(−|z|)), which neither overflows nor cancels"""
    np.abs(z, out=t.a)
    np.negative(t.a, out=t.a)
    np.exp(t.a, out=t.a)
    np.log1p(t.a, out=t.a)
    np.maximum(z, 0, out=h)
    np.add(h, t.a, out=h)


def _softplus_gradient(g: Array, z: Array, t: Scratch) -> None:
    """σ(z)"""
    _sigmoid(z, t.a, t)
    np.multiply(g, t.a, out=g)


def _softsign(z: Array, h: Array, t: Scratch) -> None:
    """z / (1 + |z|)"""
    np.abs(z, out=t.a)
    np.add(t.a, 1, out=t.a)
    np.divide(z, t.a, out=h)


def _softsign_gradient(g: Array, z: Array, t: Scratch) -> None:
    """1 / (1 + |z|)²"""
    np.abs(z, out=t.a)
    np.add(t.a, 1, out=t.a)
    np.multiply(t.a, t.a, out=t.a)
    np.divide(g, t.a, out=g)


# --- the gated family: z times a squashed z --------------------------------------------------------------------


def _normal_cdf(z: Array, out: Array) -> None:
    """Φ(z) = (1 + erf(z / √2)) / 2"""
    from scipy.special import erf

    np.multiply(z, math.sqrt(0.5), out=out)
    erf(out, out=out)
    np.add(out, 1, out=out)
    np.multiply(out, 0.5, out=out)


def _gelu(z: Array, h: Array, t: Scratch) -> None:
    """z Φ(z)"""
    _normal_cdf(z, t.a)
    np.multiply(z, t.a, out=h)


def _gelu_gradient(g: Array, z: Array, t: Scratch) -> None:
    """Φ(z) + z φ(z), with φ the normal density"""
    np.multiply(z, z, out=t.b)
    np.multiply(t.b, -0.5, out=t.b)
    np.exp(t.b, out=t.b)
    np.multiply(t.b, 1 / math.sqrt(2 * math.pi), out=t.b)
    np.multiply(t.b, z, out=t.b)
    _normal_cdf(z, t.a)
    np.add(t.a, t.b, out=t.a)
    np.multiply(g, t.a, out=g)


def _gelu_tanh_argument(z: Array, out: Array) -> None:
    """√(2/π) (z + 0.044715 z³)"""
    np.multiply(z, z, out=out)
    np.multiply(out, GELU_TANH_CUBIC, out=out)
    np.add(out, 1, out=out)
    np.multiply(out, z, out=out)
    np.multiply(out, SQRT_2_OVER_PI, out=out)


def _gelu_tanh(z: Array, h: Array, t: Scratch) -> None:
    """z (1 + tanh u) / 2 with u = √(2/π) (z + 0.044715 z³)"""
    _gelu_tanh_argument(z, t.a)
    np.tanh(t.a, out=t.a)
    np.add(t.a, 1, out=t.a)
    np.multiply(t.a, 0.5, out=t.a)
    np.multiply(z, t.a, out=h)


def _gelu_tanh_gradient(g: Array, z: Array, t: Scratch) -> None:
    """(1 + tanh u) / 2 + z (1 − tanh² u) u′ / 2 with u′ = √(2/π) (1 + 3 · 0.044715 z²)

    Beyond |z| = 10 tanh u is ±1 to the last bit and the second term 0, so z is held there: z² might overflow.
    """
    z = np.clip(z, -10, 10, out=t.b)
    _gelu_tanh_argument(z, t.a)
    np.tanh(t.a, out=t.a)
    np.multiply(z, z, out=t.c)
    np.multiply(t.c, 3 * GELU_TANH_CUBIC, out=t.c)
    np.add(t.c, 1, out=t.c)
    np.multiply(t.b, t.c, out=t.b)
    np.multiply(t.a, t.a, out=t.c)
    np.subtract(1, t.c, out=t.c)
    np.multiply(t.b, t.c, out=t.b)
    np.multiply(t.b, 0.5 * SQRT_2_OVER_PI, out=t.b)
    np.add(t.a, 1, out=t.a)
    np.multiply(t.a, 0.5, out=t.a)
    np.add(t.a, t.b, out=t.a)
    np.multiply(g, t.a, out=g)


def _silu(z: Array, h: Array, t: Scratch) -> None:
    """z σ(z)"""
    _sigmoid(z, t.a, t)
    np.multiply(z, t.a, out=h)


def _silu_gradient(g: Array, z: Array, t: Scratch) -> None:
    """σ (1 + z (1 − σ))"""
    _sigmoid(z, t.a, t)
    np.subtract(1, t.a, out=t.b)
    np.multiply(t.b, z, out=t.b)
    np.add(t.b, 1, out=t.b)
    np.multiply(t.b, t.a, out=t.b)
    np.multiply(g, t.b, out=g)


def _mish(z: Array, h: Array, t: Scratch) -> None:
    """z tanh(softplus z)"""
    _softplus(z, t.b, t)
    np.tanh(t.b, out=t.b)
    np.multiply(z, t.b, out=h)


def _mish_gradient(g: Array, z: Array, t: Scratch) -> None:
    """w + z σ(z) (1 − w²) with w = tanh(softplus z)"""
    _softplus(z, t.b, t)
    np.tanh(t.b, out=t.b)
    _sigmoid(z, t.a, t)
    np.multiply(t.a, z, out=t.a)
    np.multiply(t.b, t.b, out=t.c)
    np.subtract(1, t.c, out=t.c)
    np.multiply(t.a, t.c, out=t.a)
    np.add(t.a, t.b, out=t.a)
    np.multiply(g, t.a, out=g)


def _sine(z: Array, h: Array, t: Scratch) -> None:
    np.sin(z, out=h)


def _sine_gradient(g: Array, z: Array, t: Scratch) -> None:
    np.cos(z, out=t.a)
    np.multiply(g, t.a, out=g)


# --- row-wise: f mixes the entries of a row, f′ is a Jacobian ----------------------------------------------------


def _softmax(z: Array, h: Array, t: Scratch) -> None:
    """exp(z − max z) / Σ, row by row; book section 4.1"""
    np.subtract(z, z.max(axis=1, keepdims=True), out=h)
    np.exp(h, out=h)
    np.divide(h, h.sum(axis=1, keepdims=True), out=h)


def _softmax_gradient(g: Array, h: Array, t: Scratch) -> None:
    """h ⊙ (g − ⟨g, h⟩)"""
    np.subtract(g, np.einsum("ij,ij->i", g, h)[:, None], out=g)
    np.multiply(g, h, out=g)


def _log_softmax(z: Array, h: Array, t: Scratch) -> None:
    """z − max z − log Σ exp(z − max z)"""
    np.subtract(z, z.max(axis=1, keepdims=True), out=h)
    np.exp(h, out=t.a)
    np.subtract(h, np.log(t.a.sum(axis=1, keepdims=True)), out=h)


def _log_softmax_gradient(g: Array, h: Array, t: Scratch) -> None:
    """g − exp(h) Σ g"""
    np.exp(h, out=t.a)
    np.multiply(t.a, g.sum(axis=1, keepdims=True), out=t.a)
    np.subtract(g, t.a, out=g)


ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("identity", _identity, _identity_gradient, "none", init="glorot_uniform"),
        Activation("relu", _relu, _relu_gradient, "h", kinks=(0,)),
        Activation("leaky_relu", _leaky_relu, _leaky_relu_gradient, "h", kinks=(0,)),
        Activation("elu", _elu, _elu_gradient, "h"),
        Activation("selu", _selu, _selu_gradient, "h", init="lecun_normal", kinks=(0,)),
        Activation("celu", _elu, _elu_gradient, "h"),
        Activation("gelu", _gelu, _gelu_gradient, "z"),
        Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_gradient, "z"),
        Activation("silu", _silu, _silu_gradient, "z"),
        Activation("mish", _mish, _mish_gradient, "z"),
        Activation("tanh", _tanh, _tanh_gradient, "h", init="glorot_uniform"),
        Activation("sigmoid", _sigmoid, _sigmoid_gradient, "h", range="unit", init="glorot_uniform"),
        Activation("softplus", _softplus, _softplus_gradient, "z", range="positive"),
        Activation("softsign", _softsign, _softsign_gradient, "z", init="glorot_uniform"),
        Activation("hardtanh", _hardtanh, _between(-1, 1), "z", init="glorot_uniform", kinks=(-1, 1)),
        Activation("hardsigmoid", _hardsigmoid, _between(-3, 3, 1 / 6), "z", init="glorot_uniform", kinks=(-3, 3)),
        Activation("hardswish", _hardswish, _hardswish_gradient, "z", kinks=(-3, 3)),
        Activation("relu6", _relu6, _between(0, 6), "z", kinks=(0, 6)),
        Activation("relu_squared", _relu_squared, _relu_squared_gradient, "z"),
        Activation("sine", _sine, _sine_gradient, "z"),
        Activation("exp", _exp, _exp_gradient, "h", range="positive", init="glorot_uniform"),
        Activation("softmax", _softmax, _softmax_gradient, "h", "simplex", rowwise=True, init="glorot_uniform"),
        Activation(
            "log_softmax", _log_softmax, _log_softmax_gradient, "h", "log_simplex", rowwise=True, init="glorot_uniform"
        ),
    )
}

IDENTITY = ACTIVATIONS["identity"]


def get(name: str | Activation, argument: str = "activation") -> Activation:
    """The activation called ``name``; ``argument`` is what an error message calls it."""
    if isinstance(name, Activation):
        return name
    return ACTIVATIONS[checks.choice(argument, name, ACTIVATIONS)]
