"""Bytes that may be broken, or made to do harm: read within bounds, and refused in one line.

Leans on `checks` and NumPy.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import checks

DEFLATE_RATIO = 1032  # deflate cannot expand a byte into more: a larger claim is a lie, refused before allocating
LIKELY_RATIO = 200  # what real data are packed by at most; more is a bomb,
FREE_BYTES = 1 << 27  # unless it is no larger than this
CHUNK_BYTES = 1 << 20


def most_unpacked(size: int) -> int:
    """How many bytes a file of ``size`` may unpack into."""
    return max(FREE_BYTES, LIKELY_RATIO * size)


def check_unpacked(where: Path | str, size: int, unpacked: int, remedy: str) -> None:
    """Refuse a packed file that would fill the memory, or that a bomb could hide in."""
    if unpacked > most_unpacked(size):
        raise ValueError(
            f"{where}: {size} bytes would unpack into {unpacked}, {unpacked // max(1, size)} times as many, as a "
            f"file made to fill the memory does; if you trust it, {remedy}"
        )


@contextlib.contextmanager
def decoder(where: Path | str, kind: str) -> Iterator[None]:
    """Turn whatever a decoder of foreign bytes raises inside into a one-line ValueError that names the file."""
    try:
        yield
    except Exception as error:  # all of them: on hostile bytes zipfile, gzip, ast and pyarrow raise twenty kinds
        reason = checks.brief(error) or type(error).__name__
        raise ValueError(f"{where}: cut short or not a valid {kind} file ({reason})") from error


def read_exactly(stream: IO[bytes], count: int, where: Path | str) -> np.ndarray:
    """The last ``count`` bytes of ``stream`` as a writable (count,) uint8 array; ValueError for fewer or for more."""
    buffer = np.empty(count, np.uint8)  # of what a lying header claims, only what is filled takes memory
    filled = 0
    with decoder(where, "data"):
        while filled < count:
            got = stream.readinto(buffer[filled : filled + CHUNK_BYTES].data)  # type: ignore[attr-defined]  # all have it
            if not got:
                break
            filled += got
        surplus = stream.read(1)
    if filled < count or surplus:
        found = f"more than {count}" if surplus else str(filled)
        raise ValueError(f"{where}: expected {count} bytes after the header, found {found}")
    return buffer


def array_of(data: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool = False) -> np.ndarray:
    """Bytes -> array of native byte order, in the same memory.

    Raises ValueError for bytes that are no value of the type: a truth above 1, a character that there is not.
    """
    array = data.view(dtype)
    if not dtype.isnative:
        array = array.byteswap(inplace=True).view(dtype.newbyteorder("="))
    if dtype.kind == "b" and data.max(initial=0) > 1:
        raise ValueError("a boolean that is neither 0 nor 1")
    if dtype.kind == "U":
        codes = data.view(np.uint32)
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise ValueError("text that is not Unicode")
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], int, bool]]:
    """(stream of the plain bytes, size on disk, whether it is gzip): told by the content, for names often lie."""
    with file.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if packed:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream, size, True  # type: ignore[misc]  # GzipFile reads like IO[bytes] but is not declared so
        else:
            yield raw, size, False
