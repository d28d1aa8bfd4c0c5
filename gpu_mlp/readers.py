"""Files and built-in sets -> `RawData`: the columns and targets exactly as stored, and every broken file refused.

Leans on `checks` and NumPy; pyarrow is imported only when a Parquet file is read.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import importlib.resources
import io
import itertools
import math
import os
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import checks

BUILT_IN = ("digits", "fashion-mnist")
MOST_SHOWN = 2000  # characters of an error about a file
MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"})

Columns = dict[str, np.ndarray]
PathLike = str | os.PathLike[str]


@dataclass(eq=False)
class RawData:
    """A data set as it was stored, before any preprocessing.

    x: (n, d) array of numbers, or named columns of (n,) each: numbers (missing = NaN) or an object array of str
       (missing = None);
    y: (n,) labels or values, (n, k) values, or None where the source has no target;
    test: the source's own test part, with the same columns, or None.
    """

    x: np.ndarray | Columns
    y: np.ndarray | None = None
    feature_names: list[str] | None = None
    target_name: str | None = None
    name: str = ""
    test: RawData | None = None

    def __len__(self) -> int:
        """The number of rows, n."""
        return len(self.x if isinstance(self.x, np.ndarray) else next(iter(self.x.values())))


def read(path: PathLike, target: str | os.PathLike[str] | None = None, *, require_target: bool = True) -> RawData:
    """Read a data set; what ``path`` is decides how.

    - ``digits``, ``fashion-mnist``: a built-in set (a folder of that name is ``./digits``);
    - ``.csv``, ``.tsv`` (and ``.csv.gz``, ``.tsv.gz``), ``.parquet``: a table; ``target`` names its target column, or
      several numeric ones as ``"a,b"``;
    - ``.npz``: keys x and y (also X, data, features; Y, labels, label, target, targets), or x_train, y_train, x_test,
      y_test; or any keys, with ``target`` naming the key of y;
    - ``.npy``: x, with y in the file ``target``, or both as ``"x.npy,y.npy"``;
    - an IDX images file (labels found by the naming convention, or in the file ``target``), or a folder with
      ``train-images-idx3-ubyte[.gz]`` and its companions.

    With ``require_target=False`` (prediction) a source without its target is read too, and then ``y`` is None.
    Raises FileNotFoundError where there is no such file, ValueError, in one line, for anything unreadable.
    """
    source, wanted = os.fspath(path), None if target is None else os.fspath(target)
    if source in BUILT_IN:
        if wanted is not None:
            raise ValueError(f"target: the built-in set {source!r} has its own labels; got target={wanted!r}")
        return load_digits() if source == "digits" else load_fashion_mnist()
    pair = source.split(",")
    if len(pair) == 2 and all(part.strip().lower().endswith(".npy") for part in pair) and not os.path.exists(source):
        if wanted is not None:
            raise ValueError(f"target: {source!r} already names the file of y; got target={wanted!r}")
        source, wanted = (part.strip() for part in pair)
    file = _existing(source)
    try:
        return _reader_of(file)(file, wanted, require_target)
    except ValueError as error:  # names and values in it are the file's own: of any length, and perhaps not printable
        raise ValueError(checks.brief(error, MOST_SHOWN)) from None
    except MemoryError:
        raise ValueError(f"{file}: there is not enough memory for it") from None


def _existing(source: str) -> Path:
    """The path of a file or folder that exists; otherwise a FileNotFoundError that suggests a built-in set."""
    file = Path(source)
    if not file.exists():
        hint = checks.nearest(source, BUILT_IN)
        raise FileNotFoundError(f"{source}: no such file or folder{hint} (built-in sets: {', '.join(BUILT_IN)})")
    return file


def _reader_of(file: Path) -> Callable[[Path, str | None, bool], RawData]:
    if file.is_dir():
        return _read_idx_folder
    if IDX_NAME.search(file.name):
        return _read_idx_images
    for ending, reader in READERS.items():
        if file.name.lower().endswith(ending):
            return reader
    raise ValueError(
        f"{file}: unknown kind of file; accepted endings: {' '.join(READERS)} -idx3-ubyte[.gz], "
        f"a folder of IDX files, or a built-in set ({', '.join(BUILT_IN)})"
    )


# --- built-in sets ---------------------------------------------------------------------------------------------------


def load_digits() -> RawData:
    """The UCI optical digits that ship in the package: x (1797, 64) uint8 of 0..16, y (1797,) uint8 of 0..9."""
    resource = importlib.resources.files("gpu_mlp") / "datasets" / "digits.npz"
    with resource.open("rb") as stream:  # a stream and not a path: the package may lie inside a zip
        arrays = Npz(stream, "digits.npz")
        return RawData(arrays["x"], arrays["y"], name="digits")


def load_fashion_mnist(folder: PathLike | None = None) -> RawData:
    """Fashion-MNIST, x (60000, 784) uint8, y (60000,) uint8 of 0..9, with its 10000-row test part.

    Read from the four IDX files in ``folder``, else in $FASHION_MNIST_DIR, else where Debian's package
    dataset-fashion-mnist puts them. Raises FileNotFoundError, saying how to get them, where they are not.
    """
    place = Path(folder or os.environ.get("FASHION_MNIST_DIR") or "/usr/share/datasets/fashion-mnist")
    missing = [stem for stem in TRAIN + TEST if _find_idx(place, stem) is None] if place.is_dir() else ["the folder"]
    if missing:
        raise FileNotFoundError(
            f"fashion-mnist: {place} lacks {', '.join(missing)}; apt-get install dataset-fashion-mnist, "
            "or name a folder with its four IDX files (folder=... or the variable FASHION_MNIST_DIR)"
        )
    data = _read_idx_folder(place, None, True)
    data.name = "fashion-mnist"
    return data


# --- arrays into their final shape -----------------------------------------------------------------------------------


def _inputs(array: np.ndarray, where: str) -> np.ndarray:
    """``array`` as the (n, d) matrix x, its dtype kept: one dimension is one feature, more than two are flattened."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: x must hold real numbers, got dtype {checks.brief(array.dtype)}")
    if array.ndim == 0:
        raise ValueError(f"{where}: x must be (n, d), got a single number")
    return array.reshape(len(array), -1)


