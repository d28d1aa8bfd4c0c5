"""The compiled passes of the CPU: their formulas to the last digits, the same bits however the work is cut, and lanes.

What each operation computes is compared in `test_operations.py`, row "numba".
"""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import threadpoolctl
from numba import njit
from scipy.special import ndtr

from gpu_mlp import (
    EMA,
    L2,
    MLP,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    Trainer,
    activations,
    ops,
    precision,
)  # fmt: skip
from gpu_mlp.ops import blas, formulas, jobs, numba_kernels, numpy_ops, philox, rules, tape
from gpu_mlp.ops.formulas import FROM_H, WITH_SLOPE, exp_of_negative, expm1_of_negative, log1p_of_share, normal_tail
from gpu_mlp.ops.interface import Dropout, Layout, Slot
from gpu_mlp.ops.numba_ops import NumbaOperations
from gpu_mlp.ops.numpy_ops import NumpyOperations
from gpu_mlp.optimizers import OPTIMIZERS

# As the kernels are compiled, but not kept: Numba would not see that a formula in another file has changed.
kernel = njit(fastmath={"contract"}, error_model="numpy")


def each(formula):
    """A loop over the numbers of an array."""

    @kernel
    def loop(x, out):
        for i in range(x.size):
            out[i] = formula(x[i])

    return loop


exp_each, expm1_each, log1p_each = each(exp_of_negative), each(expm1_of_negative), each(log1p_of_share)


@kernel
def tail_each(a, out):
    for i in range(a.size):
        out[i] = normal_tail(a[i], exp_of_negative(np.float32(-0.5) * a[i] * a[i]))


def test_exp_is_right_to_one_and_a_half_units_in_the_last_place():
    x = -np.linspace(0, 86.99, 1_000_003).astype(np.float32)
    found, expected = np.empty_like(x), np.exp(x.astype(np.float64))
    exp_each(x, found)
    assert np.max(np.abs(found - expected) / np.spacing(expected.astype(np.float32))) < 1.5


def test_expm1_and_log1p_are_right_to_two_units_in_the_last_place():
    numbers = np.concatenate([np.linspace(0, 100, 1_000_003), np.logspace(-30, 0, 999)]).astype(np.float32)
    for work, exact, x in ((expm1_each, np.expm1, -numbers), (log1p_each, np.log1p, numbers[numbers <= 1])):
        found, expected = np.empty_like(x), exact(x.astype(np.float64))
        work(x, found)
        assert np.max(np.abs(found - expected) / np.abs(np.spacing(expected.astype(np.float32)))) < 2


def test_exp_at_the_ends():
    x = np.array([0, -0.0, -1e-30, -87.5, -1e4, -np.inf, np.nan], np.float32)
    found = np.empty_like(x)
    exp_each(x, found)
    np.testing.assert_array_equal(found, np.array([1, 1, 1, 0, 0, 0, np.nan], np.float32))


def test_the_normal_tail_keeps_its_digits():
    """Relative to itself: 1 − erf loses every digit beyond a = 5. The rounding of a² is a² / 2 units in the last place
    of the exponential; beside it, four units."""
    a = np.linspace(0, 13, 1_000_003).astype(np.float32)
    found, expected = np.empty_like(a), ndtr(-a.astype(np.float64))
    tail_each(a, found)
    error = np.abs(found / expected - 1)
    assert np.max(error / (1 + a.astype(np.float64) ** 2)) < 2.0**-21


