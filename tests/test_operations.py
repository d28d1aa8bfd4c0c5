"""Every operation of the seam against plain float64 formulas: values, dtypes, and what is written and what is not.

An implementation is one row of IMPLEMENTATIONS; every test runs on each of them, at each precision. Outputs are the
first rows of larger buffers full of NaN, so that a skipped element, a stray write and a read of what was there before
all show.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import os
import signal
import threading
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import threadpoolctl
from helpers import (
    ACTIVATION_NAMES,
    PRECISIONS,
    ROWWISE,
    TOLERANCE,
    activation,
    assert_close,
    dropout_factor,
    loss_rows,
    muon_rule,
    row_weights,
    same_bits,
    through_activation,
    update_rule,
)

from gpu_mlp import losses, optimizers, precision, regularizers
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.ops import sharing
from gpu_mlp.ops.interface import ALIGNMENT, Dropout, Layout, Operations, Slot
from gpu_mlp.ops.numpy_ops import BLOCK, LARGE_GEMM, SMALL_GEMM, NumpyOperations


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row of the table: the class, how to read an array's address, and the precisions to try."""

    make: type
    address: object
    precisions: tuple


IMPLEMENTATIONS = {
    "numpy": Implementation(
        NumpyOperations,
        lambda array: array.ctypes.data,
        ("float64", "float32", "float16", "bfloat16"),  # tf32 multiplies as float32 does here
    )
}