def _targets(array: np.ndarray, n: int, where: str) -> np.ndarray:
    """``array`` as y, (n,) or (n, k); (n, 1) becomes (n,), and bytes become text."""
    if array.dtype.kind == "S":
        with _decoder(where, "UTF-8 label"):
            array = np.char.decode(array, "utf-8")
    if array.ndim not in (1, 2):
        raise ValueError(f"{where}: y must be (n,) or (n, k), got shape {array.shape}")
    if len(array) != n:
        raise ValueError(f"{where}: x has {n} rows and y has {len(array)}; they must be the same")
    return array[:, 0] if array.shape[1:] == (1,) else array


def _with_test(train: RawData, test: RawData, where: str) -> RawData:
    """``train`` with ``test`` as its test part, once their columns agree."""
    d, d_test = (part.x.shape[1] if isinstance(part.x, np.ndarray) else len(part.x) for part in (train, test))
    if d != d_test:
        raise ValueError(f"{where}: the training part has {d} columns, the test part {d_test}")
    if (train.y is None) != (test.y is None):
        raise ValueError(f"{where}: only the {'training' if test.y is None else 'test'} part has labels")
    test.name = f"{train.name} (test)"
    train.test = test
    return train


def _listed(names: Sequence[str], most: int = 20) -> str:
    """``a, b, c``, cut after ``most`` names."""
    shown = (checks.brief(name, 80) for name in names[:most])
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(names) > most else "")


# --- bytes that may be broken ----------------------------------------------------------------------------------------

DEFLATE_RATIO = 1032  # deflate cannot expand a byte into more: a larger claim is a lie, refused before allocating
LIKELY_RATIO = 200  # what real data are packed by at most; more is a bomb,
FREE_BYTES = 1 << 27  # unless it is no larger than this
CHUNK_BYTES = 1 << 20


