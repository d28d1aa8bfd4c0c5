"""Every operation of the seam against plain float64 formulas: values, dtypes, and what is written and what is not.

An implementation is one row of IMPLEMENTATIONS; every test runs on each of them: on NumPy, on the emulated GPU of
`cuda_on_cpu`, which runs the kernels' own text, and under `pytest -m gpu` on a real one. Outputs are the middle of
larger buffers full of NaN, so that a skipped element, a stray write and a read of what was there before all show.

NumPy gets every precision and every combination of what else a test varies. To the emulated GPU each such combination
is a kernel of its own, which takes longer to compile (0.2 s) than to run; where they are many it gets a covering of
them, see `covering`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import math
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from cuda_on_cpu.fixtures import emulated_gpu, kept_stand_in  # noqa: F401
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

from gpu_mlp import EMA, MLP, Trainer, losses, optimizers, precision, regularizers
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.ops import launch, numpy_ops, sharing
from gpu_mlp.ops.interface import ALIGNMENT, Dropout, Layout, Operations, Slot
from gpu_mlp.ops.numpy_ops import BLOCK, LARGE_GEMM, SMALL_GEMM, NumpyOperations
from gpu_mlp.parallel import buckets, ranks


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row of the table: where the class is, how to read an array's address, the precisions to try, what the class
    needs around it (fixtures), whether it gets coverings or all combinations, and the marks of its tests."""

    module: str
    name: str
    address: Callable
    precisions: tuple
    fixtures: tuple = ()
    covered: bool = False
    marks: tuple = ()

    def prepare(self, request):
        """The class; imported here, since the emulated device has to be there first."""
        for fixture in self.fixtures:
            request.getfixturevalue(fixture)
        return getattr(importlib.import_module(self.module), self.name)


IMPLEMENTATIONS = {
    "numpy": Implementation(
        "gpu_mlp.ops.numpy_ops",
        "NumpyOperations",
        lambda array: array.ctypes.data,
        ("float64", "float32", "float16", "bfloat16"),  # tf32 multiplies as float32 does here
    ),
    "numba": Implementation(
        "gpu_mlp.ops.numba_ops", "NumbaOperations", lambda array: array.ctypes.data, ("float64", "float32")
    ),
    "cuda": Implementation(
        "gpu_mlp.ops.cuda_ops",
        "CudaOperations",
        lambda array: array.data.ptr,
        ("float64", "float32", "tf32", "float16", "bfloat16"),
        ("kept_stand_in", "emulated_gpu"),
        covered=True,
    ),
}
IMPLEMENTATIONS["gpu"] = dataclasses.replace(IMPLEMENTATIONS["cuda"], fixtures=("real_gpu",), marks=(pytest.mark.gpu,))

# (batch, n_in, n_out): nothing, one, odd, one row of more than a block, many rows that end within a block, whole packs
# of 16 bytes. 257 rows are more than the emulated device's grid covers at once.
SHAPES = [
    *((0, 5, 3), (1, 1, 1), (1, 31, 7), (31, 257, 31), (257, 31, 129)),
    *((3, 7, BLOCK + 5), (2, BLOCK + 5, 3), (257, 24, 40)),
]


def covering(*columns, turn=0, times=2):
    """The arguments (bench, *row) of a test, for `parametrize`, where ``columns`` are what it varies.

    All combinations at all precisions; for an implementation that is ``covered``, every value of the first column
    twice: at float64, and at another precision, by turns, with the opposite values of the other columns; or once
    (``times``), at a precision by turns.

    So every value of the first column runs in both types S that formulas are written in, and meets every value of each
    other column of two; and every precision meets those as well. With another ``turn`` the values of the first column
    meet another of the precisions, so that an activation's forward and backward pass run in three of the four. More
    would find no more: what the first column chooses (f, f′, a loss, a rule) is written in S; the storage type adds two
    conversions around it, the pack a loop, and both are the same text for all of them.
    """
    arguments = []
    for name, row in IMPLEMENTATIONS.items():
        precisions = [p for p in row.precisions if p != "tf32"]  # the kernels of float32
        rest = list(itertools.product(*columns[1:]))
        for i, value in enumerate(columns[0]):
            if not row.covered:
                chosen = list(itertools.product(precisions, rest))
            elif times == 1:
                chosen = [(precisions[(i + turn) % len(precisions)], rest[i % len(rest)])]
            else:
                first, *others = precisions
                chosen = [(first, rest[i % len(rest)]), (others[(i + turn) % len(others)], rest[-1 - i % len(rest)])]
            for p, more in chosen:
                told = "-".join([name, p, *map(tell, (value, *more))])
                arguments.append(pytest.param((name, p), value, *more, id=told, marks=row.marks))
    return arguments


def tell(value):
    """A value of a column in the name of a test: SGD(lr=0.1, momentum=0.9) with what differs from its defaults."""
    if not isinstance(value, optimizers.Optimizer):
        return "-".join(map(tell, value)) if isinstance(value, tuple) else str(value)
    told = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    default = {f.name: getattr(type(value)(), f.name) for f in dataclasses.fields(value)}
    return f"{value.name}({', '.join(f'{k}={v}' for k, v in told.items() if v != default[k] and k != 'lr')})"


def benches(tf32=False):
    return [
        pytest.param((name, p), id=f"{name}-{p}", marks=row.marks)
        for name, row in IMPLEMENTATIONS.items()
        for p in row.precisions
        if tf32 or p != "tf32"
    ]


# For tests of what is the same text for all types.
in_float32 = pytest.mark.parametrize(
    "bench", [param for param in benches() if param.values[0][1] == "float32"], indirect=True
)
# For tests of products: tf32 has kernels and everything else in common with float32.
with_tf32 = pytest.mark.parametrize("bench", benches(tf32=True), indirect=True)


@pytest.fixture(params=[pytest.param(name, marks=row.marks) for name, row in IMPLEMENTATIONS.items()])
def implementation(request):
    return IMPLEMENTATIONS[request.param].prepare(request)


@pytest.fixture(params=benches())
def bench(request):
    name, wanted = request.param
    if wanted == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 is a type of ml_dtypes")
    operations = IMPLEMENTATIONS[name].prepare(request)
    return Bench(operations(precision.get(wanted)), IMPLEMENTATIONS[name])


