"""The files of a data set that stays on the disk, and the runs of rows that are read from them: NPY and NPZ.

A set is one file or a folder of shards. Leans on `readers` for what a header may say; `tables` has the shards of rows
with named columns, `streams` what is made of the shards.
"""

from __future__ import annotations

import abc
import errno
import io
import itertools
import math
import os
import stat
import struct
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .readers import Columns, numpy_files, rawdata, untrusted

CHUNK_BYTES = 1 << 20  # of the rows that are read at once, where the format lets them be as many as one likes
LEAST_CHUNKS = 64  # a set is cut into at least so many, where its format lets it be, so that a small one shuffles too
HEADER_BYTES = 1 << 17  # more than any header of an NPY stream that NumPy reads


class Piece(NamedTuple):
    """Some rows of a set: x, (rows, d) or named columns of (rows,) each; y and the sample weights, (rows, …) or None.

    On the way into a network x is a matrix.
    """

    x: NDArray[Any] | Columns
    y: NDArray[Any] | None
    w: NDArray[Any] | None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.x if isinstance(self.x, np.ndarray) else next(iter(self.x.values())))

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """x, y and the weights of a piece that has been prepared for a network."""
        assert isinstance(self.x, np.ndarray)
        assert self.y is not None
        return self.x, self.y, self.w

    def rows(self, chosen: slice) -> Piece:
        """Some of the rows, as views."""
        x = self.x[chosen] if isinstance(self.x, np.ndarray) else {k: column[chosen] for k, column in self.x.items()}
        y, w = (None if part is None else part[chosen] for part in (self.y, self.w))
        return Piece(x, y, w)


Room = Sequence["NDArray[Any] | None"]  # for x, y and the weights
NOWHERE: Room = (None, None, None)
PAGE = 4096  # bytes; where reads past the page cache begin and end: no disk's blocks are larger
WORTH_A_DETOUR = 16 * PAGE  # bytes; a read of fewer goes through the page cache, whose pages then serve the next one


class File:
    """A regular file, which has to be the same whenever it is looked into again.

    ``bypass``: read long runs past the page cache. That spares a processor the upkeep of pages that are gone before
    they are read again, as those of a file that memory cannot hold are.
    """

    bypass = False

    def __init__(self, path: Path) -> None:
        self.path = path
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: not a regular file")
        self.size = found.st_size
        self._identity = _identity(found)

    @contextmanager
    def open(self, flags: int = 0) -> Iterator[io.FileIO]:
        """The file, unless it has been changed or exchanged since it was first seen; with more flags of `os.open`."""
        try:
            stream = open(  # noqa: SIM115  (closed below)
                self.path, "rb", buffering=0, opener=lambda path, usual: os.open(path, usual | flags)
            )
        except OSError as error:
            if flags and error.errno == errno.EINVAL:  # this file system does not know them
                raise
            raise ValueError(f"{self.path}: cannot be read any more ({error.strerror}); put it back") from None
        with stream:
            if _identity(os.fstat(stream.fileno())) != self._identity:
                raise ValueError(f"{self.path}: was changed while it was in use; start again with the files at rest")
            yield stream

    def read_at(self, offset: int, out: NDArray[Any]) -> None:
        """Fill a contiguous array with the bytes from ``offset`` on."""
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        if self.bypass and len(view) >= WORTH_A_DETOUR:
            try:
                self._read_past_cache(offset, view)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.bypass = False  # this file system or disk does not do that
        with self.open() as stream:
            stream.seek(offset)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise self._cut_short()
                view = view[count:]

    def _read_past_cache(self, offset: int, view: memoryview) -> None:
        """`read_at` in whole pages of the file, by way of a buffer that begins at one of memory."""
        first, last = offset // PAGE * PAGE, -(-(offset + len(view)) // PAGE) * PAGE
        pages, done, wanted = _pages(last - first), 0, offset - first + len(view)
        with self.open(os.O_DIRECT) as stream:
            stream.seek(first)
            while done < wanted:
                count = stream.readinto(pages[done:].data)
                if not count or (done + count < wanted and count % PAGE):
                    raise self._cut_short()
                done += count
        np.copyto(np.frombuffer(view, np.uint8), pages[offset - first : wanted])

    def _cut_short(self) -> ValueError:
        return ValueError(f"{self.path}: cut short while it was in use; start again with the files at rest")

    def will_need(self, extents: Iterable[tuple[int, int]]) -> None:
        """Let the system begin to read these bytes, (offset, count) each, where it takes such advice."""
        if self.bypass or not hasattr(os, "posix_fadvise"):
            return
        with self.open() as stream:
            for offset, count in extents:
                if not _at_hand(stream.fileno(), offset):  # for what is, the advice takes longer than the reading
                    os.posix_fadvise(stream.fileno(), offset, count, os.POSIX_FADV_WILLNEED)

    def sample(self) -> bytes:
        """The first and the last 4 KiB, by which a fingerprint knows the file."""
        with self.open() as stream:
            head = stream.read(4096)
            stream.seek(max(0, self.size - 4096))
            return head + stream.read(4096)


