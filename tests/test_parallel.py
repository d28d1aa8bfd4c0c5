"""Ranks that train together: the update of one rank, in every way and with every feature, and every end of a job.

The ranks are real processes under mpiexec, a few launches with many cases each (`parallel_program.py`); what can be
said without them is tested without them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpu_mlp import MLP, Checkpoints, Parallel, Stream, Trainer, metrics, shards
from gpu_mlp.checkpoint import listed
from gpu_mlp.ops.exchange import Bucket
from gpu_mlp.ops.interface import Layout
from gpu_mlp.parallel import buckets, named, ranks

PROGRAM = Path(__file__).with_name("parallel_program.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
LIMIT = 300  # seconds; a launch takes a few, on a machine that does nothing else

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or (not MPIEXEC.exists() and shutil.which("mpiexec") is None),
    reason="no MPI: pip install mpi4py mpich",
)


def launch(n: int, *arguments: object, status: int | None = 0, python: tuple[str, ...] = ("-m", "mpi4py")):
    """The outcome of a program on ``n`` ranks; it has to end with ``status``, or with any but 0 for None."""
    mpiexec = str(MPIEXEC) if MPIEXEC.exists() else "mpiexec"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GPU_MLP_NUMBA": "0"}
    command = [mpiexec, "-n", str(n), sys.executable, *python, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == status if status is not None else done.returncode, done.stdout + done.stderr
    return done


def close(found, expected, bound, what):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= bound, f"{what}: {error:.2g} from one rank's"


# --- the same update as on one rank ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one rank found in every scene, and the shards of the scene of streams."""
    place = tmp_path_factory.mktemp("parallel")
    rng = np.random.default_rng(8)
    (place / "stream").mkdir()
    for shard in "ab":
        x = rng.normal(size=(130, 20)).astype(np.float32)
        np.save(place / "stream" / f"x-{shard}.npy", x)
        np.save(place / "stream" / f"y-{shard}.npy", x[:, :5].argmax(axis=1))
    return place


def scene(folder, name, n):
    launch(n, PROGRAM, name, folder)
    with np.load(folder / f"{name}-{n}.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def one(folder):
    """What one rank finds in a scene, which is played once."""
    played: dict[str, dict] = {}
    return lambda name: played[name] if name in played else played.setdefault(name, scene(folder, name, 1))


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_fifty_steps_are_those_of_one_rank_for_every_rule_and_feature(folder, one, n):
    expected, found = one("steps"), scene(folder, "steps", n)
    assert len(found) > 60
    for what, theta in found.items():
        case = ", ".join(what.split(", ")[:2]).removesuffix(": figures")
        suffix = ": figures" if what.endswith(": figures") else ""
        close(theta, expected[case + suffix], 1e-12, f"{what}, {n} ranks")


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_loops_streams_stops_scales_wires_and_lbfgs_agree_with_one_rank(folder, one, n):
    expected, found = one("more"), scene(folder, "more", n)
    exact = ("a loop of steps", "evaluate", "early stopping", "epochs", "regression", "loss scale")
    for what in exact:
        close(found[what], expected[what], 1e-12, f"{what}, {n} ranks")
    close(found["lbfgs"], expected["lbfgs"], 1e-8, "a line search repeats what rounding begins")
    close(found["stream"], expected["stream"], 1e-5, "stream, float32")
    close(found["stream figures"], expected["stream figures"], 1e-5, "stream, float32")
    close(found["float16"], expected["float16"], 2e-2, "float16")
    for what in ("narrow False", "narrow True"):
        close(found[what], expected[what], 2e-2, what)
        assert np.linalg.norm(found[what] - expected[what]) > 1e-6 * np.linalg.norm(expected[what]), (
            "nothing was rounded"
        )


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_emulated_gpus_sum_through_nccl(emulated_gpu, folder, one, n):
    """One rank has the bits of none, in buckets, slices, streams and graphs; several agree with it to rounding."""
    expected, found = one("gpu"), scene(folder, "gpu", n)
    assert found["collectives"] > 500
    for what, theta in found.items():
        if what != "collectives":
            close(theta, expected[what.split(",")[0]], 2e-2 if "narrow" in what else 2e-5, f"{what}, {n} ranks")


def test_ranks_on_gpus_without_nccl_say_what_to_install(emulated_gpu, monkeypatch):
    """CuPy's packages do not bring NCCL, and CuPy's module has none of its names then."""
    import cupy

    monkeypatch.setattr(cupy.cuda.nccl, "available", False)
    monkeypatch.delattr(cupy.cuda.nccl, "NCCL_SUM")
    monkeypatch.delitem(sys.modules, "gpu_mlp.ops.nccl", raising=False)
    with pytest.raises(ValueError, match=r"^parallel: CuPy finds no NCCL.*pip install nvidia-nccl-cu12"):
        importlib.import_module("gpu_mlp.ops.nccl")


# --- how a job ends ---------------------------------------------------------------------------------------------------


@needs_mpi
def test_a_run_goes_on_with_other_numbers_of_ranks_in_the_same_order_of_the_data(tmp_path):
    """2 ranks, until the second is told to end; 3, whose third is interrupted; then 1: the weights of 1 rank alone."""
    whole = tmp_path / "whole"
    whole.mkdir()
    launch(1, PROGRAM, "run", whole, 0, 0, 0, 0)
    launch(2, PROGRAM, "run", tmp_path, 1, int(signal.SIGTERM), 17, 1, status=143)
    launch(3, PROGRAM, "run", tmp_path, 2, int(signal.SIGINT), 31, 0)
    record = json.loads((tmp_path / "end.json").read_text())
    assert (record["stopped"], record["rounds"]) == ("interrupted", 31)
    done = launch(1, PROGRAM, "run", tmp_path, 0, 0, 0, 0)
    assert "ranks was 3 and is 1 now" in done.stderr
    assert json.loads((tmp_path / "end.json").read_text())["stopped"] == "completed"
    close(np.load(tmp_path / "theta.npy"), np.load(whole / "theta.npy"), 1e-12, "resumed on 2, 3 and 1 ranks")
    ends = [json.loads((place / "end.json").read_text())["cost"] for place in (whole, tmp_path)]
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-12)