class Bench:
    """The operations of one implementation at one precision, with arrays to try them on.

    ``shift``: by how many elements inputs and outputs begin behind an aligned address.
    """

    shift = 0

    def __init__(self, ops, implementation):
        self.ops, self.implementation = ops, implementation
        self.storage, self.master = ops.precision.storage_dtype, ops.precision.master_dtype
        self.tolerance = TOLERANCE[ops.precision.name]
        self.master_tolerance = TOLERANCE[ops.precision.master]
        # TF32 rounds the factors of a product to 10 bits of mantissa: half a unit in 2⁻¹⁰ each
        factors = 2e-3 if ops.precision.reduced_gemm and ops.device == "cuda" else 0.0
        self.product_tolerance = max(self.tolerance, factors)
        self.master_product_tolerance = max(self.master_tolerance, factors)
        self.rng = np.random.default_rng(12345)
        self._guards = []

    def input(self, values, dtype=None):
        """``values`` on the device in the storage type (or ``dtype``), and as the float64 numbers that it holds."""
        array = self.ops.to_device(np.asarray(values).astype(dtype or self.storage))
        if self.shift:
            aligned, array = array, self._shifted(array.shape, array.dtype)[1]
            array[...] = aligned
        return array, self.host(array).astype(np.float64)

    def _shifted(self, shape, dtype, room=0):
        """A new flat array, and an array of ``shape`` in it behind ``shift`` elements and before ``room``."""
        size = math.prod(shape)
        whole = self.ops.empty(self.shift + size + room, dtype)
        return whole, whole[self.shift : self.shift + size].reshape(shape)

    def normal(self, *shape, scale=1.0, dtype=None):
        return self.input(self.rng.normal(size=shape) * scale, dtype)

    def output(self, *shape, dtype=None):
        """A buffer to write into: the middle of a larger one that is full of NaN, with a row of them behind it."""
        whole, array = self._shifted(shape, dtype or self.storage, math.prod(shape[1:]))
        whole[...] = math.nan
        self._guards.append((whole, array.size))
        return array

    def check_guards(self):
        for whole, size in self._guards:
            held = self.host(whole).astype(np.float64)
            outside = np.concatenate([held[: self.shift], held[self.shift + size :]])
            assert np.isnan(outside).all(), "written in front of an output or beyond its end"
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
    wanted, found = public_methods(Operations), public_methods(implementation)
    assert set(found) == set(wanted), "an implementation never grows an operation of its own"
    for name in wanted:
        mine, theirs = inspect.signature(found[name]).parameters, inspect.signature(wanted[name]).parameters
        assert [(p.name, p.kind, p.default) for p in mine.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name


def test_every_implementation_is_in_the_table():
    files = Path(numpy_ops.__file__).parent.glob("*_ops.py")
    assert {f"gpu_mlp.ops.{file.stem}" for file in files} == {row.module for row in IMPLEMENTATIONS.values()}


def test_every_operation_of_the_interface_has_a_test_here():
    """One that is named after it, and that runs on each implementation."""
    tests = [
        name for name, f in globals().items() if name.startswith("test_") and "bench" in inspect.signature(f).parameters
    ]
    for operation in public_methods(Operations):
        named = re.compile(rf"test_(\w+_and_)?{operation}(_|$)")
        assert any(named.match(name) for name in tests), f"no test of {operation}"


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
@pytest.mark.parametrize("columns", [1, 7, 16])
def test_gather(bench, n, columns):
    check_gather(bench, n, columns, bench.storage)


def check_gather(bench, n, columns, dtype):
    rows = bench.ops.to_device(bench.rng.integers(0, 300, n))
    source = bench.input((bench.rng.random((300, columns)) * 2), dtype)[0]
    out = bench.output(n, columns)
    with only_writes(bench, locals(), "out"):
        bench.ops.gather(source, rows, out)
    np.testing.assert_array_equal(bench.host(out), bench.host(source)[bench.host(rows)].astype(bench.storage))
    bench.check_guards()


SOURCES = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
SOURCES += ["bool", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize(("bench", "source_type", "columns"), covering(SOURCES, (7, 16)), indirect=["bench"])
def test_gather_from_every_type(bench, source_type, columns):
    """Whatever numbers a data set holds: the cast is NumPy's."""
    if source_type == "bfloat16":
        source_type = pytest.importorskip("ml_dtypes", reason="bfloat16 is a type of ml_dtypes").bfloat16
    dtype = np.dtype(source_type)
    numbers = bench.rng.integers(np.iinfo(dtype).min, 127, (40, columns)) if dtype.kind in "iu" else None
    if numbers is None:  # values that float16 holds: from float64, a GPU rounds to float32 first
        numbers = (bench.rng.normal(size=(40, columns)) * 3).round(2).astype(np.float16)
    numbers = (numbers % 1000).astype(dtype)
    source, rows = bench.ops.to_device(numbers), bench.ops.to_device(bench.rng.integers(0, 40, 57))
    out = bench.output(57, columns)
    with only_writes(bench, locals(), "out"):
        bench.ops.gather(source, rows, out)
    np.testing.assert_array_equal(bench.host(out), numbers[bench.host(rows)].astype(bench.storage))
    bench.check_guards()


@in_float32
@pytest.mark.parametrize("source_type", ["float16", "bfloat16"])
def test_gather_of_every_16_bit_number(bench, source_type):
    """Subnormal numbers and infinities among them, and a NaN."""
    if source_type == "bfloat16":
        source_type = pytest.importorskip("ml_dtypes", reason="bfloat16 is a type of ml_dtypes").bfloat16
    numbers = np.arange(1 << 16, dtype=np.uint16).view(source_type)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = np.append(numbers[~np.isnan(numbers)], numbers.dtype.type(math.nan)).reshape(1, -1)
        out = bench.output(*numbers.shape)
        bench.ops.gather(bench.ops.to_device(numbers), bench.ops.to_device(np.zeros(1, np.int64)), out)
        expected = numbers.astype(np.float64).astype(bench.storage).astype(np.float64)
    np.testing.assert_array_equal(bench.host(out).astype(np.float64), expected)
    bench.check_guards()


@in_float32
@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3), (50, 2, 3)])
@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_gather_of_labels_weights_and_targets(bench, dtype, shape):
    values = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    source, rows = bench.ops.to_device(values), bench.ops.to_device(np.array([49, 0, 3, 3], np.int64))
    out = bench.ops.empty((4, *shape[1:]), dtype)
    bench.ops.gather(source, rows, out)
    np.testing.assert_array_equal(bench.host(out), values[[49, 0, 3, 3]])


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("cursor", [0, 7])
def test_gather_from_the_cursor_on_and_scaled(bench, cursor, ordered):
    numbers = bench.rng.integers(0, 256, (40, 16)).astype(np.uint8)
    order = bench.rng.permutation(40)
    rows = bench.ops.to_device(order) if ordered else None
    source, state, out = bench.ops.to_device(numbers), bench.state(CURSOR=cursor), bench.output(9, 16)
    with only_writes(bench, locals(), "out"):
        bench.ops.gather(source, rows, out, state, 1 / 255)
    chosen = (order if ordered else np.arange(40))[cursor : cursor + 9]
    assert_close(bench.host(out), numbers[chosen] / 255, bench.tolerance)
    labels = bench.ops.empty(9, np.int64)
    bench.ops.gather(bench.ops.to_device(np.arange(40)), rows, labels, state, 1 / 255)
    np.testing.assert_array_equal(bench.host(labels), chosen)  # which are not scaled
    bench.check_guards()


def test_copy_from_the_host(bench):
    values = bench.rng.normal(size=(5, 7))
    out = bench.output(5, 7)
    bench.ops.copy(values.astype(bench.storage), out)
    np.testing.assert_array_equal(bench.host(out), values.astype(bench.storage))
    bench.check_guards()


def test_owns(bench):
    assert not bench.ops.owns(np.zeros(3))
    assert not bench.ops.owns([1.0])
    assert bench.ops.owns(bench.ops.zeros(3, np.float64)) == (bench.ops.device == "cuda")


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_all_finite(bench, bad):
    values = np.zeros((31, 7), bench.storage)
    if bad is not None:
        values[30, 6] = bad
    assert bench.ops.all_finite(bench.ops.to_device(values)) == (bad is None)
    assert bench.ops.all_finite(bench.ops.to_device(np.zeros((0, 7), bench.storage)))


def test_all_finite_in_another_type(bench):
    large = bench.ops.to_device(np.array([[65504.0, -7e4]]))
    assert bench.ops.all_finite(large, np.float32)
    assert not bench.ops.all_finite(large, np.float16)
    assert bench.ops.all_finite(large[:, :1], np.float16)
    assert bench.ops.all_finite(bench.ops.to_device(np.array([7, -7])), np.float16)


def test_free_bytes(bench):
    free = bench.ops.free_bytes()
    assert free is None or free > 0


