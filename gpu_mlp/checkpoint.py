"""Model files: safetensors, written so that a crash leaves the old file or the new one, and read with suspicion.

A leaf: knows tensors and metadata, not networks. No pickle on the way in or out.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "gpu_mlp.model"
FORMAT_VERSION = 1


def write(path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> Path:
    """Write ``tensors`` and a JSON-able ``header`` to ``path``: beside it first, synced, then renamed over it."""
    from safetensors.numpy import save

    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "header": json.dumps(header, allow_nan=False)}
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return write_bytes(path, _with_sorted_metadata(save(contiguous, metadata)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """The same file with its metadata in order: safetensors writes them in any; equal models are to be equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a whole file or nothing: into a temporary file in the same folder, synced, then renamed."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private; a model file is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets a folder be synced."""
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


def read(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The tensors and the header of a model file; ValueError for anything that is not one."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model: no file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            header = _header(path, file.metadata() or {})
            tensors = {}
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                kind = file.get_slice(name).get_dtype()
                if kind not in ("F32", "F64"):
                    raise ValueError(f"model: {path}: tensor {name} is of type {kind}, not F32 or F64")
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"model: {path} is not a readable safetensors file ({error})") from None
    return tensors, header


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object that `write` put in, once format and version are seen to be this one's."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"model: {path} is a safetensors file, but not one that gpu_mlp wrote")
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise ValueError(f"model: {path} has format version {version}; this release reads {FORMAT_VERSION}")
    try:
        header = json.loads(metadata["header"])
    except (KeyError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"model: {path} has no readable header") from None
    if not isinstance(header, dict):
        raise ValueError(f"model: {path} has no readable header")
    return header
