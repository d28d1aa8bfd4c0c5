"""The folder of checkpoints: how often, how many, which stay; damage, and disks that refuse at any point."""

from __future__ import annotations

import errno
import os
import tempfile
import warnings

import numpy as np
import pytest
from helpers import same_bits

from gpu_mlp import MLP, Checkpoints, EarlyStopping, Trainer, checkpoint
from gpu_mlp.checkpoint import Damaged, Folder, Snapshot, interval, listed
from gpu_mlp.tensorfile import Expected

EXPECTED = {"a": Expected((3,), ("F64",))}


def snapshot(step, figure=None, values=(1.0, 2.0, 3.0)):
    return Snapshot({"a": np.array(values)}, {"fit": {"stopped": ""}}, step, figure)


def steps(folder):
    return [int(path.stem.removeprefix("step-")) for path in listed(folder)]


def problem():
    rng = np.random.default_rng(1)
    return rng.normal(size=(40, 4)), rng.integers(0, 3, 40)


def trainer():
    return Trainer(MLP([4, 6, 3], output="softmax", seed=2))


def trained(folder=None, **options):
    run = trainer()
    run.fit(problem(), 3, 8, progress=False, checkpoints=folder, **options)
    return run.net.theta.tobytes()


# --- how often, how many ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "found"),
    [
        ("500 steps", (500, "steps")),
        ("step", (1, "steps")),
        ("2 epochs", (2, "epochs")),
        ("30s", (30, "seconds")),
        ("1.5 minutes", (90, "seconds")),
        (" 2 h ", (7200, "seconds")),
    ],
)
def test_every(every, found):
    assert interval(every) == found


@pytest.mark.parametrize("every", ["", "5", "0 steps", "-1 epoch", "1.5 steps", "two epochs", "5 weeks", "never"])
def test_every_that_cannot_be(every):
    with pytest.raises(ValueError, match=r"^every: expected such as '500 steps'"):
        Checkpoints("c", every)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((3,), "^folder: "),
        (("c", 3), "^every: "),
        (("c", "1 step", 1.0), "^keep: "),
        (("c", "1 step", True), "^keep: "),
    ],
)
def test_values_of_the_wrong_type(arguments, match):
    with pytest.raises(TypeError, match=match):
        Checkpoints(*arguments)


def test_none_are_not_kept():
    with pytest.raises(ValueError, match=r"^keep: "):
        Checkpoints("c", keep=0)


@pytest.mark.parametrize(
    ("every", "found"),
    [("1 step", range(1, 16)), ("4 steps", [4, 8, 12, 15]), ("1 epoch", [5, 10, 15]), ("2 epochs", [10, 15])],
)
def test_written_when_due(tmp_path, every, found):
    trained(Checkpoints(tmp_path, every, 100))
    assert steps(tmp_path) == list(found)


def test_by_the_clock(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    folder = Folder(Checkpoints(tmp_path, "2 seconds"))
    folder.open()
    folder.begin(0, 0)
    assert [now.__setitem__(0, t) or folder.due(7, 1) for t in (101.9, 102.0)] == [False, True]
    folder.write(snapshot(7), 1)
    assert not folder.due(8, 1)
    folder.close()


def test_the_last_and_the_best_stay(tmp_path):
    folder = Folder(Checkpoints(tmp_path, "1 step", 2), monitor="validation_loss")
    folder.open()
    left = []
    for step, figure in enumerate([3.0, 1.0, None, 2.0, 1.5, None, 0.5, None, None], 1):
        folder.write(snapshot(step, figure), 0)
        left.append(steps(tmp_path))
    assert left == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7], [7, 8], [7, 8, 9]]
    folder.close()
    again = Folder(Checkpoints(tmp_path, "1 step", 1), monitor="validation_loss")
    again.open()  # knows the best of those that are there
    again.write(snapshot(10, 0.6), 0)
    assert steps(tmp_path) == [7, 10]
    again.close()