@pytest.mark.parametrize("wanted", [None, True, False])
def test_recorder_does_the_work_every_time_and_in_order(bench, wanted):
    recorder, state = bench.ops.recorder(wanted), bench.state()
    for i in range(5):
        bench.ops.begin_step(0.5, i, i, state)
        bench.ops.write_state(state, {Slot.COST: 2.0 + i})
        recorder.run("a step", lambda: bench.ops.finish_step(10, state))
    assert bench.read(state, Slot.EPOCH_COST) == sum(10 * (2.0 + i) for i in range(5))
    assert bench.read(state, Slot.STEP) == 5
    assert recorder.replays == (bench.ops.device == "cuda")
    recorder.clear()


def test_staging(bench):
    staging = bench.ops.staging((9, 4), np.float32)
    for i in range(3):
        staging.free()
        staging.host[...] = np.arange(36).reshape(9, 4) + i
        staging.send(7)
        staging.receive()
        np.testing.assert_array_equal(bench.host(staging.device[:7]), np.arange(28).reshape(7, 4) + i)
        staging.release()


# --- state -------------------------------------------------------------------------------------------------------


def test_begin_step(bench):
    state = bench.state(COST=3.0, GRADIENT_NORM=2.0, STEP=5.0)
    slots = [Slot.LEARNING_RATE, Slot.ROUND, Slot.CURSOR, Slot.COST, Slot.GRADIENT_NORM]
    with only_writes(bench, locals(), slots=slots):
        bench.ops.begin_step(0.25, 7, 2**40, state)
    assert [bench.read(state, slot) for slot in slots] == [0.25, 7, 2**40, 0, 0]


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


@with_tf32
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "softmax"])
def test_affine_activation(bench, shape, name):
    h, z, z0 = affine(bench, shape, name)
    assert h.dtype == bench.storage
    assert_close(h, activation(name, z0), bench.product_tolerance)
    if z is not None:
        assert_close(z, z0, bench.product_tolerance)


@pytest.mark.parametrize(
    ("bench", "name", "keep_z", "n"), covering(ACTIVATION_NAMES, (False, True), (23, 24)), indirect=["bench"]
)
def test_affine_activation_of_every_kind(bench, name, keep_z, n):
    h, z, z0 = affine(bench, (37, 11, n), name, keep_z)
    assert_close(h, activation(name, z0), bench.tolerance)
    if keep_z:
        assert_close(z, z0, bench.tolerance)


@pytest.mark.parametrize(
    ("bench", "name", "rate", "n"),
    covering(["identity", "relu", "silu", "exp"], (0.1, 0.5, 0.97), (21, 24)),
    indirect=["bench"],
)
def test_affine_activation_with_dropout(bench, name, rate, n):
    dropout = Dropout(rate, seed=2**40 + 7, layer=3, first_row=1000)
    h, z, z0 = affine(bench, (33, 9, n), name, dropout=dropout, round_=2**33 + 5)
    factor = dropout_factor(rate, 2**40 + 7, 3, 2**33 + 5, (33, n), 1000)
    assert 0 < np.count_nonzero(factor) < factor.size
    assert not h[factor == 0].astype(np.float64).any()
    assert_close(h, activation(name, z0) * factor, bench.tolerance)
    if z is not None:
        assert_close(z, z0, bench.tolerance)  # before dropout


@pytest.mark.parametrize("shape", [(0, 3, 9), (1, 1, 1), (2, 3, BLOCK + 9), (300, 3, 257), (300, 3, 264)])
def test_affine_activation_with_dropout_by_blocks(bench, shape):
    """The mask of a batch of several blocks is the mask of its rows one by one."""
    batch, _, n_out = shape
    h, _, z0 = affine(bench, shape, "exp", dropout=Dropout(0.4, 5, 0), round_=1)  # e^z is never 0 itself
    rows = {0, batch // 2, batch - 1} if batch else set()
    for row in rows:
        factor = dropout_factor(0.4, 5, 0, 1, (1, n_out), row)[0]
        np.testing.assert_array_equal(h[row] != 0, factor != 0)
        assert_close(h[row], np.exp(z0[row]) * factor, bench.tolerance)
    assert h.shape == (batch, n_out)


@pytest.mark.parametrize("cut", [1, 13])
def test_dropout_of_micro_batches_is_that_of_the_whole_batch(bench, cut):
    """Forward and backward, to the bit: row ``first_row`` of a batch is row 0 of the micro-batch that begins there."""
    z, h_in = bench.normal(33, 21)[0], bench.normal(33, 21)[0]
    W, b, none = bench.input(np.eye(21))[0], bench.input(np.zeros(21))[0], ACTIVATIONS["identity"]
    state = bench.state(ROUND=3.0)
    results = []
    for edges in ((0, 33), (0, cut, 33)):
        h, g = bench.output(33, 21), bench.output(33, 21)
        for first, last in itertools.pairwise(edges):
            dropout, rows = Dropout(0.5, 4, 2, first), slice(first, last)
            bench.ops.affine_activation(h_in[rows], W, b, none, h[rows], None, dropout, state)
            bench.ops.input_gradient(z[rows], W, none, None, dropout, g[rows], None, False, state)
        results.append((bench.host(h), bench.host(g)))
        bench.check_guards()
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])
    np.testing.assert_array_equal(results[0][0] == 0, dropout_factor(0.5, 4, 2, 3, (33, 21)) == 0)


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


ODD_SIZES = [(0, 3), (1, 1), (1, 2 * BLOCK + 3), (31, 257), (257, 31)]
EVEN_SIZES = [(0, 8), (7, 24), (257, 8)]  # whole packs


@pytest.mark.parametrize(
    ("bench", "name", "sizes"), covering(ACTIVATION_NAMES, ("odd", "even"), times=1), indirect=["bench"]
)
def test_activate(bench, name, sizes):
    for shape in ODD_SIZES if sizes == "odd" else EVEN_SIZES:
        z, z0 = bench.normal(*shape)
        h = bench.output(*shape)
        with only_writes(bench, {"z": z, "h": h}, "h"):
            bench.ops.activate(ACTIVATIONS[name], z, h)
        assert_close(bench.host(h), activation(name, z0), bench.tolerance)
        bench.check_guards()
        bench.ops.activate(ACTIVATIONS[name], z, z)  # in place
        assert same_bits(bench.host(z), bench.host(h))


# --- numbers at the ends of a type's range, and beyond -----------------------------------------------------------

_LARGE = [0.0, 1e-30, 1e-8, 5.9, 17.0, 88.0, 104.0, 710.0, 6e4, 1e18, math.inf]
EXTREMES = np.array([*_LARGE, *(-x for x in _LARGE)])  # n = 22


def beside_numpy(*columns, **options):
    """The arguments of `covering` without NumPy's own, for tests where NumPy is the reference."""
    return [p for p in covering(*columns, **options) if p.values[0][0] != "numpy"]


def assert_same_numbers(actual, expected, storage):
    """Infinities and NaN where the other has them, and the rest to a few units of the type's last place."""
    unit = float(np.finfo(storage).eps) if storage.name != "bfloat16" else 2.0**-7
    least = float(np.finfo(storage).tiny) if storage.name != "bfloat16" else 2.0**-126
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=16 * unit, atol=16 * max(least, unit * 2.0**-24))


@pytest.mark.parametrize(
    ("bench", "name", "n"),
    beside_numpy([n for n in ACTIVATION_NAMES if n not in ROWWISE], (23, 24), times=1),
    indirect=["bench"],
)
def test_activate_at_the_ends_of_the_range(bench, name, n):
    """What overflows, and what is done with infinities and NaN, is what NumPy does."""
    reference = NumpyOperations(bench.ops.precision)
    with np.errstate(all="ignore"):
        z, _ = bench.input(np.append(EXTREMES, [math.nan] * (n - len(EXTREMES))).reshape(1, n))
        h, expected = bench.output(1, n), np.empty((1, n), bench.storage)
        reference.activate(ACTIVATIONS[name], bench.host(z), expected)
    bench.ops.activate(ACTIVATIONS[name], z, h)
    bench.check_guards()
    assert_same_numbers(bench.host(h), expected, bench.storage)