@needs_mpi
@pytest.mark.parametrize("number", [int(signal.SIGKILL), 0], ids=["killed", "raises"])
def test_a_rank_that_ends_ends_the_job_and_the_last_checkpoint_stands(tmp_path, number):
    started = time.monotonic()
    done = launch(3, PROGRAM, "run", tmp_path, 1, number, 10, 1, status=None)
    seconds = time.monotonic() - started
    assert seconds < 40, "the job went on"  # of which the program's own start and ten steps are a part
    if number == 0:
        assert "ZeroDivisionError: a callback of rank 1" in done.stderr
    assert [path.stem for path in listed(tmp_path / "checkpoints")] == ["step-000000004", "step-000000008"]
    launch(2, PROGRAM, "run", tmp_path, 0, 0, 0, 0)
    assert json.loads((tmp_path / "end.json").read_text())["stopped"] == "completed"


@needs_mpi
def test_ranks_with_other_options_are_refused(tmp_path):
    done = launch(2, PROGRAM, "differ", tmp_path, status=None)
    assert "the ranks were not started alike: optimizer.lr is 0.01 on rank 0 and 0.02 on rank 1" in done.stderr


# --- the command ------------------------------------------------------------------------------------------------------

TRAIN = ("-m", "gpu_mlp", "train", "--no-plots", "--epochs", "4", "--schedule", "constant", "--hidden", "32")