@pytest.mark.parametrize("n", [23, 24])  # the last columns are a scalar loop's, or a vector's
def test_gelu_and_its_derivative_at_the_ends_of_the_range(n):
    """Far out, where Φ has lost every digit of 1 + erf or z² overflows; infinities and NaN as the formula has them."""
    ends = [0.0, 1e-30, 1e-8, 3.0, 6.0, 9.0, 13.0, 1e4, 1e19, 3e38, np.inf]
    s = np.array([*ends, *(-x for x in ends), np.nan] + [0.5] * (n - 23), np.float32)
    exact = s.astype(np.float64)
    tail, density = ndtr(exact), np.exp(-exact * exact / 2) / np.sqrt(2 * np.pi)
    h, slope = np.empty((1, n), np.float32), np.zeros((1, n), np.float32)
    loops("gelu")[0](slope, s, h)
    with np.errstate(invalid="ignore"):  # ∞ · 0 is NaN
        np.testing.assert_allclose(h[0], exact * tail, rtol=1e-5, atol=1e-36)
        np.testing.assert_allclose(slope[0], tail + exact * density, rtol=1e-5, atol=1e-36)


# --- every activation ---


@kernel
def slope_backward(g, saved, keep, gb):
    numba_kernels.slope_gradient(g, saved, gb)


@functools.cache
def loops(name):
    """Loops as a job has them: z → h, and what f′ is worked out from; then g → gz, with its column sums."""
    f = {**FROM_H, **WITH_SLOPE}[name]
    if name in FROM_H:

        @kernel
        def forward(z, b, h):
            numba_kernels.bias_value(f, z, b)

        @kernel
        def backward(g, saved, keep, gb):
            numba_kernels.value_gradient(f, g, saved, keep, gb)

    else:

        @kernel
        def forward(z, b, h):
            numba_kernels.bias_slope(f, z, b, h)

        backward = slope_backward
    return forward, backward


def found(name, x):
    """f and f′ of some float32 numbers, by the loops."""
    forward, backward = loops(name)
    z, h, g, none = x[None].copy(), np.empty_like(x)[None], np.ones_like(x)[None], np.zeros_like(x)
    forward(z, none, h)
    backward(g, z, np.float32(1), none.copy())
    return (z if name in FROM_H else h)[0], g[0]


def expected(name, x):
    """f and f′ by the table's formulas in float64."""
    f, z = activations.get(name), x.astype(np.float64)[None]
    h, g = np.empty_like(z), np.ones_like(z)
    scratch = activations.Scratch(*(np.empty_like(z) for _ in range(3)), np.empty(z.shape, bool))
    with np.errstate(all="ignore"):
        f.f(z, h, scratch)
        f.df(g, z if f.reads == "z" else h, scratch)
    return h[0], g[0]


@pytest.mark.parametrize("name", [*FROM_H, *WITH_SLOPE])
def test_an_activation_is_right_to_the_last_digits(name):
    """f to 3 of its last places, but where its formula cancels (gelu's tail has a test of its own); f′ to 2 of 1."""
    near = np.logspace(-30, 0, 999)
    x = np.concatenate([np.linspace(-80, 80, 400_001), np.linspace(-4, 4, 400_001), near, -near]).astype(np.float32)
    (h, slope), (exact_h, exact_slope) = found(name, x), expected(name, x)
    eps = np.finfo(np.float32).eps
    cancels = {"gelu": 4, "gelu_tanh": 4, "hardsigmoid": 1, "hardswish": 4}.get(name, 0)
    assert np.all(np.abs(h - exact_h) <= 3 * eps * np.abs(exact_h) + cancels * eps + 1e-37)
    assert np.all(np.abs(slope - exact_slope) <= 2 * eps)