# (batch, n_in, n_out): nothing, one, odd, one row of more than a block, many rows that end within a block
SHAPES = [(0, 5, 3), (1, 1, 1), (1, 31, 7), (31, 257, 31), (257, 31, 129), (3, 7, BLOCK + 5), (2, BLOCK + 5, 3)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(params=[(name, p) for name, row in IMPLEMENTATIONS.items() for p in row.precisions], ids="-".join)
def bench(request):
    name, wanted = request.param
    if wanted == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 is a type of ml_dtypes")
    return Bench(IMPLEMENTATIONS[name].make(precision.get(wanted)), IMPLEMENTATIONS[name])


class Bench:
    """The operations of one implementation at one precision, with arrays to try them on."""

    def __init__(self, ops, implementation):
        self.ops, self.implementation = ops, implementation
        self.storage, self.master = ops.precision.storage_dtype, ops.precision.master_dtype
        self.tolerance = TOLERANCE[ops.precision.name]
        self.master_tolerance = TOLERANCE[ops.precision.master]
        self.rng = np.random.default_rng(12345)
        self._guards = []

    def input(self, values, dtype=None):
        """``values`` on the device in the storage type (or ``dtype``), and as the float64 numbers that it holds."""
        array = self.ops.to_device(np.asarray(values).astype(dtype or self.storage))
        return array, self.host(array).astype(np.float64)

    def normal(self, *shape, scale=1.0, dtype=None):
        return self.input(self.rng.normal(size=shape) * scale, dtype)

    def output(self, *shape, dtype=None):
        """A buffer to write into: the first rows of a larger one that is full of NaN."""
        whole = self.ops.empty((shape[0] + 1, *shape[1:]), dtype or self.storage)
        whole[...] = math.nan
        self._guards.append(whole)
        return whole[: shape[0]]

    def check_guards(self):
        for whole in self._guards:
            assert np.isnan(self.host(whole[-1:]).astype(np.float64)).all(), "written beyond the end of an output"
        self._guards.clear()

    def host(self, array):
        return np.array(self.ops.to_host(array))

    def state(self, **slots):
        state = self.ops.zeros(len(Slot), np.float64)
        self.ops.write_state(state, {Slot.LOSS_SCALE: 1.0, **{Slot[name]: value for name, value in slots.items()}})
        return state

    def read(self, state, slot):
        return self.ops.read_state(state, slot)


@contextmanager
def only_writes(bench, arguments, *written, slots=()):
    """Within this block, of all arrays in ``arguments`` only those named in ``written`` may change.

    Of the one called ``state`` only ``slots`` may, if it is not in ``written``.
    """
    arrays = {
        f"{name}[{i}]" if isinstance(value, (list, tuple)) else name: array
        for name, value in arguments.items()
        for i, array in enumerate(value if isinstance(value, (list, tuple)) else [value])
        if hasattr(array, "dtype")
    }
    before = {name: bench.host(array) for name, array in arrays.items()}
    yield
    for name, array in arrays.items():
        after = bench.host(array)
        assert after.dtype == before[name].dtype
        if name == "state" and name not in written:
            allowed = [int(slot) for slot in slots]
            after[allowed] = before[name][allowed]
        if name.split("[")[0] not in written:
            assert same_bits(after, before[name]), f"{name} was overwritten"


# --- the seam itself ---------------------------------------------------------------------------------------------


def public_methods(cls):
    return {name: f for name, f in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}


def test_signatures_are_those_of_the_interface(implementation):
    wanted, found = public_methods(Operations), public_methods(implementation.make)
    assert set(found) == set(wanted), "an implementation never grows an operation of its own"
    for name in wanted:
        mine, theirs = inspect.signature(found[name]).parameters, inspect.signature(wanted[name]).parameters
        assert [(p.name, p.kind, p.default) for p in mine.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name


def test_every_operation_of_the_interface_has_a_test_here():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for operation in Operations.__abstractmethods__:
        assert any(operation in name for name in tests), f"no test of {operation}"


def test_attributes(bench):
    assert bench.ops.device in ("cpu", "cuda")
    assert isinstance(bench.ops.waits, bool)
    assert bench.ops.precision.name in PRECISIONS


# --- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0, 1, 257, (0, 4), (3, 0), (31, 257), (2, 3, 4)])
def test_empty_and_zeros(bench, shape):
    for dtype in (bench.storage, bench.master, np.dtype(np.int64), np.dtype(bool)):
        for array in (bench.ops.empty(shape, dtype), bench.ops.zeros(shape, dtype)):
            assert array.shape == (shape if isinstance(shape, tuple) else (shape,))
            assert array.dtype == dtype
            assert array.flags.c_contiguous
            if array.size:
                assert bench.implementation.address(array) % ALIGNMENT == 0
        assert not bench.host(array).astype(np.float64).any()  # the last one is of zeros


def test_zeros_where_memory_was_used_before(bench):
    for _ in range(3):
        dirty = bench.ops.empty(1 << 16, bench.master)
        dirty[...] = 7
        del dirty
        assert not bench.host(bench.ops.zeros(1 << 16, bench.master)).any()


def test_to_device_keeps_what_fits(bench):
    array = bench.ops.to_device(np.arange(6.0).reshape(2, 3).astype(bench.master))
    assert bench.ops.to_device(array) is array
    assert bench.ops.to_device(array, bench.master) is array


@pytest.mark.parametrize("given", ["F-order", "reversed", "every other", "transposed", "integers", "list"])
def test_to_device_gives_c_order_in_the_dtype(bench, given):
    a = np.arange(24.0).reshape(4, 6)
    source = {
        "F-order": np.asfortranarray(a),
        "reversed": a[::-1, ::-1],
        "every other": a[::2, 1::2],
        "transposed": a.T,
        "integers": a.astype(np.uint8),
        "list": a.tolist(),
    }[given]
    expected = np.array(source, np.float64)
    out = bench.ops.to_device(source, bench.storage)
    assert out.dtype == bench.storage
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(bench.host(out).astype(np.float64), expected)
    np.testing.assert_array_equal(np.array(source, np.float64), expected)


def test_to_host(bench):
    array = bench.ops.to_device(np.arange(5.0), bench.master)
    host = bench.ops.to_host(array)
    assert isinstance(host, np.ndarray)
    np.testing.assert_array_equal(host, np.arange(5.0))


@pytest.mark.parametrize("n", [0, 1, 31, 257, BLOCK + 1])
def test_copy(bench, n):
    source, values = bench.normal(n, 3, dtype=bench.master)
    for dtype in (bench.master, bench.storage):
        out = bench.output(n, 3, dtype=dtype)
        with only_writes(bench, locals(), "out"):
            bench.ops.copy(source, out)
        np.testing.assert_array_equal(bench.host(out), values.astype(bench.master).astype(dtype))
    bench.check_guards()


def test_copy_reads_any_layout_and_number_type(bench):
    numbers = np.arange(12).reshape(3, 4)
    for source in (numbers.astype(np.uint8)[:, ::-1], np.asfortranarray(numbers.astype(float))):
        out = bench.output(3, 4)
        bench.ops.copy(bench.ops.to_device(source) if bench.ops.device == "cuda" else source, out)
        np.testing.assert_array_equal(bench.host(out).astype(np.float64), source)


@pytest.mark.parametrize("n", [0, 1, 31, 257, 5000])
@pytest.mark.parametrize("columns", [1, 7])
def test_gather(bench, n, columns):
    rows = bench.ops.to_device(bench.rng.permutation(300)[: min(n, 300)].repeat(1 if n <= 300 else 17)[:n])
    for dtype in (bench.storage, bench.master, np.dtype(np.uint8), np.dtype(bool)):
        source = bench.ops.to_device((bench.rng.random((300, columns)) * 2).astype(dtype))
        out = bench.output(n, columns)
        with only_writes(bench, locals(), "out"):
            bench.ops.gather(source, rows, out)
        np.testing.assert_array_equal(bench.host(out), bench.host(source)[bench.host(rows)].astype(bench.storage))
    bench.check_guards()


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_gather_of_labels_and_weights(bench, dtype):
    source = bench.ops.to_device(np.arange(50).astype(dtype))
    rows = bench.ops.to_device(np.array([49, 0, 3, 3], np.int64))
    out = bench.ops.empty(4, dtype)
    bench.ops.gather(source, rows, out)
    np.testing.assert_array_equal(bench.host(out), [49, 0, 3, 3])


# --- state -------------------------------------------------------------------------------------------------------


def test_write_state_and_read_state(bench):
    state = bench.ops.zeros(len(Slot), np.float64)
    for slot in Slot:
        with only_writes(bench, locals(), slots=[slot]):
            bench.ops.write_state(state, {slot: 2.0**40 + slot})
        assert bench.ops.read_state(state, slot) == 2.0**40 + slot
    bench.ops.write_state(state, {Slot.COST: 1.5, Slot.STEP: 7.0})
    assert (bench.ops.read_state(state, Slot.COST), bench.ops.read_state(state, Slot.STEP)) == (1.5, 7)
    assert isinstance(bench.ops.read_state(state, Slot.COST), float)


def test_snapshot_state_is_of_the_moment(bench):
    state = bench.state(COST=1.25)
    snapshot = bench.ops.snapshot_state(state, Slot.COST)
    bench.ops.write_state(state, {Slot.COST: 9.0})
    assert float(snapshot) == 1.25


# --- forward -----------------------------------------------------------------------------------------------------


def affine(bench, shape, name, keep_z=None, dropout=None, round_=0):
    """Run affine_activation on random arrays; what it wrote, and z in float64."""
    batch, n_in, n_out = shape
    h_in, h0 = bench.normal(batch, n_in)
    W, W0 = bench.normal(n_out, n_in, scale=1 / math.sqrt(n_in))
    b, b0 = bench.normal(n_out, scale=0.5)
    f = ACTIVATIONS[name]
    h = bench.output(batch, n_out)
    z = bench.output(batch, n_out) if (f.reads == "z" if keep_z is None else keep_z) else None
    state = bench.state(ROUND=round_, COST=3.0)
    with only_writes(bench, locals(), "h", "z"):
        bench.ops.affine_activation(h_in, W, b, f, h, z, dropout, state)
    bench.check_guards()
    return bench.host(h), None if z is None else bench.host(z), h0 @ W0.T + b0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "softmax"])
def test_affine_activation(bench, shape, name):
    h, z, z0 = affine(bench, shape, name)
    assert h.dtype == bench.storage
    assert_close(h, activation(name, z0), bench.tolerance)
    if z is not None:
        assert_close(z, z0, bench.tolerance)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_affine_activation_of_every_kind(bench, name):
    for keep_z in (False, True):
        h, z, z0 = affine(bench, (37, 11, 23), name, keep_z)
        assert_close(h, activation(name, z0), bench.tolerance)
        if keep_z:
            assert_close(z, z0, bench.tolerance)


