"""NumPy's NPY and NPZ files; nothing is ever unpickled."""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import checks
from .rawdata import RawData, existing, inputs, listed, targets_of, with_test
from .untrusted import DEFLATE_RATIO, array_of, check_unpacked, decoder, read_exactly

X_KEYS = ("x", "X", "data", "features")
Y_KEYS = ("y", "Y", "labels", "label", "target", "targets")
NPY_HEADER_BYTES = 10_000  # what NumPy itself reads at most
NPY_DIMENSIONS = 32  # what every supported NumPy can reshape to


def npy_header(stream: IO[bytes], size: int, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran order, dtype) of an NPY stream of ``size`` bytes, checked against ``size``."""
    with decoder(where, "NPY"):
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"format version {version}")
        length = stream.read(2 if version[0] == 1 else 4)
        if (announced := int.from_bytes(length, "little")) > NPY_HEADER_BYTES:
            raise ValueError(f"a header of {announced} bytes")
        # Version 3 differs from 2 only in the encoding of field names, and records are refused below.
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python says of odd literals in a header
            shape, fortran, dtype = read_header(io.BytesIO(length + stream.read(announced)))
        if len(shape) > NPY_DIMENSIONS:
            raise ValueError(f"{len(shape)} dimensions")
        left = size - stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{where}: holds pickled Python objects, which are never loaded; save numbers or strings")
    if dtype.kind not in "biufSU" or dtype.itemsize == 0:
        raise ValueError(f"{where}: dtype {dtype} is not accepted; accepted: real numbers, booleans, strings")
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 1:
        raise ValueError(f"{where}: no rows or no columns, shape {shape}")
    if expected != left:
        raise ValueError(f"{where}: shape {shape} of {dtype} needs {expected} bytes after the header, found {left}")
    return shape, fortran, dtype


def _npy_array(stream: IO[bytes], size: int, where: str) -> np.ndarray:
    """The array of an NPY stream of ``size`` bytes; its header is checked against ``size`` before allocating."""
    shape, fortran, dtype = npy_header(stream, size, where)
    data = read_exactly(stream, math.prod(shape) * dtype.itemsize, where)
    with decoder(where, "NPY"):
        return array_of(data, dtype, shape, fortran)


def _read_npy_file(file: Path) -> np.ndarray:
    with file.open("rb") as stream:
        return _npy_array(stream, os.fstat(stream.fileno()).st_size, str(file))


def read_npy(file: Path, target: str | None, require_target: bool) -> RawData:
    """x from ``file`` and y from the file ``target``."""
    if target is None and require_target:
        raise ValueError(f"{file}: holds x only; give target=PATH of the .npy file with y, or 'x.npy,y.npy'")
    x = inputs(_read_npy_file(file), str(file))
    y = None
    if target is not None:
        y_file = existing(target)
        if y_file.suffix.lower() != ".npy":
            raise ValueError(f"target: for an .npy file of x it is the path of the .npy file of y, got {target!r}")
        y = targets_of(_read_npy_file(y_file), len(x), target)
    return RawData(x, y, name=file.name)


class _Directory:
    """A stream that hands out an archive's directory only if it is small: each entry takes ten times its bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.most: int | None = 1 << 20
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        """As of the stream."""
        if self.most is not None and size > self.most:
            raise ValueError(f"a directory of {size} bytes, more than {self.most}")
        return self._stream.read(size)


