"""The trainer in real runs: what one update does, and what surrounds it: validation, stopping, divergence, Ctrl-C.

Expected numbers come from plain NumPy, from SciPy, or from what a callback saw; never from a recorded run.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import pytest
from helpers import assert_close, blobs, network_forward, network_gradients, same_bits, waves

from gpu_mlp import (
    L1,
    L2,
    LBFGS,
    MLP,
    SGD,
    Adam,
    CrossEntropy,
    Diverged,
    EarlyStopping,
    ElasticNet,
    Trainer,
    data,
    optimizers,
    precision,
    schedules,
)
from gpu_mlp.ops.interface import Slot
from gpu_mlp.ops.numpy_ops import NumpyOperations


def classifier(hidden=12, **options):
    options = {"output": "softmax", "precision": "float64", "seed": 3, **options}
    return MLP([6, hidden, 3], **options)


def fit(trainer, dataset, epochs=3, batch_size=32, **options):
    return trainer.fit(dataset, epochs=epochs, batch_size=batch_size, progress=False, **options)


def accuracy(net, x, y):
    return float((net.forward(x).argmax(axis=1) == y).mean())


# --- one update --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 0.01])
def test_step_is_gradient_descent(rate):
    x, y = blobs(20)
    net = classifier(activation="tanh")
    W, b = [w.copy() for w in net.weights], [v.copy() for v in net.biases]
    J, gW, gb = network_gradients(W, b, ["tanh", "softmax"], x, y, "cross_entropy")
    cost = Trainer(net, optimizer=SGD(lr=rate)).step(x, y)
    assert_close(float(cost), J, 1e-12)
    for found, old, g in (*zip(net.weights, W, gW), *zip(net.biases, b, gb)):
        assert_close(found, old - rate * g, 1e-12)


def test_step_returns_the_cost_before_it_with_the_penalty():
    x, y = blobs(20)
    net = classifier()
    expected = net.cost(x, y, "cross_entropy", L2(0.1))
    assert_close(float(Trainer(net, regularizer=L2(0.1)).step(x, y)), expected, 1e-14)


@pytest.mark.parametrize("clip_norm", [1e-3, 0.1, 1e6])
@pytest.mark.parametrize("regularizer", [None, L2(0.5, on="all")])
def test_clip_norm_bounds_the_step(clip_norm, regularizer):
    x, y = blobs(20)
    net = classifier()
    before = net.theta.copy()
    _, g = net.cost_and_gradients(x, y, "cross_entropy", regularizer)
    norm = np.linalg.norm(g.theta)
    Trainer(net, optimizer=SGD(lr=1.0), clip_norm=clip_norm, regularizer=regularizer).step(x, y)
    step = before - net.theta
    assert_close(step, g.theta * min(1, clip_norm / norm), 2e-6 / min(norm, 1))  # torch adds 1e-6 to the norm
    assert np.linalg.norm(step) <= min(clip_norm, norm) * (1 + 1e-12)


@pytest.mark.parametrize("regularizer", [None, L1(0.01), L2(0.1), ElasticNet(0.01, 0.1, on="all")], ids=repr)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("numba", ["0", "1"])
def test_applying_at_once_is_applying_stored_gradients(regularizer, weight_decay, precision, numba, monkeypatch):
    """The same bits in the NumPy reference; where a GEMM adds to W itself, the same but for rounding."""
    monkeypatch.setenv("GPU_MLP_NUMBA", numba)
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, y = blobs(90)
    thetas, costs = [], []
    for at_once in (True, False):
        net = MLP([6, 40, 33, 3], ["relu", "gelu"], "softmax", dropout=0.1, precision=precision)
        rule = SGD(lr=0.1, weight_decay=weight_decay)
        trainer = Trainer(net, optimizer=rule, regularizer=regularizer, apply_at_once=at_once)
        assert trainer.apply_at_once is at_once
        costs.append(fit(trainer, (x, y), epochs=2, batch_size=25)["cost"])
        thetas.append(net.theta.copy())
    if type(net._ops) is NumpyOperations:
        assert same_bits(*thetas)
        assert costs[0] == costs[1]
    else:
        assert_close(thetas[0], thetas[1], {"float64": 1e-13, "float32": 1e-5}[precision])


def test_applying_at_once_is_chosen_where_it_can_be():
    net = classifier()
    assert Trainer(net, optimizer=SGD()).apply_at_once
    for options in ({"optimizer": "adam"}, {"optimizer": SGD(momentum=0.9)}, {"clip_norm": 1.0}, {"accumulate": 2}):
        assert not Trainer(net, **{"optimizer": SGD(), **options}).apply_at_once
    assert not Trainer(classifier(precision="float16"), optimizer=SGD()).apply_at_once


def test_an_empty_batch_moves_theta_by_the_penalty_alone():
    net = classifier()
    before = [w.copy() for w in net.weights]
    cost = Trainer(net, optimizer=SGD(lr=0.5), regularizer=L2(0.1)).step(np.zeros((0, 6)), np.zeros(0, int))
    assert_close(float(cost), sum(0.05 * (w**2).sum() for w in before), 1e-12)
    for found, old in zip(net.weights, before):
        assert_close(found, old * 0.95, 1e-12)


def test_batches_of_changing_size():
    """A trainer takes whatever comes: smaller, larger, smaller again."""
    x, y = blobs(100)
    sizes = [10, 100, 3, 64, 1, 100]
    one, other = classifier(), classifier()
    trainer = Trainer(one, optimizer=SGD(lr=0.1, momentum=0.5))
    for n in sizes:
        trainer.step(x[:n], y[:n])
    velocity = np.zeros_like(other.theta)
    for n in sizes:
        _, g = other.cost_and_gradients(x[:n], y[:n], "cross_entropy")
        velocity = 0.5 * velocity + g.theta
        other.theta[...] -= 0.1 * velocity
    assert_close(one.theta, other.theta, 1e-12)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optimizer": "adam", "apply_at_once": True}, "apply_at_once: not possible: the optimizer is not plain SGD"),
        ({"optimizer": SGD(momentum=0.5), "apply_at_once": True}, "apply_at_once: .*not plain SGD"),
        ({"optimizer": SGD(), "clip_norm": 1.0, "apply_at_once": True}, "apply_at_once: .*clip_norm"),
        ({"optimizer": SGD(), "accumulate": 2, "apply_at_once": True}, "apply_at_once: .*accumulate"),
        ({"optimizer": "lbfgs", "apply_at_once": True}, "apply_at_once"),
        ({"optimizer": "lbfgs", "clip_norm": 1.0}, "clip_norm: L-BFGS"),
        ({"optimizer": "lbfgs", "schedule": "cosine"}, "schedule: L-BFGS"),
        ({"loss": "mse", "optimizer": "adm"}, "optimizer: unknown name 'adm'; did you mean 'adam'"),
        ({"loss": "cross_entrpy"}, "loss: unknown name 'cross_entrpy'; did you mean 'cross_entropy'"),
        ({"schedule": "cosin"}, "schedule: unknown name 'cosin'; did you mean 'cosine'"),
        ({"loss": "nll"}, "loss: nll needs .*use output='log_softmax'.*or loss='cross_entropy' with output='softmax'"),
        ({"loss": CrossEntropy(class_weight=[1, 2])}, "class_weight: expected 3 weights"),
        ({"clip_norm": 0}, r"clip_norm: expected a finite number in \(0"),
        ({"clip_norm": math.nan}, "clip_norm: expected a finite number"),
        ({"accumulate": 0}, "accumulate: expected an integer of at least 1"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
    ],
)
def test_contradictory_and_unknown_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Trainer(classifier(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optimizer": 3}, "optimizer: expected a name, got int"),
        ({"regularizer": 0.1}, "regularizer: expected L1, L2, ElasticNet or None, got float"),
        ({"clip_norm": "1"}, "clip_norm: expected a number"),
        ({"accumulate": 1.5}, "accumulate: expected an integer"),
        ({"accumulate": True}, "accumulate: expected an integer"),
    ],
)
def test_options_of_the_wrong_type_are_refused(options, match):
    with pytest.raises(TypeError, match=match):
        Trainer(classifier(), **options)


def test_a_trainer_needs_an_mlp():
    with pytest.raises(TypeError, match="net: expected an MLP, got str"):
        Trainer("net")


def test_float16_cannot_apply_at_once():
    with pytest.raises(ValueError, match=r"apply_at_once: .*float16"):
        Trainer(classifier(precision="float16"), optimizer=SGD(), apply_at_once=True)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_lbfgs_needs_a_full_precision(precision):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    with pytest.raises(ValueError, match=f"precision: L-BFGS needs float64, float32 or tf32, not '{precision}'"):
        Trainer(classifier(precision=precision), optimizer="lbfgs")


def test_lbfgs_takes_no_dropout_and_no_single_steps():
    with pytest.raises(ValueError, match="dropout: L-BFGS"):
        Trainer(classifier(dropout=0.1), optimizer="lbfgs")
    with pytest.raises(ValueError, match="L-BFGS works on the whole data set; use fit"):
        Trainer(classifier(), optimizer="lbfgs").step(*blobs(9))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected an integer of at least 1"),
        ({"epochs": 1.0}, TypeError, "epochs: expected an integer"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer of at least 1"),
        ({"validation": 0.0}, ValueError, "validation: expected a finite number in"),
        ({"validation": 1.0}, ValueError, "validation: expected a finite number in"),
        ({"validation": "x"}, TypeError, "validation: expected a number"),
        ({"validation": (1,)}, TypeError, r"validation: expected \(x, y\)"),
        ({"validation": blobs(5, features=4)}, ValueError, "validation: x: expected shape"),
        ({"validation": (np.zeros((0, 6)), np.zeros(0, int))}, ValueError, "validation: no rows"),
        ({"shuffle": 1}, TypeError, "shuffle: expected True or False"),
        ({"callbacks": [3]}, TypeError, "callbacks: every one must be callable"),
        ({"early_stopping": 3}, TypeError, "early_stopping: expected an EarlyStopping"),
        ({"early_stopping": EarlyStopping(monitor="validation_loss")}, ValueError, "monitor: unknown name"),
        ({"early_stopping": EarlyStopping(monitor="cots")}, ValueError, "monitor: .*did you mean 'cost'"),
        ({"metrics": ["acuracy"]}, ValueError, "metrics: unknown name 'acuracy'; did you mean 'accuracy'"),
        ({"metrics": "accuracy"}, TypeError, "metrics: expected a list of names"),
        ({"metrics": ["top_4_accuracy"]}, ValueError, "metrics"),
    ],
)
def test_fit_refuses_before_any_work(options, error, match):
    net = classifier()
    before = net.theta.copy()
    with pytest.raises(error, match=match):
        fit(Trainer(net), blobs(60), **options)
    assert same_bits(net.theta, before)


@pytest.mark.parametrize("name", ["rmse", "r2"])
def test_a_metric_of_numbers_is_refused_for_class_labels(name):
    """Labels are names: their difference from a probability row means nothing, whatever the shapes happen to allow."""
    x, y = blobs(3)
    with pytest.raises(ValueError, match=f"metrics: {name}"):
        Trainer(classifier()).evaluate(x, y, metrics=[name])


@pytest.mark.parametrize(
    ("dataset", "error", "match"),
    [
        (np.zeros((4, 6)), TypeError, r"data: expected \(x, y\)"),
        ((np.zeros((4, 6)),), TypeError, r"data: expected \(x, y\)"),
        ((np.zeros((0, 6)), np.zeros(0, int)), ValueError, "data: no rows"),
        ((np.zeros((4, 6)), np.zeros(3, int)), ValueError, "y: expected 4 rows"),
        ((np.zeros((4, 6)), np.array([0, 1, 2, 3])), ValueError, "y: label 3 in row 3 is outside 0..2"),
        ((np.zeros((4, 6)), np.zeros(4, int), np.zeros(4)), ValueError, "sample_weight: every weight is 0"),
        ((np.full((4, 6), np.nan), np.zeros(4, int)), ValueError, "x: row 0, column 0 is nan"),
    ],
)
def test_fit_refuses_data_it_cannot_use(dataset, error, match):
    with pytest.raises(error, match=match):
        fit(Trainer(classifier()), dataset)


def test_a_value_too_large_for_the_precision_is_refused_before_any_work():
    x, y = blobs(50)
    x[7, 2] = 1e300
    for storage in ("float32", "float16"):
        net = classifier(precision=storage)
        before = net.theta.copy()
        for work in (lambda trainer: fit(trainer, (x, y)), lambda trainer: trainer.step(x, y)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nor is it worth a warning of NumPy's
                with pytest.raises(ValueError, match="row 7, column 2") as caught:
                    work(Trainer(net))
                assert str(caught.value).startswith("x")
                assert storage in str(caught.value)
        assert same_bits(net.theta, before)


def test_a_target_too_large_for_the_precision_is_refused():
    x, y = waves(9)
    y[4, 1] = -1e300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"y.*row 4"):
            MLP([3, 4, 2]).cost(x, y)


# --- order, validation, history ----------------------------------------------------------------------------------


def watch_minibatches(monkeypatch, trainer, see):
    """Have ``see(x, y, w)`` called with every minibatch of a run, just before its step."""
    honest = trainer._step

    def step(feed, rows, cursor, schedule):
        trainer.net._ops.begin_step(0.0, trainer.rounds, cursor, trainer._state)
        x, y, w = feed.fetch(rows, trainer._state)
        see(x[:], y, w)
        honest(feed, rows, cursor, schedule)

    monkeypatch.setattr(trainer, "_step", step)


def seen_rows(net, n, epochs, monkeypatch, **options):
    """The row numbers of every minibatch of a run; x is the row number itself."""
    seen = []
    x = np.arange(n, dtype=np.float64)[:, None]
    trainer = Trainer(net, optimizer=SGD(lr=0.0), **options)

    def see(x, y, w):
        seen.append(x[:, 0].astype(int).tolist())
        assert y[:, 0].astype(int).tolist() == [2 * i for i in seen[-1]], "x and y must stay together"
        assert w.tolist() == [3.0 * i + 1 for i in seen[-1]], "and so must the weights"

    watch_minibatches(monkeypatch, trainer, see)
    fit(trainer, (x, 2 * x, 3 * x[:, 0] + 1), epochs, batch_size=7)
    return seen


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch(monkeypatch):
    n, runs = 30, []
    for options in ({}, {}, {"accumulate": 2}, {"seed": 99}):
        runs.append(seen_rows(MLP([1, 2, 1], precision="float64", seed=4), n, 3, monkeypatch, **options))
    assert [len(rows) for rows in runs[0]] == [7, 7, 7, 7, 2] * 3
    epochs = [[row for rows in runs[0][5 * e : 5 * e + 5] for row in rows] for e in range(3)]
    for epoch, order in enumerate(epochs):
        assert sorted(order) == list(range(n))
        assert order == data.epoch_order(n, 4, epoch).tolist()
    assert len({tuple(order) for order in epochs}) == 3
    assert runs[0] == runs[1] == runs[2]
    assert runs[0] != runs[3]


def test_without_shuffling_the_rows_come_in_order(monkeypatch):
    seen = []
    trainer = Trainer(MLP([1, 1], precision="float64"), optimizer=SGD(lr=0.0))
    watch_minibatches(monkeypatch, trainer, lambda x, y, w: seen.extend(x[:, 0].tolist()))
    x = np.arange(10.0)[:, None]
    fit(trainer, (x, x), epochs=2, batch_size=4, shuffle=False)
    assert seen == [*range(10), *range(10)]


def test_a_batch_larger_than_the_data_is_the_data():
    x, y = blobs(30)
    nets = [classifier(), classifier()]
    for net, size in zip(nets, (30, 10_000)):
        assert fit(Trainer(net), (x, y), batch_size=size).last["step"] == 3
    assert_close(nets[0].theta, nets[1].theta, 1e-12)


def test_validation_by_fraction_holds_out_that_share_of_every_class(monkeypatch):
    x, y = blobs(100, classes=3)
    y[:70], y[70:90], y[90:] = 0, 1, 2
    held = {}

    def spy(self, dataset, names):
        vx, vy, vw = dataset
        held.update(x=vx.copy(), y=vy.copy(), w=vw.copy())
        return {"loss": 1.0}

    monkeypatch.setattr(Trainer, "_evaluate", spy)
    used = []
    trainer = Trainer(classifier(), optimizer=SGD(lr=0.0))
    watch_minibatches(monkeypatch, trainer, lambda bx, by, bw: used.append(bx.copy()))
    weights = x[:, 0] ** 2
    fit(trainer, (x, y, weights), epochs=1, validation=0.2, metrics=[])
    assert np.bincount(held["y"]).tolist() == [14, 4, 2]
    rows = [int(np.flatnonzero((x == row).all(axis=1))[0]) for row in held["x"]]
    np.testing.assert_array_equal(y[rows], held["y"])
    np.testing.assert_array_equal(weights[rows], held["w"])
    trained = {tuple(row) for row in np.concatenate(used)}
    assert len(trained) == 80
    assert not trained & {tuple(row) for row in held["x"]}, "no row is both trained on and held out"


def test_validation_by_fraction_of_a_regression():
    x, y = waves(50)
    trainer = Trainer(MLP([3, 8, 2], "tanh", precision="float64"))
    row = fit(trainer, (x, y), validation=0.3).last
    assert row["step"] == 3 * math.ceil(35 / 32)
    assert {"validation_loss", "validation_rmse", "validation_r2"} <= set(row)


def test_validation_data_is_judged_without_dropout_and_penalty():
    x, y = blobs(80)
    xv, yv = blobs(40, seed=1)
    w = np.random.default_rng(0).random(40)
    net = classifier(dropout=0.4, activation="tanh")
    history = fit(Trainer(net, regularizer=L2(0.1)), (x, y), validation=(xv, yv, w), metrics=["accuracy"])
    _, hs = network_forward(net.weights, net.biases, ["tanh", "softmax"], xv)
    losses = -np.log(hs[-1][np.arange(40), yv])
    assert_close(history.last["validation_loss"], losses @ w / w.sum(), 1e-12)
    right = hs[-1].argmax(axis=1) == yv
    assert_close(history.last["validation_accuracy"], right @ w / w.sum(), 1e-12)
    found = Trainer(net).evaluate(xv, yv, w)
    assert_close(found["loss"], losses @ w / w.sum(), 1e-12)
    assert_close(found["accuracy"], right @ w / w.sum(), 1e-12)


def test_validation_changes_nothing_in_the_training():
    x, y = blobs(80)
    nets = [classifier(dropout=0.3) for _ in range(2)]
    fit(Trainer(nets[0]), (x, y))
    fit(Trainer(nets[1]), (x, y), validation=blobs(40, seed=1))
    assert same_bits(nets[0].theta, nets[1].theta)


def test_history_has_one_row_an_epoch_with_these_columns():
    x, y = blobs(70)
    started = time.perf_counter()
    history = fit(Trainer(classifier()), (x, y), epochs=4, batch_size=32, validation=(x, y))
    elapsed = time.perf_counter() - started
    assert len(history) == 4
    assert history.stopped == "completed"
    assert [row["epoch"] for row in history] == history["epoch"] == [1, 2, 3, 4]
    assert history["step"] == [3, 6, 9, 12]
    assert set(history.last) == {
        "epoch", "step", "cost", "learning_rate", "seconds", "samples_per_second",
        "validation_loss", "validation_accuracy",
    }  # fmt: skip
    assert history["learning_rate"] == [0.001] * 4
    assert 0 < sum(history["seconds"]) <= elapsed
    for row in history:
        assert math.isclose(row["samples_per_second"], 70 / row["seconds"])
    assert history.best["validation_loss"] == min(history["validation_loss"])
    assert history.to_dict()["epochs"] == history.rows
    with pytest.raises(KeyError, match="no column 'csot'; did you mean 'cost'"):
        history["csot"]


def test_the_cost_of_an_epoch_is_the_mean_over_its_samples():
    """J of every minibatch weighted by its rows: here with a learning rate of 0, so that J is that of all the data."""
    x, y = blobs(70)
    net = classifier()
    history = fit(Trainer(net, optimizer=SGD(lr=0.0), regularizer=L2(0.1)), (x, y), batch_size=32)
    assert_close(history["cost"], [net.cost(x, y, "cross_entropy", L2(0.1))] * 3, 1e-12)


# --- callbacks and early stopping ----------------------------------------------------------------------------------


def test_callbacks_get_the_trainer_and_a_row_and_can_end_the_run():
    x, y = blobs(70)
    seen, after = [], []

    def stop(trainer, row):
        seen.append((trainer, row["epoch"], row["cost"]))
        row["cost"] = "a callback's own business"
        return row["epoch"] == 3

    trainer = Trainer(classifier())
    history = fit(trainer, (x, y), epochs=9, callbacks=[stop, lambda *_: after.append(1)])
    assert history.stopped == "callback"
    assert len(history) == 3
    assert [(t, e, c) for t, e, c in seen] == [(trainer, row["epoch"], row["cost"]) for row in history]
    assert len(after) == 3, "a callback after the one that stops is called as well"


@pytest.mark.parametrize("answer", [True, np.True_])
def test_a_callback_ends_the_run_with_any_true_bool(answer):
    history = fit(Trainer(classifier()), blobs(40), callbacks=[lambda *_: answer])
    assert (history.stopped, len(history)) == ("callback", 1)


@pytest.mark.parametrize("answer", [None, False, np.False_])
def test_a_callback_that_returns_nothing_lets_the_run_go_on(answer):
    assert fit(Trainer(classifier()), blobs(40), callbacks=[lambda *_: answer]).stopped == "completed"


def test_an_error_in_a_callback_comes_out():
    def broken(trainer, row):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(Trainer(classifier()), blobs(40), callbacks=[broken])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_callback_can_change_the_weights(precision):
    """What a callback writes is what the next step starts from, in a 16-bit precision as well."""
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, y = blobs(40)
    net = classifier(precision=precision)
    costs = []

    def reset(trainer, row):
        for part in (*trainer.net.weights, *trainer.net.biases):
            part[...] = 0

    trainer = Trainer(net, optimizer=SGD(lr=0.01))
    honest = trainer._step

    def spy(*arguments):
        honest(*arguments)
        costs.append(net._ops.read_state(trainer._state, Slot.COST))

    trainer._step = spy
    fit(trainer, (x, y), epochs=2, batch_size=40, callbacks=[reset])
    assert_close(costs[1], math.log(3), 1e-6)  # every class is as likely where all weights are 0


def early(trainer, epochs=60, patience=3, **options):
    """A run that overfits: few samples with wrong labels, judged on others. What every epoch's θ was comes with it."""
    x, y = blobs(24, spread=3.0)
    thetas = []
    history = fit(
        trainer,
        (x, np.roll(y, 1)),
        epochs,
        batch_size=8,
        validation=blobs(60, spread=3.0, seed=8),
        early_stopping=EarlyStopping(patience=patience, **options),
        callbacks=[lambda t, row: thetas.append(t.net.theta.copy())],
    )
    return history, thetas


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_early_stopping_ends_the_run_and_puts_the_best_weights_back(precision):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    net = classifier(hidden=40, precision=precision)
    history, thetas = early(Trainer(net, optimizer=Adam(lr=0.02)))
    best = int(np.argmin(history["validation_loss"]))
    assert history.stopped == "early stopping"
    assert len(history) == best + 1 + 3
    assert history.best is history.rows[best]
    assert history.restored_best
    assert same_bits(net.theta, thetas[best])
    # and they are what the next prediction uses
    assert_close(Trainer(net).evaluate(*blobs(60, spread=3.0, seed=8))["loss"], history.best["validation_loss"], 1e-12)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_is_put_back_is_what_a_16_bit_network_computes_with(precision):
    """Nobody looks at θ in this run, so nothing but the putting back brings the 16-bit copy of it up to date."""
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, y = blobs(24, spread=3.0)
    held_out = blobs(60, spread=3.0, seed=8)
    trainer = Trainer(classifier(hidden=40, precision=precision), optimizer=Adam(lr=0.02))
    history = fit(
        trainer, (x, np.roll(y, 1)), 60, batch_size=8, validation=held_out, early_stopping=EarlyStopping(patience=3)
    )
    assert history.best["validation_loss"] < history.last["validation_loss"]
    assert_close(trainer.evaluate(*held_out)["loss"], history.best["validation_loss"], 1e-12)