def _most_unpacked(size: int) -> int:
    """How many bytes a file of ``size`` may unpack into."""
    return max(FREE_BYTES, LIKELY_RATIO * size)


def _check_unpacked(where: Path | str, size: int, unpacked: int, remedy: str) -> None:
    """Refuse a packed file that would fill the memory, or that a bomb could hide in."""
    if unpacked > _most_unpacked(size):
        raise ValueError(
            f"{where}: {size} bytes would unpack into {unpacked}, {unpacked // max(1, size)} times as many, as a "
            f"file made to fill the memory does; if you trust it, {remedy}"
        )


@contextlib.contextmanager
def _decoder(where: Path | str, kind: str) -> Iterator[None]:
    """Turn whatever a decoder of foreign bytes raises inside into a one-line ValueError that names the file."""
    try:
        yield
    except Exception as error:  # all of them: on hostile bytes zipfile, gzip, ast and pyarrow raise twenty kinds
        reason = checks.brief(error) or type(error).__name__
        raise ValueError(f"{where}: cut short or not a valid {kind} file ({reason})") from error


def _read_exactly(stream: IO[bytes], count: int, where: Path | str) -> np.ndarray:
    """The last ``count`` bytes of ``stream`` as a writable (count,) uint8 array; ValueError for fewer or for more."""
    buffer = np.empty(count, np.uint8)  # of what a lying header claims, only what is filled takes memory
    filled = 0
    with _decoder(where, "data"):
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


def _array_of(data: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool = False) -> np.ndarray:
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
def _opened(file: Path) -> Iterator[tuple[IO[bytes], int, bool]]:
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


# --- IDX, the format of MNIST ----------------------------------------------------------------------------------------

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IDX_MAX_DIMENSIONS = 32  # what every supported NumPy can reshape to
IDX_NAME = re.compile(r"[-.]idx\d+-(ubyte|byte|short|int|float|double)(\.gz)?$|\.idx(\.gz)?$", re.IGNORECASE)
TRAIN = ("train-images", "train-labels")
TEST = ("t10k-images", "t10k-labels")


def read_idx(path: PathLike) -> np.ndarray:
    """The array of one IDX file (plain or gzip), in the shape and type its header declares, native byte order.

    The header is 00 00, a type code, the number of dimensions, then each dimension as a big-endian uint32. It is
    checked against the length of the file before anything is allocated. Raises ValueError for any disagreement.
    """
    file = Path(path)
    with _opened(file) as (stream, size, packed):
        with _decoder(file, "IDX"):
            head = stream.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_DTYPES or not 0 < head[3] <= IDX_MAX_DIMENSIONS:
            raise ValueError(
                f"{file}: not an IDX file: expected the bytes 00 00, a type code of 08 09 0b 0c 0d 0e and a number of "
                f"dimensions of 1 to {IDX_MAX_DIMENSIONS}, found {head.hex(' ') or 'an empty file'}"
            )
        dtype, n_dimensions = np.dtype(IDX_DTYPES[head[2]]), head[3]
        with _decoder(file, "IDX"):
            shape = struct.unpack(f">{n_dimensions}I", stream.read(4 * n_dimensions))
        if 0 in shape:
            raise ValueError(f"{file}: the header declares {' x '.join(map(str, shape))} values, which is no data")
        header, count = 4 + 4 * n_dimensions, math.prod(shape) * dtype.itemsize
        if header + count > size * DEFLATE_RATIO if packed else header + count != size:
            raise ValueError(
                f"{file}: a header of {header} bytes and {' x '.join(map(str, shape))} {dtype.name} values make an "
                f"expected {header + count} bytes, found {size}{' of gzip' if packed else ''}"
            )
        if packed:
            _check_unpacked(file, size, header + count, "unpack it first (gunzip)")
        return _array_of(_read_exactly(stream, count, file), dtype, shape)