@pytest.mark.parametrize(
    ("bench", "name", "n"),
    beside_numpy([n for n in ACTIVATION_NAMES if n not in ROWWISE], (23, 24), turn=1),
    indirect=["bench"],
)
def test_input_gradient_at_the_ends_of_the_range(bench, name, n):
    """f′ far out, where h has reached its limit or z * z overflows."""
    f, reference = ACTIVATIONS[name], NumpyOperations(bench.ops.precision)
    with np.errstate(all="ignore"):
        z = np.append(EXTREMES, [0.5] * (n - len(EXTREMES))).reshape(1, n).astype(bench.storage)
        h = np.empty_like(z)
        reference.activate(f, z, h)
        saved = {"none": None, "h": h, "z": z}[f.reads]
        gz, W, expected = np.ones((1, 1), bench.storage), np.ones((1, n), bench.storage), np.empty_like(z)
        sums, state = np.empty(n, bench.master), bench.state()
        host_state = bench.host(state)
        reference.input_gradient(gz, W, f, saved, None, expected, sums, False, host_state)
    found, gb = bench.output(1, n), bench.output(n, dtype=bench.master)
    gz, W = bench.ops.to_device(gz), bench.ops.to_device(W)
    saved = saved if saved is None else bench.ops.to_device(saved)
    bench.ops.input_gradient(gz, W, f, saved, None, found, gb, False, state)
    bench.check_guards()
    assert_same_numbers(bench.host(found), expected, bench.storage)


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("n", [5, 1500])  # a warp a row, and a block a row
def test_activate_of_rows_with_infinities_and_nan(bench, name, n):
    """−∞ is a class left out; a row without any finite entry, with +∞ or with NaN is NaN, and no other row is."""
    rows = np.zeros((6, n))
    rows[0, 1] = -math.inf
    rows[1, :] = -math.inf
    rows[2, n - 1] = math.inf
    rows[3, 2] = math.nan
    rows[4, :2] = 6e4, -6e4
    z, h = bench.input(rows)[0], bench.output(6, n)
    with np.errstate(all="ignore"):
        bench.ops.activate(ACTIVATIONS[name], z, h)
    found = bench.host(h).astype(np.float64)
    found = np.exp(found) if name == "log_softmax" else found
    assert np.isnan(found[1:4]).all()
    expected = np.full((3, n), 1 / n)
    expected[0], expected[0, 1] = 1 / (n - 1), 0
    expected[1], expected[1, 0] = 0, 1
    np.testing.assert_allclose(found[[0, 4, 5]], expected, rtol=4 * bench.tolerance, atol=bench.tolerance / n)
    bench.check_guards()


@pytest.mark.parametrize("value", [1e30, -1e30])
def test_affine_activation_beyond_the_range_of_float16_is_infinite(bench, value):
    """What does not fit a type becomes ±∞, not its largest number: the loss scale and the cost have to see it."""
    h_in, W = bench.input(np.full((2, 1), 200.0))[0], bench.input(np.full((3, 1), math.copysign(500.0, value)))[0]
    b, h = bench.input(np.zeros(3))[0], bench.output(2, 3)
    with np.errstate(over="ignore"):
        bench.ops.affine_activation(h_in, W, b, ACTIVATIONS["identity"], h, None, None, bench.state())
    limit = math.inf if bench.storage.name == "float16" else 1e5
    np.testing.assert_allclose(bench.host(h).astype(np.float64), math.copysign(limit, value), rtol=bench.tolerance)


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


@pytest.mark.parametrize(("bench", "pair", "sizes"), covering(PAIRS, ("odd", "even")), indirect=["bench"])
def test_loss_and_gradient(bench, pair, sizes):
    # with cross_entropy not computed from z, as no network has it, the scaled gh = −y / ŷ does not fit float16
    scaled = bench.ops.precision.loss_scaled and pair != PAIRS[6]
    for rows, n in [(0, 3), (1, 3), (31, 257), (257, 31)] if sizes == "odd" else EVEN_SIZES:
        check_loss(bench, pair, rows, n, scale=4096.0 if scaled else 1.0)


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4], PAIRS[10]], ids=pair_name)
def test_loss_and_gradient_of_a_single_output(bench, pair):
    for rows in (0, 1, 31):
        check_loss(bench, pair, rows, 1)


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4], PAIRS[10], PAIRS[11]], ids=pair_name)
def test_loss_and_gradient_of_rows_longer_than_a_block(bench, pair):
    # what the loss scale is for: gz / n is below what float16 resolves
    check_loss(bench, pair, 2, BLOCK + 3, scale=65536.0 if bench.ops.precision.loss_scaled else 1.0)


@pytest.mark.parametrize(("bench", "pair", "n"), covering(PAIRS, (5, 8)), indirect=["bench"])
def test_loss_and_gradient_with_weights_scale_and_accumulation(bench, pair, n):
    check_loss(bench, pair, 43, n, weighted=True, accumulate=True, scale=1024.0)


@pytest.mark.parametrize(
    ("bench", "kind", "weighted", "from_z"),
    covering(["labels", "rows"], (False, True), (True, False)),
    indirect=["bench"],
)
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


@in_float32
def test_loss_and_gradient_takes_numbers_of_numpys_types(bench):
    check_loss(bench, PAIRS[15], 9, 5, loss=losses.Huber(np.float64(1.0)))
    smoothed = losses.CrossEntropy(label_smoothing=np.float32(0.125))
    check_loss(bench, PAIRS[0], 9, 5, loss=smoothed, smoothing=0.125)


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


@pytest.mark.parametrize(("bench", "pair", "n"), covering(PAIRS, (5, 8)), indirect=["bench"])
def test_loss_and_gradient_of_weights_that_are_all_zero(bench, pair, n):
    y, _ = targets(bench, pair[3], 9, n)
    h, _ = bench.input(bench.rng.uniform(0.1, 0.9, (9, n)))
    loss, f, weight = losses.get(pair[0]), ACTIVATIONS[pair[1]], bench.ops.zeros(9, np.float64)
    gz, gb, state = bench.output(9, n), bench.output(n, dtype=bench.master), bench.state(LOSS_SCALE=1024.0)
    bench.ops.total_weight(loss, y, weight, state)
    bench.ops.loss_and_gradient(loss, f, pair[2], h, h, y, weight, gz, gb, False, state)
    bench.check_guards()
    assert bench.read(state, Slot.TOTAL_WEIGHT) == bench.read(state, Slot.COST) == 0
    assert not bench.host(gz).astype(np.float64).any()
    assert not bench.host(gb).any()


@pytest.mark.parametrize(("bench", "pair", "n"), covering(PAIRS, (5, 8)), indirect=["bench"])
def test_loss_and_gradient_of_nan_is_seen_in_the_cost(bench, pair, n):
    """One NaN anywhere among ŷ or z: no maximum, clip or comparison in a loss may swallow it."""
    y, _ = targets(bench, pair[3], 9, n)
    loss, f = losses.get(pair[0]), ACTIVATIONS[pair[1]]
    y0 = bench.host(y)
    for row, column in ((0, n - 1), (8, 0)):
        if pair[3] == "labels":
            y0[row] = column
        elif pair[3] != "signs":
            y0[row, column] = 0.5  # an entry with target 0 may count for nothing
        values = bench.rng.uniform(0.1, 0.9, (9, n))
        values[row, column] = math.nan
        h, _ = bench.input(values)
        gz, gb, state = bench.output(9, n), bench.output(n, dtype=bench.master), bench.state(TOTAL_WEIGHT=9.0)
        with np.errstate(all="ignore"):
            bench.ops.loss_and_gradient(loss, f, pair[2], h, h, bench.ops.to_device(y0), None, gz, gb, False, state)
        assert math.isnan(bench.read(state, Slot.COST))


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[1], PAIRS[10], PAIRS[11]], ids=pair_name)
@in_float32
def test_loss_and_gradient_of_a_hundred_thousand_classes(bench, pair):
    """More partial sums than a block has threads, and rows of 391 entries a thread."""
    check_loss(bench, pair, 2, 100_001, weighted=True)


