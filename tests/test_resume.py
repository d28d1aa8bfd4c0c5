"""Resumed runs: after any step, with all that moves switched on, they end with the bits of one that ran through."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.fixtures import emulated_gpu, kept_stand_in  # noqa: F401
from helpers import same_bits

from gpu_mlp import (
    EMA,
    L2,
    LBFGS,
    MLP,
    SGD,
    Adam,
    Checkpoints,
    Cosine,
    Diverged,
    EarlyStopping,
    ReduceOnPlateau,
    Terminated,
    Trainer,
    Warmup,
    optimizers,
)
from gpu_mlp.checkpoint import listed
from gpu_mlp.ops.interface import Slot
from gpu_mlp.streams import Stream

RULES = [
    *(kind() for kind in optimizers.OPTIMIZERS.values() if kind is not LBFGS),
    optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    optimizers.Adam(amsgrad=True),
    optimizers.RMSprop(centered=True, momentum=0.5),
]
ROWS, BATCH, EPOCHS = 53, 12, 3  # 42 rows to train on: 4 updates an epoch, the last of them shorter


def problem(rows=ROWS):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(rows, 5))
    return x, (x[:, :3] + rng.normal(size=(rows, 3))).argmax(axis=1), rng.random(rows) + 0.5


def trainer(device="cpu", precision="float32", **options):
    net = MLP([5, 9, 3], "gelu", "softmax", dropout=0.2, precision=precision, device=device, seed=4)
    defaults = {"regularizer": L2(1e-3), "clip_norm": 0.5, "accumulate": 2, "average": EMA(0.9), "schedule": "cosine"}
    return Trainer(net, **{**defaults, **options})


def fit(run, **options):
    defaults = {
        "data": problem(), "epochs": EPOCHS, "batch_size": BATCH, "validation": 0.2, "progress": False,
        "early_stopping": EarlyStopping(2),
    }  # fmt: skip
    return run.fit(**{**defaults, **options})


def state(run, history):
    """All that two runs of the same bits have in common, to the bit."""
    ops = run.net._ops
    numbers = np.array(ops.to_host(run._state))
    arrays = [run.net._theta, *run.moments.values(), *([] if run._averaged is None else [run._averaged])]
    columns = [name for name in history.rows[0] if name not in ("seconds", "samples_per_second")]
    return (
        [np.array(ops.to_host(array)).tobytes() for array in arrays],
        numbers.tobytes(),
        [[row[name] for name in columns] for row in history],
        (history.stopped, history.restored_best, history.best_index, run.epoch, run.rounds, run.plateau),
    )


def check_every_step(tmp_path, make, steps=None, **options):
    """A run with a checkpoint after every step, and one resumed from each of them."""
    whole = make()
    expected = state(whole, fit(whole, **options, checkpoints=Checkpoints(tmp_path / "c", "1 step", 1000)))
    bare = make()
    assert state(bare, fit(bare, **options)) == expected, "writing checkpoints changes nothing"
    found = listed(tmp_path / "c")
    assert [int(path.stem.removeprefix("step-")) for path in found] == list(range(1, whole.rounds + 1))
    for path in found[:: 1 if steps is None else max(1, len(found) // steps)]:
        again = make()
        assert state(again, fit(again, **options, resume=path)) == expected, path.name


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_after_every_step(tmp_path, rule):
    check_every_step(tmp_path, lambda: trainer(optimizer=rule))


PLATEAU = Warmup(3, ReduceOnPlateau(0.5, patience=0))


@pytest.mark.parametrize("precision", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": PLATEAU, "average": None},
        {"optimizer": SGD(0.05), "clip_norm": None, "accumulate": 1, "average": None, "regularizer": None},
    ],
    ids=["plateau", "at once"],
)
def test_after_every_step_in_every_precision(tmp_path, precision, options):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    check_every_step(tmp_path, lambda: trainer(precision=precision, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": EarlyStopping(1, min_delta=10.0), "epochs": 6},
        {"validation": None, "early_stopping": None, "shuffle": False},
        {"batch_size": 1000},
        {"batch_size": 42, "validation": problem(20)},
    ],
    ids=["stopped early", "as stored", "one step an epoch", "validation apart"],
)
def test_after_every_step_of_every_kind_of_fit(tmp_path, options):
    check_every_step(tmp_path, trainer, **options)


def test_a_loss_scale_that_moves(tmp_path):
    """A scale that overflows at first: the steps that are skipped, and the count of good ones, are carried on."""

    def make():
        run = trainer(precision="float16")
        run.net._ops.write_state(run._state, {Slot.LOSS_SCALE: 2.0**40})
        return run

    check_every_step(tmp_path, make)
    run = make()
    fit(run)
    assert run.net._ops.read_state(run._state, Slot.SKIPPED) > 2


def test_a_second_fit(tmp_path):
    """Its schedule, its epochs and its history count from its own beginning."""

    def make():
        run = trainer(schedule=None)
        fit(run, epochs=2)
        run.schedule = Cosine()
        return run

    whole = make()
    expected = state(whole, fit(whole, checkpoints=Checkpoints(tmp_path, "1 step", 1000)))
    for path in listed(tmp_path):
        again = trainer()
        assert state(again, fit(again, resume=path)) == expected


def test_a_stream_from_the_disk(tmp_path):
    x, y, _ = problem()
    np.savez(tmp_path / "data.npz", x=x, y=y)

    def dataset():
        return Stream(tmp_path / "data.npz", buffer_rows=16, chunk_rows=8)

    check_every_step(tmp_path, trainer, data=dataset(), steps=4)
    other = Stream(tmp_path / "data.npz", buffer_rows=32, chunk_rows=8)
    with pytest.raises(ValueError, match=r"^resume: .*data\.buffer_rows was 16 and is 32 now"):
        fit(trainer(), data=other, resume=listed(tmp_path / "c")[0])


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "float32", "optimizer": Adam(), "graph": True},
        {"precision": "float16", "optimizer": SGD(0.1, momentum=0.9), "schedule": PLATEAU},
    ],
    ids=["float32", "float16"],
)
def test_on_a_gpu(kept_stand_in, emulated_gpu, tmp_path, monkeypatch, options, streamed):  # noqa: F811
    from gpu_mlp.ops.cuda_ops import CudaOperations

    if streamed:
        monkeypatch.setattr(CudaOperations, "free_bytes", lambda self: 0)
    check_every_step(tmp_path, lambda: trainer("cuda", **options), steps=3)


def test_on_another_device_with_a_warning(kept_stand_in, emulated_gpu, tmp_path):  # noqa: F811
    fit(trainer("cuda"), checkpoints=Checkpoints(tmp_path, "2 epochs"))
    with pytest.warns(RuntimeWarning, match="the checkpoint was written on cuda and the run goes on on cpu"):
        history = fit(trainer("cpu"), resume=tmp_path)
    assert history.stopped == "completed"


def test_with_sums_in_another_order_with_a_warning(tmp_path, monkeypatch):
    fit(trainer(), checkpoints=Checkpoints(tmp_path, "2 epochs"))
    with monkeypatch.context() as patch:
        patch.setenv("GPU_MLP_NUMBA", "0")
        without = trainer()
    with pytest.warns(RuntimeWarning, match=r"passes was 'NumbaOperations' and is 'NumpyOperations' now\): the bits"):
        assert fit(without, resume=tmp_path).stopped == "completed"
    more = trainer()
    monkeypatch.setattr(more.net._ops, "lanes", lambda rows, sizes: (2, -(-rows // 2)))
    with pytest.warns(RuntimeWarning, match="lanes was 1 and is 2 now"):
        assert fit(more, resume=tmp_path).stopped == "completed"


# --- interruptions ---------------------------------------------------------------------------------------------------


def interrupting(run, step, number):
    """Send the process a signal after so many steps."""
    honest = run._step

    def watched(*arguments):
        honest(*arguments)
        if run.rounds == step:
            signal.raise_signal(number)

    run._step = watched
    return run


@pytest.mark.parametrize("step", range(1, 4 * EPOCHS + 1))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_any_step(tmp_path, step, number):
    whole = trainer()
    expected = state(whole, fit(whole))
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = interrupting(trainer(), step, number)
        if number == signal.SIGTERM:
            with pytest.raises(Terminated) as caught:
                fit(run, checkpoints=tmp_path)
            assert caught.value.code == 143
            assert caught.value.history.stopped == "terminated"
        else:
            with pytest.warns(UserWarning, match="interrupted"):
                assert fit(run, checkpoints=tmp_path).stopped == "interrupted"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is handlers[1]
    finally:
        signal.signal(signal.SIGINT, handlers[0])
    assert [path.stem for path in listed(tmp_path)] == [f"step-{step:09d}"]
    again = trainer()
    assert state(again, fit(again, checkpoints=tmp_path, resume=True)) == expected


def test_without_checkpoints_sigterm_is_left_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: seen.append(number))
    fit(trainer(), epochs=1)
    assert signal.SIGTERM not in seen


def test_a_run_that_is_over_is_left_as_it_is(tmp_path):
    whole = trainer()
    expected = state(whole, fit(whole, checkpoints=tmp_path))
    again = trainer()
    again._step = None
    assert state(again, fit(again, checkpoints=tmp_path, resume=True)) == expected


def test_a_run_that_a_callback_ended_goes_on(tmp_path):
    whole = trainer()
    expected = state(whole, fit(whole))
    fit(trainer(), checkpoints=tmp_path, callbacks=[lambda run, row: row["epoch"] == 2])
    again = trainer()
    assert state(again, fit(again, checkpoints=tmp_path, resume=True)) == expected


def test_more_epochs_where_the_schedule_does_not_span_the_run(tmp_path):
    whole = trainer(schedule=PLATEAU)
    expected = state(whole, fit(whole, epochs=5))
    fit(trainer(schedule=PLATEAU), epochs=2, checkpoints=tmp_path)
    again = trainer(schedule=PLATEAU)
    assert state(again, fit(again, epochs=5, checkpoints=tmp_path, resume=True)) == expected
    with pytest.raises(ValueError, match=r"^resume: 5 epochs are done already, and epochs is 4"):
        fit(trainer(schedule=PLATEAU), epochs=4, checkpoints=tmp_path, resume=True)


def test_more_epochs_are_refused_where_the_schedule_spans_the_run(tmp_path):
    fit(trainer(), checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"^resume: epochs was 3 and is 5 now, but the schedule spans the run"):
        fit(trainer(), epochs=5, checkpoints=tmp_path, resume=True)


def test_callbacks_are_told_where_a_run_goes_on(tmp_path):
    class Log:
        def __init__(self):
            self.rewound, self.steps = [], []

        def __call__(self, run, row):
            self.steps.append(row["step"])

        def rewind(self, step):
            self.rewound.append(step)

    log = Log()
    fit(trainer(), checkpoints=Checkpoints(tmp_path, "3 steps", 100), callbacks=[log])
    assert log.rewound == []
    again = Log()
    fit(trainer(), resume=tmp_path / "step-000000006.safetensors", callbacks=[again])
    assert (again.rewound, again.steps) == ([6], log.steps[1:])
    anew = Log()
    fit(trainer(), checkpoints=tmp_path / "empty", resume=True, callbacks=[anew])
    assert (anew.rewound, anew.steps) == ([0], log.steps)


# --- a trainer by itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_save_and_restore_in_a_loop_of_ones_own(tmp_path, precision):
    x, y, w = problem(40)
    whole = trainer(precision=precision, schedule=None)
    for i in range(6):
        whole.step(x[:, :], y, w)
        if i == 2:
            whole.save(tmp_path / "t.safetensors")
    again = trainer(precision=precision, schedule=None)
    again.restore(tmp_path / "t.safetensors")
    assert again.rounds == 3
    for _ in range(3):
        again.step(x, y, w)
    assert same_bits(again.net.theta, whole.net.theta)
    assert same_bits(again._state, whole._state)
    with pytest.raises(ValueError, match=r"Trainer\.restore takes it"):
        fit(trainer(schedule=None), resume=tmp_path / "t.safetensors")
    with pytest.raises(FileNotFoundError, match="no file at"):
        again.restore(tmp_path / "missing.safetensors")


def test_a_checkpoint_of_a_fit_can_be_restored(tmp_path):
    run = trainer()
    fit(run, checkpoints=tmp_path)
    again = trainer()
    again.restore(listed(tmp_path)[-1])
    assert again.rounds == run.rounds
    assert same_bits(again._averaged, run._averaged)


# --- what is refused -------------------------------------------------------------------------------------------------


HASH = "data.hash: the values are others"


@pytest.mark.parametrize(
    ("options", "changed", "said"),
    [
        ({"optimizer": Adam(lr=0.01)}, {}, ["optimizer.lr was 0.001 and is 0.01 now"]),
        ({"optimizer": "sgd"}, {}, ["optimizer was Adam and is SGD now"]),
        ({"schedule": None}, {}, ["schedule was Cosine and is Constant now"]),
        ({"average": None}, {}, ["average was EMA and is None now"]),
        ({"seed": 9}, {}, ["seed was 4 and is 9 now", HASH]),  # of the part that is left to train on
        ({"precision": "float64"}, {}, ["network.precision was 'float32' and is 'float64' now"]),
        ({"clip_norm": 1.0, "accumulate": 3}, {}, ["clip_norm was 0.5 and is 1.0", "accumulate was 2 and is 3"]),
        ({"regularizer": L2(0.1)}, {}, ["regularizer.l2 was 0.001 and is 0.1 now"]),
        ({}, {"batch_size": 13, "shuffle": False}, ["batch_size was 12 and is 13 now", "shuffle was True"]),
        ({}, {"validation": 0.1}, ["data.arrays was [", HASH, "validation was 0.2 and is 0.1 now"]),
        ({}, {"early_stopping": None}, ["early_stopping was EarlyStopping and is None now"]),
        ({}, {"metrics": ["top_2_accuracy"]}, ["metrics was ['accuracy'] and is ['top_2_accuracy'] now"]),
        ({}, {"data": (problem()[0] + 1e-12, *problem()[1:])}, [HASH]),
        ({}, {"data": problem()[:2]}, ["data.arrays was [", HASH]),
    ],
    ids=lambda value: "" if isinstance(value, list) else ",".join(value),
)  # fmt: skip
def test_another_run_is_refused_with_every_difference_named(tmp_path, options, changed, said):
    fit(trainer(), checkpoints=tmp_path)
    run = trainer(**options)
    before = run.net.theta.copy()
    with pytest.raises(ValueError, match=r"^resume: the checkpoint is of another run: ") as caught:
        fit(run, **changed, checkpoints=tmp_path, resume=True)
    found = str(caught.value).split(": ", 2)[2].split("; ")
    assert len(found) == len(said), found
    assert all(one.startswith(part) for one, part in zip(found, said)), found
    assert same_bits(run.net.theta, before)
    assert run.rounds == 0


def test_another_network_is_refused_by_its_sizes(tmp_path):
    fit(trainer(), checkpoints=tmp_path)
    other = Trainer(MLP([5, 8, 3], "gelu", "softmax", seed=5))
    with pytest.raises(ValueError, match=r"network\.sizes was \[5, 9, 3\] and is \[5, 8, 3\] now.*network\.seed was 4"):
        fit(other, checkpoints=tmp_path, resume=True)


def test_lbfgs_has_no_checkpoints(tmp_path):
    for options in ({"checkpoints": tmp_path}, {"resume": tmp_path}):
        with pytest.raises(ValueError, match=r"^checkpoints: L-BFGS can have none"):
            Trainer(MLP([5, 3], output="softmax"), optimizer=LBFGS()).fit(problem(), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_checkpoints_is_not_written_to_by_another_run(tmp_path):
    fit(trainer(), checkpoints=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"^checkpoints: .* holds those of another run; resume=True"):
        fit(trainer(), checkpoints=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    def nested(run, row):
        with pytest.raises(ValueError, match=r"^checkpoints: another process is writing to "):
            fit(trainer(), checkpoints=tmp_path, resume=True)

    assert fit(trainer(), checkpoints=tmp_path, callbacks=[nested], epochs=1).stopped == "completed"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"resume": True}, ValueError, r"^resume: True goes on from the folder of checkpoints, and none is given"),
        ({"resume": 3}, TypeError, r"^resume: expected True, False or a path, got int"),
        ({"checkpoints": 3}, TypeError, r"^checkpoints: expected a folder or Checkpoints, got int"),
        ({"resume": "nowhere"}, FileNotFoundError, r"no file at nowhere"),
    ],
)
def test_arguments_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        fit(trainer(), **options)


def test_a_folder_without_checkpoints_is_begun_anew_and_a_path_to_one_refused(tmp_path):
    whole = trainer()
    expected = state(whole, fit(whole))
    run = trainer()
    assert state(run, fit(run, checkpoints=tmp_path / "c", resume=True)) == expected
    with pytest.raises(FileNotFoundError, match="resume: there is no checkpoint in "):
        fit(trainer(), resume=tmp_path)


# --- a run that diverges ---------------------------------------------------------------------------------------------


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    def spoil(run, row):
        if row["epoch"] == 2:
            run.net.weights[0][...] = 1e308

    run = trainer(precision="float64", clip_norm=None)
    with pytest.raises(Diverged, match=r"epoch 3, step 9: the (cost|gradient) is not finite"):
        run.regularizer = None
        fit(run, checkpoints=Checkpoints(tmp_path, "1 step", 1), callbacks=[spoil], epochs=4)
    kept = listed(tmp_path)
    assert kept
    assert max(int(path.stem.removeprefix("step-")) for path in kept) <= 8


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """Infinite weights that no cost has seen yet: a checkpoint is due, and the run ends instead."""
    run = trainer(optimizer=SGD(0.1), clip_norm=None, schedule=None, average=None, accumulate=1)
    honest = run._step

    def overflow(*arguments):
        honest(*arguments)
        if run.rounds == 2:
            run.net.theta[:3] = math.inf

    run._step = overflow
    with pytest.raises(Diverged, match="the weights of layer 0 are not finite"):
        fit(run, checkpoints=Checkpoints(tmp_path, "1 step", 1))
    assert [path.stem for path in listed(tmp_path)] == ["step-000000001"]


# --- what is in a header ---------------------------------------------------------------------------------------------


def test_the_header_says_what_the_run_is(tmp_path):
    run = trainer(optimizer=Adam(lr=np.float64(0.01)))
    run.net.metadata = {"labels": ["a", "b", "c"]}
    fit(run, checkpoints=tmp_path)
    content = listed(tmp_path)[-1].read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    found = json.loads(header["header"])
    assert header["format"] == "gpu_mlp.checkpoint"
    assert found["metadata"] == run.net.metadata
    assert found["recipe"]["optimizer"]["lr"] == 0.01
    assert found["recipe"]["average"] == {"rule": "EMA", **dataclasses.asdict(EMA(0.9))}
    assert found["fit"]["stopped"] == "completed"


def test_a_resume_warns_of_nothing(tmp_path):
    fit(trainer(), checkpoints=Checkpoints(tmp_path, "5 steps"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(trainer(), checkpoints=Path(tmp_path), resume=True)


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no SIGKILL")
def test_runs_that_are_killed_end_with_the_same_bits():
    program = Path(__file__).with_name("kill_test.py")
    done = subprocess.run([sys.executable, program, "--kills", "10"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counts = list(map(int, re.findall(r"\d+", done.stdout)))
    assert counts[0] + counts[1] == 10, done.stdout
    assert min(counts[3:]) > 0, "some went on, and some came to their end"