@pytest.mark.parametrize("n", [23, 24])  # the last columns are a scalar loop's, or a vector's
@pytest.mark.parametrize("name", [*FROM_H, *WITH_SLOPE])
def test_an_activation_at_the_ends_of_the_range(name, n):
    """Infinities and NaN as the table's formulas have them."""
    ends = [0.0, 1e-30, 1e-8, 3.0, 6.0, 9.0, 13.0, 1e4, 1e19, 3e38, np.inf]
    x = np.array([*ends, *(-end for end in ends), np.nan] + [0.5] * (n - 23), np.float32)
    (h, slope), (exact_h, exact_slope) = found(name, x), expected(name, x)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(h, exact_h.astype(np.float32), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(slope, exact_slope.astype(np.float32), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [*FROM_H, *WITH_SLOPE])
def test_a_column_has_the_same_bits_in_every_place_of_a_vector(name):
    """A column at the end of a row takes the scalar loop, one in the middle a vector: contraction must not tell."""
    rng = np.random.default_rng(0)
    column = rng.normal(size=(70, 1)).astype(np.float32) * 3
    g = rng.normal(size=(70, 1)).astype(np.float32)
    forward, backward = loops(name)
    results = set()
    for width in range(1, 40):
        z, gz = np.repeat(column, width, axis=1), np.repeat(g, width, axis=1)
        h, b, gb = np.zeros_like(z), np.full(width, 0.25, np.float32), np.zeros(width, np.float32)
        forward(z, b, h)
        backward(gz, z, np.float32(0.75), gb)
        for j in range(width):
            results.add((z[:, j].tobytes(), h[:, j].tobytes(), gz[:, j].tobytes(), gb[j].tobytes()))
    assert len(results) == 1


def test_every_activation_but_the_rare_ones_is_a_job():
    """Sine and exp take the reference's passes; those that mix a row are output layers."""
    known = {*formulas.IN_EVERY_TYPE, *FROM_H, *WITH_SLOPE}
    assert {f.name for f in activations.ACTIVATIONS.values() if not f.rowwise} - known == {"sine", "exp"}
    assert all(activations.get(name).reads == "h" for name in FROM_H)
    assert all(activations.get(name).reads == "z" for name in WITH_SLOPE)


@pytest.mark.parametrize(
    "rule",
    [
        Adam(weight_decay=0.1),
        AdamW(),
        SGD(lr=0.1, weight_decay=0.1),
        SGD(momentum=0.9),
        SGD(momentum=0.9, nesterov=True),
        RMSprop(weight_decay=0.1),
        RMSprop(momentum=0.9),
        Lion(lr=0.01, weight_decay=0.1),
        NAdam(weight_decay=0.1),
        RAdam(),
        Adamax(),
        Adagrad(lr_decay=0.1),
        Adadelta(),
    ],
    ids=repr,
)
def test_an_update_has_the_same_bits_wherever_it_is_cut(rule, monkeypatch):
    monkeypatch.setattr(jobs, "PASS_PART", 1)
    rng, work = np.random.default_rng(0), NumbaOperations(precision.get("float32"))
    theta, g = (rng.normal(size=3001).astype(np.float32) for _ in range(2))
    moments = [np.abs(rng.normal(size=3001)).astype(np.float32) for _ in rule.moments]
    state = work.zeros(len(Slot), np.float64)
    values = {Slot.LEARNING_RATE: 0.01, Slot.STEP: 2, Slot.LOSS_SCALE: 4, Slot.GRADIENT_NORM: 3}
    work.write_state(state, values)
    results = set()
    for threads in (1, 2, 3, 7, 600):
        t, m = theta.copy(), [moment.copy() for moment in moments]
        with work._sharing_passes(threads):
            work.update(t, g, m, rule, Layout([3000, 1], 4), 2000, L2(0.1), 1.5, None, state)
        results.add((t.tobytes(), *(moment.tobytes() for moment in m)))
    assert len(results) == 1


def test_which_optimizers_are_jobs():
    """All but Muon and L-BFGS; not in rare forms, nor one that a user has derived, whose rule may be another."""

    class Own(Adam):
        """A rule of a user's."""

    there = {name for name, kind in OPTIMIZERS.items() if rules.of(kind()) is not None}
    assert there == set(OPTIMIZERS) - {"muon", "lbfgs"}
    assert [rules.of(rare) for rare in (Adam(amsgrad=True), RMSprop(centered=True), Own())] == [None] * 3


def test_radam_is_rectified_from_the_step_on_that_the_reference_is():
    """In the first steps it is momentum alone; then Adam with a factor: both against the reference, step by step."""
    rng, thetas = np.random.default_rng(0), []
    gradients = rng.normal(size=(9, 50))
    for kind in (NumbaOperations, NumpyOperations):
        work, theta, moments = kind(precision.get("float64")), np.ones(50), [np.zeros(50), np.zeros(50)]
        state = work.zeros(len(Slot), np.float64)
        work.write_state(state, {Slot.LEARNING_RATE: 0.1, Slot.LOSS_SCALE: 1})
        thetas.append([])
        for g in gradients:
            work.update(theta, g.copy(), moments, RAdam(), Layout([49, 1], 8), 0, None, None, None, state)
            work.finish_step(1, state)
            thetas[-1].append(theta.copy())
    np.testing.assert_allclose(thetas[0], thetas[1], rtol=1e-13)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 100])