@pytest.mark.parametrize("rows", [0, 1, 257])
def test_total_weight(bench, rows):
    check_total_weight(bench, rows)


def check_total_weight(bench, rows):
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


@pytest.mark.parametrize("rows", [0, 1, 257])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_watch(bench, rows, bad):
    """Of the implementations that have it; for the others somebody looks before a step."""
    x = bench.ops.zeros((rows, 7), bench.ops.precision.storage_dtype)
    state = bench.state(COST=2.5)
    if not bench.ops.watches:
        with pytest.raises(NotImplementedError):
            bench.ops.watch(x, state)
        return
    x[...] = np.finfo(x.dtype).max / 2  # whose sum is not finite
    if bad is not None:
        x[rows // 2 :, 3] = bad
    with only_writes(bench, locals(), slots=[Slot.COST]):
        bench.ops.watch(x, state)
    spoilt = bad is not None and rows > 0
    np.testing.assert_equal(bench.read(state, Slot.COST), math.nan if spoilt else 2.5)


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
    assert_close(bench.host(gz_in), expected, bench.product_tolerance)
    if with_gb:
        assert gb.dtype == bench.master
        total = expected.sum(axis=0) + (gb0 if accumulate else 0)
        assert_close(bench.host(gb), total, bench.product_tolerance, scale=np.linalg.norm(abs(expected).sum(axis=0)))


@with_tf32
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "softmax"])
def test_input_gradient(bench, shape, name):
    check_input_gradient(bench, shape, name)


@pytest.mark.parametrize(
    ("bench", "name", "accumulate", "n"),
    covering(ACTIVATION_NAMES, (False, True), (23, 24), turn=1),
    indirect=["bench"],
)
def test_input_gradient_of_every_kind(bench, name, accumulate, n):
    check_input_gradient(bench, (37, n, 11), name, accumulate=accumulate)


@pytest.mark.parametrize(
    ("bench", "name", "n"),
    covering([n for n in ACTIVATION_NAMES if n not in ROWWISE], (21, 24), times=1),
    indirect=["bench"],
)
def test_input_gradient_through_dropout(bench, name, n):
    check_input_gradient(bench, (33, n, 9), name, Dropout(0.3, seed=9, layer=1, first_row=64))


@pytest.mark.parametrize("shape", [(0, 9, 3), (1, 1, 1), (1, BLOCK + 9, 3), (80, 257, 5)])
def test_input_gradient_through_dropout_by_blocks(bench, shape):
    check_input_gradient(bench, shape, "tanh", Dropout(0.5, seed=9, layer=0), accumulate=True)


@with_tf32
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient_with_respect_to_x(bench, shape):
    check_input_gradient(bench, shape, "identity", with_gb=False)


@with_tf32
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
    assert_close(bench.host(gW), g0.T @ h0 + before, bench.master_product_tolerance)


@pytest.mark.parametrize("accumulate", [False, True])
def test_independent_gradients(bench, accumulate):
    """The two gradients of a layer are the same whether they may run side by side or not."""
    batch, n_in, n_out = 37, 12, 8
    (gz, g0), (W, W0), (h_in, h0) = bench.normal(batch, n_out), bench.normal(n_out, n_in), bench.normal(batch, n_in)
    gz_in, gW = bench.output(batch, n_in), bench.output(n_out, n_in, dtype=bench.master)
    gW[...] = 0
    with only_writes(bench, locals(), "gz_in", "gW"), bench.ops.independent():
        bench.ops.input_gradient(gz, W, ACTIVATIONS["identity"], None, None, gz_in, None, False, bench.state())
        bench.ops.weight_gradient(gz, h_in, gW, accumulate)
    bench.check_guards()
    assert_close(bench.host(gz_in), g0 @ W0, bench.product_tolerance)
    assert_close(bench.host(gW), g0.T @ h0, bench.master_product_tolerance)


def test_aside_and_join(bench):
    """Work that is done aside is seen after the join."""
    first, second = bench.ops.zeros(9, bench.master), bench.ops.zeros(9, bench.master)
    bench.ops.copy(np.arange(9, dtype=bench.master), first)
    with bench.ops.aside():
        bench.ops.copy(first, second)
    bench.ops.join()
    np.testing.assert_array_equal(bench.host(second), np.arange(9))


def test_join(bench):
    """There may be nothing to join."""
    bench.ops.join()


def test_hides_update(bench):
    """On a CPU there is nothing to hide an update under; on a GPU a large one is hidden under large products."""
    assert bench.ops.hides_update(8192, 1 << 24) == (bench.ops.device == "cuda")
    assert not bench.ops.hides_update(8192, 1000)
    assert not bench.ops.hides_update(8, 1 << 24)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_auxiliary(bench, name):
    """Nothing, where no epilogue was found to be faster."""
    kept = bench.ops.auxiliary(ACTIVATIONS[name], 37, 12)
    if kept is not None:
        kept = kept.first(5)
    (h_in, h0), (W, W0), (b, b0) = bench.normal(5, 4), bench.normal(12, 4), bench.normal(12)
    h = bench.output(5, 12)
    bench.ops.affine_activation(h_in, W, b, ACTIVATIONS[name], h, None, None, bench.state(), kept)
    bench.check_guards()
    expected = {"relu": lambda z: np.maximum(z, 0), "tanh": np.tanh}[name](h0 @ W0.T + b0)
    assert_close(bench.host(h), expected, bench.product_tolerance)


REGULARIZERS = [
    None,
    regularizers.L2(0.3),
    regularizers.L1(0.2),
    regularizers.ElasticNet(0.1, 0.4),
]


def penalty_gradient(theta, regularizer):
    return 0 if regularizer is None else regularizer.l1 * np.sign(theta) + regularizer.l2 * theta


@pytest.mark.parametrize(
    ("bench", "regularizer", "weight_decay"), covering(REGULARIZERS, (0.0, 0.25)), indirect=["bench"]
)
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
    assert_close(bench.host(W), expected, bench.master_product_tolerance)
    if shadow is not None:
        assert same_bits(bench.host(shadow), bench.host(W).astype(bench.storage))


