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
    return write_bytes(path, save(contiguous, metadata))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a whole file or nothing: into a temporary file in the same folder, synced, then renamed."""
    path = Path(path)
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
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"model: {path} is a safetensors file, but not one that gpu_mlp wrote")
            if metadata.get("format_version") != str(FORMAT_VERSION):
                found = metadata.get("format_version")
                raise ValueError(f"model: {path} has format version {found}; this release reads {FORMAT_VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"model: {path} is not a readable safetensors file ({error})") from None
    try:
        header = json.loads(metadata["header"])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(f"model: {path} has no readable header") from None
    if not isinstance(header, dict):
        raise ValueError(f"model: {path} has no readable header")
    return tensors, header