@needs_mpi
def test_the_command_trains_on_all_ranks_and_the_first_one_writes(tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    first = launch(1, *TRAIN, "--out", alone, "--precision", "float64")
    done = launch(2, *TRAIN, "--out", both, "--precision", "float64", "--shard-optimizer", "--log", "csv")
    assert "2 ranks" in done.stderr
    assert done.stdout == first.stdout
    assert done.stderr.count("written to") == 1
    assert len((both / "log.csv").read_text().splitlines()) == 5
    theta = [MLP.load(place / "model.safetensors", device="cpu").theta for place in (alone, both)]
    close(theta[1], theta[0], 1e-12, "the model of two ranks")
    more = launch(3, "-m", "gpu_mlp", "train", "--resume", both, "--epochs", "5")
    assert "resume: from" in more.stderr
    assert len((both / "log.csv").read_text().splitlines()) == 6


@needs_mpi
def test_bad_options_are_told_once(tmp_path):
    done = launch(3, *TRAIN, "--optimizer", "nope", status=2)
    assert done.stderr.count("nope") == 1
    done = launch(2, *TRAIN, "--out", tmp_path / "new", status=None, python=())
    assert "start" in done.stderr
    assert ranks.LAUNCH in done.stderr
    assert not (tmp_path / "new").exists()


# --- without other ranks ----------------------------------------------------------------------------------------------


class Rank(ranks.Ranks):
    """A rank of so many, that talks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_the_parts_of_a_batch_lie_end_to_end(size):
    for rows in (0, 1, 2, 63, 64, 129, 1000, 4096):
        parts = [Rank(rank, size).part(rows) for rank in range(size)]
        assert [parts[0].start, parts[-1].stop] == [0, rows]
        assert all(a.stop == b.start for a, b in zip(parts, parts[1:]))
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) - min(lengths) <= ranks.ROW_MULTIPLE
        assert max(lengths) <= Rank(0, size).most(rows)
        assert max(lengths) <= Rank(0, size).most(max(rows, 4096)), "the buffers are those of the largest batch"


@pytest.mark.parametrize("columns", [3, 9000])
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_every_rank_reads_its_own_rows_of_a_stream(tmp_path, monkeypatch, ending, columns):
    """Together the ranks have every row once, in its place; of rows that are long they read no others."""
    n, batch, size = 101, 24, 3
    x = np.arange(n, dtype=np.float32)[:, None] + np.zeros(columns, np.float32)
    y = np.arange(n, dtype=np.float64)
    if ending == "npy":
        np.save(tmp_path / "x.npy", x)
        np.save(tmp_path / "y.npy", y)
    else:
        np.savez_compressed(tmp_path / "a.npz", x=x, y=y)
    stream = Stream(tmp_path, memory="64MiB", buffer_rows=40, chunk_rows=10)
    read, honest = [], shards.Field.read

    def watched(self, start, stop, into):
        if self.row_bytes == 4 * columns:
            read.append(stop - start)
        return honest(self, start, stop, into)

    monkeypatch.setattr(shards.Field, "read", watched)
    expected = stream.order(7, 2).rows()
    counts = []
    for rank in range(size):
        us = Rank(rank, size)
        ahead = stream.ahead(ranks.Share(us, batch, n))
        read.clear()
        ahead.begin(stream.order(7, 2))
        for cursor in range(0, n, batch):
            own = us.part(min(batch, n - cursor))
            outs = [np.empty((own.stop - own.start, columns), np.float32), np.empty(own.stop - own.start)]
            ahead.take(cursor + own.start, [*outs, None])
            wanted = expected[cursor + own.start : cursor + own.stop]
            np.testing.assert_array_equal(outs[0], x[wanted])
            np.testing.assert_array_equal(outs[1], y[wanted])
        ahead.close()
        counts.append(sum(read))
    if ending == "npy" and columns == 9000:
        assert sum(counts) < 1.6 * n, "rows between those that a rank needs are 36 KB each, and pairs are read together"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_buckets_cover_the_gradient_and_no_W_of_whole_ones_is_cut(size, limit, whole):
    layout = Layout([20, 300, 7, 64, 3], 4)
    cut = buckets.cut(layout, size, limit, whole)
    covered = np.zeros(layout.size, int)
    for bucket in cut:
        assert [bucket.slices[0].start, bucket.slices[-1].stop] == [bucket.start, bucket.stop]
        assert len(bucket.slices) == size
        for part in bucket.slices:
            covered[part] += 1
            assert part.start % layout.unit == 0 or part.start == part.stop
    assert (covered == 1).all()
    assert [bucket.layer for bucket in cut] == sorted((bucket.layer for bucket in cut), reverse=True)
    for bucket in cut[:-1]:
        final = layout.spans[bucket.layer].start
        assert bucket.start >= final, "it would be sent before it is final"
        assert bucket.stop - bucket.start >= limit / 4 or bucket.layer == 0
        if whole:
            edges = {part.start for part in bucket.slices} | {part.stop for part in bucket.slices}
            assert edges <= {span.start for span in layout.spans} | {layout.n_weights}
    assert cut[-1] == Bucket(layout.n_weights, layout.size, cut[-1].slices, 0)


def test_the_layout_of_a_slice_has_the_matrices_that_lie_in_it():
    layout = Layout([20, 30, 7, 3], 8)
    flat = np.arange(layout.size, dtype=float)
    part = slice(layout.spans[1].start, layout.spans[2].start)
    inner = layout.within(part)
    (W,) = inner.weights(flat[part])
    np.testing.assert_array_equal(W, layout.weights(flat)[1])
    assert (inner.n_weights, inner.size) == (part.stop - part.start,) * 2
    behind = layout.within(slice(layout.n_weights, layout.size))
    assert (behind.n_weights, behind.weights(flat[layout.n_weights :])) == (0, [])


@pytest.mark.parametrize("name", ["accuracy", "top_2_accuracy", "rmse", "r2"])
def test_metrics_of_parts_merge_to_that_of_the_whole(name):
    rng = np.random.default_rng(2)
    loss = "mse" if name in ("rmse", "r2") else "cross_entropy"
    y_hat, w = rng.normal(size=(90, 4)), rng.uniform(size=90)
    y = rng.normal(size=(90, 4)) if loss == "mse" else rng.integers(0, 4, 90)
    whole, merged = metrics.make(name, loss, 4), metrics.make(name, loss, 4)
    whole.add(y_hat, y, w)
    for part in (slice(0, 0), slice(0, 31), slice(31, 90)):
        some = metrics.make(name, loss, 4)
        some.add(y_hat[part], y[part], w[part])
        merged.merge(some.sums())
    assert merged.value() == pytest.approx(whole.value(), rel=1e-13)


def test_a_program_without_mpi4py_trains_by_itself(monkeypatch):
    for name in ("mpi4py.run", "mpi4py.MPI"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(ranks, "started", lambda: 1)
    assert Trainer(MLP([2, 2], device="cpu")).ranks is ranks.ALONE
    with pytest.raises(ValueError, match=r"^parallel: the program was not started with mpi4py: mpiexec -n N python"):
        Trainer(MLP([2, 2], device="cpu"), parallel=True)
    monkeypatch.setattr(ranks, "started", lambda: 2)
    with pytest.warns(RuntimeWarning, match="one of 2 processes .* trains by itself"):
        Trainer(MLP([2, 2], device="cpu"))


def test_what_a_launcher_tells():
    assert ranks.started({"PMI_SIZE": "3", "OMPI_COMM_WORLD_SIZE": "x"}) == 3
    assert ranks.started({}) == 1
    assert ranks.local_rank({"SLURM_LOCALID": "2"}) == 2
    assert ranks.local_rank({}) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wire": "float8"}, "wire: "),
        ({"bucket_bytes": 0}, "bucket_bytes: "),
        ({"shard_optimizer": 1}, "shard_optimizer: "),
    ],
)
def test_bad_options_of_parallel_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        Parallel(**options)


def test_words_for_the_command_line():
    assert (named("auto", False, "full"), named("on", False, "full"), named("off", False, "full")) == (
        None, Parallel(), False,
    )  # fmt: skip
    assert named("auto", True, "bfloat16") == Parallel(True, "bfloat16")
    with pytest.raises(ValueError, match=r"^parallel: off"):
        named("off", True, "full")
    with pytest.raises(TypeError, match=r"^parallel: expected Parallel"):
        Trainer(MLP([2, 2], device="cpu"), parallel="yes")


def test_checkpoints_by_the_clock_are_told_apart(tmp_path):
    from gpu_mlp.checkpoint import Folder

    assert Folder(Checkpoints(tmp_path, "5 seconds")).timed
    assert not Folder(Checkpoints(tmp_path, "5 steps")).timed
