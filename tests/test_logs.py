"""Logs: every row of the history, to the digit, whatever ends a run; and a log that fails ends none."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest

from gpu_mlp import MLP, CSVLog, JSONLLog, TensorBoardLog, Trainer, logs

ROW = {"epoch": 1, "step": 10, "cost": 0.1 + 0.2, "learning_rate": 1e-3}


def rows(n, start=1, **more):
    return [{"epoch": e, "step": 10 * e, "cost": 1 / (3 * e), **more} for e in range(start, start + n)]


def written(log, some):
    for row in some:
        log(None, row)


def csv_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


def jsonl_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    """Every event of a folder, read by the record format's own words: length, its CRC, the bytes, their CRC."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("*tfevents*"), key=lambda p: p.stat().st_mtime_ns):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            found.append(event_pb2.Event.FromString(content[place + 12 : place + 12 + size]))
            place += 16 + size
    return found


def scalars(folder):
    """{step: {tag: value}} as TensorBoard shows them: what a start at a step takes back is not there."""
    shown = {}
    for event in events(folder):
        if event.HasField("session_log"):
            shown = {step: values for step, values in shown.items() if step < event.step}
        elif event.HasField("summary"):
            shown.setdefault(event.step, {}).update({v.tag: v.simple_value for v in event.summary.value})
    return shown


LINES = [(CSVLog, csv_rows), (JSONLLog, jsonl_rows)]


@pytest.fixture(params=LINES, ids=["csv", "jsonl"])
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_fit_is_logged_to_the_digit(tmp_path):
    pytest.importorskip("tensorboardX")
    x = np.random.default_rng(0).normal(size=(60, 3))
    callbacks = [CSVLog(tmp_path / "a.csv"), JSONLLog(tmp_path / "a.jsonl"), TensorBoardLog(tmp_path / "events")]
    trainer = Trainer(MLP([3, 4, 2], output="softmax"))
    data = x, np.arange(60) % 2
    history = trainer.fit(data, epochs=3, batch_size=16, validation=0.25, progress=False, callbacks=callbacks)
    assert csv_rows(tmp_path / "a.csv") == history.rows
    assert jsonl_rows(tmp_path / "a.jsonl") == history.rows
    shown = scalars(tmp_path / "events")
    assert list(shown) == history["step"]
    for row in history:
        figures = {k: np.float32(v) for k, v in row.items() if k not in ("epoch", "step")}
        assert shown[row["step"]] == figures


def test_every_row_is_in_the_file_at_once(tmp_path, kind):
    log, read = kind
    log = log(tmp_path / "a")
    for n, row in enumerate(rows(4), start=1):
        log(None, row)
        assert read(tmp_path / "a") == rows(n)


def test_a_number_of_numpy_and_one_that_is_not_finite(tmp_path):
    row = {**ROW, "epoch": np.int64(1), "cost": np.float64(0.25), "a": math.inf, "b": math.nan}
    CSVLog(tmp_path / "a.csv")(None, row)
    assert (tmp_path / "a.csv").read_text() == "epoch,step,cost,learning_rate,a,b\n1,10,0.25,0.001,inf,nan\n"
    JSONLLog(tmp_path / "a.jsonl")(None, row)
    assert jsonl_rows(tmp_path / "a.jsonl") == [{**ROW, "cost": 0.25, "a": None, "b": None}]


# --- again -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_gone_on_with(tmp_path, kind):
    log, read = kind
    written(log(tmp_path / "a"), rows(2))
    written(log(tmp_path / "a"), rows(2, start=3))
    assert read(tmp_path / "a") == rows(4)


def test_a_row_that_a_kill_left_torn_is_removed(tmp_path, kind):
    log, read = kind
    path = tmp_path / "a"
    written(log(path), rows(3))
    whole = path.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = log(path)
        kept = max(end for end in ends if end <= cut)
        assert path.read_bytes() == whole[:kept]
        written(again, rows(1, start=9))
        lines = kept and whole[:kept].count(b"\n") - (log is CSVLog)
        assert read(path) == [*rows(lines), *rows(1, start=9)], "and never two headers"