class Npz:
    """The arrays of an NPZ stream by key, each read when it is asked for; nothing is ever unpickled."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        self.where = where
        self.size = stream.seek(0, os.SEEK_END)
        with decoder(where, "NPZ"):
            directory = _Directory(stream)
            self.archive = zipfile.ZipFile(directory)
            directory.most = None
            infos = self.archive.infolist()
        names = Counter(info.filename for info in infos)
        if twice := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"{where}: two members are called {twice!r}; readers differ in which of them they take")
        self.members = {info.filename[:-4]: info for info in infos if info.filename.endswith(".npy")}
        if not self.members:
            raise ValueError(f"{where}: holds no arrays")
        if {info.compress_type for info in infos} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise ValueError(f"{where}: packed as numpy.savez_compressed does not, in a way that unpacks without bound")

    def __getitem__(self, key: str) -> np.ndarray:
        info, where = self.members[key], f"{self.where}, array {key!r}"
        packed = min(info.compress_size, self.size)
        if info.file_size > DEFLATE_RATIO * packed:
            raise ValueError(f"{where}: {info.compress_size} bytes cannot unpack into the {info.file_size} it claims")
        check_unpacked(where, packed, info.file_size, "save it with numpy.savez, unpacked")
        with decoder(where, "NPZ"):
            member = self.archive.open(info)
        with member:
            return _npy_array(member, info.file_size, where)

    def keys(self) -> str:
        """The keys, for an error."""
        return f"its keys: {listed(list(self.members))}"

    def one_of(self, keys: Iterable[str]) -> str | None:
        """The one key of ``keys`` that is there, None where none is; ValueError where several are."""
        found = [key for key in keys if key in self.members]
        if len(found) > 1:
            raise ValueError(f"{self.where}: the keys {', '.join(found)} could all be meant; keep one of them")
        return found[0] if found else None

    def part(self, x_key: str, y_key: str | None, name: str) -> RawData:
        """The arrays of two keys as one data set."""
        x = inputs(self[x_key], f"{self.where}, array {x_key!r}")
        y = None if y_key is None else targets_of(self[y_key], len(x), f"{self.where}, array {y_key!r}")
        return RawData(x, y, target_name=y_key, name=name)


def read_npz(file: Path, target: str | None, require_target: bool) -> RawData:
    with file.open("rb") as stream:
        arrays = Npz(stream, str(file))
        x_train = arrays.one_of(("x_train", "X_train"))
        if x_train is not None and target in (None, "y_train"):
            return _npz_parts(arrays, x_train, file.name, require_target)
        x_key, y_key = npz_keys(arrays, target, require_target)
        return arrays.part(x_key, y_key, file.name)


def npz_keys(arrays: Npz, target: str | None, require_target: bool, *others: str) -> tuple[str, str | None]:
    """The keys of x and y, without ``others``; that of y is None where there is none and none is required."""
    y_key = _npz_target(arrays, target, require_target)
    left = [key for key in arrays.members if key not in (y_key, *others)]
    x_key = arrays.one_of(key for key in X_KEYS if key in left) or (left[0] if len(left) == 1 else None)
    if x_key is None:
        raise ValueError(f"{arrays.where}: no array to be x is called {', '.join(X_KEYS)} ({arrays.keys()})")
    return x_key, y_key


def _npz_target(arrays: Npz, target: str | None, require_target: bool) -> str | None:
    """The key of y: ``target``, or the one that is called so; None where there is none and none is required."""
    if target in arrays.members:
        return target
    key = arrays.one_of(Y_KEYS) if target is None else None
    if key is None and require_target:
        names = ", ".join(Y_KEYS) if target is None else repr(target) + checks.nearest(target, arrays.members)
        raise ValueError(f"{arrays.where}: no array to be y is called {names} ({arrays.keys()})")
    return key


def _npz_parts(arrays: Npz, x_train: str, name: str, require_target: bool) -> RawData:
    """x_train, y_train, and as the test part x_test, y_test."""
    y_train, y_test = (key if key in arrays.members else None for key in ("y_train", "y_test"))
    if y_train is None and require_target:
        raise ValueError(f"{arrays.where}: has {x_train} but no y_train ({arrays.keys()})")
    data = arrays.part(x_train, y_train, name)
    x_test = x_train.replace("train", "test")
    if x_test not in arrays.members:
        return data
    return with_test(data, arrays.part(x_test, y_test, name), arrays.where)
