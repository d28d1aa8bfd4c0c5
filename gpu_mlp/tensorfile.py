"""Files of tensors in the safetensors format: written whole or not at all, and read with suspicion.

A leaf: knows tensors and metadata, not networks. A file from a stranger is checked to its last byte, against the format
and against what its reader expects, before any array is made. No pickle on the way in or out.

The format (https://github.com/huggingface/safetensors): the length of the header as 8 bytes, little-endian; the header,
JSON; then the tensors' bytes, one after the other without a gap. It is read and written here and not by its library,
because that cannot be told what to expect, takes the last of two entries of one name, and builds the file in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from . import checks

DTYPES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
MAX_HEADER_BYTES = 32 << 20  # what a header may take: some 300,000 prepared columns
MAX_VALUES = 1_000_000  # and how many values, keys and brackets its JSON may have: each takes some 100 bytes once read
MAX_DIGITS = 40
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Format:
    """A kind of file: what it is called in messages and in the file, what it holds, and in which version it is.

    ``noun`` "model" makes the format "gpu_mlp.model"; ``holds`` is what a message says a file should describe.
    """

    noun: str
    holds: str
    version: int

    @property
    def name(self) -> str:
        """What stands in the file."""
        return f"gpu_mlp.{self.noun}"


@dataclass(frozen=True)
class Expected:
    """What a tensor must be: its shape, where None takes any length, one of some types, and finite or not."""

    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...] = ("F32", "F64")
    finite: bool = True


@dataclass(frozen=True)
class _Entry:
    """What the header says of a tensor; ``begin`` counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any], format: Format
) -> Path:
    """Write ``tensors`` and a JSON-able ``header`` to ``path``, whole or not at all; equal content, equal bytes.

    Tensors go from their memory to the file, without a copy of them all in between. Raises ValueError or TypeError,
    before the file is touched, for a header that could not be read back, and OSError where the disk refuses.
    """
    metadata = {"format": format.name, "format_version": str(format.version), "header": _text(format, header)}
    kinds = {name: np.dtype(tensor.dtype).newbyteorder("<") for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # the library's order: all are aligned
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        entries[name] = {
            "dtype": NAMES[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":"))
    text += " " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    _check_writable(format, text)
    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        for name in order:
            plain = np.ascontiguousarray(tensors[name], kinds[name])
            file.write(plain.reshape(-1).view(np.uint8).data)
    return Path(path)


def _text(format: Format, header: Mapping[str, Any]) -> str:
    """``header`` as JSON that `_parsed` takes."""
    try:
        text = json.dumps(header, allow_nan=False)
        _parsed(text)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{format.noun}: its description cannot be written as JSON ({checks.brief(error)})") from None
    return text


def _check_writable(format: Format, text: str) -> None:
    """Refuse to write a header that `opened` would not read."""
    for name, count, most in (("bytes", len(text), MAX_HEADER_BYTES), ("values", _values(text), MAX_VALUES)):
        if count > most:
            raise ValueError(f"{format.noun}: its description takes {count} {name}, more than {most}")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a whole file or nothing: into a temporary file in the same folder, synced, then renamed."""
    with replacing(Path(path)) as file:
        file.write(content)
    return Path(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` once it is complete and on the disk; until then the old one stays."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private; this one is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, where the system lets a folder be synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


# --- reading ---------------------------------------------------------------------------------------------------------


class TensorFile:
    """An open file whose layout has been checked. ``header`` is what `write` was given; no tensor is read yet.

    The header's own values are a stranger's: the reader checks each, says by `expect` which tensors follow from them,
    and then takes the tensors from `arrays`.
    """

    def __init__(self, path: Path, file: io.BufferedReader, format: Format) -> None:
        self._path, self._file, self._format = path, file, format
        size = os.fstat(file.fileno()).st_size
        try:
            self._start, entries = _entries(file, size)
            metadata = _metadata(entries.pop("__metadata__", None))
            self._tensors = _tensors(entries, size - self._start)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{format.noun}: {path} is not a readable safetensors file ({checks.brief(error)})"
            ) from None
        self.header = self._own(metadata)
        self._expected: Mapping[str, Expected] = {}

    def expect(self, expected: Mapping[str, Expected]) -> None:
        """A ValueError unless the tensors are exactly these, each of one of its types and of its shape."""
        odd = sorted(set(self._tensors) ^ set(expected))
        if odd:
            raise ValueError(
                f"tensors {checks.brief(', '.join(odd[:6]))}{', …' * (len(odd) > 6)} are missing or unknown"
            )
        for name, entry in self._tensors.items():
            wanted = expected[name]
            if entry.dtype not in wanted.dtypes:
                raise ValueError(f"tensor {name} is of type {entry.dtype}, not {' or '.join(wanted.dtypes)}")
            lengths = zip(entry.shape, wanted.shape)
            if len(entry.shape) != len(wanted.shape) or any(n != m for n, m in lengths if m is not None):
                raise ValueError(f"tensor {name} has shape {entry.shape}, not {wanted.shape}")
        self._expected = expected

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Every expected tensor, one after the other in the order of the file, finite where it was to be."""
        for name, entry in self._tensors.items():
            array = np.empty(entry.shape, DTYPES[entry.dtype])
            self._file.seek(self._start + entry.begin)
            if self._file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise ValueError(f"{self._format.noun}: {self._path} was cut short while it was read")
            if entry.dtype == "BOOL" and array.size and array.view(np.uint8).max() > 1:
                raise ValueError(f"{self._format.noun}: {self._path}: tensor {name} holds more than true and false")
            if self._expected[name].finite:
                checks.finite(f"{self._format.noun}: {self._path}: tensor {name}", np.atleast_1d(array))
            yield name, array.astype(array.dtype.newbyteorder("="), copy=False)

    def _own(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        """The JSON object that `write` put in, once format and version are seen to be this one's."""
        noun, path, found = self._format.noun, self._path, metadata.get("format", "")
        if found != self._format.name:
            if found.startswith("gpu_mlp."):
                raise ValueError(f"{noun}: {path} is a {checks.brief(found.removeprefix('gpu_mlp.'))}, not a {noun}")
            raise ValueError(f"{noun}: {path} is a safetensors file, but not one that gpu_mlp wrote")
        version = metadata.get("format_version")
        if version != str(self._format.version):
            wanted = self._format.version
            raise ValueError(f"{noun}: {path} has format version {checks.brief(version)}; this release reads {wanted}")
        try:
            header = _parsed(metadata["header"])
            if not isinstance(header, dict):
                raise ValueError("not a JSON object")
            if odd := set(metadata) - {"format", "format_version", "header"}:
                raise ValueError(f"unknown metadata {', '.join(sorted(odd))}")
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{noun}: {path} has no readable header ({checks.brief(error)})") from None
        return header

    def refusal(self, error: Exception) -> ValueError:
        """The error for a header, or tensors, that do not make sense to the reader: one line, of bounded length."""
        reason = f"{checks.brief(error)} is missing" if isinstance(error, KeyError) else checks.brief(error)
        return ValueError(f"{self._format.noun}: {self._path} does not describe {self._format.holds} ({reason})")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], format: Format) -> Iterator[TensorFile]:
    """The file at ``path``, of this format; FileNotFoundError where there is none, ValueError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{format.noun}: no file at {path}")
    with path.open("rb") as file:
        yield TensorFile(path, file, format)


def _entries(file: io.BufferedReader, size: int) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and the header as it stands in the file, of ``size`` bytes."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER_BYTES}")
    entries = _parsed(file.read(length).decode())
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    return 8 + length, entries


def _metadata(found: Any) -> dict[str, str]:
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata are not text by name")
    return found


def _tensors(entries: Mapping[str, Any], size: int) -> dict[str, _Entry]:
    """The tensors by name, in the order of their bytes, which fill the ``size`` bytes without gap or overlap."""
    tensors = {name: _entry(name, found) for name, found in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in ordered.items():
        if entry.begin != position:
            raise ValueError(f"tensor {checks.brief(name)} begins at byte {entry.begin}, not {position}")
        position = entry.end
    if position != size:
        raise ValueError(f"tensors of {position} bytes in a file with {size} for them")
    return ordered


def _entry(name: str, found: Any) -> _Entry:
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {checks.brief(name)} has no dtype, shape and data_offsets, or more than these")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {checks.brief(name)} is of type {checks.brief(dtype)}; known: {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {checks.brief(name)} has the shape {checks.brief(shape)}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {checks.brief(name)} has the offsets {checks.brief(offsets)}")
    begin, end = offsets
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if end - begin != size:
        raise ValueError(f"tensor {checks.brief(name)} has {end - begin} bytes for {size}")
    return _Entry(dtype, tuple(shape), begin, end)


def _counts(values: Any) -> bool:
    """Whether this is a list of whole numbers from 0 up."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


# --- JSON from strangers ---------------------------------------------------------------------------------------------


def _parsed(text: str) -> Any:
    """The value of a JSON text of bounded size, whose objects have no name twice and whose numbers are finite."""
    if _values(text) > MAX_VALUES:
        raise ValueError(f"JSON of more than {MAX_VALUES} values")
    return json.loads(
        text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
    )


def _values(text: str) -> int:
    """At least as many as the values, names and brackets of a JSON text."""
    return sum(map(text.count, "[{,:"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = iter(found)  # in the order in which each came first: the first that differs came before
        twice = next(name for name, _ in pairs if name != next(names, None))
        raise ValueError(f"JSON with {checks.brief(twice)!r} twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {checks.brief(digits)}")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name}, which is not a number")