@pytest.mark.skipif(os.name != "posix", reason="a process is killed")
def test_a_killed_run_leaves_whole_rows(tmp_path, kind):
    log, read = kind
    code = f"""
        import os, signal, numpy as np
        from gpu_mlp import MLP, Trainer, {log.__name__}
        def kill(trainer, row):
            if row["epoch"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        data = np.ones((8, 2)), np.zeros((8, 1))
        callbacks = [{log.__name__}({str(tmp_path / "a")!r}), kill]
        Trainer(MLP([2, 1])).fit(data, epochs=9, progress=False, callbacks=callbacks)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert done.returncode == -9
    assert [row["epoch"] for row in read(tmp_path / "a")] == [1, 2, 3]


@pytest.mark.parametrize("step", [0, 9, 10, 25, 30, 99])
def test_rewinding_drops_later_rows(tmp_path, kind, step):
    log, read = kind
    written(log(tmp_path / "a"), rows(3))
    again = log(tmp_path / "a")
    again.rewind(step)
    kept = [row for row in rows(3) if row["step"] <= step]
    assert read(tmp_path / "a") == kept
    written(again, rows(1, start=7))
    assert read(tmp_path / "a") == [*kept, *rows(1, start=7)]


def test_rewinding_what_is_not_there(tmp_path, kind):
    kind[0](tmp_path / "a").rewind(5)
    assert not (tmp_path / "a").exists()


def test_columns_that_change(tmp_path):
    path = tmp_path / "a.csv"
    log = CSVLog(path)
    written(log, rows(1, first=1.0))
    written(log, rows(1, start=2))
    written(log, rows(1, start=3, last=2.0))
    blank = {"first": None, "last": None}
    expected = [{**blank, **row} for row in (*rows(1, first=1.0), *rows(1, start=2), *rows(1, start=3, last=2.0))]
    assert csv_rows(path) == expected
    assert path.read_text().splitlines()[0] == "epoch,step,cost,first,last"
    log.rewind(0)
    written(log, rows(1, new=3.0))
    assert csv_rows(path) == [{**blank, **rows(1)[0], "new": 3.0}]


def test_tensorboard_after_a_rewind(tmp_path):
    pytest.importorskip("tensorboardX")
    written(TensorBoardLog(tmp_path / "t"), rows(3))
    again = TensorBoardLog(tmp_path / "t")
    again.rewind(20)
    assert list(scalars(tmp_path / "t")) == [10, 20]
    written(again, rows(1, start=3))
    assert list(scalars(tmp_path / "t")) == [10, 20, 30]
    assert len(list((tmp_path / "t").iterdir())) == 2, "each run writes a file of its own"


def test_the_records_of_tensorboard_have_their_checksums(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.crc32c import crc32c

    written(TensorBoardLog(tmp_path / "t"), rows(1))
    (path,) = (tmp_path / "t").iterdir()
    content, place, count = path.read_bytes(), 0, 0

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    while place < len(content):
        (size,) = struct.unpack_from("<Q", content, place)
        assert struct.unpack_from("<I", content, place + 8)[0] == masked(content[place : place + 8])
        data = content[place + 12 : place + 12 + size]
        assert struct.unpack_from("<I", content, place + 12 + size)[0] == masked(data)
        place, count = place + 16 + size, count + 1
    assert count == 2


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "other"),
    [(CSVLog, b"name,age\n1,2\n"), (CSVLog, b'{"epoch": 1}\n'), (JSONLLog, b"epoch,step,\n"), (JSONLLog, b"\x00\xff")],
)
def test_another_file_is_refused_and_left_alone(tmp_path, log, other):
    path = tmp_path / "a"
    path.write_bytes(other)
    with pytest.raises(ValueError, match=f"log: {path} exists and is no log of this kind"):
        log(path)
    assert path.read_bytes() == other


def test_a_place_where_nothing_can_be_written(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match="log: there is no folder"):
        kind[0](tmp_path / "no" / "a")
    with pytest.raises(ValueError, match=r"log: .* is a folder"):
        kind[0](tmp_path)
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"log: .* is a file"):
        TensorBoardLog(tmp_path / "file")


class FullDisk:
    """Every file that is opened for appending takes five bytes, or none, while ``full``."""

    def __init__(self, patch, takes):
        self.full, opened = True, Path.open

        class Full(io.FileIO):
            def write(file, content):
                if not self.full:
                    return super().write(content)
                if takes:
                    return super().write(content[:takes])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def open_(path, mode="r", *arguments, **options):
            return Full(path, mode) if mode == "ab" else opened(path, mode, *arguments, **options)

        patch.setattr(Path, "open", open_)


@pytest.mark.parametrize("takes", [0, 5])
@pytest.mark.parametrize("log", [CSVLog, JSONLLog, TensorBoardLog])
def test_a_full_disk_is_said_once_and_ends_no_training(tmp_path, log, takes, monkeypatch):
    if log is TensorBoardLog:
        pytest.importorskip("tensorboardX")
    path = tmp_path / "a"
    disk = FullDisk(monkeypatch, takes)

    def make_room(trainer, row):
        disk.full = row["epoch"] < 3

    data = np.ones((8, 2)), np.zeros((8, 1))
    with pytest.warns(RuntimeWarning, match=f"log: {path} cannot be written .No space left on device") as said:
        history = Trainer(MLP([2, 1])).fit(data, epochs=5, progress=False, callbacks=[log(path), make_room])
    assert history.stopped == "completed"
    assert len(said) == 1
    later = history.rows[3:]  # are there, and nothing of the torn ones
    if log is TensorBoardLog:
        assert list(scalars(path)) == [row["step"] for row in later]
    else:
        assert dict(LINES)[log](path) == later


def test_a_bad_step_to_rewind_to_is_said(tmp_path, kind):
    path = tmp_path / "a"
    written(kind[0](path), rows(1))
    path.write_bytes(path.read_bytes().replace(b"10", b"xx"))
    with pytest.warns(RuntimeWarning, match=f"log: {path} cannot be written"):
        kind[0](path).rewind(3)
    assert b"xx" in path.read_bytes()


# --- by name ---------------------------------------------------------------------------------------------------------


def test_logs_by_name(tmp_path):
    assert logs.of(None, tmp_path) == logs.of(" ", tmp_path) == []
    found = logs.of("jsonl, csv,csv", tmp_path)
    assert [(type(log), log.path.name) for log in found] == [(JSONLLog, "log.jsonl"), (CSVLog, "log.csv")]
    with pytest.raises(ValueError, match=r"log: unknown name 'cvs'; did you mean 'csv'\?"):
        logs.check("cvs")


def test_without_tensorboardx_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "tensorboardX.record_writer", raising=False)
    for make in (lambda: TensorBoardLog(tmp_path / "t"), lambda: logs.check("csv,tensorboard")):
        with pytest.raises(ValueError, match=r"pip install 'gpu-mlp\[tensorboard\]'"):
            make()
