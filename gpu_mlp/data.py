"""Data sets, their split into parts, and the order of the minibatches: a function of the seed and nothing else.

Leans on `readers`, which turns files and built-in names into `RawData`, on `checks` and on NumPy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import checks
from .readers import BUILT_IN, PathLike, RawData, load_digits, load_fashion_mnist, read

__all__ = [
    "BUILT_IN",
    "RawData",
    "epoch_order",
    "fingerprint",
    "load",
    "load_digits",
    "load_fashion_mnist",
    "split",
    "take",
]

# What keeps the random streams of one seed apart: each use has a number of its own.
SPLIT_STREAM, EPOCH_STREAM = 1, 2


CHUNK_BYTES = 1 << 20  # of an array that is summed up at a time,
HASHED_CHUNKS = 16  # and how many such chunks are hashed byte by byte


def fingerprint(*arrays: Any, to_host: Callable[[Any], np.ndarray] = np.asarray) -> dict[str, Any]:
    """What tells a data set of these arrays, None among them too, from another: shapes, dtypes and a hash, as JSON.

    Every MiB of every array goes into the hash by its sum, and up to 16 of them, evenly spread, byte by byte; so it
    costs about as much as reading the data once. ``to_host`` brings a slice of an array that is elsewhere here.
    """
    hashed = hashlib.blake2b(digest_size=16)
    shapes = []
    for array in arrays:
        if array is None:
            shapes.append("none")
            continue
        shapes.append(f"{array.dtype} {tuple(array.shape)}")
        rows = max(1, CHUNK_BYTES * len(array) // max(1, array.nbytes))
        starts = range(0, len(array), rows)
        whole = {starts[i * (len(starts) - 1) // max(1, HASHED_CHUNKS - 1)] for i in range(HASHED_CHUNKS) if starts}
        for start in starts:
            chunk = np.ascontiguousarray(to_host(array[start : start + rows])).reshape(-1).view(np.uint8)
            words = chunk.size // 8 * 8
            total = int(np.add.reduce(chunk[:words].view(np.uint64))) if words else 0
            hashed.update(total.to_bytes(8, "little") + chunk[words:].tobytes())
            if start in whole:
                hashed.update(chunk.data)
    return {"arrays": shapes, "hash": hashed.hexdigest()}


def load(
    source: PathLike, target: PathLike | None = None, folder: PathLike | None = None, *, require_target: bool = True
) -> RawData:
    """A built-in set by name, or a file or folder as `readers.read` reads it.

    ``folder`` is where fashion-mnist has its four IDX files, for no other source.
    """
    if folder is None:
        return read(source, target, require_target=require_target)
    if os.fspath(source) != "fashion-mnist" or target is not None:
        raise ValueError(f"folder: only for the built-in set fashion-mnist, got {folder!r} with {source!r}")
    return load_fashion_mnist(folder)


def take(raw: RawData, rows: ArrayLike | slice) -> RawData:
    """The ``rows`` of a data set, int indices, a (n,) bool mask or a slice; without its test part.

    A slice gives views, anything else copies.
    """
    chosen = rows if isinstance(rows, slice) else _row_indices(rows, len(raw))
    x = raw.x[chosen] if isinstance(raw.x, np.ndarray) else {name: column[chosen] for name, column in raw.x.items()}
    return dataclasses.replace(raw, x=x, y=None if raw.y is None else raw.y[chosen], test=None)


def _row_indices(rows: ArrayLike, n: int) -> np.ndarray:
    """``rows`` as an index array whose every entry is a row of ``n``."""
    indices = np.asarray(rows)
    if indices.dtype.kind == "b" and indices.shape == (n,):
        return np.flatnonzero(indices)
    if indices.size == 0 and indices.ndim == 1:
        return np.zeros(0, np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(f"rows: expected (k,) integers or ({n},) booleans, got {indices.dtype} of {indices.shape}")
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(f"rows: expected indices from 0 to {n - 1}, got {indices.min()} to {indices.max()}")
    return indices


def split(n: int, fraction: float, seed: int, stratify: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cut n rows at random into a first part and a held-out second part of round(fraction * n) rows.

    Each part has at least one row; both come as ascending int64 indices. With ``stratify``, the (n,) codes of the
    classes, every class is in the second part in proportion (the largest remainders round up) and keeps at least one
    row in the first. Raises ValueError where the classes are too small to fill the second part that way.
    """
    checks.integer("n", n, minimum=2)
    checks.real("fraction", fraction, 0, 1, open_minimum=True, open_maximum=True)
    second_size = min(max(1, round(fraction * n)), n - 1)
    rng = np.random.default_rng([checks.integer("seed", seed, minimum=0), SPLIT_STREAM])
    if stratify is None:
        held_out = rng.permutation(n)[:second_size]
    else:
        held_out = _stratified(_class_codes(stratify, n), second_size, rng)
    second = np.zeros(n, bool)
    second[held_out] = True
    return np.flatnonzero(~second).astype(np.int64), np.flatnonzero(second).astype(np.int64)


def _class_codes(stratify: ArrayLike, n: int) -> np.ndarray:
    codes = np.asarray(stratify)
    if codes.shape != (n,) or codes.dtype.kind not in "iub":
        raise ValueError(f"stratify: expected ({n},) integer codes, got {codes.dtype} of shape {codes.shape}")
    return codes


def _stratified(codes: np.ndarray, second_size: int, rng: np.random.Generator) -> np.ndarray:
    """The indices of ``second_size`` rows, so many of each class as `_shares` says."""
    _, code, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    shares = _shares(sizes, second_size)
    order = rng.permutation(len(codes))
    by_class = order[np.argsort(code[order], kind="stable")]  # the rows of each class together, in random order
    starts = np.cumsum(sizes) - sizes
    return np.concatenate(
        [by_class[start : start + share] for start, share in zip(starts.tolist(), shares.tolist(), strict=True)]
    )


def _shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """``total`` rows over classes of ``sizes``, in proportion by largest remainder, never all the rows of a class."""
    most = sizes - 1
    if total > most.sum():
        raise ValueError(
            f"stratify: {len(sizes)} classes that each keep a row leave at most {most.sum()} of {sizes.sum()} rows "
            f"to hold out, fewer than {total}; hold out a smaller fraction, or do not stratify"
        )
    quotas = sizes * (total / sizes[most > 0].sum())
    shares: np.ndarray = np.minimum(np.floor(quotas).astype(np.int64), most)
    while left := total - int(shares.sum()):
        open_classes = np.flatnonzero(shares < most)
        neediest = open_classes[np.argsort(shares[open_classes] - quotas[open_classes], kind="stable")]
        shares[neediest[:left]] += 1
    return shares


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The (n,) int64 order of the rows in an epoch: the same for the same arguments, on every machine and backend."""
    n = checks.integer("n", n, minimum=0)
    seed, epoch = checks.integer("seed", seed, minimum=0), checks.integer("epoch", epoch, minimum=0)
    bits = np.random.PCG64(np.random.SeedSequence([seed, EPOCH_STREAM, epoch]))
    order: np.ndarray = np.random.Generator(bits).permutation(n).astype(np.int64, copy=False)
    return order
