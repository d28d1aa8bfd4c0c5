"""The activations of a CPU's compiled jobs, as formulas of one number in float32 without a table or a branch.

A leaf: Numba, and the constants of `activations`.

LLVM writes them into the loops of `numba_kernels`, eight or sixteen numbers at a time. What is
meant by each is in `gpu_mlp/activations.py`; to how many digits they are right, in `tests/test_numba.py`. Infinities
and NaN go where the formulas there take them.

A job is compiled for the number of its activation, so that of a chain of ifs over it one branch is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ..activations import GELU_TANH_CUBIC, LEAKY_SLOPE, SELU_ALPHA, SELU_SCALE, SQRT_2_OVER_PI

_f4, _i4 = np.float32, np.int32

# The numbers of the activations. Those of the first line are the jobs' own in every type; of the second f′ is worked
# out from h, and of the third left by the forward pass in the place of z.
IDENTITY, RELU = range(2)
TANH, SIGMOID, LEAKY_RELU, ELU, CELU, SELU = range(2, 8)
GELU, GELU_TANH, SILU, MISH, SOFTPLUS, SOFTSIGN, HARDTANH, HARDSIGMOID, HARDSWISH, RELU6, RELU_SQUARED = range(8, 19)
IN_EVERY_TYPE = {"identity": IDENTITY, "relu": RELU}
FROM_H = {"tanh": TANH, "sigmoid": SIGMOID, "leaky_relu": LEAKY_RELU, "elu": ELU, "celu": CELU, "selu": SELU}
WITH_SLOPE = {
    "gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU, "mish": MISH, "softplus": SOFTPLUS, "softsign": SOFTSIGN,
    "hardtanh": HARDTANH, "hardsigmoid": HARDSIGMOID, "hardswish": HARDSWISH, "relu6": RELU6,
    "relu_squared": RELU_SQUARED,
}  # fmt: skip

_LEAKY, _ALPHA, _SCALE = _f4(LEAKY_SLOPE), _f4(SELU_ALPHA), _f4(SELU_SCALE)
_CUBIC, _ROOT = _f4(GELU_TANH_CUBIC), _f4(SQRT_2_OVER_PI)

formula: Any = njit(inline="always", nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")


# --- exponentials -----------------------------------------------------------------------------------------------


@formula
def reduced(x):
    """(exp(r) − 1, 2ⁿ) with x = n ln 2 + r, for a float32 x ≤ 0; ln 2 in two parts (Cody and Waite, 1980)."""
    n = np.floor(max(x, _f4(-88.0)) * _f4(1.44269504) + _f4(0.5))
    r = x - n * _f4(0.693359375) + n * _f4(2.12194440e-4)
    p = _f4(1.9875691500e-4)  # the polynomial of Moshier's Cephes, expf
    p = p * r + _f4(1.3981999507e-3)
    p = p * r + _f4(8.3334519073e-3)
    p = p * r + _f4(4.1665795894e-2)
    p = p * r + _f4(1.6666665459e-1)
    p = p * r + _f4(5.0000001201e-1)
    power = _i4(_i4(n) + _i4(127)) << _i4(23)  # the bits of 2ⁿ
    return p * (r * r) + r, _i4(power).view(_f4)


@formula
def exp_of_negative(x):
    """exp(x) for a float32 x ≤ 0, to 1.5 ulp; 0 below −87."""
    q, power = reduced(x)
    if x > _f4(-87.0):
        return (q + _f4(1.0)) * power
    return _f4(0) if x <= _f4(-87.0) else x  # NaN stays NaN


@formula
def expm1_of_negative(x):
    """exp(x) − 1 for a float32 x ≤ 0."""
    q, power = reduced(x)
    if x > _f4(-87.0):
        return q * power + (power - _f4(1))
    return _f4(-1) if x <= _f4(-87.0) else x


@formula
def log1p_of_share(e):
    """log(1 + e) for 0 ≤ e ≤ 1: 2 artanh y with y = e / (2 + e), the polynomial in y² to 4.5e-9 of it."""
    y = e / (_f4(2) + e)
    s = y * y
    p = _f4(0.14005993684731602)
    p = p * s + _f4(0.14000902570361257)
    p = p * s + _f4(0.2001076362459539)
    p = p * s + _f4(0.3333320814271282)
    return _f4(2) * (p * s * y + y)


@formula
def normal_tail(a, density):
    """1 − Φ(a) for a ≥ 0, from exp(−a²/2): that times t P(t), t = 1 / (1 + 0.35 a).

    P is the polynomial of degree 8 with the smallest relative error, 3.2e-8, over 0 ≤ a ≤ 14.
    """
    t = _f4(1) / (_f4(1) + _f4(0.35) * a)
    p = _f4(-0.029145519357797096)
    p = p * t + _f4(0.14396983413951359)
    p = p * t + _f4(-0.2557106756285932)
    p = p * t + _f4(0.15917037043489826)
    p = p * t + _f4(-0.02310742081834101)
    p = p * t + _f4(0.10550705914430057)
    p = p * t + _f4(0.11983308901654374)
    p = p * t + _f4(0.13986184133675306)
    p = p * t + _f4(0.13962140581362043)
    return p * t * density


@formula
def sigmoid_and_rest(x):
    """σ(x) and 1 − σ(x), from exp(−|x|), so that neither loses its digits at either end."""
    e = exp_of_negative(-abs(x))
    share = _f4(1) / (_f4(1) + e)
    if x < 0:
        return e * share, share
    return share, e * share


@formula
def tanh_of(x):
    """tanh of a float32: (1 − e) / (1 + e) with e = exp(−2|x|), and near 0, where that cancels, a polynomial in x²."""
    a = abs(x)
    s = a * a
    p = _f4(-5.70498872745e-3)  # of Moshier's Cephes, tanhf
    p = p * s + _f4(2.06390887954e-2)
    p = p * s + _f4(-5.37397155531e-2)
    p = p * s + _f4(1.33314422036e-1)
    p = p * s + _f4(-3.33332819422e-1)
    e = exp_of_negative(_f4(-2) * a)
    far = (_f4(1) - e) / (_f4(1) + e)
    return np.copysign(p * s * a + a if a < _f4(0.625) else far, x)


# --- f′ from h --------------------------------------------------------------------------------------------------


@formula
def value(f, s):
    """f(s) of those in `FROM_H`."""
    if f == TANH:
        return tanh_of(s)
    if f == SIGMOID:
        return sigmoid_and_rest(s)[0]
    if f == LEAKY_RELU:
        return s if s > 0 else _LEAKY * s
    below = expm1_of_negative(-abs(s))
    if f == SELU:
        return _SCALE * (s if s > 0 else _ALPHA * below)
    return s if s > 0 else below


@formula
def slope_from_value(f, h):
    """f′ of those in `FROM_H`, from h = f(s)."""
    if f == TANH:
        return (_f4(1) - h) * (_f4(1) + h)
    if f == SIGMOID:
        return h * (_f4(1) - h)
    if f == LEAKY_RELU:
        return _f4(1) if h > 0 else _LEAKY
    if f == SELU:
        return _SCALE if h > 0 else h + _SCALE * _ALPHA
    return _f4(1) if h > 0 else h + _f4(1)


# --- f and f′ at once -------------------------------------------------------------------------------------------


@formula
def gelu(s):
    """s Φ(s), and Φ(s) + s φ(s) with the normal density φ."""
    density = exp_of_negative(_f4(-0.5) * s * s)
    tail = normal_tail(abs(s), density)
    below = tail if s < 0 else _f4(1) - tail
    return s * below, below + _f4(0.3989422804014327) * density * s


@formula
def gelu_tanh(s):
    """s (1 + tanh u) / 2 = s σ(2u), u = √(2/π) (s + 0.044715 s³), and its derivative.

    Beyond |s| = 10 σ(2u) is 0 or 1 to the last bit, so s is held there: s² might overflow.
    """
    held = _f4(10) if s > _f4(10) else (_f4(-10) if s < _f4(-10) else s)
    square = held * held
    share, rest = sigmoid_and_rest(_f4(2) * _ROOT * held * (_f4(1) + _CUBIC * square))
    return s * share, share + held * share * rest * (_f4(2) * _ROOT) * (_f4(1) + _f4(3) * _CUBIC * square)


@formula
def silu(s):
    """s σ(s), and σ + s σ (1 − σ)."""
    share, rest = sigmoid_and_rest(s)
    return s * share, share + s * share * rest


@formula
def mish(s):
    """s w with w = tanh(softplus s), and w + s σ(s) (1 − w²), in e = exp(−|s|).

    w = (1 + 2e) / (1 + 2e + 2e²) for s ≥ 0, and e (e + 2) / (e (e + 2) + 2) below.
    """
    e = exp_of_negative(-abs(s))
    if s < 0:
        over, rest, factor = e * (e + _f4(2)), _f4(2), e
    else:
        over, rest, factor = _f4(1) + _f4(2) * e, _f4(2) * e * e, e * e
    under = _f4(1) / (over + rest)
    w = over * under
    return s * w, w + s * (_f4(4) * factor * (_f4(1) + e) * (under * under))


@formula
def softplus(s):
    """log(1 + exp s) = max(s, 0) + log(1 + exp(−|s|)), and σ(s)."""
    e = exp_of_negative(-abs(s))
    share = _f4(1) / (_f4(1) + e)
    beyond = log1p_of_share(e)
    if s < 0:
        return beyond, e * share
    return s + beyond, share


@formula
def within(s, low, high):
    """s, or the end of the interval that it is beyond."""
    return low if s < low else (high if s > high else s)


@formula
def value_and_slope(f, s):
    """f(s) and f′(s) of those in `WITH_SLOPE`."""
    zero, one = _f4(0), _f4(1)
    if f == GELU:
        return gelu(s)
    if f == GELU_TANH:
        return gelu_tanh(s)
    if f == SILU:
        return silu(s)
    if f == MISH:
        return mish(s)
    if f == SOFTPLUS:
        return softplus(s)
    if f == SOFTSIGN:
        root = one / (one + abs(s))
        return s / (one + abs(s)), root * root
    if f == HARDTANH:
        return within(s, -one, one), (one if -one < s and s < one else zero)
    if f == RELU6:
        return within(s, zero, _f4(6)), (one if zero < s and s < _f4(6) else zero)
    if f == RELU_SQUARED:
        h = zero if s < zero else s
        return h * h, _f4(2) * h
    share = within(s * _f4(1 / 6) + _f4(0.5), zero, one)
    if f == HARDSIGMOID:
        return share, (_f4(1 / 6) if _f4(-3) < s and s < _f4(3) else zero)
    slope = zero if s <= _f4(-3) else (one if s >= _f4(3) else s * _f4(1 / 3) + _f4(0.5))
    return s * share, slope  # hardswish
