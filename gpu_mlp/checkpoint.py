"""Checkpoints of a training run: one file that holds all its future depends on, and the folder that keeps the last few.

Leans on `tensorfile` for the file. Knows neither networks nor trainers: what goes into a snapshot, and whether one fits
a run, is said in `resuming`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from . import checks, tensorfile
from .history import improves
from .tensorfile import Expected

FILE = tensorfile.Format("checkpoint", "a training run", 1)
SUFFIX = ".safetensors"
LOCK = ".lock"  # a file of this name in the folder is locked by the process that writes to it
UNITS: dict[str, Any] = {
    "step": "steps", "steps": "steps", "epoch": "epochs", "epochs": "epochs",
    "s": 1, "second": 1, "seconds": 1, "min": 60, "minute": 60, "minutes": 60, "h": 3600, "hour": 3600, "hours": 3600,
}  # fmt: skip


@dataclass
class Snapshot:
    """Arrays by name, and beside them what is JSON; ``step`` is the number of steps begun, ``figure`` what the
    monitored column of the history was at the end of the epoch that the snapshot was taken at, if at any."""

    tensors: dict[str, NDArray[Any]]
    header: dict[str, Any]
    step: int
    figure: float | None = None


@dataclass(frozen=True)
class Checkpoints:
    """Where a run puts its checkpoints, how often, and how many it keeps.

    folder: made where it is missing. every: "500 steps", "2 epochs", "30 seconds", "10 minutes" or "1 hour" at the
    least; a checkpoint is also written where a run ends, however it ends, unless it diverged. keep: the last so many
    stay, and the best by the history's monitor of those that were written at the end of an epoch.
    """

    folder: str | os.PathLike[str]
    every: str = "60 seconds"
    keep: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)):
            raise TypeError(f"folder: expected a path, got {type(self.folder).__name__}")
        interval(self.every)
        checks.integer("keep", self.keep, 1)


def interval(every: str) -> tuple[float, str]:
    """ "500 steps" as (500, "steps"), "2 epochs" as (2, "epochs"), "10 minutes" as (600, "seconds")."""
    if not isinstance(every, str):
        raise TypeError(f"every: expected text such as '500 steps', got {every!r} ({type(every).__name__})")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)?\s*([a-z]+)\s*", every)
    unit = UNITS.get(found[2]) if found else None
    count = float(found[1] or 1) if found else 0.0
    if unit is None or count <= 0 or (isinstance(unit, str) and count != int(count)):
        raise ValueError(f"every: expected such as '500 steps', '2 epochs' or '30 seconds', got {every!r}")
    return (count, unit) if isinstance(unit, str) else (count * unit, "seconds")


def check(checkpoints: Checkpoints | str | os.PathLike[str] | None) -> Checkpoints | None:
    """``checkpoints`` as a policy: itself, that of a folder, or None."""
    if checkpoints is None or isinstance(checkpoints, Checkpoints):
        return checkpoints
    if not isinstance(checkpoints, (str, os.PathLike)):
        raise TypeError(f"checkpoints: expected a folder or Checkpoints, got {type(checkpoints).__name__}")
    return Checkpoints(checkpoints)


# --- one file --------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], snapshot: Snapshot) -> Path:
    """Write a snapshot whole or not at all; OSError where the disk refuses."""
    header = {
        "step": snapshot.step,
        "figure": snapshot.figure,
        "checksums": {name: _checksum(tensor) for name, tensor in snapshot.tensors.items()},
        **snapshot.header,
    }
    return tensorfile.write(path, snapshot.tensors, {**header, "checksum": _checksum_of(header)}, FILE)


Fits = Callable[[Mapping[str, Any]], Mapping[str, Expected]]  # the tensors that follow from a header that fits a run


def read(path: str | os.PathLike[str], fits: Fits) -> Snapshot:
    """The snapshot in a file that `write` wrote.

    ``fits`` is given the header, says which tensors follow from it, or raises what it likes where the header does not
    fit. FileNotFoundError where there is no file; `Damaged` for one that is not as it was written.
    """
    with contextlib.ExitStack() as stack:
        with _damage(path):
            file = stack.enter_context(tensorfile.opened(path, FILE))
            header = file.header
            if header.pop("checksum") != _checksum_of(header):
                raise ValueError("its header is not what was written")
            step, checksums = checks.integer("step", header["step"], 0), dict(header["checksums"])
            figure = None if header["figure"] is None else checks.real("figure", header["figure"])
        expected = fits(header)
        with _damage(path):
            file.expect(expected)
            tensors = dict(file.arrays())
            for name, tensor in tensors.items():
                if _checksum(tensor) != checksums[name]:
                    raise ValueError(f"tensor {name} is not what was written")
    return Snapshot(tensors, header, step, figure)


class Damaged(ValueError):
    """A checkpoint that is not as it was written; the message says how."""


@contextlib.contextmanager
def _damage(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        told = reason if str(path) in reason else f"checkpoint: {path}: {reason}"
        raise Damaged(told) from None


def _checksum(tensor: NDArray[Any]) -> int:
    """The CRC-32 of the bytes of an array."""
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _checksum_of(header: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass
class Folder:
    """The checkpoints of a run on the disk, in the order in which they were written, and when the next one is due."""

    policy: Checkpoints
    paths: list[Path] = field(default_factory=list)
    figures: dict[Path, float] = field(default_factory=dict)
    monitor: str = "cost"

    def __post_init__(self) -> None:
        self.path = Path(self.policy.folder)
        self._count, self._unit = interval(self.policy.every)
        self._last = {"steps": 0.0, "epochs": 0.0, "seconds": time.monotonic()}
        self._lock: IO[bytes] | None = None
        self._written = (-1, "")  # the step of the last snapshot, and why the run ended there

    def open(self) -> None:
        """Make the folder, see that it can be written to, and find what is in it; ValueError where that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / LOCK)
            for leftover in self.path.glob(f".step-*{SUFFIX}.*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            tensorfile.write_bytes(self.path / ".probe", b"").unlink()
        except BlockingIOError:
            raise ValueError(
                f"checkpoints: another process is writing to {self.path}; wait for it, or end it"
            ) from None
        except OSError as error:
            raise ValueError(f"checkpoints: cannot write to {self.path} ({_reason(error)})") from None
        self.paths = listed(self.path)
        for path in self.paths:
            with contextlib.suppress(Exception), tensorfile.opened(path, FILE) as file:
                self.figures[path] = checks.real("figure", file.header["figure"])

    @property
    def timed(self) -> bool:
        """Whether the next checkpoint is due by the clock, which no two processes read alike."""
        return self._unit == "seconds"

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, step: int, epoch: int) -> None:
        """Count from here on."""
        self._last = {"steps": float(step), "epochs": float(epoch), "seconds": time.monotonic()}

    def due(self, step: int, epoch: int) -> bool:
        """Whether a checkpoint is due after ``step`` steps and ``epoch`` whole epochs."""
        now = {"steps": float(step), "epochs": float(epoch), "seconds": time.monotonic()}
        return now[self._unit] - self._last[self._unit] >= self._count

    def write(self, snapshot: Snapshot, epoch: int) -> None:
        """Write a snapshot, and take away what need not be kept.

        Where the disk refuses, the run goes on with a warning, and what was written before stays.
        """
        path = self.path / f"step-{snapshot.step:09d}{SUFFIX}"
        try:
            write(path, snapshot)
        except OSError as error:
            stands = f"{self.paths[-1].name} stands" if self.paths else "there is none yet"
            warnings.warn(
                f"checkpoint: {path} cannot be written ({_reason(error)}); {stands}, the run goes on and tries again "
                f"when the next one is due",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self._written = (snapshot.step, str(snapshot.header["fit"]["stopped"]))
            self.paths = [*(kept for kept in self.paths if kept != path), path]
            self.figures.pop(path, None)
            if snapshot.figure is not None:
                self.figures[path] = snapshot.figure
            self._prune()
        self._last = {"steps": float(snapshot.step), "epochs": float(epoch), "seconds": time.monotonic()}

    def has(self, step: int, reason: str) -> bool:
        """Whether the last snapshot was of this step, and of a run that ended for the same reason, or had not ended."""
        return self._written == (step, reason)

    def _prune(self) -> None:
        kept = {*self.paths[-self.policy.keep :], *self._best()}
        for path in self.paths:
            if path not in kept:
                with contextlib.suppress(OSError):  # one file too many does no harm
                    path.unlink()
        self.paths = [path for path in self.paths if path in kept]

    def _best(self) -> list[Path]:
        best: Path | None = None
        for path in self.paths:
            figure = self.figures.get(path)
            if figure is not None and (best is None or improves(self.monitor, figure, self.figures[best])):
                best = path
        return [] if best is None else [best]


def _locked(path: Path) -> IO[bytes] | None:
    """The file at ``path`` with a lock on it that goes with the process; None where the system has no such locks.

    BlockingIOError where another process has the lock.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:  # a file system without locks
        file.close()
        return None
    return file


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    return sorted(path for path in folder.glob(f"step-*{SUFFIX}") if re.fullmatch(r"step-\d{9,}", path.stem))


def newest(where: Path, fits: Fits) -> Snapshot | None:
    """The newest whole checkpoint of a folder, or of a file that is named itself; None for a folder without any.

    Where a file is damaged the one before it is taken, with a warning; ValueError where none of them can be read.
    """
    if not where.is_dir():
        return read(where, fits)
    damage = ""
    for path in reversed(listed(where)):
        try:
            return read(path, fits)
        except Damaged as error:
            if not damage:
                warnings.warn(f"{error}; the checkpoint before it is taken", RuntimeWarning, stacklevel=2)
            damage = damage or str(error)
    if damage:
        raise ValueError(f"resume: no checkpoint in {where} can be read ({damage})")
    return None


def metadata(folder: Path) -> Mapping[str, Any] | None:
    """What the network of the newest readable checkpoint in a folder was described by; None where there is none."""
    for path in reversed(listed(folder)):
        with contextlib.suppress(KeyError, TypeError, ValueError, OSError), tensorfile.opened(path, FILE) as file:
            return dict(file.header["metadata"])
    return None


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