def _read_idx_images(file: Path, target: str | None, require_target: bool) -> RawData:
    """One images file, its labels in ``target`` or found beside it by name."""
    labels = _existing(target) if target is not None else _labels_beside(file)
    if labels is None and require_target:
        raise ValueError(f"{file}: no labels file beside it; give target=PATH of the IDX file with its labels")
    x = _inputs(read_idx(file), str(file))
    y = None if labels is None else _targets(read_idx(labels), len(x), str(labels))
    return RawData(x, y, name=file.name)


def _labels_beside(images: Path) -> Path | None:
    """`train-labels-idx1-ubyte[.gz]` for `train-images-idx3-ubyte[.gz]`; None where the name or the file is not so."""
    stem = IDX_NAME.sub("", images.name)
    return _find_idx(images.parent, stem.replace("images", "labels")) if "images" in stem else None


def _find_idx(folder: Path, stem: str) -> Path | None:
    """The IDX file of ``folder`` whose name is ``stem`` and an IDX ending; the unpacked one where there are two."""
    found = [f for f in folder.iterdir() if IDX_NAME.search(f.name) and IDX_NAME.sub("", f.name) == stem]
    return min(found, key=lambda f: (f.suffix.lower() == ".gz", f.name), default=None)


def _read_idx_folder(folder: Path, target: str | None, require_target: bool) -> RawData:
    """The training part of an MNIST-like folder, with its test part where there is one."""
    if target is not None:
        raise ValueError(f"target: a folder of IDX files has its own labels files; got target={target!r}")
    train, test = _find_idx(folder, TRAIN[0]), _find_idx(folder, TEST[0])
    if train is None:
        raise ValueError(f"{folder}: a folder must hold IDX files, and train-images-idx3-ubyte[.gz] is not there")
    data = _read_idx_images(train, None, require_target)
    data.name = folder.name
    return data if test is None else _with_test(data, _read_idx_images(test, None, require_target), str(folder))


# --- NumPy's NPY and NPZ ---------------------------------------------------------------------------------------------

X_KEYS = ("x", "X", "data", "features")
Y_KEYS = ("y", "Y", "labels", "label", "target", "targets")
NPY_HEADER_BYTES = 10_000  # what NumPy itself reads at most
NPY_DIMENSIONS = 32  # what every supported NumPy can reshape to


