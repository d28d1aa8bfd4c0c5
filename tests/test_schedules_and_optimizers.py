"""Learning rates over a run and the hyperparameters of the rules: formulas, edges, and what is refused.

The formulas are written out here once more, from the papers; PyTorch's own are in test_torch.py.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from helpers import assert_close, blobs

from gpu_mlp import MLP, SGD, Adam, Muon, NAdam, Trainer, optimizers, schedules
from gpu_mlp.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseScaling,
    OneCycle,
    PlateauState,
    ReduceOnPlateau,
    StepDecay,
    Warmup,
)

LR = 0.08


def cosine(start, end, part):
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def one_cycle(t, length, up=0.3, div=25.0, final=1e4, linear=False):
    """Up to the peak at t = up · length − 1, and down to the end at t = length − 1."""
    between = (lambda a, b, p: a + (b - a) * p) if linear else cosine
    peak = up * length - 1
    if t <= peak:
        return between(LR / div, LR, t / peak)
    return between(LR, LR / div / final, (t - peak) / (length - 1 - peak))


# a schedule, and η at time t of a run of 24 units
CASES = [
    (Constant(), lambda t: LR),
    (StepDecay(7), lambda t: LR * 0.1 ** (t // 7)),
    (StepDecay(5, gamma=0.5), lambda t: LR * 0.5 ** (t // 5)),
    (Exponential(0.9), lambda t: LR * 0.9**t),
    (InverseScaling(), lambda t: LR / math.sqrt(t + 1)),
    (InverseScaling(power=2.0), lambda t: LR / (t + 1) ** 2),
    (Cosine(), lambda t: cosine(LR, 0, t / 24)),
    (Cosine(length=10, lr_min=0.01), lambda t: cosine(LR, 0.01, min(t, 10) / 10)),
    (OneCycle(), lambda t: one_cycle(t, 24)),
    (OneCycle(pct_start=0.5, anneal="linear", div_factor=10, final_div_factor=100),
     lambda t: one_cycle(t, 24, 0.5, 10, 100, linear=True)),
    (Warmup(6), lambda t: LR * (1 / 3 + 2 / 3 * t / 6) if t < 6 else LR),
    (Warmup(4, Exponential(0.9), start_factor=0.0), lambda t: LR * t / 4 if t < 4 else LR * 0.9 ** (t - 4)),
    (Warmup(4, Cosine(), start_factor=0.5),
     lambda t: LR * (0.5 + 0.5 * t / 4) if t < 4 else cosine(LR, 0, (t - 4) / 20)),
]  # fmt: skip


def by_epoch(schedule):
    changes = {"by": "epoch"}
    if isinstance(schedule, Warmup):
        changes["then"] = by_epoch(schedule.then)
    return dataclasses.replace(schedule, **changes)


def history_of(schedule, epochs, batch_size, rows=60, **options):
    x, y = blobs(rows)
    trainer = Trainer(MLP([6, 3], output="softmax"), optimizer=SGD(lr=LR), schedule=schedule, **options)
    return trainer.fit((x, y), epochs=epochs, batch_size=batch_size, progress=False)


@pytest.mark.parametrize(("schedule", "rate"), CASES, ids=lambda v: repr(v) if dataclasses.is_dataclass(v) else "")
def test_the_learning_rate_of_a_run_follows_the_schedule_by_steps(schedule, rate):
    """8 epochs of 3 updates; an epoch's row has the rate of its last update."""
    history = history_of(schedule, 8, 20)
    assert_close(history["learning_rate"], [rate(3 * epoch + 2) for epoch in range(8)], 1e-12)


@pytest.mark.parametrize(("schedule", "rate"), CASES, ids=lambda v: repr(v) if dataclasses.is_dataclass(v) else "")
def test_the_learning_rate_of_a_run_follows_the_schedule_by_epochs(schedule, rate):
    history = history_of(by_epoch(schedule), 24, 20)
    assert_close(history["learning_rate"], [rate(epoch) for epoch in range(24)], 1e-12)


@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
def test_every_schedule_can_be_asked_for_by_name(name):
    required = {"step": {"step_size": 3}, "exponential": {"gamma": 0.5}}.get(name, {})
    schedule = schedules.get(name, **required)
    assert schedule.name == name
    assert all(rate > 0 for rate in history_of(schedule, 3, 20)["learning_rate"])
    assert schedules.get(schedule) is schedule
    assert isinstance(schedules.get(None), Constant)


def test_the_rate_is_the_one_that_the_update_uses():
    x, y = blobs(30)
    net, twin = (MLP([6, 3], output="softmax", precision="float64") for _ in range(2))
    trainer = Trainer(net, optimizer=SGD(lr=LR), schedule=InverseScaling())
    for t in range(5):
        trainer.step(x, y)
        twin.theta[...] -= LR / math.sqrt(t + 1) * twin.cost_and_gradients(x, y, "cross_entropy")[1].theta
        assert_close(net.theta, twin.theta, 1e-12)