BAD = [{"COST": math.nan}, {"COST": math.inf}, {"BAD_ROUND": 3.0}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_descend_leaves_W_where_the_cost_is_not_finite(bench, bad):
    check_bad_descent(bench, bad, (4, 3, 2))


def check_bad_descent(bench, bad, sizes):
    batch, n_out, n_in = sizes
    gz, h_in = bench.normal(batch, n_out)[0], bench.normal(batch, n_in)[0]
    gz[1, 1] = h_in[1, 1] = math.nan
    W = bench.normal(n_out, n_in, dtype=bench.master)[0]
    shadow = bench.ops.to_device(bench.host(W), bench.storage) if bench.ops.precision.has_shadow else None
    state = bench.state(LEARNING_RATE=0.125, **bad)
    for regularizer in (None, regularizers.L1(0.1)):
        with only_writes(bench, locals(), "gz", "h_in"):
            bench.ops.descend(W, gz, h_in, optimizers.SGD(), regularizer, shadow, state)


# --- update ------------------------------------------------------------------------------------------------------

# the last θ is longer than what the grid of the emulated device covers at once
SIZES = [[1, 1], [31, 7, 5], [257, 31, 1], [131, 193, 7]]


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
    for sizes, part in itertools.product(SIZES, ("nothing", "some", "all")):
        check_penalty(bench, sizes, regularizer, part)


def check_penalty(bench, sizes, regularizer, part):
    layout, theta, theta0 = parameters(bench, sizes)
    n = {"nothing": 0, "some": layout.n_weights - 27, "all": layout.size}[part]
    state = bench.state(COST=0.5)
    with only_writes(bench, locals(), slots=[Slot.COST]):
        bench.ops.penalty(theta, n, regularizer, state)
    t = theta0[:n]
    expected = regularizer.l1 * abs(t).sum() + regularizer.l2 / 2 * (t * t).sum()
    assert_close(bench.read(state, Slot.COST), 0.5 + expected, bench.master_tolerance)


@pytest.mark.parametrize("regularizer", REGULARIZERS[1:], ids=repr)
def test_add_penalty_gradient(bench, regularizer):
    for sizes, part in itertools.product(SIZES, ("nothing", "some", "all")):
        check_add_penalty_gradient(bench, sizes, regularizer, part)


def check_add_penalty_gradient(bench, sizes, regularizer, part):
    layout, theta, theta0 = parameters(bench, sizes)
    _, g, g0 = parameters(bench, sizes)
    n = {"nothing": 0, "some": layout.n_weights - 27, "all": layout.size}[part]
    with only_writes(bench, locals(), "g"):
        bench.ops.add_penalty_gradient(theta, n, regularizer, g)
    g0[:n] += penalty_gradient(theta0[:n], regularizer)
    assert_close(bench.host(g), g0, bench.master_tolerance)


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=repr)
def test_gradient_norm(bench, regularizer):
    for sizes, part in itertools.product(SIZES, ("some", "all")):
        check_gradient_norm(bench, sizes, regularizer, part)