@pytest.mark.parametrize("name", ["identity", "relu", "silu", "exp"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.97])
def test_affine_activation_with_dropout(bench, name, rate):
    shape = (33, 9, 21)
    dropout = Dropout(rate, seed=2**40 + 7, layer=3, first_row=1000)
    h, z, z0 = affine(bench, shape, name, dropout=dropout, round_=2**33 + 5)
    factor = dropout_factor(rate, 2**40 + 7, 3, 2**33 + 5, (33, 21), 1000)
    assert 0 < np.count_nonzero(factor) < factor.size
    assert not h[factor == 0].astype(np.float64).any()
    assert_close(h, activation(name, z0) * factor, bench.tolerance)
    if z is not None:
        assert_close(z, z0, bench.tolerance)  # before dropout


@pytest.mark.parametrize("shape", [(0, 3, 9), (1, 1, 1), (2, 3, BLOCK + 9), (300, 3, 257)])
def test_affine_activation_with_dropout_by_blocks(bench, shape):
    """The mask of a batch of several blocks is the mask of its rows one by one."""
    batch, _, n_out = shape
    h, _, z0 = affine(bench, shape, "identity", dropout=Dropout(0.4, 5, 0), round_=1)
    rows = {0, batch // 2, batch - 1} if batch else set()
    for row in rows:
        factor = dropout_factor(0.4, 5, 0, 1, (1, n_out), row)[0]
        np.testing.assert_array_equal(h[row] != 0, (factor != 0) & (z0[row] != 0))
        assert_close(h[row], z0[row] * factor, bench.tolerance)
    assert h.shape == (batch, n_out)


def test_affine_activation_divides_what_it_keeps_by_keep(bench):
    """h = 1 comes out as 65536 / kept, rounded once: with the exact keep probability, the expectation of h is kept."""
    h_in, W = bench.ops.zeros((64, 1), bench.storage), bench.ops.zeros((40, 1), bench.storage)
    b, h = bench.input(np.ones(40))[0], bench.output(64, 40)
    bench.ops.affine_activation(h_in, W, b, ACTIVATIONS["identity"], h, None, Dropout(0.3, 1, 0), bench.state())
    values = np.unique(bench.host(h).astype(np.float64))
    assert len(values) == 2
    assert values[0] == 0
    expected = 65536 / round(0.7 * 65536)  # 1.428585…, where 1 / 0.7 would be 1.428571…
    assert abs(values[1] - expected) <= 2 * 2.0**-23 if bench.storage.itemsize >= 4 else 2.0**-8


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activate(bench, name):
    for shape in [(0, 4), (1, 1), (31, 257), (2, BLOCK + 3)]:
        z, z0 = bench.normal(*shape)
        h = bench.output(*shape)
        with only_writes(bench, {"z": z, "h": h}, "h"):
            bench.ops.activate(ACTIVATIONS[name], z, h)
        assert_close(bench.host(h), activation(name, z0), bench.tolerance)
        bench.check_guards()
        bench.ops.activate(ACTIVATIONS[name], z, z)  # in place
        assert same_bits(bench.host(z), bench.host(h))


# --- the loss ----------------------------------------------------------------------------------------------------

# (loss, output, computed from z, the kind of target)
PAIRS = [
    ("cross_entropy", "softmax", True, "labels"),
    ("cross_entropy", "softmax", True, "rows"),
    ("nll", "log_softmax", True, "labels"),
    ("nll", "log_softmax", True, "rows"),
    ("binary_cross_entropy", "sigmoid", True, "unit"),
    ("poisson", "exp", True, "counts"),
    ("cross_entropy", "softmax", False, "labels"),
    ("nll", "log_softmax", False, "rows"),
    ("binary_cross_entropy", "softmax", False, "unit"),
    ("poisson", "softplus", False, "counts"),
    ("mse", "identity", False, "real"),
    ("mse", "softmax", False, "real"),
    ("mse", "gelu", False, "real"),
    ("half_mse", "sigmoid", False, "real"),
    ("mae", "sine", False, "real"),
    ("huber", "silu", False, "real"),
    ("log_cosh", "tanh", False, "real"),
    ("hinge", "identity", False, "signs"),
    ("hinge", "tanh", False, "labels"),
]


def pair_name(pair):
    return "-".join([pair[0], pair[1], "z" if pair[2] else "h", pair[3]])


def targets(bench, kind, rows, n):
    rng = bench.rng
    values = {
        "labels": lambda: rng.integers(0, n, rows),
        "rows": lambda: rng.dirichlet(np.ones(n), rows).reshape(rows, n),
        "unit": lambda: rng.random((rows, n)),
        "counts": lambda: rng.poisson(2.0, (rows, n)),
        "real": lambda: rng.normal(size=(rows, n)) * 2,
        "signs": lambda: rng.choice([-1.0, 1.0], (rows, n)),
    }[kind]()
    dtype = np.int64 if kind == "labels" else bench.master
    y = bench.ops.to_device(values.astype(dtype))
    return y, bench.host(y) if kind == "labels" else bench.host(y).astype(np.float64)


def check_loss(bench, pair, rows, n, weighted=False, accumulate=False, with_gb=True, scale=1.0, loss=None, **options):
    name, output, from_z, kind = pair
    loss = losses.get(name) if loss is None else loss
    f = ACTIVATIONS[output]
    z0 = bench.rng.normal(size=(rows, n))
    # the kink of hinge and mae in ŷ is not where normal numbers fall
    h, _ = bench.input(z0 if from_z else activation(output, z0))
    z = None if from_z or f.reads != "z" else bench.input(z0)[0]
    y, y0 = targets(bench, kind, rows, n)
    w0 = bench.rng.uniform(0.5, 2, rows) if weighted else None
    sample_weight = None if w0 is None else bench.ops.to_device(w0)
    gz = bench.output(rows, n)
    gb, gb0 = bench.normal(n, dtype=bench.master) if with_gb else (None, None)
    if with_gb and not accumulate:
        gb[...] = math.nan
    state = bench.state(LOSS_SCALE=scale, COST=0.25)
    with only_writes(bench, locals(), slots=[Slot.TOTAL_WEIGHT]):
        bench.ops.total_weight(loss, y, sample_weight, state)
    with only_writes(bench, locals(), "gz", "gb", slots=[Slot.COST]):
        bench.ops.loss_and_gradient(loss, f, from_z, h, z, y, sample_weight, gz, gb, accumulate, state)
    bench.check_guards()

    total_weight = row_weights(y0, rows, w0, options.get("class_weight")).sum()
    share = row_weights(y0, rows, w0) / total_weight if rows else np.zeros(0)  # L has the class's weight in it already
    values, gh = loss_rows(name, activation(output, z0), y0, **options)
    expected = through_activation(output, gh, z0) * share[:, None]
    assert_close(bench.read(state, Slot.TOTAL_WEIGHT), total_weight, 1e-12)
    assert_close(bench.read(state, Slot.COST) - 0.25, values @ share, bench.tolerance, scale=1.0)
    assert_close(bench.host(gz), scale * expected, bench.tolerance)
    if with_gb:
        assert gb.dtype == bench.master
        total = expected.sum(axis=0) * scale + (gb0 if accumulate else 0)
        # columns of the softmax gradient nearly cancel, so the error is measured against what is added up
        assert_close(bench.host(gb), total, bench.tolerance, scale=scale * np.linalg.norm(abs(expected).sum(axis=0)))


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_loss_and_gradient(bench, pair):
    for rows, n in [(0, 3), (1, 2), (31, 257), (257, 31)]:
        check_loss(bench, pair, rows, n, scale=4096.0 if bench.ops.precision.loss_scaled else 1.0)


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4], PAIRS[6], PAIRS[10], PAIRS[11]], ids=pair_name)
def test_loss_and_gradient_of_rows_longer_than_a_block(bench, pair):
    # what the loss scale is for: gz / n is below what float16 resolves
    check_loss(bench, pair, 2, BLOCK + 3, scale=65536.0 if bench.ops.precision.loss_scaled else 1.0)


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_loss_and_gradient_with_weights_scale_and_accumulation(bench, pair):
    check_loss(bench, pair, 43, 5, weighted=True, accumulate=True, scale=1024.0)