@pytest.mark.parametrize(("seed", "round_"), [(7, 5), (2**63 + 11, 2**33 + 3)])
def test_dropout_draws_what_philox_draws(columns, seed, round_):
    work = NumbaOperations(precision.get("float32"))
    state = work.zeros(len(Slot), np.float64)
    work.write_state(state, {Slot.ROUND: round_})
    h, dropout = np.empty((33, columns), np.float32), Dropout(0.3, seed, 2, 1017)
    ones = np.ones((33, 1), np.float32)
    work.affine_activation(
        ones,
        np.ones((columns, 1), np.float32),
        np.zeros(columns, np.float32),
        activations.get("relu", "f"),
        h,
        None,
        dropout,
        state,
    )
    kept = philox.bits(seed, 2, round_, 1017, h.shape) < philox.keep_threshold(0.3)
    np.testing.assert_array_equal(h != 0, kept)
    assert set(np.unique(h)) <= {np.float32(0), np.float32(1 / numpy_ops.keep_probability(dropout))}


# --- which implementation ---------------------------------------------------------------------------------------


def test_numba_is_chosen_where_it_computes_in_what_it_stores(monkeypatch):
    assert isinstance(ops.make("cpu", precision.get("float32")), NumbaOperations)
    assert isinstance(ops.make("cpu", precision.get("float64")), NumbaOperations)
    assert type(ops.make("cpu", precision.get("bfloat16"))) is NumpyOperations
    monkeypatch.setenv("GPU_MLP_NUMBA", "0")
    assert ops.numba_obstacle() == "GPU_MLP_NUMBA is 0"
    assert type(ops.make("cpu", precision.get("float32"))) is NumpyOperations


def test_without_numba_everything_is_numpys():
    """In a process of its own, in which Numba cannot be found."""
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "numba" else find(name, *more)
import numpy as np
from gpu_mlp import MLP, Trainer, ops
assert "pip install 'gpu-mlp[cpu]'" in ops.numba_obstacle()
net = MLP([4, 8, 3], output="softmax")
Trainer(net).step(np.ones((5, 4)), np.zeros(5, int))
assert type(net._ops).__name__ == "NumpyOperations" and "numba" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- lanes ------------------------------------------------------------------------------------------------------

SIZES, BATCH = [60, 200, 150, 10], 700


@pytest.fixture
def _two_threads():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if blas.threads() != 2:
            pytest.skip("this BLAS has no two threads, or none that can be told to")
        yield


def problem(n=BATCH):
    rng = np.random.default_rng(3)
    return rng.normal(size=(n, SIZES[0])).astype(np.float32), rng.integers(0, SIZES[-1], n)


def trained(lanes, monkeypatch, dtype="float64", kind=NumbaOperations, steps=4, **options):
    """The trainer after some steps in so many lanes, and the costs."""
    if lanes is not None:
        monkeypatch.setattr(kind, "lanes", lambda self, rows, sizes: lanes(rows))
    x, y = problem()
    net = MLP(SIZES, options.pop("activation", "relu"), "softmax", options.pop("dropout", 0.0), precision=dtype)
    trainer = Trainer(net, **{"optimizer": Adam(lr=1e-2), **options})
    weight = np.linspace(0.5, 2, len(x)) if options.get("clip_norm") else None
    return trainer, [float(trainer.step(x, y, weight)) for _ in range(steps)]