def npy_header(stream: IO[bytes], size: int, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran order, dtype) of an NPY stream of ``size`` bytes, checked against ``size``."""
    with _decoder(where, "NPY"):
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
    data = _read_exactly(stream, math.prod(shape) * dtype.itemsize, where)
    with _decoder(where, "NPY"):
        return _array_of(data, dtype, shape, fortran)


def _read_npy_file(file: Path) -> np.ndarray:
    with file.open("rb") as stream:
        return _npy_array(stream, os.fstat(stream.fileno()).st_size, str(file))


def _read_npy(file: Path, target: str | None, require_target: bool) -> RawData:
    """x from ``file`` and y from the file ``target``."""
    if target is None and require_target:
        raise ValueError(f"{file}: holds x only; give target=PATH of the .npy file with y, or 'x.npy,y.npy'")
    x = _inputs(_read_npy_file(file), str(file))
    y = None
    if target is not None:
        y_file = _existing(target)
        if y_file.suffix.lower() != ".npy":
            raise ValueError(f"target: for an .npy file of x it is the path of the .npy file of y, got {target!r}")
        y = _targets(_read_npy_file(y_file), len(x), target)
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
        with _decoder(where, "NPZ"):
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

    def __getitem__(self, key: str) -> np.ndarray:
        info, where = self.members[key], f"{self.where}, array {key!r}"
        packed = min(info.compress_size, self.size)
        if info.file_size > DEFLATE_RATIO * packed:
            raise ValueError(f"{where}: {info.compress_size} bytes cannot unpack into the {info.file_size} it claims")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a bound
            raise ValueError(f"{where}: packed in a way that numpy.savez_compressed does not use")
        _check_unpacked(where, packed, info.file_size, "save it with numpy.savez, unpacked")
        with _decoder(where, "NPZ"):
            member = self.archive.open(info)
        with member:
            return _npy_array(member, info.file_size, where)

    def keys(self) -> str:
        """The keys, for an error."""
        return f"its keys: {_listed(list(self.members))}"

    def one_of(self, keys: Iterable[str]) -> str | None:
        """The one key of ``keys`` that is there, None where none is; ValueError where several are."""
        found = [key for key in keys if key in self.members]
        if len(found) > 1:
            raise ValueError(f"{self.where}: the keys {', '.join(found)} could all be meant; keep one of them")
        return found[0] if found else None

    def part(self, x_key: str, y_key: str | None, name: str) -> RawData:
        """The arrays of two keys as one data set."""
        x = _inputs(self[x_key], f"{self.where}, array {x_key!r}")
        y = None if y_key is None else _targets(self[y_key], len(x), f"{self.where}, array {y_key!r}")
        return RawData(x, y, target_name=y_key, name=name)


def _read_npz(file: Path, target: str | None, require_target: bool) -> RawData:
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
    return _with_test(data, arrays.part(x_test, y_test, name), arrays.where)


# --- tables: what CSV and Parquet share ------------------------------------------------------------------------------


def _target_columns(where: Path, columns: Sequence[str], target: str | None, require_target: bool) -> list[str]:
    """The columns that ``target`` names (one, or several as ``"a,b"``), present or refused.

    Where none is required the list may be empty, and names of columns that are not there are passed over.
    """
    names = [] if target is None else [target] if target in columns else [name.strip() for name in target.split(",")]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: target={target!r} names a column twice")
    if require_target:
        if target is None:
            raise ValueError(f"{where}: which column is the target? Give target=NAME (its columns: {_listed(columns)})")
        for name in set(names).difference(columns):
            hint = checks.nearest(name, columns)
            raise ValueError(f"{where}: no column {name!r}{hint} (its columns: {_listed(columns)})")
    return names


def _table(where: Path, columns: Columns, targets: list[str], target: str | None) -> RawData:
    """Named columns -> RawData: the features as float64 or text, the target columns as y."""
    x = {name: _feature(column) for name, column in columns.items() if name not in targets}
    if not x:
        raise ValueError(f"{where}: no column is left for the features (its columns: {_listed(list(columns))})")
    y = None
    if targets and all(name in columns for name in targets):
        y = columns[targets[0]] if len(targets) == 1 else _stacked(where, columns, targets)
    return RawData(x, y, feature_names=list(x), target_name=None if y is None else target, name=where.name)


def _feature(column: np.ndarray) -> np.ndarray:
    return column if column.dtype.kind == "O" else column.astype(np.float64, copy=False)


def _stacked(where: Path, columns: Columns, targets: list[str]) -> np.ndarray:
    """Several target columns as one (n, k) float64 array; text is refused."""
    for name in targets:
        if columns[name].dtype.kind == "O":
            raise ValueError(f"{where}: column {name!r} holds text; several targets must all be numeric")
    return np.column_stack([columns[name].astype(np.float64) for name in targets])


def _check_names(where: Path, names: Sequence[str], hint: str = "") -> None:
    """Refuse a nameless column and a name that comes twice."""
    for position, name in enumerate(names, start=1):
        if not name:
            raise ValueError(
                f"{where}: column {position} has no name; name it, or if it is the index of a pandas table "
                "write the file with index=False"
            )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{where}: two columns are called {repeated[0]!r}; every name must be there once{hint}")


def _infinite_row(column: np.ndarray) -> int | None:
    """The first row of a numeric column with inf; None where all is well."""
    if column.dtype.kind != "f" or not np.isinf(column).any():
        return None
    return int(np.isinf(column).argmax())


# --- CSV and TSV -----------------------------------------------------------------------------------------------------

LONGEST_LINE = 16 << 20  # bytes
MOST_FIELDS = 1 << 20  # of a record
CHUNK_FIELDS = 1 << 16  # text takes ten times the memory of the numbers it spells, so a table is read in pieces
DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")


def _read_csv(file: Path, target: str | None, require_target: bool) -> RawData:
    """A delimited text file with a header row: UTF-8, quotes doubled inside quotes, fields stripped of blanks."""
    data = _utf8(file)
    delimiter = "\t" if file.name.lower().endswith((".tsv", ".tsv.gz")) else _delimiter(data)
    header = _header(file, data, delimiter)
    targets = _target_columns(file, header, target, require_target)
    columns = _csv_columns(file, data, delimiter, header, targets)
    if delimiter != ",":
        _refuse_decimal_commas(file, columns)
    return _table(file, columns, targets, target)


def _utf8(file: Path) -> bytes:
    """The bytes of a plain or gzip file of UTF-8 text; ValueError naming the line that is something else."""
    with _opened(file) as (stream, size, packed), _decoder(file, "gzip") if packed else contextlib.nullcontext():
        data = stream.read(_most_unpacked(size) + 1 if packed else -1)
    if packed:
        _check_unpacked(file, size, len(data), "unpack it first (gunzip)")
    _check_utf8(file, data)
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise ValueError(f"{file}, line {line}: a NUL character; this is not a text file, or not in UTF-8")
    return data


def _check_utf8(file: Path, data: bytes) -> None:
    """Refuse what is not UTF-8, or has a line beyond any table's; piece by piece, for text takes up to four times as
    much decoded."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), LONGEST_LINE):
        piece, last = data[start : start + LONGEST_LINE], start + LONGEST_LINE >= len(data)
        try:
            decoder.decode(piece, last)
        except UnicodeDecodeError as error:
            place = start + len(piece) - len(error.object) + error.start
            line = data.count(b"\n", 0, place) + 1
            raise ValueError(
                f"{file}, line {line}: byte 0x{data[place]:02x} is not UTF-8; save the file as UTF-8"
            ) from None
        if not last and b"\n" not in piece and b"\r" not in piece:
            line = data.count(b"\n", 0, start) + 1
            raise ValueError(f"{file}, line {line}: a line of more than {LONGEST_LINE} bytes; this is no table")


