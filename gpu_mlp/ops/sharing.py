"""Work shared out among threads of our own: matrix products, each part of which BLAS does on one thread.

Leans on NumPy alone. The threads of a BLAS wait for each other by spinning, so that beside other work on the machine
one of them keeps all the others busy doing nothing for a time slice of the scheduler: a product of 3 ms was seen to
take 96 ms. Ours sleep (which costs a tenth of a millisecond to wake one up, so that passes without a product in them
are not worth it), and the parts are a function of the shapes and the number of threads: the same bits every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

PART_FLOP = 16_000_000  # a part of fewer operations costs more to hand out than it saves
QUIET: Any = {"over": "ignore", "invalid": "ignore", "divide": "ignore"}  # the state tells of what is not finite
ROW_MULTIPLE = 16  # parts end at a multiple of what a BLAS kernel takes at once

_pool: ThreadPoolExecutor | None = None


def matmul(a: NDArray[Any], b: NDArray[Any], out: NDArray[Any], threads: int) -> NDArray[Any]:
    """out ← a b, by blocks of rows on up to ``threads`` threads. a: (m, k); b: (k, n); out: (m, n), all of one type."""
    parts = row_parts(len(a), 2 * a.size * b.shape[1], threads)
    if len(parts) < 2:
        return np.matmul(a, b, out=out)
    for_each(parts, lambda rows: np.matmul(a[rows], b, out=out[rows]), threads)
    return out


def row_parts(rows: int, flop: int, threads: int) -> list[slice]:
    """``rows`` cut into at most ``threads`` parts, of which each has a good share of the ``flop`` operations."""
    parts = min(threads, flop // PART_FLOP)
    if parts < 2:
        return [slice(0, rows)]
    step = -(-rows // (parts * ROW_MULTIPLE)) * ROW_MULTIPLE
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def for_each(blocks: Iterable[Any], work: Callable[[Any], object], threads: int) -> None:
    """Call ``work(block)`` for every block, on up to ``threads`` threads; returns when all are done.

    What the calls write must not overlap; of floating-point errors they say nothing.
    """
    if threads < 2:
        for block in blocks:
            work(block)
        return
    cut = list(blocks)
    parts = max(1, min(threads, len(cut)))
    others = [_workers().submit(in_turn, cut[i::parts], work) for i in range(1, parts)]
    try:
        in_turn(cut[::parts], work)
    finally:  # also when interrupted: whoever comes next may write to the same arrays
        for other in others:
            other.result()


def in_turn(blocks: Iterable[Any], work: Callable[[Any], object]) -> None:
    """Call ``work(block)`` for every block, on this thread."""
    with np.errstate(**QUIET):  # the caller's settings are its thread's own
        for block in blocks:
            work(block)


def _workers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="gpu_mlp")
    return _pool


def _forget_pool() -> None:
    """A forked child has the pool's object without its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