def test_muon_s_adamw_follows_the_schedule_in_proportion():
    x, y = blobs(30)
    thetas = []
    for rule, schedule in (
        (Muon(lr=0.1, adamw=optimizers.AdamW(lr=0.01)), Exponential(0.5)),
        (Muon(lr=0.05, adamw=optimizers.AdamW(lr=0.005)), None),
    ):
        net = MLP([6, 3], output="softmax", precision="float64", seed=1)
        trainer = Trainer(net, optimizer=rule, schedule=schedule)
        if schedule is not None:
            trainer.rounds = 1  # as if one update had been made, so that η is halved
        trainer.step(x, y)
        thetas.append(net.theta.copy())
    assert_close(thetas[0], thetas[1], 1e-12)


def test_a_schedule_without_a_length_needs_a_run_to_span():
    x, y = blobs(9)
    net = MLP([6, 3], output="softmax")
    before = net.theta.copy()
    with pytest.raises(ValueError, match="length: schedule 'cosine' needs one where there is no run to span"):
        Trainer(net, schedule="cosine").step(x, y)
    np.testing.assert_array_equal(net.theta, before)
    assert float(Trainer(net, schedule=Cosine(length=5)).step(x, y)) > 0


@pytest.mark.parametrize("length", range(2, 25))
@pytest.mark.parametrize("up", [0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 1.0])
def test_one_cycle_is_defined_whatever_its_length(length, up):
    """Also where the climb has no step at all (up · length = 1), at which a quotient of two zeros lies in wait."""
    schedule = OneCycle(length=length, pct_start=up)
    rates = [schedule.rate(LR, t) for t in range(length + 3)]
    assert np.isfinite(rates).all()
    assert all(LR / 25e4 - 1e-15 <= rate <= LR + 1e-15 for rate in rates)
    if up < 1:
        assert_close(rates[length - 1 :], [LR / 25e4] * 4, 1e-9)


@pytest.mark.parametrize("schedule", [Exponential(2.0), StepDecay(1, gamma=3.0)], ids=repr)
def test_a_rate_that_grows_beyond_all_bounds_is_infinite_and_no_arithmetic_error(schedule):
    """The run then diverges, and says so; an OverflowError of Python's would say nothing."""
    assert schedule.rate(LR, 10_000) == math.inf


# --- on plateau --------------------------------------------------------------------------------------------------


def torch_plateau(costs, factor=0.1, patience=10, threshold=1e-4, mode="rel", cooldown=0, lr_min=0.0):
    """η before every epoch, by the rules of torch's ReduceLROnPlateau, step by step as its documentation tells them."""
    lr, best, bad, rest, rates = LR, math.inf, 0, 0, []
    for cost in costs:
        rates.append(lr)
        better = cost < best * (1 - threshold) if mode == "rel" else cost < best - threshold
        if better:
            best, bad = cost, 0
        else:
            bad += 1
        if rest > 0:
            rest -= 1
            bad = 0
        if bad > patience:
            lr, rest, bad = max(lr * factor, lr_min), cooldown, 0
    return rates


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 0},
        {"patience": 2, "factor": 0.5},
        {"patience": 1, "factor": 0.5, "cooldown": 3},
        {"patience": 0, "factor": 0.5, "lr_min": 0.03},
        {"patience": 2, "threshold": 0.3},
        {"patience": 2, "threshold": 0.05, "threshold_mode": "abs"},
    ],
    ids=str,
)
@pytest.mark.parametrize("warmup", [False, True])
def test_on_plateau_cuts_the_rate_of_a_run(options, warmup):
    schedule = ReduceOnPlateau(**options)
    xv, yv = blobs(40, spread=3.0, seed=7)
    x, y = blobs(60, spread=3.0)
    trainer = Trainer(
        MLP([6, 16, 3], output="softmax"), optimizer=SGD(lr=LR), schedule=Warmup(1, schedule) if warmup else schedule
    )
    history = trainer.fit((x, y), epochs=25, batch_size=20, validation=(xv, yv), progress=False)
    options = dict(options)
    expected = torch_plateau(history["validation_loss"], mode=options.pop("threshold_mode", "rel"), **options)
    assert_close(history["learning_rate"], expected, 1e-12)
    assert trainer.plateau.cuts > 0, "or the test would show nothing"


def test_on_plateau_watches_the_cost_where_there_is_no_validation():
    history = history_of(ReduceOnPlateau(patience=1, threshold=1e9, threshold_mode="abs", factor=0.5), 9, 60)
    # the first epoch beats infinity; then every second epoch without an improvement halves η
    assert_close(history["learning_rate"], LR * 0.5 ** np.array([0, 0, 0, 1, 1, 2, 2, 3, 3]), 1e-12)