def _lines(data: bytes) -> Iterator[str]:
    """The lines of UTF-8 text, without its byte order mark; decoded as they go, for all of a table's text is a lot."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")


def _bounded(lines: Iterator[str], delimiter: str) -> Iterator[str]:
    """The lines, up to a record of more than MOST_FIELDS fields: one of many short lines in open quotes too."""
    fields, quoted = 0, False
    for line in lines:
        if quoted or '"' in line or len(line) > MOST_FIELDS:
            fields += line.count(delimiter)
            if fields > MOST_FIELDS:
                raise csv.Error(f"a record of more than {MOST_FIELDS} fields")
            quoted ^= line.count('"') % 2 == 1
            fields *= quoted
        yield line


def _records(file: Path, data: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every record; blank lines are passed over, bad quoting is refused."""
    reader = csv.reader(_bounded(_lines(data), delimiter), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; is a quote left open or not doubled?") from None


def _delimiter(data: bytes) -> str:
    """Of comma, semicolon and tab the one that cuts the header line into most fields."""
    first = next((line for line in _lines(data) if line.strip()), "")
    beginning = first[: 1 << 16]
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([beginning], delimiter=delimiter), [])))


def _header(file: Path, data: bytes, delimiter: str) -> list[str]:
    """The column names of the first record, checked."""
    first = next(_records(file, data, delimiter), None)
    if first is None:
        raise ValueError(f"{file}: an empty file; expected a header row with the column names and rows of data")
    names = [name.strip() for name in first[1]]
    numeric = _floats(names) is not None
    _check_names(file, names, "; the first line holds only numbers: is the header row missing?" if numeric else "")
    return names