def _at_hand(descriptor: int, offset: int) -> bool:
    """Whether a byte of a file can be read without waiting for the disk, as far as the system tells."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:  # it would have to wait, or this kind of file cannot be asked
        return False
    return True


class _Buffer(threading.local):
    """A thread's own buffer of whole pages."""

    pages = np.empty(0, np.uint8)


_buffer = _Buffer()


def _pages(count: int) -> NDArray[np.uint8]:
    """``count`` bytes of this thread's that begin at a page of memory; the next call gives the same ones."""
    if len(_buffer.pages) < count:
        raw = np.empty(count + PAGE, np.uint8)
        _buffer.pages = raw[-raw.ctypes.data % PAGE :][:count]
    return _buffer.pages[:count]


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Shard(abc.ABC):
    """A part of a set: ``rows`` of it, in ``files``; ``schema`` is what all parts of a set have to agree on.

    ``row_bytes``: what a row takes in memory, about. ``overhead``: how many times that is taken while it is read.
    ``as_it_lies``: whether rows are read with `File.read_at`, as the runs of bytes that they are.
    """

    files: list[File]
    rows: int
    schema: dict[str, Any]
    row_bytes: float
    overhead = 1.0
    as_it_lies = False
    feature_names: list[str] | None = None

    @property
    def path(self) -> Path:
        """The file that an error names."""
        return self.files[0].path

    @abc.abstractmethod
    def bounds(self, chunk_rows: int) -> list[int]:
        """The first row of every chunk, then ``rows``; chunks of ``chunk_rows`` rows where the format allows that."""

    @abc.abstractmethod
    def read(self, start: int, stop: int, into: Room = NOWHERE) -> Piece:
        """The rows from ``start`` to ``stop``, which lie within one chunk; ``into`` may be used for them."""

    def extents(self, start: int, stop: int) -> Iterator[tuple[File, int, int]]:
        """Which bytes these rows are read from: (file, offset, count); all of them where nothing better is known."""
        for file in self.files:
            yield file, 0, file.size


def even_bounds(rows: int, chunk_rows: int) -> list[int]:
    """The bounds of chunks of equal length, the last one apart."""
    return [*range(0, rows, chunk_rows), rows]


# --- arrays ----------------------------------------------------------------------------------------------------------


class Field:
    """An array on the disk, C order, of which runs of rows are read."""

    def __init__(self, file: File, offset: int, size: int, where: str) -> None:
        """The NPY stream of ``size`` bytes that begins at ``offset``."""
        head = np.empty(min(size, HEADER_BYTES), np.uint8)
        file.read_at(offset, head)
        stream = io.BytesIO(head.tobytes())
        self.shape, fortran, self.dtype = numpy_files.npy_header(stream, size, where)
        if not self.shape:
            raise ValueError(f"{where}: holds a single value; expected rows")
        if fortran and len(self.shape) > 1:
            raise ValueError(f"{where}: in Fortran order, a row all over the file; save np.ascontiguousarray of it")
        self._file, self._offset = file, offset + stream.tell()
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, start: int, stop: int, into: NDArray[Any] | None) -> NDArray[Any]:
        """Rows in native byte order; in ``into``, where they fit there as they are."""
        shape = (stop - start, *self.shape[1:])
        fits = into is not None and into.dtype == self.dtype and into.shape == shape and into.flags.c_contiguous
        out = into if into is not None and fits else np.empty(shape, self.dtype)
        self._file.read_at(self._offset + start * self.row_bytes, out)
        return out.astype(self.dtype.newbyteorder("="), copy=False)

    def extent(self, start: int, stop: int) -> tuple[File, int, int]:
        """Which bytes some rows are: (file, offset, count)."""
        return self._file, self._offset + start * self.row_bytes, (stop - start) * self.row_bytes