def check_gradient_norm(bench, sizes, regularizer, part):
    layout, theta, theta0 = parameters(bench, sizes)
    _, g, g0 = parameters(bench, sizes, scale=16.0)
    n = 0 if regularizer is None else layout.size - 27 if part == "some" else layout.size
    state = bench.state(LOSS_SCALE=16.0)
    with only_writes(bench, locals(), slots=[Slot.GRADIENT_NORM]):
        bench.ops.gradient_norm(theta, g, n, regularizer, state)
    whole = g0 / 16
    whole[:n] += penalty_gradient(theta0[:n], regularizer)
    assert_close(bench.read(state, Slot.GRADIENT_NORM), math.sqrt((whole**2).sum()), bench.master_tolerance)
    some = [slice(0, layout.size // 3), slice(layout.size // 2, layout.size)]
    bench.ops.gradient_norm(theta, g, n, regularizer, state, some)
    squares = sum((whole[part] ** 2).sum() for part in some)
    assert_close(bench.read(state, Slot.GRADIENT_NORM), math.sqrt(squares), bench.master_tolerance)


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


def new_shadow(bench, layout):
    """The 16-bit copy of θ, where there is one: zeros in the gaps as in θ, and in the segments what has to go."""
    if not bench.ops.precision.has_shadow:
        return None
    shadow = bench.ops.zeros(layout.size, bench.storage)
    for segment in (*layout.weights(shadow), *layout.biases(shadow)):
        segment[...] = math.nan
    return shadow


def check_update(
    bench, rule, sizes, regularizer=None, on="weights", clip_norm=None, scale=1.0, steps=3, tolerance=None
):
    if regularizer is not None:
        regularizer = dataclasses.replace(regularizers.ElasticNet(regularizer.l1, regularizer.l2), on=on)
    layout, theta, theta0 = parameters(bench, sizes)
    n = 0 if regularizer is None else layout.penalised(regularizer)
    moments = new_moments(bench, rule, layout)
    shadow = new_shadow(bench, layout)
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
        assert_close(bench.host(theta), theta0, tolerance or bench.master_tolerance * 4)
        if shadow is not None:
            assert same_bits(bench.host(shadow), bench.host(theta).astype(bench.storage))
    gaps = np.ones(layout.size, bool)
    for segment in (*layout.weights(gaps), *layout.biases(gaps)):
        segment[...] = False
    assert not bench.host(theta)[gaps].any(), "the gaps between the segments of θ have to stay zero"


@pytest.mark.parametrize(("bench", "rule"), covering(RULES), indirect=["bench"])
def test_update(bench, rule):
    for sizes in SIZES:
        check_update(bench, rule, sizes, steps=3 if sizes != SIZES[-1] else 1)


@pytest.mark.parametrize("rule", [O.SGD(lr=0.1), O.AdamW(lr=0.1), O.Muon(lr=0.1)], ids=tell)
def test_update_of_theta_longer_than_a_block(bench, rule):
    check_update(bench, rule, [257, 257, 7], regularizers.L2(0.1), steps=1)


@with_tf32
@pytest.mark.parametrize("sizes", [[31, 1], [1, 31], [7, 257, 31], [64, 64]], ids=str)
def test_update_of_matrices_of_every_form(bench, sizes):
    """Muon on one row, one column, tall, wide and square."""
    tolerance = 5 * bench.master_product_tolerance if bench.ops.precision.reduced_gemm else None
    check_update(bench, O.Muon(lr=0.1), sizes, steps=2, tolerance=tolerance)


@pytest.mark.parametrize(("bench", "rule"), covering(RULES), indirect=["bench"])
def test_update_with_penalty_clipping_and_loss_scale(bench, rule):
    for sizes, on in (([131, 193, 7], "weights"), ([31, 7, 5], "all")):
        check_update(bench, rule, sizes, regularizers.ElasticNet(0.02, 0.1), on, clip_norm=1.5, scale=64.0, steps=2)


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_update_clips_only_what_is_longer(bench, clip_norm):
    check_update(bench, O.SGD(lr=0.5), [31, 7, 5], clip_norm=clip_norm)


@pytest.mark.parametrize(
    ("bench", "rule"), covering([r for r in RULES if not isinstance(r, O.Muon)], times=1), indirect=["bench"]
)
def test_update_of_a_part_of_theta(bench, rule):
    """A rule that sees no matrices updates any part of θ as it would within the whole."""
    layout = Layout([31, 7, 5], bench.master.itemsize)
    for part in (slice(layout.n_weights, layout.size), slice(0, 37), slice(3, 43), slice(7, 8), slice(9, 9)):
        check_update_of_a_part(bench, rule, layout, part)


def check_update_of_a_part(bench, rule, layout, part):
    theta, theta0 = bench.normal(layout.size, dtype=bench.master)
    g, g0 = bench.normal(layout.size, dtype=bench.master)
    moments, shadow = new_moments(bench, rule, layout), new_shadow(bench, layout)
    before = [bench.host(m) for m in moments]
    n = max(0, part.stop - part.start - 2)  # the penalty ends within the part
    state = bench.state(LEARNING_RATE=rule.lr)
    arguments = theta[part], g[part], [m[part] for m in moments], rule, layout, n, regularizers.L2(0.1, on="all")
    bench.ops.update(*arguments, None, None if shadow is None else shadow[part], state)
    g0[part][:n] += 0.1 * theta0[part][:n]
    expected = theta0.copy()
    expected[part] = update_rule(rule, theta0[part], g0[part], {}, 1)
    assert_close(bench.host(theta), expected, bench.master_tolerance * 4)
    outside = np.ones(layout.size, bool)
    outside[part] = False
    np.testing.assert_array_equal(bench.host(theta)[outside], theta0[outside])
    for moment, old in zip(moments, before):
        np.testing.assert_array_equal(bench.host(moment)[outside], old[outside])
    if shadow is not None:
        assert same_bits(bench.host(shadow)[part], bench.host(theta)[part].astype(bench.storage))


def test_update_with_a_shadow_that_begins_elsewhere(bench):
    """Aligned θ and a copy that is not: no rule says that the two begin at the same place."""
    layout, theta, _ = parameters(bench, [31, 7, 5])
    g = parameters(bench, [31, 7, 5])[1]
    bench.shift = 1
    shadow = bench.output(layout.size)
    bench.ops.update(theta, g, [], O.SGD(), layout, 0, None, None, shadow, bench.state(LEARNING_RATE=0.5))
    bench.check_guards()
    np.testing.assert_array_equal(bench.host(shadow), bench.host(theta).astype(bench.storage))


@pytest.mark.parametrize(
    ("bench", "rule", "slot", "value"),
    [
        pytest.param(*p.values[:2], *p.values[2], id=p.id)
        for p in covering(RULES, (("COST", math.nan), ("COST", math.inf), ("GRADIENT_NORM", math.inf)))
    ],
    indirect=["bench"],
)
def test_update_leaves_everything_where_the_step_is_not_finite(bench, rule, slot, value):
    layout, theta, _ = parameters(bench, [31, 7, 5])
    g = parameters(bench, [31, 7, 5])[1]
    moments = [bench.normal(layout.size, dtype=bench.master)[0] for _ in rule.moments]
    shadow = bench.normal(layout.size)[0] if bench.ops.precision.has_shadow else None
    state = bench.state(LEARNING_RATE=0.1, **{slot: value})
    with only_writes(bench, locals()):
        bench.ops.update(theta, g, moments, rule, layout, 0, None, None, shadow, state)


# (rule, t, d of update t): torch's constant decay, TensorFlow's warm-up, and the first update, which copies
DECAYS = [
    (EMA(0.9, warmup=False), 1, 0.0),
    (EMA(0.9, warmup=False), 2, 0.9),
    (EMA(0.999), 1, 0.0),
    (EMA(0.999), 2, 2 / 11),
    (EMA(0.999), 30, 30 / 39),
    (EMA(0.75), 30, 0.75),
    (EMA(0.0, warmup=False), 3, 0.0),
]


@pytest.mark.parametrize(("rule", "t", "decay"), DECAYS, ids=str)
def test_average(bench, rule, t, decay):
    for sizes in SIZES:
        check_average(bench, sizes, rule, t, decay)


def check_average(bench, sizes, rule, t, decay):
    _, theta, theta0 = parameters(bench, sizes)
    _, averaged, averaged0 = parameters(bench, sizes)
    if t == 1:
        averaged[...] = math.nan  # the first average owes nothing to what was there before
        averaged0 = np.zeros_like(theta0)
    state = bench.state(COST=1.0, STEP=t - 1)
    with only_writes(bench, locals(), "averaged"):
        bench.ops.average(theta, averaged, rule, state)
    assert_close(bench.host(averaged), decay * averaged0 + (1 - decay) * theta0, bench.master_tolerance)
    assert t > 1 or same_bits(bench.host(averaged), bench.host(theta))


@pytest.mark.parametrize("bad", [{"COST": math.nan}, {"GRADIENT_NORM": math.inf}, {"BAD_ROUND": 3.0}], ids=str)
def test_average_leaves_everything_where_the_step_is_not_applied(bench, bad):
    _, theta, _ = parameters(bench, [31, 7, 5])
    _, averaged, _ = parameters(bench, [31, 7, 5])
    state = bench.state(STEP=4.0, **bad)
    with only_writes(bench, locals()):
        bench.ops.average(theta, averaged, EMA(), state)


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


class OneRank(ranks.Ranks):
    """A job of one rank, and of MPI what sums on the host ask for; several ranks are in `test_parallel.py`."""

    class mpi:
        FLOAT, DOUBLE, UINT16_T, IN_PLACE = "f", "d", "u2", None

        class Request:
            Waitall = staticmethod(lambda requests: None)
            Wait = staticmethod(lambda: None)
            Test = staticmethod(lambda: True)

        class Comm:
            def Ialltoallv(self, sent, received):
                assert sent[-1] == received[-1]
                received[0][...] = sent[0]
                return OneRank.mpi.Request

            def Iallgatherv(self, sent, received):
                return OneRank.mpi.Request

    halves = (mpi.Comm(), mpi.Comm())


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("wire", ["full", "bfloat16"])
def test_exchange(bench, wire, scatter):
    """The sum over one rank is what it has, or that rounded to what travels; slices and numbers stay its own."""
    layout = Layout([31, 7, 64, 5], bench.master.itemsize)
    g, g0 = bench.normal(layout.size, dtype=bench.master)
    cut = buckets.cut(layout, 1, 1, False)
    exchange = bench.ops.exchange(OneRank(), g, cut, wire, scatter)
    for bucket in range(len(cut)):
        exchange.begin(bucket)
        exchange.poke()
    exchange.finish()
    narrow = precision.get("bfloat16").storage_dtype
    expected = g0.astype(bench.master)
    rounded = expected.astype(narrow).astype(bench.master)
    assert same_bits(bench.host(g), expected if wire == "full" else rounded)
    before = bench.host(g).copy()
    exchange.gather(g)
    assert same_bits(bench.host(g), before)
    state = bench.state(COST=-3.5)
    exchange.sum_state(state, Slot.COST)
    assert bench.read(state, Slot.COST) == -3.5
    exchange.sum_state(state, Slot.COST, squares=True)
    assert bench.read(state, Slot.COST) == 3.5


@pytest.mark.parametrize("rows", [1, 64, 10**6])
@pytest.mark.parametrize("sizes", [(3, 1), (64, 64, 64, 10), (4096, 4096, 4096)])
def test_lanes(bench, rows, sizes):
    lanes, micro = bench.ops.lanes(rows, sizes)
    assert lanes >= 1
    assert 1 <= micro <= rows


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_side_by_side(bench, lanes):
    """Every lane begins with the first one's state and none of its cost; what they leave adds up in the first."""
    states = [bench.state(COST=1.5 if i == 0 else 99.0, TOTAL_WEIGHT=7.0 if i == 0 else 98.0) for i in range(lanes)]
    g, g0 = zip(*(bench.normal(1003, dtype=bench.master) for _ in range(lanes)))
    seen = []

    def work(i):
        found = [bench.ops.read_state(states[i], slot) for slot in (Slot.COST, Slot.TOTAL_WEIGHT)]
        seen.append((i, *found))
        bench.ops.write_state(states[i], {Slot.COST: found[0] + 10.0**i})

    bench.ops.side_by_side(work, states, g)
    assert sorted(seen) == [(i, 1.5 if i == 0 else 0.0, 7.0) for i in range(lanes)]
    assert bench.ops.read_state(states[0], Slot.COST) == pytest.approx(1.5 + sum(10.0**i for i in range(lanes)))
    assert_close(bench.host(g[0]), sum(g0), bench.master_tolerance)
    for gradient, before in zip(g[1:], g0[1:]):
        np.testing.assert_array_equal(bench.host(gradient), before)


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("threads", [2, 3])
def test_a_step_that_is_shared_out_is_the_same_step(activation, dropout, precision, threads, monkeypatch):
    """Forward and backward, with column sums and masks, on parts of 16 rows against the whole at once."""
    monkeypatch.setattr(sharing, "PART_FLOP", 1000)
    x, y = np.random.default_rng(0).normal(size=(70, 19)), np.arange(70) % 5
    found = {}
    for count in (1, threads, threads):
        net = MLP([19, 33, 40, 5], activation, "softmax", dropout, precision=precision, seed=3)
        trainer = Trainer(net, "cross_entropy", optimizers.Adam(lr=0.01), regularizers.L2(0.1), accumulate=2)
        net._ops._threads = count
        for _ in range(3):
            trainer.step(x, y)
        theta = np.array(net.theta)
        if count in found:
            assert same_bits(theta, found[count])
        found[count] = theta
    # bfloat16 rounds each gradient, and a sum that is a bit off may round the other way
    assert_close(found[threads], found[1], 1e-11 if precision == "float64" else 1e-3)


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


# --- arrays that begin off an aligned address --------------------------------------------------------------------

# Whole packs of columns, so that the address alone says no to loads of 16 bytes.
UNALIGNED = {
    "affine_activation": lambda bench: affine(bench, (9, 5, 24), "gelu"),
    "affine_activation with dropout": lambda bench: affine(bench, (9, 5, 24), "exp", dropout=Dropout(0.4, 5, 0)),
    "affine_activation of rows": lambda bench: affine(bench, (9, 5, 24), "softmax"),
    "loss_and_gradient": lambda bench: check_loss(bench, PAIRS[10], 9, 24, weighted=True),
    "loss_and_gradient of rows": lambda bench: check_loss(bench, PAIRS[0], 9, 24, weighted=True),
    "input_gradient": lambda bench: check_input_gradient(bench, (9, 24, 5), "relu"),
    "input_gradient of rows": lambda bench: check_input_gradient(bench, (9, 24, 5), "softmax"),
    "weight_gradient": lambda bench: test_weight_gradient(bench, (9, 24, 8), True),
    "descend": lambda bench: check_descend(bench, (9, 24, 8), regularizers.L2(0.3), 0.0),
    "copy": lambda bench: test_copy(bench, 31),
    "gather": lambda bench: check_gather(bench, 40, 16, bench.storage),
    "penalty": lambda bench: check_penalty(bench, [31, 7, 5], regularizers.L2(0.3), "all"),
    "add_penalty_gradient": lambda bench: check_add_penalty_gradient(bench, [31, 7, 5], regularizers.L1(0.2), "all"),
    "gradient_norm": lambda bench: check_gradient_norm(bench, [31, 7, 5], regularizers.L1(0.2), "all"),
    "update": lambda bench: check_update(bench, O.AdamW(lr=0.1), [31, 7, 5], steps=1),
    "average": lambda bench: check_average(bench, [31, 7, 5], EMA(0.9), 20, 20 / 29),
}


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("operation", UNALIGNED)
def test_unaligned_arrays(bench, operation, shift):
    bench.shift = shift
    array, values = bench.normal(2, 24)
    assert bench.implementation.address(array) % 16
    assert bench.implementation.address(bench.output(2, 24)) % 16
    UNALIGNED[operation](bench)
    bench.check_guards()
    np.testing.assert_array_equal(bench.host(array), values)


# --- more than one grid ------------------------------------------------------------------------------------------

A_LOOP = re.compile(r"(flat_stride|tile_stride|rows_of_grid|gridDim)\b")
A_KERNEL = re.compile(
    r'extern "C" __global__ void (?:__launch_bounds__\([\w, ]+\))?\s*(\w+)\((.*?)^}', re.DOTALL | re.MULTILINE
)


def rows_at_once(grid, block):
    return grid[1] * block[1]


def long_rows_at_once(grid, block):
    return grid[0] * block[1]


def numbers_at_once(grid, block):
    return grid[0] * block[0]


def packs_at_once(grid, block):
    return 4 * grid[0] * block[0]  # of float32


# Each kernel whose threads go round a loop over the grid: what the grid covers at once, and something larger, which
# the emulated device with its 3 multiprocessors does not cover; with the operations, at a size that the tests above
# compare values at.
LARGER_THAN_A_GRID = {
    "gather": (rows_at_once, 5000, lambda bench: check_gather(bench, 5000, 7, bench.storage)),
    "bias_activation": (rows_at_once, 257, lambda bench: affine(bench, (257, 24, 40), "relu")),
    "bias_softmax": (long_rows_at_once, 257, lambda bench: affine(bench, (257, 31, 129), "softmax")),
    "softmax_gradient": (long_rows_at_once, 257, lambda bench: check_input_gradient(bench, (257, 31, 9), "softmax")),
    "activation_gradient": (rows_at_once, 257, lambda bench: check_input_gradient(bench, (257, 31, 9), "relu")),
    "pointwise_loss": (rows_at_once, 257, lambda bench: check_loss(bench, PAIRS[10], 257, 31)),
    "softmax_cross_entropy": (long_rows_at_once, 257, lambda bench: check_loss(bench, PAIRS[0], 257, 31)),
    "total_weight": (numbers_at_once, 7000, lambda bench: check_total_weight(bench, 7000)),
    "penalty": (numbers_at_once, 26624, lambda bench: check_penalty(bench, SIZES[-1], regularizers.L2(1.0), "all")),
    "disarm": (
        numbers_at_once,
        257 * 31,
        lambda bench: check_bad_descent(bench, BAD[0], (257, 31, 9)),
    ),
    "square_norm": (numbers_at_once, 26624, lambda bench: check_gradient_norm(bench, SIZES[-1], None, "all")),
    "update": (packs_at_once, 26624, lambda bench: check_update(bench, O.SGD(lr=0.1), SIZES[-1], steps=1)),
    "average": (packs_at_once, 26624, lambda bench: check_average(bench, SIZES[-1], EMA(0.9), 20, 20 / 29)),
    **{
        kernel: (numbers_at_once, 131 * 193, lambda bench: check_update(bench, O.Muon(lr=0.1), SIZES[-1], steps=1))
        for kernel in ("muon_direction", "muon_normalise", "muon_apply")
    },
}


def test_every_kernel_with_a_loop_over_the_grid_is_in_the_table():
    texts = "\n".join(launch.text(name) for name in (*launch.HEADERS, *launch.COMMON, "tile.cuh", "rows.cuh"))
    looping = {name for name, body in A_KERNEL.findall(texts) if A_LOOP.search(re.sub(r"//.*", "", body))}
    one_grid_row = {"pointwise_loss", "activation_gradient"}  # gridDim also where they number their blocks
    assert looping >= one_grid_row
    assert looping == set(LARGER_THAN_A_GRID)


@pytest.mark.parametrize("bench", [("cuda", "float32")], ids="-".join, indirect=True)
@pytest.mark.parametrize("kernel", LARGER_THAN_A_GRID)
def test_a_grid_goes_round(bench, emulated_gpu, kernel):  # noqa: F811
    """The device of these tests is small enough, and the sizes large enough, that each loop runs more than once."""
    at_once, size, run = LARGER_THAN_A_GRID[kernel]
    run(bench)
    launched = [at_once(grid, block) for name, grid, block in emulated_gpu.log if name == kernel]
    assert launched
    assert min(launched) < size


@pytest.mark.parametrize("bench", [("cuda", "float32")], ids="-".join, indirect=True)
def test_a_row_longer_than_a_block_goes_round_both_ways(bench, emulated_gpu):  # noqa: F811
    check_loss(bench, PAIRS[0], 31, 1025)
    grids = {name: (grid, block) for name, grid, block in emulated_gpu.log}
    assert grids["softmax_cross_entropy"] == ((24, 1), (256, 1))


@pytest.mark.parametrize("bench", [("cuda", "float32")], ids="-".join, indirect=True)
def test_more_blocks_than_a_block_has_threads(bench, monkeypatch):
    """As on a large GPU: the sums of their partial sums take more than one round."""
    monkeypatch.setattr(importlib.import_module("gpu_mlp.ops.launch"), "processors", lambda: 40)
    check_gradient_norm(bench, [300, 300, 1], regularizers.L2(0.3), "all")
    check_penalty(bench, [300, 300, 1], regularizers.L2(0.3), "all")
    check_update(bench, O.Muon(lr=0.1, ns_steps=1), [300, 300, 1], steps=1)


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
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(z, h, e)) for (z, _), h, e in zip(zs, hs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