@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("from_z", [True, False])
def test_loss_and_gradient_with_class_weight_and_smoothing(bench, kind, weighted, from_z):
    options = {"smoothing": 0.1, "class_weight": [0.5, 2.0, 1.0, 0.0]}
    loss = losses.CrossEntropy(label_smoothing=0.1, class_weight=[0.5, 2.0, 1.0, 0.0])
    check_loss(bench, ("cross_entropy", "softmax", from_z, kind), 57, 4, weighted, loss=loss, **options)


@pytest.mark.parametrize("kind", ["labels", "rows"])
@pytest.mark.parametrize("from_z", [True, False])
def test_cross_entropy_of_clipped_probabilities(bench, kind, from_z):
    """A clip of 0.2 meets about every third probability of 4 classes; it changes L and leaves the gradient."""
    loss = losses.CrossEntropy(clip=0.2)
    check_loss(bench, ("cross_entropy", "softmax", from_z, kind), 57, 4, True, loss=loss, clip=0.2)


@pytest.mark.parametrize("from_z", [True, False])
def test_binary_cross_entropy_of_clipped_probabilities(bench, from_z):
    loss = losses.BinaryCrossEntropy(clip=0.3)
    kinds = {kind for name, _, _, kind in PAIRS if name == "binary_cross_entropy"}
    for kind in kinds:
        check_loss(bench, ("binary_cross_entropy", "sigmoid", from_z, kind), 57, 4, True, loss=loss, clip=0.3)
    assert kinds


def test_loss_and_gradient_counts_a_class_weight_once(bench):
    """A uniform ŷ over 2 classes costs ln 2 a sample, so any weighted mean of it is ln 2; by hand, ∂J/∂z as well."""
    loss = losses.CrossEntropy(class_weight=[1.0, 3.0])
    z, y = bench.ops.zeros((2, 2), bench.storage), bench.ops.to_device(np.array([0, 1]))
    gz, state = bench.output(2, 2), bench.state()
    bench.ops.total_weight(loss, y, None, state)
    bench.ops.loss_and_gradient(loss, ACTIVATIONS["softmax"], True, z, None, y, None, gz, None, False, state)
    assert bench.read(state, Slot.TOTAL_WEIGHT) == 4
    assert_close(bench.read(state, Slot.COST), math.log(2), 1e-6)
    # (w_y / 4)(softmax(z) − 1_y): 1/4 · (−1/2, 1/2) for the first sample, 3/4 · (1/2, −1/2) for the second
    np.testing.assert_array_equal(bench.host(gz).astype(np.float64), [[-0.125, 0.125], [0.375, -0.375]])


def test_loss_and_gradient_without_gb(bench):
    check_loss(bench, PAIRS[0], 9, 4, with_gb=False)


def test_loss_and_gradient_of_no_weight_at_all_is_zero(bench):
    h, _ = bench.normal(3, 2)
    y, _ = targets(bench, "real", 3, 2)
    gz, gb = bench.output(3, 2), bench.output(2, dtype=bench.master)
    state = bench.state(TOTAL_WEIGHT=0.0)
    f = ACTIVATIONS["identity"]
    bench.ops.loss_and_gradient(
        losses.get("mse"), f, False, h, None, y, bench.ops.zeros(3, np.float64), gz, gb, False, state
    )
    assert bench.read(state, Slot.COST) == 0
    assert not bench.host(gz).astype(np.float64).any()
    assert not bench.host(gb).any()


@pytest.mark.parametrize("rows", [0, 1, 257])
def test_total_weight(bench, rows):
    y, y0 = targets(bench, "labels", rows, 3)
    w0 = bench.rng.random(rows)
    plain, weighted = losses.CrossEntropy(), losses.CrossEntropy(class_weight=[1.0, 0.0, 4.0])
    for loss, w, expected in [
        (plain, None, rows),
        (plain, w0, w0.sum()),
        (weighted, None, row_weights(y0, rows, None, [1.0, 0.0, 4.0]).sum()),
        (weighted, w0, row_weights(y0, rows, w0, [1.0, 0.0, 4.0]).sum()),
    ]:
        state = bench.state(TOTAL_WEIGHT=99.0)
        sample_weight = None if w is None else bench.ops.to_device(w)
        with only_writes(bench, locals(), slots=[Slot.TOTAL_WEIGHT]):
            bench.ops.total_weight(loss, y, sample_weight, state)
        assert_close(bench.read(state, Slot.TOTAL_WEIGHT), expected, 1e-12)


# --- backward ----------------------------------------------------------------------------------------------------