class ArrayShard(Shard):
    """Arrays that lie on the disk as they are: three NPY files, or the members of an NPZ that is not compressed."""

    as_it_lies = True

    def __init__(self, files: Sequence[File], x: Field, y: Field | None, w: Field | None) -> None:
        self.files = list(files)
        self._fields = (x, y, w)
        self.rows = _common_rows(self.path, self._fields)
        self.schema = _array_schema(self._fields)
        self.row_bytes = sum(field.row_bytes for field in self._fields if field is not None)

    def bounds(self, chunk_rows: int) -> list[int]:
        return even_bounds(self.rows, chunk_rows)

    def read(self, start: int, stop: int, into: Room = NOWHERE) -> Piece:
        x, y, w = (None if field is None else field.read(start, stop, out) for field, out in zip(self._fields, into))
        assert x is not None
        return array_piece(x, y, w, f"{self.path}, rows {start} to {stop - 1}")

    def extents(self, start: int, stop: int) -> Iterator[tuple[File, int, int]]:
        return (field.extent(start, stop) for field in self._fields if field is not None)


class PackedShard(Shard):
    """The members of an NPZ that is compressed, which can only be read as a whole."""

    overhead = 2.0

    def __init__(self, file: File, keys: Sequence[str | None]) -> None:
        self.files, self._keys = [file], keys
        self._where = [f"{file.path}, array {key!r}" for key in keys]
        headers = self._headers()
        self.rows = _common_rows(file.path, headers)
        self.schema = _array_schema(headers)
        self.row_bytes = sum(math.prod(h.shape[1:]) * h.dtype.itemsize for h in headers if h is not None)

    def _headers(self) -> list[_Header | None]:
        with self.files[0].open() as stream:
            arrays = numpy_files.Npz(stream, str(self.path))
            return [None if key is None else _packed_header(arrays, key, w) for key, w in zip(self._keys, self._where)]

    def bounds(self, chunk_rows: int) -> list[int]:
        return [0, self.rows]

    def read(self, start: int, stop: int, into: Room = NOWHERE) -> Piece:
        with self.files[0].open() as stream:
            arrays = numpy_files.Npz(stream, str(self.path))
            x, y, w = (None if key is None else arrays[key] for key in self._keys)
        assert x is not None
        return array_piece(x, y, w, str(self.path)).rows(slice(start, stop))


