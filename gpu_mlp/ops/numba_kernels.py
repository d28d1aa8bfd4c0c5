"""The passes that a CPU spends its time in beside the GEMMs, each one loop that LLVM makes into vector code.

Leans on `formulas` for the activations and on `rules` for the optimizers. `job_parts` calls them in the place of the
reference's passes, which read and write their arrays once an operation; these do so once. They hold no lock, so that
several threads run them side by side. Arrays are C-order, (rows, n) or flat, all of one type; of a part of the columns
they are seen as long as a whole row. Sums over rows are added to what stands there.

Multiplications and additions may be contracted into one instruction, as nvcc does it; nothing else is rearranged.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from . import rules
from .formulas import exp_of_negative, formula, slope_from_value, value, value_and_slope

_COMPILED: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}
_f4, _u8 = np.float32, np.uint64


def kernel(function):
    """A loop over arrays."""
    return njit(**_COMPILED)(function)


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


@formula
def bias_value(f, z, b):
    """z ← f(z + b), f of those whose f′ is worked out from h. z: (rows, ≥ n) float32; b: (n,)."""
    for i in range(z.shape[0]):
        for j in range(b.size):
            z[i, j] = value(f, z[i, j] + b[j])


@formula
def bias_slope(f, z, b, h):
    """h = f(s) and z ← f′(s), s = z + b. z, h: (rows, ≥ n) float32; b: (n,)."""
    for i in range(z.shape[0]):
        for j in range(b.size):
            h[i, j], z[i, j] = value_and_slope(f, z[i, j] + b[j])


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


@formula
def value_gradient(f, g, h, keep, gb):
    """g ← g · f′ with f′ from keep · h; gb ← gb + Σ_rows g. g, h: (rows, ≥ n) float32; gb: (n,)."""
    for i in range(g.shape[0]):
        for j in range(gb.size):
            gz = g[i, j] * slope_from_value(f, keep * h[i, j])
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


@formula
def update(f, theta, g, m, v, l1, l2, unscale, clip, decay, shrink, beta1, beta2, a, b, c):
    """θ, m, v ← those after a step of rule ``f`` (`rules.moved`); m and v are looked at where it has them. All (n,).

    g is effective, with decay · θ added to it: the L2 form of weight decay, ``shrink`` the decoupled one.
    """
    zero, one = theta.dtype.type(0), theta.dtype.type(1)
    for i in range(theta.size):
        t = theta[i]
        gi = effective(g[i], t, l1, l2, unscale, clip) + decay * t
        mi = m[i] if rules.reads_m(f) else zero
        vi = v[i] if rules.reads_v(f) else zero
        theta[i], mi, vi = rules.moved(f, shrink * t, gi, mi, vi, beta1, beta2, a, b, c, one)
        if rules.reads_m(f):
            m[i] = mi
        if rules.reads_v(f):
            v[i] = vi


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
