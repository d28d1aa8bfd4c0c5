"""A matrix product shared out among threads of our own, each of which runs BLAS on one thread.

Leans on NumPy alone. The threads of a BLAS wait for each other by spinning, so that beside other work on the machine one
of them keeps all the others busy doing nothing for a time slice of the scheduler: a product of 3 ms was seen to take
96 ms. Ours sleep, and the parts are a function of the shapes and the number of threads alone: the same bits every time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

PART_FLOP = 16_000_000  # a part of fewer operations costs more to hand out than it saves
ROW_MULTIPLE = 16  # parts end at a multiple of what a BLAS kernel takes at once

_pool: ThreadPoolExecutor | None = None


def matmul(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any], threads: int) -> NDArray[Any]:
    """out ← a b, by blocks of rows on up to ``threads`` threads. a: (m, k); b: (k, n); out: (m, n), all of one type."""
    rows, parts = len(a), min(threads, 2 * a.size * b.shape[1] // PART_FLOP)
    step = -(-rows // max(1, parts * ROW_MULTIPLE)) * ROW_MULTIPLE
    if parts < 2 or step >= rows:
        return np.matmul(a, b, out=out)
    blocks = [slice(start, start + step) for start in range(0, rows, step)]
    others = [_workers().submit(_part, a[block], b, out[block]) for block in blocks[1:]]
    try:
        _part(a[blocks[0]], b, out[blocks[0]])
    finally:  # also when interrupted: whoever comes next may write to `out`
        for other in others:
            other.result()
    return out


def _part(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any]) -> None:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the caller's settings are its thread's own
        np.matmul(a, b, out=out)


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="gpu_mlp-gemm")
    return _pool


def _forget_pool() -> None:
    """A forked child has the pool's object without its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