@pytest.mark.usefixtures("_two_threads")
def test_a_step_is_dealt_out_to_lanes(monkeypatch):
    monkeypatch.setenv("GPU_MLP_NUMBA", "0")
    trainer, _ = trained(None, monkeypatch, dtype="float32")
    lanes = trainer._lanes(BATCH)
    assert len(lanes) == 2
    assert len({id(lane.g) for lane in lanes}) == 2
    assert sum(len(range(i, BATCH, 1)[:: lanes[0].work.rows]) > 0 for i in range(2)) == 2


@pytest.mark.parametrize("cut", [(2, 350), (2, 64), (3, 100), (4, 699)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu", "dropout": 0.3},
        {"optimizer": SGD(lr=0.1)},
        {"accumulate": 3, "regularizer": L2(1e-3)},
        {"clip_norm": 0.1, "average": EMA(0.9)},
    ],
    ids=str,
)
def test_lanes_give_the_update_of_one_pass(cut, options, monkeypatch):
    check_lanes(cut, options, monkeypatch)


def test_lanes_of_single_rows(monkeypatch):
    check_lanes((2, 1), {}, monkeypatch)


def check_lanes(cut, options, monkeypatch):
    alone, costs = trained(lambda rows: (1, rows), monkeypatch, steps=2, **options)
    beside, again = trained(lambda rows: (cut[0], min(cut[1], rows)), monkeypatch, steps=2, **options)
    np.testing.assert_allclose(again, costs, rtol=1e-12)
    np.testing.assert_allclose(beside.net.theta, alone.net.theta, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("numba", "lanes"), [("1", None), ("1", lambda rows: (2, 350)), ("0", None)])
def test_threads_give_the_same_bits_every_time(numba, lanes, monkeypatch):
    monkeypatch.setenv("GPU_MLP_NUMBA", numba)
    results = {
        trained(lanes, monkeypatch, dtype="float32", activation="gelu", dropout=0.2)[0].net.theta.tobytes()
        for _ in range(5)
    }
    assert len(results) == 1


def test_an_error_in_a_lane_comes_out_and_the_trainer_goes_on(monkeypatch):
    trainer, _ = trained(lambda rows: (2, 350), monkeypatch, activation="silu")  # which no job knows
    x, y = problem()

    def fail(*arguments):
        raise KeyError("from a lane")

    with monkeypatch.context() as patch:
        patch.setattr(NumpyOperations, "input_gradient", fail)
        trainer._recorder.clear()
        with pytest.raises(KeyError, match="from a lane"):
            trainer.step(x, y)
    trainer._recorder.clear()
    assert np.isfinite(float(trainer.step(x, y)))


