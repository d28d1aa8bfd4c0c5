"""Philox-4x32-10, the counter-based generator behind dropout: the same bits here and in `kernels/philox.cuh`.

Salmon, Moraes, Dror and Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, 2011. A leaf: imports NumPy alone.

One call of the generator gives 128 bits, which are the 16-bit numbers of eight neighbouring columns. The counter is
(column / 8, row, layer + 2¹⁶ · (round >> 32), round mod 2³²), the key the 64-bit seed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
PER_CALL = 8  # 16-bit numbers from one call
LEVELS = 1 << 16


def keep_threshold(rate: float) -> int:
    """The number of 16-bit values, out of 65536, that keep an entry. The keep probability is exactly this / 65536."""
    return min(LEVELS - 1, max(1, round((1 - rate) * LEVELS)))


def philox(counter: tuple[NDArray[np.uint64], ...], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Four words of 32 random bits (held in uint64) for four counter words that broadcast, and a key of two words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIER[0]
        p1 = c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def bits(seed: int, layer: int, round_: int, first_row: int, shape: tuple[int, int]) -> NDArray[np.uint16]:
    """The 16-bit random numbers of a block of rows of one layer, (rows, columns)."""
    rows, columns = shape
    calls = -(-columns // PER_CALL)
    c0 = np.arange(calls, dtype=np.uint64)[None, :]
    c1 = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    c2 = np.full((1, 1), layer + ((round_ >> 32) << 16), np.uint64)
    c3 = np.full((1, 1), round_ & 0xFFFFFFFF, np.uint64)
    words = philox((c0, c1, c2, c3), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    out = np.empty((rows, calls, 4), "<u4")
    for i, word in enumerate(words):
        out[:, :, i] = word
    return out.view("<u2").reshape(rows, calls * PER_CALL)[:, :columns]