def test_early_stopping_without_restoring_keeps_the_last_weights():
    net = classifier(hidden=40)
    history, thetas = early(Trainer(net, optimizer=Adam(lr=0.02)), restore_best=False)
    assert history.stopped == "early stopping"
    assert not history.restored_best
    assert same_bits(net.theta, thetas[-1])


def test_the_best_weights_come_back_where_the_run_was_not_ended_early():
    net = classifier(hidden=40)
    history, thetas = early(Trainer(net, optimizer=Adam(lr=0.02)), epochs=12, patience=100)
    assert history.stopped == "completed"
    assert same_bits(net.theta, thetas[int(np.argmin(history["validation_loss"]))])


def test_early_stopping_by_a_metric_that_should_rise():
    net = classifier(hidden=40)
    history, thetas = early(Trainer(net, optimizer=Adam(lr=0.02)), monitor="validation_accuracy")
    assert history.monitor == "validation_accuracy"
    assert same_bits(net.theta, thetas[int(np.argmax(history["validation_accuracy"]))])


def test_early_stopping_counts_only_what_improves_by_more_than_min_delta():
    net = classifier()
    history = fit(
        Trainer(net, optimizer=SGD(lr=1e-6)), blobs(40), epochs=20, early_stopping=EarlyStopping(4, min_delta=0.5)
    )
    assert history.monitor == "cost"
    assert np.all(np.diff(history["cost"]) < 0), "it improves all the time, but by too little"
    assert (history.stopped, len(history)) == ("early stopping", 5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"patience": 0}, ValueError, "patience: expected an integer of at least 1"),
        ({"patience": 1.5}, TypeError, "patience: expected an integer"),
        ({"min_delta": -1}, ValueError, "min_delta: expected a finite number"),
        ({"restore_best": 1}, TypeError, "restore_best: expected True or False"),
    ],
)
def test_early_stopping_checks_its_options(options, error, match):
    with pytest.raises(error, match=match):
        EarlyStopping(**options)


