"""What was found to be fastest on a device, kept on disk: measured once, the same from then on.

One small JSON file for all of a user's programs: ``gemms.json`` in GPU_MLP_CACHE, or in the user's cache folder. With
GPU_MLP_CACHE=0 nothing is kept; and nothing is looked for either, since a choice that is made anew in every run may
fall differently, and other algorithms give other last bits. A leaf.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import tensorfile
from ..notices import say_once

FORMAT = "gpu_mlp gemms 1"
FILE = "gemms.json"
VARIABLE = "GPU_MLP_CACHE"
_PINNED = "every GEMM takes the algorithm that cuBLAS proposes first, and none is searched"


def folder() -> Path | None:
    """Where choices are kept; None where they are not to be."""
    given = os.environ.get(VARIABLE)
    if given == "0":
        return None
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "gpu_mlp"


class Choices:
    """The choices for one device, by name. They are read once; every new one is merged into the file at once.

    device: whatever a choice depends on beside its name: the model, its multiprocessors, the library's version.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._path: Path | None = None
        self._known: dict[str, Any] = {}
        try:
            where = folder()
            if where is not None:
                where.mkdir(parents=True, exist_ok=True)
                with _locked(where):  # a folder that cannot be written to is found out before anything is searched
                    self._known = dict(_read(where / FILE).get(device, {}))
                self._path = where / FILE
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home folder
            self._give_up(error)

    @property
    def path(self) -> Path | None:
        """The file; None where nothing can be kept."""
        return self._path

    def get(self, name: str) -> Any:
        """What was chosen, or None."""
        return self._known.get(name)

    def keep(self, name: str, choice: Any) -> Any:
        """Keep ``choice``, and give what holds from now on: another process's where that was earlier; None where
        nothing can be kept any more."""
        with self._lock:
            if self._path is None:
                return None
            try:
                with _locked(self._path.parent):
                    devices = _read(self._path)
                    mine = devices.setdefault(self._device, {})
                    if mine.get(name) is None:
                        mine[name] = choice
                        _write(self._path, devices)
            except (OSError, ValueError) as error:
                self._give_up(error)
                return None
            self._known = dict(mine)
            return self._known[name]

    def forget(self, name: str) -> None:
        """Forget a choice that does not fit any more."""
        with self._lock:
            self._known.pop(name, None)
            if self._path is None:
                return
            try:
                with _locked(self._path.parent):
                    devices = _read(self._path)
                    if devices.get(self._device, {}).pop(name, None) is not None:
                        _write(self._path, devices)
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._path = None
        say_once(f"the choices of GEMM algorithms cannot be kept ({error}), so {_PINNED}; {VARIABLE} names a folder")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The choices of every device; a ValueError for a file that is damaged, or not ours."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:  # no JSON, or no text at all
        raise ValueError(f"{path} is damaged; remove it") from None
    devices = content.get("devices") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(devices, dict) or not all(isinstance(names, dict) for names in devices.values()):
        raise ValueError(f"{path} is not a file of this program, or of another version; remove it")
    return devices


def _write(path: Path, devices: dict[str, dict[str, Any]]) -> None:
    """Replace the file, whole or not at all."""
    text = json.dumps({"format": FORMAT, "devices": devices}, indent=1, sort_keys=True)
    tensorfile.write_bytes(path, text.encode())


@contextmanager
def _locked(where: Path) -> Iterator[None]:
    """Alone among the processes that keep choices there; on systems without flock only against torn files."""
    with open(where / f".{FILE}.lock", "a", encoding="utf-8") as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back