@pytest.mark.parametrize("rows", [1, 31, 128, 1024, 65536])
@pytest.mark.parametrize("sizes", [[3, 1], [784, 256, 128, 10], [64] * 5, [784, 4096, 4096, 10]], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("kind", [NumpyOperations, NumbaOperations])
def test_lanes_cover_every_batch(rows, sizes, threads, kind, monkeypatch):
    monkeypatch.setattr(blas, "threads", lambda: threads)
    lanes, micro = kind(precision.get("float32")).lanes(rows, sizes)
    assert 1 <= lanes <= threads
    assert 1 <= micro <= rows
    assert lanes == 1 or micro < rows, "a lane would have nothing to do"


@pytest.mark.parametrize(
    ("sizes", "rows", "expected"),
    [([64] * 5, 65536, 2), ([256] * 5, 32768, 2), ([784, 512, 512, 10], 128, 1), ([1024] * 4, 65536, 1)],
    ids=str,
)
def test_lanes_are_for_many_rows_of_narrow_layers(sizes, rows, expected, monkeypatch):
    monkeypatch.setattr(blas, "threads", lambda: 2)
    assert NumbaOperations(precision.get("float32")).lanes(rows, sizes)[0] == expected


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("rule", [SGD(lr=0.1), Adam(lr=1e-2)], ids=repr)
def test_a_step_that_the_crew_shares_is_the_step_of_one_thread(rule, monkeypatch):
    shared, costs = trained(lambda rows: (1, rows), monkeypatch, optimizer=rule)
    monkeypatch.setattr(blas, "threads", lambda: 1)
    alone, again = trained(lambda rows: (1, rows), monkeypatch, optimizer=rule)
    np.testing.assert_allclose(again, costs, rtol=1e-12)
    np.testing.assert_allclose(shared.net.theta, alone.net.theta, rtol=1e-9, atol=1e-11)


# --- steps that are written down ----------------------------------------------------------------------------------

TAPES = {
    "sgd": {"optimizer": SGD(lr=0.1)},
    "adam, L2, gelu, dropout": {"activation": "gelu", "dropout": 0.3, "regularizer": L2(1e-3)},
    "momentum, no job for f": {"activation": "silu", "optimizer": SGD(lr=0.1, momentum=0.9)},
    "clipped, averaged, weighted": {"clip_norm": 0.1, "average": EMA(0.9)},
    "micro-batches": {"accumulate": 3, "optimizer": "lion"},
    "lanes": {"lanes": lambda rows: (2, min(200, rows))},
    "lanes, no job for f": {"lanes": lambda rows: (2, min(200, rows)), "activation": "tanh", "dropout": 0.2},
}


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", TAPES.values(), ids=TAPES)
def test_a_step_that_is_replayed_has_the_bits_of_one_that_is_not(options, dtype, monkeypatch):
    options = {"lanes": None, **options}
    replayed, costs = trained(monkeypatch=monkeypatch, dtype=dtype, **options)
    plain, again = trained(monkeypatch=monkeypatch, dtype=dtype, graph=False, **options)
    assert costs == again
    assert replayed.net.theta.tobytes() == plain.net.theta.tobytes()
    assert len(replayed._recorder._tapes) == 1
    assert not hasattr(plain._recorder, "_tapes")


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_both_gradients_of_a_layer_are_one_job(threads, monkeypatch):
    """Its parts are those of both products, and the numbers are those of one after the other."""
    monkeypatch.setattr(jobs, "PART_FLOP", 1)
    rng, work = np.random.default_rng(0), NumbaOperations(precision.get("float64"))
    gz, W, h = rng.normal(size=(200, 30)), rng.normal(size=(30, 40)), rng.normal(size=(200, 40))
    gz_in, gb, gW, state = np.empty((200, 40)), np.empty(40), np.empty((30, 40)), work.zeros(len(Slot), np.float64)

    def both():
        with work.independent():
            work.input_gradient(gz, W, activations.get("relu", "f"), h, None, gz_in, gb, False, state)
            work.weight_gradient(gz, h, gW, False)

    with work._sharing_products(threads), blas.OneThread():
        written = work._writing_down(both)
        assert len(written[0].inner) == 2
        assert written[0].parts == sum(job.parts for job in written[0].inner) <= threads
        both()
    np.testing.assert_allclose(gz_in, (gz @ W) * (h > 0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gb, gz_in.sum(0), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gW, gz.T @ h, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_replayed_step_reads_the_batch_that_it_is_given(activation):
    """Batches that lie elsewhere every time, in other types and orders, of other lengths, and in one array."""
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(rows, 8)), rng.integers(0, 8, rows)) for rows in (32, 32, 7, 32, 7)]
    batches[1] = (np.asfortranarray(batches[1][0]), batches[1][1].astype(np.int8))
    trainers = []
    for graph in (None, False):
        trainers.append(Trainer(MLP([8, 16, 8], activation, "softmax", precision="float32"), graph=graph))
        for x, y in batches:
            trainers[-1].step(x.astype(np.float32), y)
    assert trainers[0].net.theta.tobytes() == trainers[1].net.theta.tobytes()
    coders = [Trainer(MLP([8, 16, 8], precision="float32"), graph=graph) for graph in (None, False)]
    for coder in coders:
        for i, (x, _) in enumerate(batches):
            x = x.astype(np.float32)
            coder.step(x, x if i < 2 else -x)
    assert coders[0].net.theta.tobytes() == coders[1].net.theta.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": SGD(lr=0.1)},
        {"dropout": 0.3, "regularizer": L2(1e-3), "average": EMA(0.9)},
        {"activation": "tanh", "accumulate": 3, "optimizer": "rmsprop"},
        {"lanes": lambda rows: (2, min(200, rows))},
    ],
    ids=["sgd", "average", "micro-batches", "lanes"],
)
def test_a_step_on_bad_input_is_refused_as_if_it_had_not_come(bad, options, monkeypatch):
    thetas = []
    for comes in (True, False):
        trainer, _ = trained(**{"lanes": None, **options}, monkeypatch=monkeypatch, dtype="float32")
        x, y = problem()
        if comes:
            spoilt = x.copy()
            spoilt[-1, 3] = bad
            with pytest.raises(ValueError, match=f"x: row {len(x) - 1}, column 3 is {bad}"):
                trainer.step(spoilt, y)
        trainer.step(x, y)
        thetas.append((trainer.net.theta.tobytes(), trainer.rounds, *map(bytes, trainer.moments.values())))
    assert thetas[0] == thetas[1]