def check_input_gradient(bench, shape, name, dropout=None, with_gb=True, accumulate=False, round_=2):
    batch, n_in, n_out = shape
    gz, g0 = bench.normal(batch, n_out, scale=0.5)
    W, W0 = bench.normal(n_out, n_in, scale=1 / math.sqrt(n_out))
    z0 = bench.rng.normal(size=(batch, n_in))
    factor = 1.0
    if dropout is not None:
        factor = dropout_factor(dropout.rate, dropout.seed, dropout.layer, round_, (batch, n_in), dropout.first_row)
    f = ACTIVATIONS[name]
    saved = {"h": activation(name, z0) * factor, "z": z0, "none": None}[f.reads]
    saved = saved if saved is None else bench.input(saved)[0]
    gz_in = bench.output(batch, n_in)
    gb, gb0 = bench.normal(n_in, dtype=bench.master) if with_gb else (None, None)
    if with_gb and not accumulate:
        gb[...] = math.nan
    state = bench.state(ROUND=round_, COST=1.0, LOSS_SCALE=4.0)
    with only_writes(bench, locals(), "gz_in", "gb"):
        bench.ops.input_gradient(gz, W, f, saved, dropout, gz_in, gb, accumulate, state)
    bench.check_guards()
    expected = through_activation(name, g0 @ W0 * factor, z0)
    assert gz_in.dtype == bench.storage
    assert_close(bench.host(gz_in), expected, bench.tolerance)
    if with_gb:
        assert gb.dtype == bench.master
        total = expected.sum(axis=0) + (gb0 if accumulate else 0)
        assert_close(bench.host(gb), total, bench.tolerance, scale=np.linalg.norm(abs(expected).sum(axis=0)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "softmax"])
def test_input_gradient(bench, shape, name):
    check_input_gradient(bench, shape, name)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_input_gradient_of_every_kind(bench, name):
    for accumulate in (False, True):
        check_input_gradient(bench, (37, 23, 11), name, accumulate=accumulate)


@pytest.mark.parametrize("name", [n for n in ACTIVATION_NAMES if n not in ROWWISE])
def test_input_gradient_through_dropout(bench, name):
    check_input_gradient(bench, (33, 21, 9), name, Dropout(0.3, seed=9, layer=1, first_row=64))


@pytest.mark.parametrize("shape", [(0, 9, 3), (1, 1, 1), (1, BLOCK + 9, 3), (80, 257, 5)])
def test_input_gradient_through_dropout_by_blocks(bench, shape):
    check_input_gradient(bench, shape, "tanh", Dropout(0.5, seed=9, layer=0), accumulate=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient_with_respect_to_x(bench, shape):
    check_input_gradient(bench, shape, "identity", with_gb=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "added"])
def test_weight_gradient(bench, shape, accumulate):
    batch, n_in, n_out = shape
    gz, g0 = bench.normal(batch, n_out)
    h_in, h0 = bench.normal(batch, n_in)
    gW = bench.output(n_out, n_in, dtype=bench.master)
    before = np.zeros((n_out, n_in))
    if accumulate:
        before = bench.rng.normal(size=(n_out, n_in)).astype(bench.master)
        gW[...] = bench.ops.to_device(before)
    with only_writes(bench, locals(), "gW"):
        bench.ops.weight_gradient(gz, h_in, gW, accumulate)
    bench.check_guards()
    assert_close(bench.host(gW), g0.T @ h0 + before, bench.master_tolerance)


REGULARIZERS = [
    None,
    regularizers.L2(0.3),
    regularizers.L1(0.2),
    regularizers.ElasticNet(0.1, 0.4),
]


def penalty_gradient(theta, regularizer):
    return 0 if regularizer is None else regularizer.l1 * np.sign(theta) + regularizer.l2 * theta


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=repr)
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_descend(bench, regularizer, weight_decay):
    for shape in SHAPES:
        check_descend(bench, shape, regularizer, weight_decay)


def check_descend(bench, shape, regularizer, weight_decay):
    batch, n_in, n_out = shape
    gz, g0 = bench.normal(batch, n_out)
    h_in, h0 = bench.normal(batch, n_in)
    W, W0 = bench.normal(n_out, n_in, dtype=bench.master)
    shadow = bench.output(n_out, n_in) if bench.ops.precision.has_shadow else None
    optimizer = optimizers.SGD(lr=99.0, weight_decay=weight_decay)  # the rate in the state is the one that counts
    state = bench.state(LEARNING_RATE=0.125)
    with only_writes(bench, locals(), "W", "shadow"):
        bench.ops.descend(W, gz, h_in, optimizer, regularizer, shadow, state)
    bench.check_guards()
    expected = W0 - 0.125 * (g0.T @ h0 + penalty_gradient(W0, regularizer) + weight_decay * W0)
    assert_close(bench.host(W), expected, bench.master_tolerance)
    if shadow is not None:
        assert same_bits(bench.host(shadow), bench.host(W).astype(bench.storage))


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_descend_leaves_W_where_the_cost_is_not_finite(bench, cost):
    gz, h_in = bench.normal(4, 3)[0], bench.normal(4, 2)[0]
    W = bench.normal(3, 2, dtype=bench.master)[0]
    shadow = bench.normal(3, 2)[0] if bench.ops.precision.has_shadow else None
    state = bench.state(LEARNING_RATE=0.125, COST=cost)
    with only_writes(bench, locals()):
        bench.ops.descend(W, gz, h_in, optimizers.SGD(), None, shadow, state)


# --- update ------------------------------------------------------------------------------------------------------

SIZES = [[1, 1], [31, 7, 5], [257, 31, 1], [131, 129, 31]]  # the last one's θ is longer than a block


def parameters(bench, sizes, scale=1.0):
    """A layout, and a flat array with random segments and zeros between them, as (array, float64)."""
    layout = Layout(sizes, bench.master.itemsize)
    flat = np.zeros(layout.size, bench.master)
    for segment in (*layout.weights(flat), *layout.biases(flat)):
        segment[...] = bench.rng.normal(size=segment.shape) * scale
    return layout, *bench.input(flat, bench.master)


