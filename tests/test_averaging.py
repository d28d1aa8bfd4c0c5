"""Averaged weights: the rule against its formula and PyTorch's, and what a trainer and a fit do with the average."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import assert_close, same_bits

from gpu_mlp import EMA, LBFGS, MLP, SGD, Adam, Diverged, EarlyStopping, Muon, Trainer
from gpu_mlp.ops.interface import Slot


def problem(n=60):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(n, 6))
    return x, (x[:, :3] + 0.3 * rng.normal(size=(n, 3))).argmax(axis=1)


def classifier(**options):
    return MLP([6, 12, 3], **{"output": "softmax", "precision": "float64", "seed": 3, **options})


def averaged(trainer):
    """A copy of the averaged θ."""
    with trainer.averaged_weights():
        return trainer.net.theta.copy()


# --- the rule --------------------------------------------------------------------------------------------------------


def test_the_decay_of_every_update():
    assert [EMA(0.9, warmup=False).decay_at(t) for t in (1, 2, 3)] == [0.0, 0.9, 0.9]
    assert [EMA(0.5).decay_at(t) for t in (1, 2, 9, 10, 99)] == [0.0, 2 / 11, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(ValueError, match=r"^decay: "):
        EMA(decay)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match=r"^average: expected an EMA or None, got 0\.999 \(float\)"):
        Trainer(classifier(), average=0.999)
    with pytest.raises(TypeError, match=r"^warmup: "):
        EMA(warmup=1)


def test_lbfgs_has_no_average():
    with pytest.raises(ValueError, match=r"^average: L-BFGS"):
        Trainer(classifier(), optimizer=LBFGS(), average=EMA())


def test_the_average_is_that_of_torch():
    torch = pytest.importorskip("torch")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    x, y = problem()
    net = classifier()
    trainer = Trainer(net, average=EMA(0.9, warmup=False))
    model = torch.nn.Linear(1, 1).double()
    model.weight = torch.nn.Parameter(torch.zeros(net.theta.size, dtype=torch.float64))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(12):
        trainer.step(x, y)
        model.weight.data = torch.from_numpy(net.theta.copy())
        theirs.update_parameters(model)
        assert_close(averaged(trainer), theirs.module.weight.detach().numpy(), 1e-14)


# --- a trainer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": SGD(0.1)}, {"optimizer": Muon(0.01)}, {"accumulate": 3}], ids=str
)
@pytest.mark.parametrize("precision", ["float64", "float32", "float16", "bfloat16"])
def test_the_average_follows_every_update(options, precision):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, y = problem()
    trainer = Trainer(classifier(precision=precision), average=EMA(0.8), **options)
    twin = Trainer(classifier(precision=precision), **options)
    expected = None
    for t in range(1, 15):
        trainer.step(x, y)
        twin.step(x, y)
        theta = twin.net.theta.astype(np.float64)
        d = 0.0 if t == 1 else min(0.8, t / (9 + t))
        expected = theta if expected is None else d * expected + (1 - d) * theta
        assert_close(averaged(trainer), expected, 1e-14 if precision == "float64" else 1e-6)
        assert same_bits(trainer.net.theta, twin.net.theta), "averaging leaves the training alone"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_network_has_the_average_within_the_block_and_its_own_weights_after_it(precision):
    x, y = problem()
    trainer = Trainer(classifier(precision=precision), optimizer=Adam(0.05), average=EMA(0.8))
    net = trainer.net
    for _ in range(9):
        trainer.step(x, y)
    before, y_hat = net.theta.copy(), net.forward(x)
    with trainer.averaged_weights():
        twin = classifier(precision=precision)
        twin.theta[...] = net.theta
        assert same_bits(net.forward(x), twin.forward(x))
        assert not np.allclose(net.forward(x), y_hat)
    assert same_bits(net.theta, before)
    assert same_bits(net.forward(x), y_hat)
    assert trainer.evaluate(x, y)["loss"] == Trainer(twin).evaluate(x, y)["loss"]


def test_before_the_first_update_there_is_no_average():
    net = classifier()
    trainer, before = Trainer(net, average=EMA()), net.theta.copy()
    assert same_bits(averaged(trainer), before)


def test_a_skipped_step_leaves_the_average():
    x, y = problem()
    trainer = Trainer(classifier(precision="float16"), average=EMA(0.8))
    for _ in range(3):
        trainer.step(x, y)
    before = averaged(trainer)
    ops, state = trainer.net._ops, trainer._state
    ops.write_state(state, {Slot.LOSS_SCALE: 2.0**60})
    trainer.step(x, y)
    assert ops.read_state(state, Slot.SKIPPED) == 1
    assert same_bits(averaged(trainer), before)


# --- a fit -----------------------------------------------------------------------------------------------------------


def test_a_fit_leaves_the_average_and_validates_with_it():
    x, y = problem()
    seen = []

    def callback(trainer, row):
        seen.append((averaged(trainer), row["validation_loss"], row["cost"]))

    trainer = Trainer(classifier(), optimizer=Adam(0.03), average=EMA(0.9))
    history = trainer.fit((x[:40], y[:40]), 5, 16, (x[40:], y[40:]), False, callbacks=[callback])
    assert same_bits(trainer.net.theta, seen[-1][0])
    for theta, loss, _ in seen:
        twin = classifier()
        twin.theta[...] = theta
        assert Trainer(twin).evaluate(x[40:], y[40:])["loss"] == loss
    plain = Trainer(classifier(), optimizer=Adam(0.03)).fit((x[:40], y[:40]), 5, 16, None, False)
    assert history["cost"] == plain["cost"], "the cost is that of the weights that are trained"


def test_early_stopping_restores_the_best_average():
    x, y = problem()
    seen = {}
    trainer = Trainer(classifier(), optimizer=Adam(0.3), average=EMA(0.5))
    history = trainer.fit(
        (x[:30], y[:30]), 30, 16, (x[30:], y[30:]), False, early_stopping=EarlyStopping(3),
        callbacks=[lambda trainer, row: seen.update({row["epoch"]: averaged(trainer)})],
    )  # fmt: skip
    assert history.restored_best
    assert history.best is not history.last
    assert same_bits(trainer.net.theta, seen[history.best["epoch"]])


def test_a_second_fit_goes_on_with_the_average():
    x, y = problem()
    trainer = Trainer(classifier(), average=EMA(0.9))
    trainer.fit((x, y), 2, 16, progress=False)
    steps, before, updated = trainer.rounds, averaged(trainer), []
    watch = [lambda trainer, row: updated.append(trainer.net.theta.copy())]
    trainer.fit((x, y), 1, len(x), progress=False, callbacks=watch)
    d = min(0.9, (steps + 1) / (10 + steps))
    assert_close(trainer.net.theta, d * before + (1 - d) * updated[0], 1e-14)


@pytest.mark.parametrize("bad_epoch", [1, 3])
def test_a_diverged_fit_leaves_the_average_of_the_last_good_epoch(bad_epoch):
    x, y = problem()
    net, kept = classifier(), []
    start = net.theta.copy()
    trainer = Trainer(net, optimizer=SGD(0.1), average=EMA(0.9))

    def spoil(trainer, row):
        kept.append(averaged(trainer))
        if row["epoch"] == bad_epoch - 1:
            trainer.optimizer = SGD(1e300)

    if bad_epoch == 1:
        trainer.optimizer = SGD(1e300)
    with pytest.raises(Diverged):
        trainer.fit((x, y), 5, 16, progress=False, callbacks=[spoil])
    expected = kept[-1] if kept else start
    assert same_bits(net.theta, expected)
    assert same_bits(averaged(trainer), expected)
    trainer.optimizer = SGD(0.1)
    trainer.fit((x, y), 1, 16, progress=False)
    assert np.isfinite(net.theta).all()


def test_the_plan_counts_the_average():
    plans = [Trainer(classifier(), average=average).plan(32) for average in (None, EMA())]
    assert plans[1].total - plans[0].total == classifier().theta.nbytes
    assert "average of θ" in plans[1].lines()
    assert "average of θ" not in plans[0].lines()