def test_large_numbers_whose_sum_overflows_are_no_bad_input():
    x = np.full((4, 600_000), np.float32(1e36))
    trainer = Trainer(MLP([600_000, 2], init=lambda rng, shape: np.zeros(shape)), optimizer=SGD(0.0))
    with np.errstate(over="ignore"):
        assert not np.isfinite(x.sum())
    assert float(trainer.step(x, np.zeros((4, 2)))) == 0.0


def test_no_batch_is_kept_for_as_long_as_a_recording():
    trainer = Trainer(MLP([8, 16, 8], output="softmax"))
    kept = []
    for rows in (9, 8, 7):
        x = np.ones((rows, 8), np.float32)
        kept.append(weakref.ref(x))
        trainer.step(x, np.zeros(rows, int))
    del x
    assert [reference() is None for reference in kept[:2]] == [True, True]


def test_dropout_that_is_exchanged_is_in_the_next_step():
    x, y = problem()
    thetas = []
    for graph in (None, False):
        trainer = Trainer(MLP(SIZES, "relu", "softmax", dropout=0.1), graph=graph)
        trainer.step(x, y)
        trainer.net.dropout = (0.5, 0.0)
        trainer.step(x, y)
        thetas.append(trainer.net.theta.tobytes())
    assert thetas[0] == thetas[1]


def test_a_fit_replays_its_steps_over_the_epochs():
    x, y = problem()
    fitted = []
    for graph in (None, False):
        trainer = Trainer(MLP(SIZES, "relu", "softmax"), optimizer=Adam(lr=1e-2), graph=graph)
        trainer.fit((x, y), epochs=3, batch_size=64)
        fitted.append(trainer.net.theta.tobytes())
    assert fitted[0] == fitted[1]


def test_another_thread_may_predict_while_a_step_is_written_down():
    x, y = problem()
    net = MLP(SIZES, "relu", "softmax")
    trainer, expected, found = Trainer(net, optimizer=SGD(lr=1e-9)), net.forward(x), []
    work = trainer._work_through

    def interrupted(*arguments):
        other = threading.Thread(target=lambda: found.append(net.forward(x)))
        other.start()
        other.join()
        work(*arguments)

    trainer._work_through = interrupted
    trainer.step(x, y)
    np.testing.assert_array_equal(found[0], expected)


def test_a_recorder_keeps_no_more_than_so_many_steps():
    trainer = Trainer(MLP([3, 2], output="softmax"))
    for rows in range(tape.MOST_TAPES + 5, 0, -1):  # a longer batch has buffers of its own
        trainer.step(np.ones((rows, 3)), np.zeros(rows, int))
    assert len(trainer._recorder._tapes) == tape.MOST_TAPES
    trainer.step(np.ones((0, 3)), np.zeros(0, int))