@pytest.mark.parametrize("sizes", [*SIZES, [5]], ids=str)
def test_layout(bench, sizes):
    """Every W, then every b, aligned, none overlapping, and the penalised prefix what it says."""
    layout = Layout(sizes, bench.master.itemsize)
    flat = np.zeros(layout.size)
    for i, segment in enumerate((*layout.weights(flat), *layout.biases(flat)), 1):
        offset = (segment.ctypes.data - flat.ctypes.data) // flat.itemsize
        assert offset * bench.master.itemsize % ALIGNMENT == 0
        assert not segment.any()
        segment[...] = i
        assert (offset < layout.n_weights) == (segment.ndim == 2)
    assert [W.shape for W in layout.weights(flat)] == [(m, n) for n, m in zip(sizes, sizes[1:])]
    assert [b.shape for b in layout.biases(flat)] == [(m,) for m in sizes[1:]]
    tail = flat[layout.n_weights :]
    for b, c in zip(layout.biases(flat), layout.biases(tail, layout.n_weights)):
        assert np.shares_memory(b, c)
        np.testing.assert_array_equal(b, c)
    assert layout.penalised(regularizers.L2(1.0)) == layout.n_weights
    assert layout.penalised(regularizers.L2(1.0, on="all")) == layout.size


@pytest.mark.parametrize("regularizer", REGULARIZERS[1:], ids=repr)
def test_penalty(bench, regularizer):
    for sizes, part in itertools.product(SIZES, ("nothing", "weights", "all")):
        check_penalty(bench, sizes, regularizer, part)


def check_penalty(bench, sizes, regularizer, part):
    layout, theta, theta0 = parameters(bench, sizes)
    n = {"nothing": 0, "weights": layout.n_weights, "all": layout.size}[part]
    state = bench.state(COST=0.5)
    with only_writes(bench, locals(), slots=[Slot.COST]):
        bench.ops.penalty(theta, n, regularizer, state)
    t = theta0[:n]
    expected = regularizer.l1 * abs(t).sum() + regularizer.l2 / 2 * (t * t).sum()
    assert_close(bench.read(state, Slot.COST), 0.5 + expected, bench.master_tolerance)


@pytest.mark.parametrize("regularizer", REGULARIZERS[1:], ids=repr)
def test_add_penalty_gradient(bench, regularizer):
    for sizes, part in itertools.product(SIZES, ("nothing", "weights", "all")):
        check_add_penalty_gradient(bench, sizes, regularizer, part)


def check_add_penalty_gradient(bench, sizes, regularizer, part):
    layout, theta, theta0 = parameters(bench, sizes)
    _, g, g0 = parameters(bench, sizes)
    n = {"nothing": 0, "weights": layout.n_weights, "all": layout.size}[part]
    with only_writes(bench, locals(), "g"):
        bench.ops.add_penalty_gradient(theta, n, regularizer, g)
    g0[:n] += penalty_gradient(theta0[:n], regularizer)
    assert_close(bench.host(g), g0, bench.master_tolerance)


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=repr)
def test_gradient_norm(bench, regularizer):
    for sizes, part in itertools.product(SIZES, ("weights", "all")):
        check_gradient_norm(bench, sizes, regularizer, part)