def _csv_columns(file: Path, data: bytes, delimiter: str, header: list[str], targets: list[str]) -> Columns:
    """Every column as integers (targets only), else float64, else text: the first that can read all its fields."""
    level = [0 if name in targets else 1 for name in header]
    while True:
        parts: list[list[np.ndarray]] = [[] for _ in header]
        for rows in _row_chunks(file, data, delimiter, len(header)):
            for j, fields in enumerate(zip(*rows, strict=True)):
                while (part := COLUMN_PARSERS[level[j]](fields)) is None:
                    level[j] += 1
                parts[j].append(part)
        if not parts[0]:
            raise ValueError(f"{file}: only a header row; expected rows of data below it")
        if all(part.dtype == column[-1].dtype for column in parts for part in column):
            break  # otherwise a late row showed that a column is text: now that it is known, read once more
    columns: Columns = {}
    for name, pieces in zip(header, parts, strict=True):
        columns[name] = np.concatenate(pieces)
        pieces.clear()  # so that there are never two of the whole table
    for name, column in columns.items():
        if (row := _infinite_row(column)) is not None:
            line, _ = next(itertools.islice(_records(file, data, delimiter), row + 1, None))
            raise ValueError(f"{file}, line {line}, column {name!r}: inf, or too large for a float64")
    return columns


def _row_chunks(file: Path, data: bytes, delimiter: str, width: int) -> Iterator[list[list[str]]]:
    """The records below the header, some at a time, each of ``width`` fields."""
    rows: list[list[str]] = []
    for line, fields in itertools.islice(_records(file, data, delimiter), 1, None):
        if len(fields) != width:
            count = len(fields)
            raise ValueError(f"{file}, line {line}: {count} field{'s' * (count != 1)}, but the header has {width}")
        rows.append(fields)
        if len(rows) * width >= CHUNK_FIELDS and len(rows) > 1:
            yield rows
            rows = []
    if rows:
        yield rows


def _integers(fields: Sequence[str]) -> np.ndarray | None:
    """(n,) int64, or None where a field is not an integer literal that fits."""
    try:
        return None if "_" in "".join(fields) else np.array(list(map(int, fields)), np.int64)
    except (ValueError, OverflowError):
        return None


def _floats(fields: Sequence[str]) -> np.ndarray | None:
    """(n,) float64 with NaN for a missing field, or None where a field is neither missing nor a number."""
    if "_" in "".join(fields):
        return None  # Python alone reads 1_000 as a number
    try:
        return np.array(list(map(float, fields)), np.float64)  # most columns miss nothing: the fast way first
    except ValueError:
        stripped = map(str.strip, fields)
    try:
        return np.array([math.nan if field in MISSING else float(field) for field in stripped], np.float64)
    except ValueError:
        return None


def _texts(fields: Sequence[str]) -> np.ndarray:
    """(n,) object array of str, None for a missing field."""
    column = np.empty(len(fields), object)
    known: dict[str, str] = {}  # equal texts are one object: a category takes the room of a pointer
    stripped = map(str.strip, fields)
    column[:] = [None if field in MISSING else known.setdefault(field, field) for field in stripped]
    return column


COLUMN_PARSERS: tuple[Callable[[Sequence[str]], np.ndarray | None], ...] = (_integers, _floats, _texts)


def _refuse_decimal_commas(file: Path, columns: Columns) -> None:
    """`1,5` between semicolons is a number to its writer: refuse it rather than make it a category."""
    for name, column in columns.items():
        present = [value for value in column if value is not None] if column.dtype.kind == "O" else []
        if present and all(DECIMAL_COMMA.fullmatch(value) for value in present):
            raise ValueError(f"{file}, column {name!r}: decimal commas ({present[0]!r}); write decimal points")


# --- Parquet ---------------------------------------------------------------------------------------------------------


INDEX_NAME = re.compile(r"__index_level_\d+__")  # what pandas calls an index that has no name


