"""Logs of a training run, a row an epoch: as CSV, as lines of JSON, or for TensorBoard. Callbacks for `Trainer.fit`.

A row is what the history has of an epoch: epoch, step, cost, learning_rate, seconds, samples_per_second and, with
validation, validation_loss and validation_<metric>. There are none of single updates, since reading the cost of each
would mean waiting for the device after each. Leans on `tensorfile` for whole files.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import math
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import checks, tensorfile

PathLike = str | os.PathLike[str]
_count = itertools.count()


class Log:
    """What every log does: it takes rows, drops those of updates that a resumed run does anew, and ends no training.

    Whatever goes wrong while it writes, a full disk say, is a RuntimeWarning, once; it tries again with the next row.
    """

    first_rank_only = True  # where ranks train together one of them calls it

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._warned = False

    def __call__(self, trainer: Any, row: Mapping[str, float]) -> None:
        """Write the row of an epoch."""
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
        self._safely(lambda: self._append(plain))

    def rewind(self, step: int) -> None:
        """Drop what comes after update ``step``, from which a resumed run goes on."""
        self._safely(lambda: self._rewind(checks.integer("step", step, 0)))

    def _safely(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not self._warned:
                self._warned = True
                reason = checks.brief(getattr(error, "strerror", None) or error)
                warnings.warn(
                    f"log: {self.path} cannot be written ({reason}); the training goes on", RuntimeWarning, stacklevel=4
                )

    def _append(self, row: dict[str, float]) -> None:
        raise NotImplementedError

    def _rewind(self, step: int) -> None:
        raise NotImplementedError


def _append_whole(path: Path, content: bytes) -> None:
    """Append ``content`` to a file, or leave the file as it was."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:
            file.truncate(size)
            raise


# --- lines of text ---------------------------------------------------------------------------------------------------


class _Lines(Log):
    """A log of one line a row. A line that a killed run left torn is removed; other files are refused, not changed."""

    beginning = b""

    def __init__(self, path: PathLike) -> None:
        super().__init__(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"log: there is no folder {self.path.parent}")
        if self.path.is_dir():
            raise ValueError(f"log: {self.path} is a folder; expected the path of a file")
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.startswith(self.beginning[: len(content)]):
                raise ValueError(f"log: {self.path} exists and is no log of this kind; choose another path")
            os.truncate(self.path, content.rfind(b"\n") + 1)


class CSVLog(_Lines):
    """A CSV file with a header and a row an epoch, appended and flushed at the end of each.

    A file that is there is gone on with; where a row has new columns the file is rewritten with them, empty in older
    rows. Raises FileNotFoundError for a path in no folder, ValueError for an existing file of another kind.
    """

    beginning = b"epoch,step,"

    def _append(self, row: dict[str, float]) -> None:
        columns, fields = self._columns(), {name: repr(value) for name, value in row.items()}
        if not columns:
            _append_whole(self.path, (_line(fields) + _line(fields.values())).encode())
        elif new := [name for name in fields if name not in columns]:
            self._replace([*columns, *new], [*self._rows(), fields])
        else:
            _append_whole(self.path, _line(fields.get(name, "") for name in columns).encode())

    def _rewind(self, step: int) -> None:
        if self._columns():
            self._replace(self._columns(), [row for row in self._rows() if int(row["step"]) <= step])

    def _columns(self) -> list[str]:
        """The header of the file; none where there is no file."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _rows(self) -> list[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, restval=""))

    def _replace(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        text = "".join(_line(row.get(name, "") for name in columns) for row in rows)
        tensorfile.write_bytes(self.path, (_line(columns) + text).encode())


def _line(fields: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue()


class JSONLLog(_Lines):
    """A file of one JSON object a line, a line an epoch, appended and flushed at the end of each.

    A number that is not finite is null, since JSON has no word for it. A file that is there is gone on with. Raises
    FileNotFoundError for a path in no folder, ValueError for an existing file of another kind.
    """

    beginning = b'{"epoch": '

    def _append(self, row: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        _append_whole(self.path, json.dumps(finite, allow_nan=False).encode() + b"\n")

    def _rewind(self, step: int) -> None:
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            tensorfile.write_bytes(self.path, b"".join(line for line in lines if json.loads(line)["step"] <= step))


# --- TensorBoard -----------------------------------------------------------------------------------------------------


class TensorBoardLog(Log):
    """A folder of event files for ``tensorboard --logdir``: every column but epoch and step as a scalar over the step.

    The events are tensorboardX's (``pip install 'gpu-mlp[tensorboard]'``); they are written here, since the thread that
    its writer has would hold the training up for ever where the disk is full. After `rewind` TensorBoard shows nothing
    of the steps dropped.
    Raises ValueError where tensorboardX is missing or the path is a file.
    """

    def __init__(self, folder: PathLike) -> None:
        super().__init__(folder)
        _check_tensorboard()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"log: {self.path} is a file; expected the path of a folder")
        # of one log alone, since two could begin in one second
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_count)}"
        self._file = self.path / name

    def _append(self, row: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        figures = ((name, value) for name, value in row.items() if name not in ("epoch", "step"))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures]
        self._write(step=int(row["step"]), summary=Summary(value=values))

    def _rewind(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        """Append an event to this log's own file, whose first event says the version of the format."""
        from tensorboardX.proto.event_pb2 import Event

        self.path.mkdir(parents=True, exist_ok=True)
        first = b"" if self._file.exists() else _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        _append_whole(self._file, first + _record(Event(wall_time=time.time(), **fields)))


def _record(event: Any) -> bytes:
    """An event as event files hold it, TFRecord: its length, that one's CRC, the bytes, their CRC."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _check_tensorboard() -> None:
    try:
        import tensorboardX.record_writer  # noqa: F401
    except ImportError:
        raise ValueError("log: TensorBoard logs need tensorboardX; pip install 'gpu-mlp[tensorboard]'") from None


# --- by name ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[PathLike], Log], str]] = {  # and where each writes in a run folder
    "csv": (CSVLog, "log.csv"),
    "jsonl": (JSONLLog, "log.jsonl"),
    "tensorboard": (TensorBoardLog, "tensorboard"),
}


def check(text: str | None) -> list[str]:
    """The kinds of log that ``text`` lists, as in ``csv,tensorboard``; ValueError where one is unknown or cannot be."""
    listed = [name.strip() for name in (text or "").split(",") if name.strip()]
    if "tensorboard" in listed:
        _check_tensorboard()
    return [checks.choice("log", name, KINDS) for name in dict.fromkeys(listed)]


def of(text: str | None, folder: PathLike) -> list[Log]:
    """The logs that ``text`` lists, each in its place in the run folder ``folder``."""
    return [kind(Path(folder) / place) for kind, place in (KINDS[name] for name in check(text))]