class _Header(NamedTuple):
    """What stands above a packed array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _packed_header(arrays: numpy_files.Npz, key: str, where: str) -> _Header:
    info = arrays.members[key]
    with untrusted.decoder(where, "NPZ"), arrays.archive.open(info) as member:
        shape, _, dtype = numpy_files.npy_header(member, info.file_size, where)
    if not shape:
        raise ValueError(f"{where}: holds a single value; expected rows")
    return _Header(shape, dtype)


def _common_rows(path: Path, fields: Sequence[Field | _Header | None]) -> int:
    rows = [field.shape[0] for field in fields if field is not None]
    for name, field in zip("xyw", fields):
        if field is not None and field.shape[0] != rows[0]:
            raise ValueError(f"{path}: x has {rows[0]} rows and {name} has {field.shape[0]}; they must be the same")
    return rows[0]


def _array_schema(fields: Sequence[Field | _Header | None]) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for name, field in zip("xyw", fields):
        if field is not None:
            kind = "text" if field.dtype.kind in "US" else field.dtype.name
            width = math.prod(field.shape[1:])
            schema[name] = f"{kind} of {width} column{'s' * (width != 1)}"
    return schema


def array_piece(x: NDArray[Any], y: NDArray[Any] | None, w: NDArray[Any] | None, where: str) -> Piece:
    """Arrays as `readers` would give them."""
    return Piece(rawdata.inputs(x, where), None if y is None else rawdata.targets_of(y, len(x), where), w)


def npy_shard(paths: Sequence[Path | None]) -> Shard:
    """The shard of three NPY files, x, y and the weights; the last two, or one of them, may be None."""
    files = [None if path is None else File(path) for path in paths]
    x, y, w = (None if file is None else Field(file, 0, file.size, str(file.path)) for file in files)
    assert x is not None
    return ArrayShard([file for file in files if file is not None], x, y, w)


def npz_shard(path: Path, target: str | None, weight: str | None, require_target: bool) -> Shard:
    """The shard of an NPZ file, by the keys that `readers.read` takes."""
    file = File(path)
    with file.open() as stream:
        arrays = numpy_files.Npz(stream, str(path))
        if "x_train" in arrays.members or "X_train" in arrays.members:
            raise ValueError(
                f"{path}: has a training and a test part, which are not read in pieces; save each to a file of its own"
            )
        if weight is not None and weight not in arrays.members:
            raise ValueError(f"{path}: no array of weights is called {weight!r} ({arrays.keys()})")
        hidden = () if weight is None else (weight,)
        keys = (*numpy_files.npz_keys(arrays, target, require_target, *hidden), weight)
        infos = [None if key is None else arrays.members[key] for key in keys]
        if any(info is not None and info.compress_type != zipfile.ZIP_STORED for info in infos):
            return PackedShard(file, keys)
        starts = [None if info is None else _member_start(stream, file, info, arrays) for info in infos]
    x, y, w = (
        None if info is None or start is None else Field(file, start, info.file_size, f"{path}, array {key!r}")
        for key, info, start in zip(keys, infos, starts)
    )
    assert x is not None
    return ArrayShard([file], x, y, w)


def _member_start(stream: io.FileIO, file: File, info: zipfile.ZipInfo, arrays: numpy_files.Npz) -> int:
    """Where the bytes of a member that is not compressed begin; the header in front of it has lengths of its own."""
    with untrusted.decoder(arrays.where, "NPZ"):  # a place before the file, or beyond all files
        stream.seek(info.header_offset)
        head = stream.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04" or info.flag_bits & 1:
        raise ValueError(f"{arrays.where}: cut short or not a valid NPZ file (no readable {info.filename!r})")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if start + info.file_size > file.size:
        raise ValueError(f"{arrays.where}: cut short: {info.filename!r} ends after the file does")
    return start


# --- what shards of one set have in common ---------------------------------------------------------------------------


def check_alike(shards: Sequence[Shard]) -> None:
    """A ValueError naming the first shard that differs from the first one, and in what."""
    first = shards[0]
    for shard in shards[1:]:
        if shard.schema != first.schema:
            name = next(n for n in (*first.schema, *shard.schema) if first.schema.get(n) != shard.schema.get(n))
            here, there = shard.schema.get(name, "nothing"), first.schema.get(name, "nothing")
            raise ValueError(f"{shard.path}: {name} is {here}, but in {first.path.name} it is {there}")


def chunks_of(shards: Sequence[Shard], chunk_rows: int | None) -> NDArray[np.int64]:
    """The chunks of a set, (k, 2): the first row of each and the one after its last, counted over all shards."""
    n = sum(shard.rows for shard in shards)
    if chunk_rows is None:
        chunk_rows = max(1, min(int(CHUNK_BYTES // max(1, shards[0].row_bytes)), -(-n // LEAST_CHUNKS)))
    first = itertools.accumulate((shard.rows for shard in shards), initial=0)
    bounds = [np.array(shard.bounds(chunk_rows), np.int64) + start for shard, start in zip(shards, first)]
    return np.concatenate([np.column_stack([b[:-1], b[1:]]) for b in bounds])