def _read_parquet(file: Path, target: str | None, require_target: bool) -> RawData:
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise ValueError(f"{file}: Parquet needs pyarrow; pip install 'gpu-mlp[data]'") from None
    with file.open("rb") as stream:
        table = _arrow_table(pyarrow, parquet, file, stream)
    # A pandas table keeps its unnamed index as a column: a row number, not a feature.
    names = [name for name in table.column_names if not INDEX_NAME.fullmatch(name)]
    _check_names(file, names)
    if table.num_rows == 0:
        raise ValueError(f"{file}: no rows; columns: {_listed(names)}")
    targets = _target_columns(file, names, target, require_target)
    columns = {name: _arrow_column(pyarrow, file, name, table.column(name)) for name in names}
    for name, column in columns.items():
        if (row := _infinite_row(column)) is not None:
            raise ValueError(
                f"{file}, row {row} (counting from 0), column {name!r}: inf; only finite numbers are accepted"
            )
    return _table(file, columns, targets, target)


def _arrow_table(pyarrow: Any, parquet: Any, file: Path, stream: IO[bytes]) -> Any:
    """The whole table of a Parquet stream, its text as dictionaries, once its footer is seen to be of its size."""
    size = os.fstat(stream.fileno()).st_size
    bounds: dict[str, Any] = {"thrift_string_size_limit": size, "thrift_container_size_limit": size}
    with _decoder(file, "Parquet"):
        described = parquet.ParquetFile(stream, **bounds)
        schema, footer = described.schema_arrow, described.metadata
        # Not by column, whose statistics can end the process: pyarrow lets their C++ exceptions through.
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        rows = max(footer.num_rows, sum(group.num_rows for group in groups))
        unpacked = max(rows * len(schema.names) * 8, sum(group.total_byte_size for group in groups))
    _check_unpacked(file, size, unpacked, "write it without compression and dictionaries")
    for name, kind in zip(schema.names, schema.types):
        if not INDEX_NAME.fullmatch(name):
            _check_kind(pyarrow, file, name, kind)
    text = [name for name, kind in zip(schema.names, schema.types) if _is_text(pyarrow, kind)]
    bounds["page_checksum_verification"] = True
    with _decoder(file, "Parquet"):
        try:
            return parquet.ParquetFile(stream, read_dictionary=text, **bounds).read()
        except (NotImplementedError, OSError):  # broken, or of an encoding that pyarrow makes no dictionary of
            return parquet.ParquetFile(stream, **bounds).read()


def _check_kind(pyarrow: Any, file: Path, name: str, kind: Any) -> Any:
    """The type of a column's values; ValueError unless they are numbers, booleans or text."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if not (number or _is_text(pyarrow, kind) or types.is_null(kind)):
        raise ValueError(
            f"{file}: column {name!r} holds {kind}; accepted: numbers, booleans, strings and dictionaries of them "
            "(spread a nested column over several, turn a time into a number)"
        )
    return kind


def _is_text(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def _arrow_texts(pyarrow: Any, column: Any) -> np.ndarray:
    """An Arrow column of text -> (n,) objects, str and None; equal texts of a dictionary are one object."""
    texts, start = np.empty(len(column), object), 0
    for chunk in column.chunks:
        if pyarrow.types.is_dictionary(chunk.type):
            words = np.array([*chunk.dictionary.to_pylist(), None], object)
            found = words[chunk.indices.cast(pyarrow.int64()).fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]
        else:
            found = chunk.to_pylist()
        texts[start : start + len(chunk)] = found
        start += len(chunk)
    return texts


def _arrow_column(pyarrow: Any, file: Path, name: str, column: Any) -> np.ndarray:
    """An Arrow column -> (n,) numbers, in their own dtype or with NaN for null in float64, or objects, str and None."""
    kind = _check_kind(pyarrow, file, name, column.type)
    with _decoder(f"{file}, column {name!r}", "Parquet"):
        if _is_text(pyarrow, kind):
            return _arrow_texts(pyarrow, column)
        whole = column.null_count == 0 and not pyarrow.types.is_decimal(kind)
        numbers: np.ndarray = column.cast(kind if whole else pyarrow.float64()).to_numpy()
        return numbers


READERS: dict[str, Callable[[Path, str | None, bool], RawData]] = {
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".tsv": _read_csv,
    ".tsv.gz": _read_csv,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".parquet": _read_parquet,
}
