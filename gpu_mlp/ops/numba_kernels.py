"""The passes that a CPU spends its time in beside the GEMMs, each one loop that LLVM makes into vector code.

A leaf: Numba and NumPy. `job_parts` calls them in the place of the NumPy reference's passes, which read and write their
arrays once an operation; these do so once. They hold no lock, so that several threads run them side by side. Arrays are
C-order, (rows, n) or flat, all of one type; of a part of the columns they are seen as long as a whole row. Sums over
rows are added to what stands there.

Multiplications and additions may be contracted into one instruction, as nvcc does it; nothing else is rearranged.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

_COMPILED: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}
_f4, _i4, _u8 = np.float32, np.int32, np.uint64


def kernel(function):
    """A loop over arrays."""
    return njit(**_COMPILED)(function)


def formula(function):
    """A function of numbers, written into the loops that call it."""
    return njit(inline="always", **_COMPILED)(function)


# --- float32 formulas -------------------------------------------------------------------------------------------


@formula
def exp_of_negative(x):
    """exp(x) for a float32 x ≤ 0, to 1.5 ulp; 0 below −87. x = n ln 2 + r, ln 2 in two parts (Cody and Waite, 1980)."""
    n = np.floor(max(x, _f4(-88.0)) * _f4(1.44269504) + _f4(0.5))
    r = x - n * _f4(0.693359375) + n * _f4(2.12194440e-4)
    p = _f4(1.9875691500e-4)  # the polynomial of Moshier's Cephes, expf
    p = p * r + _f4(1.3981999507e-3)
    p = p * r + _f4(8.3334519073e-3)
    p = p * r + _f4(4.1665795894e-2)
    p = p * r + _f4(1.6666665459e-1)
    p = p * r + _f4(5.0000001201e-1)
    p = p * (r * r) + r + _f4(1.0)
    power = _i4(_i4(n) + _i4(127)) << _i4(23)  # the bits of 2ⁿ
    if x > _f4(-87.0):
        return p * _i4(power).view(_f4)
    return _f4(0) if x <= _f4(-87.0) else x  # NaN stays NaN


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
def sigmoid_of(x):
    """1 / (1 + exp(−x)) of a float32, from exp(−|x|), so that neither end loses its digits."""
    e = exp_of_negative(-abs(x))
    share = _f4(1) / (_f4(1) + e)
    return e * share if x < 0 else share


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


# --- a batch ------------------------------------------------------------------------------------------------------


@njit(nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def total(x):
    """Σ x in whatever order is fast; finite numbers of an ordinary size have a finite one. x: (n,)."""
    found = x.dtype.type(0)
    for i in range(x.size):
        found += x[i]
    return found


# --- forward ----------------------------------------------------------------------------------------------------


@kernel
def bias(z, b):
    """z ← z + b. z: (rows, ≥ n); b: (n,)."""
    for i in range(z.shape[0]):
        for j in range(b.size):
            z[i, j] += b[j]


@kernel
def bias_relu(z, b):
    """z ← relu(z + b), which leaves a NaN a NaN. z: (rows, ≥ n); b: (n,)."""
    zero = z.dtype.type(0)
    for i in range(z.shape[0]):
        for j in range(b.size):
            s = z[i, j] + b[j]
            z[i, j] = zero if s <= zero else s


@kernel
def bias_gelu(z, b, h):
    """h = s Φ(s) and z ← f′(s) = Φ(s) + s φ(s), s = z + b, φ the normal density. z, h: (rows, ≥ n) float32; b: (n,)."""
    for i in range(z.shape[0]):
        for j in range(b.size):
            s = z[i, j] + b[j]
            density = exp_of_negative(_f4(-0.5) * s * s)
            tail = normal_tail(abs(s), density)
            below = tail if s < 0 else _f4(1) - tail
            h[i, j] = s * below
            z[i, j] = below + _f4(0.3989422804014327) * density * s


@kernel
def bias_tanh(z, b):
    """z ← tanh(z + b). z: (rows, ≥ n) float32; b: (n,)."""
    for i in range(z.shape[0]):
        for j in range(b.size):
            z[i, j] = tanh_of(z[i, j] + b[j])


@kernel
def bias_sigmoid(z, b):
    """z ← σ(z + b). z: (rows, ≥ n) float32; b: (n,)."""
    for i in range(z.shape[0]):
        for j in range(b.size):
            z[i, j] = sigmoid_of(z[i, j] + b[j])


# --- backward: gz = gh ⊙ f′ over gh, and its column sums -----------------------------------------------------------


@kernel
def column_sums(g, gb):
    """gb ← gb + Σ_rows g. g: (rows, ≥ n); gb: (n,)."""
    for i in range(g.shape[0]):
        for j in range(gb.size):
            gb[j] += g[i, j]


@kernel
def relu_gradient(g, h, scale, gb):
    """g ← scale · g where h > 0, else 0; gb ← gb + Σ_rows g. g, h: (rows, ≥ n); gb: (n,)."""
    zero = g.dtype.type(0)
    for i in range(g.shape[0]):
        for j in range(gb.size):
            gz = g[i, j] * scale if h[i, j] > zero else zero
            g[i, j] = gz
            gb[j] += gz


@kernel
def slope_gradient(g, slope, gb):
    """g ← g · slope; gb ← gb + Σ_rows g. g, slope: (rows, ≥ n); gb: (n,)."""
    for i in range(g.shape[0]):
        for j in range(gb.size):
            gz = g[i, j] * slope[i, j]
            g[i, j] = gz
            gb[j] += gz


@kernel
def tanh_gradient(g, h, keep, gb):
    """g ← g (1 − t) (1 + t), t = keep · h; gb ← gb + Σ_rows g. g, h: (rows, ≥ n); gb: (n,)."""
    one = g.dtype.type(1)
    for i in range(g.shape[0]):
        for j in range(gb.size):
            t = keep * h[i, j]
            gz = g[i, j] * ((one - t) * (one + t))
            g[i, j] = gz
            gb[j] += gz


@kernel
def sigmoid_gradient(g, h, keep, gb):
    """g ← g s (1 − s), s = keep · h; gb ← gb + Σ_rows g. g, h: (rows, ≥ n); gb: (n,)."""
    one = g.dtype.type(1)
    for i in range(g.shape[0]):
        for j in range(gb.size):
            s = keep * h[i, j]
            gz = g[i, j] * (s * (one - s))
            g[i, j] = gz
            gb[j] += gz


# --- the loss ---------------------------------------------------------------------------------------------------


@kernel
def softmax_cross_entropy(z, y, weight, smoothing, clip, share, scale, g, gb):
    """Σᵢ wᵢ Lᵢ · share; g = scale · ∂/∂z of it; gb ← gb + Σ_rows g.

    Lᵢ = −Σ_c t_c log softmax(z)_c with t = (1 − smoothing) · onehot(yᵢ) + smoothing / n, and every logarithm within
    log clip … log(1 − clip) where ``clip`` is not 0. z, g: (rows, n) float32; y: (rows,) int64; gb: (n,); weight:
    (rows,) float64, or empty where every wᵢ is 1.
    """
    n = z.shape[1]
    uniform, sharp = _f4(smoothing / n), _f4(1 - smoothing)
    lowest, highest = (math.log(clip), math.log1p(-clip)) if clip > 0 else (-math.inf, math.inf)
    cost = 0.0
    for i in range(z.shape[0]):
        top = z[i, 0]
        for j in range(n):
            top = z[i, j] if z[i, j] > top else top
        total, spread = _f4(0), _f4(0)
        for j in range(n):
            d = z[i, j] - top
            e = exp_of_negative(d)
            g[i, j] = e
            total += e
            spread += d
        label = y[i]
        w = weight[i] if len(weight) else 1.0
        log_total = math.log(float(total))
        if clip > 0:
            value = 0.0
            for j in range(n):
                t = float(uniform) + (float(sharp) if j == label else 0.0)
                value -= t * min(max(float(z[i, j] - top) - log_total, lowest), highest)
        else:
            value = log_total - float(sharp) * float(z[i, label] - top) - float(uniform) * float(spread)
        cost += w * value
        factor = _f4(w * share * scale)
        for j in range(n):
            g[i, j] = factor * (g[i, j] / total - uniform)
        g[i, label] -= factor * sharp
        for j in range(n):
            gb[j] += g[i, j]
    return cost * share


# --- the update -------------------------------------------------------------------------------------------------


@formula
def effective(g, theta, l1, l2, unscale, clip):
    """clip · (g / LOSS_SCALE + l1 sign(θ) + l2 θ)"""
    return clip * (g * unscale + l1 * np.sign(theta) + l2 * theta)


@kernel
def sgd(theta, g, l1, l2, unscale, clip, lr, weight_decay):
    """θ ← θ − η (g + weight_decay · θ), g effective. theta, g: (n,)."""
    for i in range(theta.size):
        t = theta[i]
        theta[i] = t - lr * (effective(g[i], t, l1, l2, unscale, clip) + weight_decay * t)


@kernel
def momentum(theta, g, m, l1, l2, unscale, clip, lr, weight_decay, momentum, share, nesterov):
    """m ← momentum · m + share · g; θ ← θ − η m, or with Nesterov θ − η (g + momentum · m). All (n,)."""
    for i in range(theta.size):
        t = theta[i]
        gi = effective(g[i], t, l1, l2, unscale, clip) + weight_decay * t
        mi = momentum * m[i] + share * gi
        m[i] = mi
        theta[i] = t - lr * (gi + momentum * mi if nesterov else mi)


@kernel
def adam(theta, g, m, v, l1, l2, unscale, clip, decay, shrink, beta1, beta2, step_size, eps):
    """θ ← shrink · θ; m, v average g and g²; θ ← θ − step_size · m / (√v + eps). All (n,).

    g is effective, with decay · θ added to it: the L2 form of weight decay, ``shrink`` the decoupled one.
    """
    one = theta.dtype.type(1)
    for i in range(theta.size):
        t = theta[i]
        gi = effective(g[i], t, l1, l2, unscale, clip) + decay * t
        mi = m[i] + (one - beta1) * (gi - m[i])
        vi = beta2 * v[i] + (one - beta2) * gi * gi
        m[i] = mi
        v[i] = vi
        theta[i] = shrink * t - step_size * mi / (np.sqrt(vi) + eps)


# --- dropout ----------------------------------------------------------------------------------------------------


@formula
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 of four counter words and two key words, all held in uint64; see `philox.py`."""
    low, shift = _u8(0xFFFFFFFF), _u8(32)
    for _ in range(10):
        p0, p1 = c0 * _u8(0xD2511F53), c2 * _u8(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + _u8(0x9E3779B9)) & low, (k1 + _u8(0xBB67AE85)) & low
    return c0, c1, c2, c3


@kernel
def mask(h, threshold, scale, k0, k1, layer, round_, first_row):
    """h ← scale · h where the entry's 16-bit number is below ``threshold``, else 0. h: (rows, n); the rest uint64."""
    n = h.shape[1]
    calls = (n + 7) // 8
    words = np.empty((4, calls), np.uint32)
    zero = h.dtype.type(0)
    for i in range(h.shape[0]):
        row = _u8(first_row + _u8(i))
        for call in range(calls):
            a, b, c, d = philox(_u8(call), row, layer, round_, k0, k1)
            words[0, call] = a
            words[1, call] = b
            words[2, call] = c
            words[3, call] = d
        for j in range(n):  # word j // 2 mod 4 of call j // 8, its lower half first
            number = (words[(j >> 1) & 3, j >> 3] >> np.uint32((j & 1) << 4)) & np.uint32(0xFFFF)
            h[i, j] = h[i, j] * (scale if number < threshold else zero)