def test_leftovers_of_a_killed_process_are_cleared_away(tmp_path):
    (tmp_path / ".step-000000003.safetensors.abc.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    trained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "notes.txt", "step-000000015.safetensors"}


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_file_reads_as_it_was_written(tmp_path):
    path = checkpoint.write(tmp_path / "c", snapshot(7, 0.25, (1.0, -0.0, 1e-310)))
    found = checkpoint.read(path, lambda header: EXPECTED)
    assert (found.step, found.figure) == (7, 0.25)
    assert same_bits(found.tensors["a"], np.array([1.0, -0.0, 1e-310]))


def test_any_byte_changed_and_any_byte_missing_is_seen(tmp_path):
    path = checkpoint.write(tmp_path / "c", snapshot(7, 0.25))
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        with pytest.raises(Damaged, match=str(path)):
            checkpoint.read(path, lambda header: EXPECTED)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(Damaged):
            checkpoint.read(path, lambda header: EXPECTED)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_behind_a_damaged_file_the_one_before_it_is_taken(tmp_path, damage):
    whole = trained()
    trained(Checkpoints(tmp_path, "4 steps", 10))
    *_, path = listed(tmp_path)
    content = path.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": flipped, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=rf"{path.name}.*; the checkpoint before it is taken"):
        assert trained(tmp_path, resume=True) == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(tmp_path, resume=True) == whole, "the run has written the last one anew"


def test_where_all_are_damaged_the_run_says_so_and_leaves_them(tmp_path):
    trained(Checkpoints(tmp_path, "4 steps", 2))
    for path in listed(tmp_path):
        path.write_bytes(b"nothing")
    before = steps(tmp_path)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"^resume: no checkpoint in .* can be read \("):
        trained(tmp_path, resume=True)
    assert steps(tmp_path) == before


def test_a_checkpoint_of_a_later_release_is_refused_by_its_version(tmp_path):
    trained(tmp_path)
    (path,) = listed(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"'))
    with pytest.raises(Damaged, match="has format version 2; this release reads 1"):
        trained(resume=path)


def test_a_model_is_no_checkpoint(tmp_path):
    path = MLP([2, 2]).save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"^checkpoint: .* is a model, not a checkpoint"):
        trained(resume=path)


# --- disks that refuse -----------------------------------------------------------------------------------------------

CALLS = ("fsync", "replace", "chmod")


class Disk:
    """Refuses the so-manieth call that writes, and all those after it, with no space left."""

    def __init__(self, monkeypatch, room):
        self.room, self.refused = room, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self._limited(getattr(os, name)))
        monkeypatch.setattr(tempfile, "mkstemp", self._limited(tempfile.mkstemp))
        honest = os.fdopen

        def opened(descriptor, mode):
            file = honest(descriptor, mode)
            return Writer(file, self)

        monkeypatch.setattr(os, "fdopen", opened)

    def take(self):
        self.room -= 1
        if self.room < 0:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _limited(self, honest):
        def call(*arguments, **options):
            self.take()
            return honest(*arguments, **options)

        return call


class Writer:
    """A file that asks the disk before it writes."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        self._disk.take()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


ONE_CHECKPOINT = 14  # calls, or a few more


@pytest.mark.parametrize("room", range(6, 6 + 2 * ONE_CHECKPOINT))
def test_a_full_disk_at_any_point_loses_nothing(tmp_path, room):
    """The run goes on, with a warning a checkpoint; what was written before stays, whole; a later resume ends alike."""
    whole = trained()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        disk = Disk(patch, room)
        assert trained(Checkpoints(tmp_path, "3 steps", 1)) == whole
    assert disk.refused > 0
    told = [str(warning.message) for warning in caught]
    assert told
    assert all(
        "No space left on device" in message and "the run goes on and tries again" in message for message in told
    )
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert len(listed(tmp_path)) <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(Checkpoints(tmp_path, "3 steps", 1), resume=True) == whole


def test_a_disk_that_is_freed_is_written_to_again(tmp_path, monkeypatch):
    honest, full = os.fsync, [False]

    def fsync(descriptor):
        if full[0]:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        honest(descriptor)

    def fill_and_free(run, row):
        full[0] = row["epoch"] == 1  # as the first checkpoint is due

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(RuntimeWarning, match=r"there is none yet, the run goes on") as caught:
        trained(Checkpoints(tmp_path, "1 epoch"), callbacks=[fill_and_free])
    assert len(caught) == 1
    assert steps(tmp_path) == [10, 15]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"^checkpoints: cannot write to .*Permission denied"):
        trained(tmp_path / "c")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(ValueError, match=r"^checkpoints: cannot write to .*File exists"):
        trained(tmp_path / "c")


def test_early_stopping_keeps_its_best_in_every_checkpoint(tmp_path):
    options = {"validation": 0.3, "early_stopping": EarlyStopping(1)}
    whole = trained(**options)
    trained(Checkpoints(tmp_path, "1 step", 100), **options)
    for path in listed(tmp_path):
        assert trained(resume=path, **options) == whole