def test_on_plateau_remembers_over_fits():
    x, y = blobs(60)
    schedule = ReduceOnPlateau(patience=1, threshold=1e9, threshold_mode="abs", factor=0.5)
    trainer = Trainer(MLP([6, 3], output="softmax"), optimizer=SGD(lr=LR), schedule=schedule)
    rates = [rate for n in (4, 5) for rate in trainer.fit((x, y), epochs=n, progress=False)["learning_rate"]]
    assert_close(rates, LR * 0.5 ** np.array([0, 0, 0, 1, 1, 2, 2, 3, 3]), 1e-12)


def test_a_floor_above_the_rate_does_not_raise_it():
    assert PlateauState(cuts=3).reduce(ReduceOnPlateau(lr_min=0.5), 0.1) == 0.1


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: StepDecay(0), "step_size: expected an integer of at least 1"),
        (lambda: StepDecay(3, gamma=-1), "gamma"),
        (lambda: Exponential(math.nan), "gamma: expected a finite number"),
        (lambda: InverseScaling(power=-1), "power"),
        (lambda: Cosine(length=0), "length: expected an integer of at least 1"),
        (lambda: Cosine(lr_min=-1), "lr_min"),
        (lambda: OneCycle(length=1), "length: expected an integer of at least 2"),
        (lambda: OneCycle(pct_start=1.5), r"pct_start: expected a finite number in \[0, 1\]"),
        (lambda: OneCycle(anneal="cos"), "anneal: unknown name 'cos'; did you mean 'cosine'"),
        (lambda: OneCycle(div_factor=0.5), "div_factor"),
        (lambda: Warmup(0), "length: expected an integer of at least 1"),
        (lambda: Warmup(3, start_factor=2), "start_factor"),
        (lambda: Warmup(3, Warmup(2)), "then: a warm-up before a warm-up"),
        (lambda: Warmup(3, StepDecay(2, by="epoch")), "then: counts by 'epoch' and the warm-up by 'step'"),
        (lambda: ReduceOnPlateau(factor=1.0), "factor"),
        (lambda: ReduceOnPlateau(patience=-1), "patience"),
        (lambda: ReduceOnPlateau(threshold_mode="relative"), "threshold_mode: unknown name 'relative'"),
        (lambda: ReduceOnPlateau(cooldown=-1), "cooldown"),
        (lambda: Constant(by="epochs"), "by: unknown name 'epochs'; did you mean 'epoch'"),
        (lambda: schedules.get("expnential"), "schedule: unknown name 'expnential'; did you mean 'exponential'"),
        (lambda: SGD(lr=-1), "lr: expected a finite number"),
        (lambda: SGD(lr=math.inf), "lr: expected a finite number"),
        (lambda: SGD(lr=10**400), "lr: expected a finite number"),
        (lambda: SGD(momentum=1.5), "momentum"),
        (lambda: SGD(weight_decay=-1), "weight_decay"),
        (lambda: SGD(dampening=-1, momentum=0.5), "dampening"),
        (lambda: SGD(nesterov=True), "nesterov: needs a momentum above 0 and no dampening"),
        (lambda: SGD(nesterov=True, momentum=0.9, dampening=0.1), "nesterov: needs a momentum"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas: expected a finite number in \[0, 1\)"),
        (lambda: Adam(betas=(0.9,)), "betas: expected two numbers"),
        (lambda: Adam(betas=(0.9, 0.99, 0.999)), "betas: expected two numbers"),
        (lambda: Adam(eps=-1), "eps"),
        (lambda: optimizers.Adamax(eps=0), "eps"),
        (lambda: optimizers.Adagrad(eps=0), "eps"),
        (lambda: optimizers.Adadelta(eps=0), "eps"),
        (lambda: optimizers.Adadelta(rho=2), "rho"),
        (lambda: optimizers.RMSprop(alpha=-0.1), "alpha"),
        (lambda: Muon(ns_steps=0), "ns_steps"),
        (lambda: Muon(lr=0), "lr"),
        (lambda: Muon(ns_coefficients=(1, 2)), "ns_coefficients: expected three numbers"),
        (lambda: Muon(adjust_lr_fn="orignal"), "adjust_lr_fn: unknown name 'orignal'; did you mean 'original'"),
        (lambda: optimizers.LBFGS(lr=0.1), "lr: L-BFGS finds its step by line search"),
        (lambda: optimizers.LBFGS(history_size=0), "history_size"),
        (lambda: optimizers.LBFGS(max_eval=0), "max_eval"),
        (lambda: optimizers.get("sdg"), "optimizer: unknown name 'sdg'; did you mean 'sgd'"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: StepDecay(2.5), "step_size: expected an integer"),
        (lambda: Exponential("0.9"), "gamma: expected a number"),
        (lambda: Warmup(3, "cosine"), "then: expected a schedule, got str"),
        (lambda: schedules.get(0.1), "schedule: expected a name, got float"),
        (lambda: SGD(lr="0.1"), "lr: expected a number"),
        (lambda: SGD(lr=True), "lr: expected a number"),
        (lambda: SGD(momentum=0.9, nesterov=1), "nesterov: expected True or False"),
        (lambda: Adam(betas=0.9), "betas"),
        (lambda: Adam(amsgrad="yes"), "amsgrad: expected True or False"),
        (lambda: optimizers.RMSprop(centered=2), "centered: expected True or False"),
        (lambda: NAdam(decoupled_weight_decay=1), "decoupled_weight_decay: expected True or False"),
        (lambda: Muon(nesterov="no"), "nesterov: expected True or False"),
        (lambda: Muon(adamw="adamw"), "adamw: expected an AdamW without amsgrad"),
        (lambda: Muon(adamw=optimizers.AdamW(amsgrad=True)), "adamw: expected an AdamW without amsgrad"),
        (lambda: Muon(ns_coefficients=("a", 1, 2)), "ns_coefficients"),
        (lambda: optimizers.LBFGS(history_size=2.5), "history_size: expected an integer"),
        (lambda: optimizers.get(None), "optimizer: expected a name"),
        (lambda: optimizers.get("sgd", rate=1), "rate"),
    ],
)
def test_values_of_the_wrong_type_are_refused(make, match):
    with pytest.raises(TypeError, match=match):
        make()