def check_gradient_norm(bench, sizes, regularizer, part):
    layout, theta, theta0 = parameters(bench, sizes)
    _, g, g0 = parameters(bench, sizes, scale=16.0)
    n = 0 if regularizer is None else layout.n_weights if part == "weights" else layout.size
    state = bench.state(LOSS_SCALE=16.0)
    with only_writes(bench, locals(), slots=[Slot.GRADIENT_NORM]):
        bench.ops.gradient_norm(theta, g, n, regularizer, state)
    whole = g0 / 16
    whole[:n] += penalty_gradient(theta0[:n], regularizer)
    assert_close(bench.read(state, Slot.GRADIENT_NORM), math.sqrt((whole**2).sum()), bench.master_tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradient_norm_of_a_gradient_that_is_not_finite(bench, bad):
    layout, theta, _ = parameters(bench, [31, 7, 5])
    g = bench.ops.zeros(layout.size, bench.master)
    g[layout.size - 64 // bench.master.itemsize] = bad
    state = bench.state()
    bench.ops.gradient_norm(theta, g, 0, None, state)
    assert not math.isfinite(bench.read(state, Slot.GRADIENT_NORM))


O = optimizers
RULES = [
    O.SGD(lr=0.1),
    O.SGD(lr=0.1, weight_decay=0.2),
    O.SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    O.SGD(lr=0.1, momentum=0.9, nesterov=True),
    O.Adam(lr=0.1, weight_decay=0.1),
    O.Adam(lr=0.1, amsgrad=True, betas=(0.5, 0.6)),
    O.Adam(lr=0.1, eps=0.1, epsilon_hat=True),
    O.AdamW(lr=0.1, weight_decay=0.3),
    O.NAdam(lr=0.1, weight_decay=0.1),
    O.NAdam(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    O.RAdam(lr=0.1, weight_decay=0.1, betas=(0.9, 0.95)),
    O.RAdam(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    O.Adamax(lr=0.1, weight_decay=0.1),
    O.Adagrad(lr=0.1, weight_decay=0.1, lr_decay=0.2, initial_accumulator_value=0.5),
    O.RMSprop(lr=0.1, weight_decay=0.1),
    O.RMSprop(lr=0.1, centered=True, momentum=0.8),
    O.Adadelta(lr=0.5, weight_decay=0.1),
    O.Lion(lr=0.1, weight_decay=0.1),
    O.Muon(lr=0.1),
    O.Muon(lr=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw", ns_steps=3, momentum=0.5),
]


def short(rule):
    """SGD(lr=0.1, momentum=0.9): what differs from the defaults."""
    told = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if f.init}
    default = {f.name: getattr(type(rule)(), f.name) for f in dataclasses.fields(rule)}
    return f"{rule.name}({', '.join(f'{k}={v}' for k, v in told.items() if v != default[k] and k != 'lr')})"


def test_update_rules_are_all_tried():
    assert {type(rule) for rule in RULES} == set(O.OPTIMIZERS.values()) - {O.LBFGS}


def reference_update(rule, layout, theta, g, memory, step):
    """A step on the flat float64 θ; Muon's matrices one by one, the rest of θ by its AdamW."""
    if not isinstance(rule, O.Muon):
        return update_rule(rule, theta, g, memory.setdefault("flat", {}), step)
    out = np.zeros_like(theta)
    for l, (new, W, gW) in enumerate(zip(layout.weights(out), layout.weights(theta), layout.weights(g))):
        new[...] = muon_rule(rule, W, gW, memory.setdefault(l, {}))
    biases = slice(layout.n_weights, None)
    out[biases] = update_rule(rule.adamw, theta[biases], g[biases], memory.setdefault("b", {}), step)
    return out


def new_moments(bench, rule, layout):
    moments = [bench.ops.zeros(layout.size, bench.master) for _ in rule.moments]
    for moment, name in zip(moments, rule.moments):
        moment[...] = rule.initial(name)
    return moments


def check_update(bench, rule, sizes, regularizer=None, on="weights", clip_norm=None, scale=1.0, steps=3):
    if regularizer is not None:
        regularizer = dataclasses.replace(regularizers.ElasticNet(regularizer.l1, regularizer.l2), on=on)
    layout, theta, theta0 = parameters(bench, sizes)
    n = 0 if regularizer is None else layout.penalised(regularizer)
    moments = new_moments(bench, rule, layout)
    shadow = bench.ops.empty(layout.size, bench.storage) if bench.ops.precision.has_shadow else None
    memory = {}
    for step in range(1, steps + 1):
        _, g, g0 = parameters(bench, sizes, scale=scale)
        state = bench.state(LEARNING_RATE=rule.lr, STEP=step - 1, LOSS_SCALE=scale, COST=1.0)
        whole = g0 / scale
        whole[:n] += penalty_gradient(theta0[:n], regularizer)
        norm = math.sqrt((whole**2).sum())
        bench.ops.write_state(state, {Slot.GRADIENT_NORM: 0.0 if clip_norm is None else norm})
        if clip_norm is not None:
            whole *= min(1, clip_norm / (norm + 1e-6))
        with only_writes(bench, locals(), "theta", "moments", "shadow"):
            bench.ops.update(theta, g, moments, rule, layout, n, regularizer, clip_norm, shadow, state)
        theta0 = reference_update(rule, layout, theta0, whole, memory, step)
        # Lion's sign of a sum that cancels may fall the other way in float32; no such sum occurs in these numbers
        assert_close(bench.host(theta), theta0, bench.master_tolerance * 4)
        if shadow is not None:
            assert same_bits(bench.host(shadow), bench.host(theta).astype(bench.storage))
    gaps = np.ones(layout.size, bool)
    for segment in (*layout.weights(gaps), *layout.biases(gaps)):
        segment[...] = False
    assert not bench.host(theta)[gaps].any(), "the gaps between the segments of θ have to stay zero"


@pytest.mark.parametrize("rule", RULES, ids=short)
def test_update(bench, rule):
    for sizes in SIZES:
        check_update(bench, rule, sizes)


@pytest.mark.parametrize("rule", RULES, ids=short)
def test_update_with_penalty_clipping_and_loss_scale(bench, rule):
    for sizes, on in (([131, 129, 31], "weights"), ([31, 7, 5], "all")):
        check_update(bench, rule, sizes, regularizers.ElasticNet(0.02, 0.1), on, clip_norm=1.5, scale=64.0)


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_update_clips_only_what_is_longer(bench, clip_norm):
    check_update(bench, O.SGD(lr=0.5), [31, 7, 5], clip_norm=clip_norm)


@pytest.mark.parametrize("rule", [r for r in RULES if not isinstance(r, O.Muon)], ids=short)
def test_update_of_a_part_of_theta(bench, rule):
    """A rule that sees no matrices updates any part of θ as it would within the whole."""
    layout, theta, theta0 = parameters(bench, [31, 7, 5])
    _, g, g0 = parameters(bench, [31, 7, 5])
    moments = new_moments(bench, rule, layout)
    tail = slice(layout.n_weights, None)
    regularizer = regularizers.L2(0.1, on="all")
    n = layout.size - layout.n_weights
    state = bench.state(LEARNING_RATE=rule.lr)
    bench.ops.update(theta[tail], g[tail], [m[tail] for m in moments], rule, layout, n, regularizer, None, None, state)
    expected = update_rule(rule, theta0[tail], g0[tail] + 0.1 * theta0[tail], {}, 1)
    assert_close(bench.host(theta)[tail], expected, bench.master_tolerance * 4)
    np.testing.assert_array_equal(bench.host(theta)[: layout.n_weights], theta0[: layout.n_weights])


@pytest.mark.parametrize("rule", RULES, ids=short)
@pytest.mark.parametrize(("slot", "value"), [("COST", math.nan), ("COST", math.inf), ("GRADIENT_NORM", math.inf)])
def test_update_leaves_everything_where_the_step_is_not_finite(bench, rule, slot, value):
    layout, theta, _ = parameters(bench, [31, 7, 5])
    g = parameters(bench, [31, 7, 5])[1]
    moments = [bench.normal(layout.size, dtype=bench.master)[0] for _ in rule.moments]
    shadow = bench.normal(layout.size)[0] if bench.ops.precision.has_shadow else None
    state = bench.state(LEARNING_RATE=0.1, **{slot: value})
    with only_writes(bench, locals()):
        bench.ops.update(theta, g, moments, rule, layout, 0, None, None, shadow, state)


@pytest.mark.parametrize(
    ("cost", "norm", "counts"), [(2.0, 0.0, True), (2.0, 3.0, True), (math.nan, 0.0, False), (math.inf, 1.0, False)]
)
def test_finish_step_counts_what_was_applied(bench, cost, norm, counts):
    state = bench.state(COST=cost, GRADIENT_NORM=norm, STEP=4.0, ROUND=6.0, EPOCH_COST=10.0)
    bench.ops.finish_step(5, state)
    assert bench.read(state, Slot.STEP) == 4 + counts
    assert bench.read(state, Slot.BAD_ROUND) == (0 if counts else 7)
    assert bench.read(state, Slot.ROUND) == 6
    np.testing.assert_equal(bench.read(state, Slot.EPOCH_COST), 10 + 5 * cost)
    bench.ops.write_state(state, {Slot.ROUND: 7.0, Slot.COST: math.nan})
    bench.ops.finish_step(5, state)
    assert bench.read(state, Slot.BAD_ROUND) == (8 if counts else 7), "the first bad round is the one that is named"


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_finish_step_of_a_gradient_that_is_not_finite(bench, norm):
    state = bench.state(COST=1.0, GRADIENT_NORM=norm, STEP=4.0, ROUND=6.0, LOSS_SCALE=1024.0, GOOD_STEPS=5.0)
    bench.ops.finish_step(5, state)
    assert bench.read(state, Slot.STEP) == 4
    if bench.ops.precision.loss_scaled:
        found = [bench.read(state, s) for s in (Slot.BAD_ROUND, Slot.LOSS_SCALE, Slot.SKIPPED, Slot.GOOD_STEPS)]
        assert found == [0, 512, 1, 0]
    else:
        assert bench.read(state, Slot.BAD_ROUND) == 7
        assert bench.read(state, Slot.LOSS_SCALE) == 1024


def test_finish_step_doubles_the_loss_scale_after_enough_good_steps(bench, monkeypatch):
    monkeypatch.setattr(precision, "LOSS_SCALE_INTERVAL", 3)
    state = bench.state(COST=1.0, GRADIENT_NORM=1.0, LOSS_SCALE=8.0)
    scales = []
    for norm in (1, 1, 1, 1, 1, math.inf, 1, 1, 1):
        bench.ops.write_state(state, {Slot.GRADIENT_NORM: float(norm)})
        bench.ops.finish_step(1, state)
        scales.append(bench.read(state, Slot.LOSS_SCALE))
    assert scales == ([8, 8, 16, 16, 16, 8, 8, 8, 16] if bench.ops.precision.loss_scaled else [8] * 9)


# --- what surrounds them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flop", [0, 10**6, 10**12])
def test_tuned_for(bench, flop):
    """Operations inside give what they give outside, and an error inside comes out."""
    gz, h_in = bench.normal(9, 4)[0], bench.normal(9, 5)[0]
    results = [bench.ops.zeros((4, 5), bench.master) for _ in range(3)]
    bench.ops.weight_gradient(gz, h_in, results[0], False)
    with bench.ops.tuned_for(flop):
        bench.ops.weight_gradient(gz, h_in, results[1], False)
        with bench.ops.tuned_for(flop):
            bench.ops.weight_gradient(gz, h_in, results[2], False)
    assert same_bits(bench.host(results[0]), bench.host(results[1]))
    assert same_bits(bench.host(results[0]), bench.host(results[2]))
    with pytest.raises(KeyError), bench.ops.tuned_for(flop):
        raise KeyError


def blas_threads():
    """The threads of NumPy's own BLAS; SciPy and PyTorch bring others, which no product here runs in."""
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    own = [pool for pool in pools if "numpy" in pool["filepath"]]
    return {pool["num_threads"] for pool in own or pools}


def test_numpy_keeps_small_products_to_one_blas_thread():
    ops = NumpyOperations(precision.get("float32"))
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if blas_threads() != {2}:
            pytest.skip("this BLAS has no two threads, or none that can be told to")
        with ops.tuned_for(LARGE_GEMM):
            assert blas_threads() == {2}
            assert ops._threads == 1
        with ops.tuned_for(SMALL_GEMM):
            assert blas_threads() == {1}
            assert ops._threads == 2
            with ops.tuned_for(SMALL_GEMM):
                assert ops._threads == 2
            assert ops._threads == 2
        assert ops._threads == 1
        with ops.tuned_for(SMALL_GEMM - 1):
            assert blas_threads() == {1}
            with ops.tuned_for(1):
                assert blas_threads() == {1}
            assert blas_threads() == {1}, "the limit ends with the outermost context"
        assert blas_threads() == {2}
        with pytest.raises(KeyError), ops.tuned_for(1):
            raise KeyError
        assert blas_threads() == {2}


@pytest.mark.parametrize(
    "shape", [(256, 784, 256), (1000, 200, 130), (17, 1000, 1000), (16, 1000, 1000), (1, 5000, 5000)]
)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_shared_matmul(shape, threads):
    """Every row once, transposed factors too; with a last part that is short, and with fewer rows than parts."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    for a, b in (
        (rng.normal(size=(m, k)), rng.normal(size=(n, k)).T),
        (rng.normal(size=(k, m)).T, rng.normal(size=(k, n))),
    ):
        out = np.full((m, n), math.nan)
        assert sharing.matmul(a, b, out, threads) is out
        assert_close(out, a @ b, 1e-13)
        again = np.full((m, n), math.nan)
        assert same_bits(sharing.matmul(a, b, again, threads), out)


def test_shared_matmul_is_quiet_in_every_thread():
    a, b = np.full((512, 512), 1e200), np.full((512, 512), 1e200)
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("error")
        assert np.isinf(sharing.matmul(a, b, np.empty_like(a), 4)).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_shared_matmul_after_a_fork():
    a = np.random.default_rng(0).normal(size=(512, 512))
    expected = sharing.matmul(a, a, np.empty_like(a), 2)
    child = os.fork()
    if not child:
        os._exit(0 if same_bits(sharing.matmul(a, a, np.empty_like(a), 2), expected) else 1)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads it does not have")
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("last", ["this thread", "the other"])
def test_numpy_gives_the_blas_threads_back_whichever_thread_is_out_last(last):
    ops = NumpyOperations(precision.get("float32"))
    inside, leave = threading.Event(), threading.Event()

    def work():
        with ops.tuned_for(1):
            inside.set()
            leave.wait(10)

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if blas_threads() != {2}:
            pytest.skip("this BLAS has no two threads, or none that can be told to")
        thread = threading.Thread(target=work)
        with ops.tuned_for(1):
            thread.start()
            assert inside.wait(10)
            assert blas_threads() == {1}
            if last == "this thread":
                leave.set()
                thread.join()
        leave.set()
        thread.join()
        assert blas_threads() == {2}


# --- from several threads ----------------------------------------------------------------------------------------


def test_operations_of_several_threads_do_not_share_scratch(bench):
    """The same operation on different data at the same time gives each thread its own result."""
    shape, name = (300, 64), "gelu_tanh"
    zs = [bench.normal(*shape) for _ in range(4)]
    hs = [bench.output(*shape) for _ in zs]
    expected = [activation(name, z0) for _, z0 in zs]
    failures = []

    def work(z, h, expected):
        try:
            for _ in range(10):
                bench.ops.activate(ACTIVATIONS[name], z, h)
                assert_close(bench.host(h), expected, bench.tolerance)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(z, h, e)) for (z, _), h, e in zip(zs, hs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