# --- divergence --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", [SGD(), SGD(momentum=0.9), "adam", "muon"], ids=str)
@pytest.mark.parametrize("at_once", [None, False])
def test_a_step_whose_cost_is_not_finite_leaves_theta_as_it_is(rule, at_once):
    net = MLP([2, 3, 1], "identity")
    trainer = Trainer(net, "mse", rule, apply_at_once=at_once)
    x, y = np.ones((4, 2)), np.ones((4, 1))
    trainer.step(x, y)
    before = net.theta.copy()
    with pytest.raises(Diverged, match=r"step 2: the cost is not finite, first in the loss") as caught:
        trainer.step(x * 1e30, y)  # ŷ is finite in float32, its square is not
    assert caught.value.history is None
    assert same_bits(net.theta, before)
    assert math.isfinite(float(trainer.step(x, y))), "and the trainer goes on from there"
    assert not np.array_equal(net.theta, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_divergence_names_the_layer_that_left_the_finite_numbers_first(layer):
    net = MLP([2, 3, 3, 1], "identity")
    net.weights[layer][...] = 3e38
    with pytest.raises(Diverged, match=f"step 1: the cost is not finite, first in layer {layer};"):
        Trainer(net, "mse").step(np.full((2, 2), 1e5), np.ones((2, 1)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_diverges_keeps_the_weights_of_the_last_good_epoch():
    """The third epoch has a learning rate that throws θ away; the network is left as the second one ended."""
    thetas = []
    x, y = waves(64)
    net = MLP([3, 16, 2], "relu", seed=1)

    class Cliff(schedules.Schedule):
        def rate(self, lr, t):
            return lr if t < 2 else 1e30

    trainer = Trainer(net, "mse", SGD(lr=0.01), schedule=Cliff(by="epoch"))
    with pytest.raises(Diverged, match=r"epoch 3, step \d+: the cost is not finite") as caught:
        fit(trainer, (x, y), epochs=9, batch_size=8, callbacks=[lambda t, _: thetas.append(t.net.theta.copy())])
    assert len(thetas) == 2
    assert same_bits(net.theta, thetas[-1])
    assert np.isfinite(net.theta).all()
    assert len(caught.value.history) == 2
    assert caught.value.history.stopped == "diverged"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gradient_that_is_not_finite_under_a_finite_cost_does_not_reach_the_user():
    """ŷ = 10⁵ · 10³⁰ x stays finite and so does its absolute error, but ∂J/∂W overflows float32."""

    def network():
        net = MLP([1, 1, 1], "relu")
        net.weights[0][...], net.weights[1][...] = 1e-30, 1e10
        return net

    x, y = np.full((4, 1), 1e30, np.float32), np.zeros((4, 1))
    for at_once in (None, False):
        net = network()
        before = net.theta.copy()
        with pytest.raises(Diverged, match="not finite"):
            fit(Trainer(net, "mae", SGD(), apply_at_once=at_once), (x, y), epochs=1, batch_size=4)
        assert same_bits(net.theta, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gradient_that_is_not_finite_is_seen_at_once_where_its_norm_is_measured():
    net = MLP([1, 1, 1], "relu")
    net.weights[0][...], net.weights[1][...] = 1e-30, 1e10
    before = net.theta.copy()
    with pytest.raises(Diverged, match="step 1: the gradient is not finite"):
        Trainer(net, "mae", SGD(), clip_norm=1.0).step(np.full((1, 1), 1e30, np.float32), np.zeros((1, 1)))
    assert same_bits(net.theta, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_lbfgs_that_diverges_says_so_and_keeps_theta():
    net = MLP([1, 1], "relu")
    net.weights[0][...] = 1e30
    before = net.theta.copy()
    with pytest.raises(Diverged, match="the cost is not finite"):
        fit(Trainer(net, "mse", "lbfgs"), (np.full((3, 1), 1e30, np.float32), np.zeros((3, 1))))
    assert same_bits(net.theta, before)


# --- Ctrl-C ------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_run_after_the_step_at_hand():
    x, y = blobs(100)
    net = classifier()
    trainer = Trainer(net)
    thetas, honest = [], trainer._step

    def step(*arguments):
        honest(*arguments)
        thetas.append(net.theta.copy())
        if len(thetas) == 6:
            signal.raise_signal(signal.SIGINT)

    trainer._step = step
    with pytest.warns(UserWarning, match="training was interrupted; what was learned so far is kept"):
        history = fit(trainer, (x, y), epochs=50, batch_size=25)
    assert history.stopped == "interrupted"
    assert len(history) == 1, "the second epoch was not finished"
    assert trainer.rounds == len(thetas) == 6
    assert same_bits(net.theta, thetas[-1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer._step = honest
    assert fit(trainer, (x, y), batch_size=25).stopped == "completed", "and the trainer can go on"


def test_ctrl_c_twice_interrupts_at_once():
    def callback(trainer, row):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = Trainer(classifier())
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, blobs(40), callbacks=[callback])
    assert trainer.rounds == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_puts_the_best_weights_back_where_early_stopping_asks_for_them():
    thetas = []

    def callback(trainer, row):
        thetas.append(trainer.net.theta.copy())
        if len(thetas) == 3:
            signal.raise_signal(signal.SIGINT)

    net = classifier()
    with pytest.warns(UserWarning, match="interrupted"):
        history = fit(
            Trainer(net, optimizer=SGD(lr=0.01)), blobs(40), epochs=9, callbacks=[callback],
            early_stopping=EarlyStopping(),
        )  # fmt: skip
    assert history.restored_best
    assert same_bits(net.theta, thetas[int(np.argmin(history["cost"]))])


def test_ctrl_c_ends_lbfgs_after_the_iteration_at_hand():
    def callback(trainer, row):
        if row["epoch"] == 2:
            signal.raise_signal(signal.SIGINT)

    net = classifier()
    start = net.cost(*blobs(40), "cross_entropy")
    with pytest.warns(UserWarning, match="interrupted"):
        history = fit(Trainer(net, optimizer="lbfgs"), blobs(40), epochs=30, callbacks=[callback])
    assert history.stopped == "interrupted"
    assert len(history) in (2, 3)
    assert net.cost(*blobs(40), "cross_entropy") < start


def test_a_program_s_own_rule_for_ctrl_c_is_left_alone():
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        mine = signal.getsignal(signal.SIGINT)
        history = fit(Trainer(classifier()), blobs(40), callbacks=[lambda *_: signal.raise_signal(signal.SIGINT)])
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(caught) == 3
    assert history.stopped == "completed"


def test_fit_runs_in_a_thread_that_may_not_set_signals():
    histories = []
    thread = threading.Thread(target=lambda: histories.append(fit(Trainer(classifier()), blobs(40))))
    thread.start()
    thread.join()
    assert [h.stopped for h in histories] == ["completed"]


CHILD = """
    import sys, time, warnings
    import numpy as np
    from gpu_mlp import MLP, Trainer

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 6)), rng.integers(0, 3, 400)
    net = MLP([6, 8, 3], output="softmax")

    def callback(trainer, row):
        if row["epoch"] == 1:
            print("started", flush=True)
        if len(sys.argv) > 2:
            time.sleep(60)

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = Trainer(net).fit((x, y), epochs=10**6, batch_size=20, callbacks=[callback], progress=True)
        net.save(sys.argv[1])
        print(history.stopped, len(history), any("interrupted" in str(w.message) for w in caught), flush=True)
    except KeyboardInterrupt:
        print("KeyboardInterrupt", flush=True)
        sys.exit(130)
"""


def child(tmp_path, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "model.safetensors"), *arguments]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "started\n"
    return process


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    process = child(tmp_path)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    stopped, epochs, warned = out.split()
    assert (stopped, warned) == ("interrupted", "True")
    assert int(epochs) >= 1
    assert "Traceback" not in err
    start = MLP([6, 8, 3], output="softmax")
    net = MLP.load(tmp_path / "model.safetensors")
    assert np.isfinite(net.theta).all()
    assert not np.array_equal(net.theta, start.theta), "what was learned is kept"


def test_a_second_ctrl_c_in_a_process_of_its_own(tmp_path):
    process = child(tmp_path, "sleep")
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first one waits for the step at hand"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == "KeyboardInterrupt\n"


# --- L-BFGS ------------------------------------------------------------------------------------------------------


def convex():
    """Softmax regression with a penalty: convex, so that both methods look for the same minimum."""
    x, y = blobs(120, spread=2.0)
    return (x, y), MLP([6, 3], output="softmax", precision="float64"), L2(0.01, on="all")


def test_lbfgs_reaches_the_minimum_that_adam_is_still_above():
    dataset, net, penalty = convex()
    history = fit(Trainer(net, optimizer=LBFGS(tolerance_grad=1e-8), regularizer=penalty), dataset, epochs=100)
    J, g = net.cost_and_gradients(*dataset, "cross_entropy", penalty)
    assert history.stopped == "converged"
    assert abs(g.theta).max() < 1e-5
    _, other, _ = convex()
    fit(Trainer(other, optimizer=Adam(lr=0.05), regularizer=penalty), dataset, epochs=len(history))
    assert other.cost(*dataset, "cross_entropy", penalty) > J
    assert all(b <= a for a, b in zip(history["cost"], history["cost"][1:]))


@pytest.mark.parametrize("weighted", [False, True])
def test_lbfgs_is_scipy_run_by_hand(weighted):
    from scipy.optimize import minimize

    x, y = blobs(60)
    w = np.random.default_rng(0).random(60) if weighted else None
    nets = [classifier(activation="tanh") for _ in range(2)]

    def objective(theta):
        nets[1].theta[...] = theta
        J, g = nets[1].cost_and_gradients(x, y, "cross_entropy", L2(0.01), w)
        return J, g.theta

    costs = []
    result = minimize(
        objective, nets[1].theta.copy(), jac=True, method="L-BFGS-B",
        callback=lambda intermediate_result: costs.append(float(intermediate_result.fun)),
        options={"maxcor": 10, "gtol": 1e-5, "ftol": 1e-9, "maxiter": 25, "maxfun": 15000},
    )  # fmt: skip
    history = fit(
        Trainer(nets[0], optimizer="lbfgs", regularizer=L2(0.01)), (x, y) if w is None else (x, y, w), epochs=25
    )
    assert len(history) == len(costs) > 5
    assert_close(history["cost"], costs, 1e-9)
    assert_close(nets[0].theta, result.x, 1e-6)


def test_lbfgs_stops_where_it_is_told():
    dataset, net, penalty = convex()
    trainer = Trainer(net, optimizer="lbfgs", regularizer=penalty)
    assert (len(h := fit(trainer, dataset, epochs=3)), h.stopped) == (3, "completed")
    h = fit(trainer, dataset, epochs=9, callbacks=[lambda t, row: row["epoch"] == 5])
    assert (len(h), h.stopped) == (2, "callback"), "epochs are counted over all fits"
    few = fit(Trainer(convex()[1], optimizer=LBFGS(max_eval=2), regularizer=penalty), dataset, epochs=50)
    assert len(few) <= 3
    assert few.stopped != "converged"


def test_lbfgs_validates_and_restores_like_the_rest():
    dataset, net, _ = convex()
    thetas = []
    history = fit(
        Trainer(net, optimizer="lbfgs"), dataset, epochs=40, validation=blobs(60, spread=2.0, seed=4),
        early_stopping=EarlyStopping(3), callbacks=[lambda t, _: thetas.append(t.net.theta.copy())],
    )  # fmt: skip
    assert "validation_accuracy" in history.last
    assert same_bits(net.theta, thetas[int(np.argmin(history["validation_loss"]))])


def test_lbfgs_in_float32_and_in_micro_batches():
    dataset, _, penalty = convex()
    for options in ({"accumulate": 3}, {}):
        net = MLP([6, 3], output="softmax", precision="float32")
        fit(Trainer(net, optimizer="lbfgs", regularizer=penalty, **options), dataset, epochs=30)
        _, exact, _ = convex()
        fit(Trainer(exact, optimizer=LBFGS(tolerance_grad=1e-9), regularizer=penalty), dataset, epochs=99)
        # near the minimum J is flat: rounding of 1e-7 in J allows about its root in θ
        assert_close(net.theta[:18], exact.theta[:18], 1e-2)
        assert_close(net.cost(*dataset, "cross_entropy", penalty), exact.cost(*dataset, "cross_entropy", penalty), 1e-5)


# --- reduced precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduced", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", [SGD(lr=0.1), Adam(lr=0.01)], ids=lambda r: r.name)
def test_reduced_precision_learns_and_follows_float32(reduced, rule):
    if reduced == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, y = blobs(200, dtype=np.float32)
    nets, costs = [], []
    for name in ("float32", reduced):
        nets.append(MLP([6, 24, 24, 3], ["relu", "tanh"], "softmax", precision=name))
        costs.append(fit(Trainer(nets[-1], optimizer=rule), (x, y), epochs=8)["cost"])
    assert accuracy(nets[1], x, y) > 0.97
    assert costs[1][-1] < costs[1][0] / 2
    # a unit of the last place of bfloat16 is 1/128, of float16 1/1024; the costs follow to a few of them
    assert_close(costs[1], costs[0], {"tf32": 1e-6, "bfloat16": 3e-2, "float16": 3e-3}[reduced])
    assert nets[1].theta.dtype == np.float32


def scale_of(trainer):
    read = trainer.net._ops.read_state
    return tuple(read(trainer._state, slot) for slot in (Slot.LOSS_SCALE, Slot.STEP, Slot.SKIPPED))


def test_float16_halves_the_loss_scale_until_the_gradient_fits_and_skips_those_steps():
    """A residual of 1000 times 65536 is beyond float16's 65504: 2 · 1000 · s / 2 outputs ≤ 65504 wants s ≤ 64."""
    net = MLP([3, 4, 2], "relu", precision="float16")
    x, y = np.zeros((2, 3)), np.full((2, 2), 2000.0)
    trainer = Trainer(net, "mse", SGD(lr=1e-4))
    assert scale_of(trainer) == (65536, 0, 0)
    before = net.theta.copy()
    for skipped in range(1, 12):
        cost = trainer.step(x, y)
        assert_close(float(cost), 2000.0**2, 1e-2)
        if scale_of(trainer)[2] < skipped:
            break
        assert scale_of(trainer) == (65536 / 2**skipped, 0, skipped)
        assert same_bits(net.theta, before), "a skipped step changes nothing"
    # gz = 2 (ŷ − y) / outputs · scale / rows = 1000 · scale has to stay below 65504: scale 32 or, with ŷ > 0, 64
    assert scale_of(trainer)[0] in (32, 64)
    assert scale_of(trainer)[1] == 1
    assert not np.array_equal(net.theta, before)
    assert np.isfinite(net.theta).all()


def test_a_skipped_step_is_quiet():
    """Overflow at too large a loss scale is how the scale is found, and nothing to warn of."""
    net = MLP([3, 4, 2], "relu", precision="float16")
    trainer = Trainer(net, "mse", SGD(lr=1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(trainer, (np.zeros((2, 3)), np.full((2, 2), 2000.0)), epochs=14)
    assert scale_of(trainer)[2] > 0


def test_divergence_is_told_once():
    """By the exception, and not by NumPy's warnings as well."""
    net = MLP([2, 3, 1], "identity")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Diverged):
            Trainer(net, "mse").step(np.full((4, 2), 1e30, np.float32), np.ones((4, 1)))


def test_float16_doubles_the_loss_scale_after_enough_good_steps(monkeypatch):
    assert precision.LOSS_SCALE_INTERVAL == 2000
    assert precision.INITIAL_LOSS_SCALE == 65536
    monkeypatch.setattr(precision, "LOSS_SCALE_INTERVAL", 5)
    x, y = blobs(32)
    trainer = Trainer(classifier(precision="float16"), optimizer=SGD(lr=1e-3))
    found = []
    for _ in range(11):
        trainer.step(x, y)
        found.append(scale_of(trainer)[0])
    assert found == [65536] * 4 + [2 * 65536] * 5 + [4 * 65536] * 2


def test_the_loss_scale_is_not_seen_outside():
    """θ after a step does not depend on the scale: 1/65536 is a power of two, so float32 loses nothing by it."""
    x, y = blobs(32)
    thetas = []
    for scale in (1024.0, 65536.0):
        net = classifier(precision="float16")
        trainer = Trainer(net, optimizer=SGD(lr=0.1), clip_norm=0.5)
        net._ops.write_state(trainer._state, {Slot.LOSS_SCALE: scale})
        trainer.step(x, y)
        thetas.append(net.theta.copy())
    assert_close(thetas[1], thetas[0], 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float16_whose_gradient_never_fits_says_so_instead_of_skipping_for_ever():
    """z = −120000 is −∞ in float16: silu(z) = 0 is fine and its derivative is not, whatever the loss scale."""
    net = MLP([1, 1, 1], "silu", precision="float16")
    net.weights[0][...], net.weights[1][...] = 60000, 1
    before = net.theta.copy()
    with pytest.raises(Diverged, match="not finite"):
        fit(Trainer(net, "mae", "sgd"), (np.full((1, 1), -2.0), np.zeros((1, 1))), epochs=1500)
    assert same_bits(net.theta, before)


# --- every optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_optimizer_learns(name):
    x, y = blobs(150)
    # rates of an order that suits each rule on a small problem; the defaults are PyTorch's, for large ones
    rate = {"sgd": 0.1, "adagrad": 0.1, "lion": 3e-3, "lbfgs": 1.0, "adadelta": 1.0, "radam": 0.05}.get(name, 0.01)
    rule = optimizers.OPTIMIZERS[name](lr=rate)
    net = classifier()
    before = net.cost(x, y, "cross_entropy")
    history = fit(Trainer(net, optimizer=rule), (x, y), epochs=12)
    assert net.cost(x, y, "cross_entropy") < before / 3
    assert accuracy(net, x, y) > 0.95
    assert np.isfinite(history["cost"]).all()


def test_a_rate_of_zero_changes_nothing():
    x, y = blobs(60)
    for name in sorted(set(optimizers.OPTIMIZERS) - {"lbfgs", "muon"}):
        net = classifier()
        before = net.theta.copy()
        fit(Trainer(net, optimizer=optimizers.OPTIMIZERS[name](lr=0.0)), (x, y))
        assert same_bits(net.theta, before), name


def test_the_default_loss_goes_with_the_output():
    for output, loss in {
        "softmax": "cross_entropy",
        "log_softmax": "nll",
        "sigmoid": "binary_cross_entropy",
        "exp": "poisson",
        "identity": "mse",
        "tanh": "mse",
    }.items():
        assert Trainer(MLP([2, 3, 2], output=output)).loss.name == loss