# --- optimizers are values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_an_optimizer_is_a_value_without_state(name):
    rule = optimizers.get(name)
    assert rule == type(rule)()
    assert hash(rule) == hash(type(rule)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.lr = 1.0
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), dataclasses.replace(rule)):
        assert twin == rule
    assert optimizers.get(rule) is rule
    assert rule.coefficients(rule.lr, 7) == type(rule)().coefficients(rule.lr, 7)


def test_the_numbers_of_a_step_do_not_depend_on_what_was_asked_before():
    """Nor on whom an optimizer was made from."""
    first = NAdam()
    expected = {t: NAdam().coefficients(1.0, t) for t in (1, 5, 300)}
    for t in (300, 1, 5, 300):
        assert first.coefficients(1.0, t) == expected[t]
    other = dataclasses.replace(first, betas=(0.5, 0.9), momentum_decay=0.1)
    assert other.coefficients(1.0, 5) == NAdam(betas=(0.5, 0.9), momentum_decay=0.1).coefficients(1.0, 5)


@pytest.mark.parametrize("name", sorted(set(optimizers.OPTIMIZERS) - {"lbfgs"}))
def test_the_numbers_of_very_late_steps_are_finite(name):
    rule = optimizers.get(name)
    for step in (1, 2, 10**4, 10**6):
        assert np.isfinite(rule.coefficients(rule.lr, step)).all()


def test_a_long_run_of_nadam_remembers_no_number_a_step():
    """Π μ_i is soon too small to count, but never 0: the least positive number times 0.9 rounds to itself."""
    rule = NAdam(momentum_decay=0.00401)
    tracemalloc.start()
    try:
        for step in (1, 100, 100_000):
            rule.coefficients(rule.lr, step)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_one_optimizer_serves_several_threads():
    """Trainers in different threads may share one; what one is working out must not upset another."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for i in range(150):
            rule, start, found = NAdam(betas=(0.999, 0.999), momentum_decay=1.0 + i / 1000), threading.Barrier(4), []
            threads = [threading.Thread(target=lambda s=start, f=found, r=rule: f.append(late(s, r))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            mu = [0.999 * (1 - 0.5 * 0.96 ** (t * rule.momentum_decay)) for t in range(401)]
            along_g = rule.lr * (1 - mu[400]) / (1 - math.prod(mu[1:])) * math.sqrt(1 - 0.999**400)
            assert_close(found, [along_g] * 4, 1e-9)
    finally:
        sys.setswitchinterval(interval)


def late(start, rule):
    """The second of the numbers of step 400, worked out when all threads are there."""
    start.wait(10)
    return rule.coefficients(rule.lr, 400)[1]


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(set(optimizers.OPTIMIZERS) - {"lbfgs"}))
@pytest.mark.filterwarnings("error")
def test_a_gradient_of_zero_leaves_finite_parameters(name, precision):
    """Dead units have a gradient that is always 0: no quotient of two zeros, no warning."""
    net = MLP([2, 3, 2], precision=precision)
    x = np.zeros((4, 2))
    y = net.forward(x)
    trainer = Trainer(net, "mse", name)
    for _ in range(20):
        trainer.step(x, y)
    assert np.isfinite(net.theta).all()
