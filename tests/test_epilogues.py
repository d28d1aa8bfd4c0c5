"""Layers by cublasLt's epilogues: every one against the NumPy reference, and which of them is chosen.

The tests say how long a product and a kernel take on the emulated GPU, so that one way or the other is the fastest.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from cuda_on_cpu import streams
from cuda_on_cpu.fake_cublaslt import Behaviour

from gpu_mlp import MLP, SGD, Adam, Diverged, Trainer, activations, notices
from gpu_mlp import precision as precisions
from gpu_mlp.ops import make
from gpu_mlp.ops.interface import Dropout, Slot
from gpu_mlp.ops.numpy_ops import NumpyOperations

SHAPES = [(6, 8, 5), (37, 24, 13), (1, 136, 3), (130, 8, 2)]  # batch, n_out, n_in
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 3e-3}
PLAIN, FUSED = 0.0, 1.0  # seconds that a kernel takes for a byte of its arrays; with 0 the epilogues gain nothing


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())


@pytest.fixture
def gpu(emulated_gpu, monkeypatch, tmp_path):
    """The emulated GPU as a new process finds it, whose kernels take ``seconds`` a byte: `gpu(seconds)`."""
    from gpu_mlp.ops import gemm, launch

    monkeypatch.setenv("GPU_MLP_CACHE", str(tmp_path))
    emulated_gpu.orders, emulated_gpu.races = (0,), False
    honest = launch.launch

    def begin(seconds, refuses=lambda epilogue: False, product_seconds=lambda queued: 0.125):
        monkeypatch.setattr(gemm, "_bindings", threading.local())
        monkeypatch.setattr(Behaviour, "refuses", staticmethod(refuses))
        monkeypatch.setattr(Behaviour, "seconds", staticmethod(product_seconds))

        def launched(function, geometry, arguments):
            honest(function, geometry, arguments)
            taken = seconds * sum(getattr(array, "nbytes", 0) for array in arguments)
            streams.current().submit(lambda: setattr(streams.Order, "clock", streams.Order.clock + taken))

        monkeypatch.setattr(launch, "launch", launched)
        emulated_gpu.products.clear()
        emulated_gpu.log.clear()
        return emulated_gpu

    return begin


def epilogues(device):
    return [queued.epilogue for queued in device.products]


def close(found, expected, precision):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= TOLERANCE[precision] * max(np.linalg.norm(expected), 1e-3)


def tuned(work):
    """The work as the first step of a shape does it, and once more as the next ones do."""
    from gpu_mlp.ops import search

    with search.tuning(searching=True):
        work()
    with search.tuning():
        work()


def layer(shape, precision, f, dtype=np.float64):
    rng = np.random.default_rng(1)
    batch, n_out, n_in = shape
    storage = precisions.get(precision).storage_dtype
    h_in, W, b = (rng.normal(size=size).astype(storage) for size in ((batch, n_in), (n_out, n_in), (n_out,)))
    return h_in, W, b


def both(precision):
    return NumpyOperations(precisions.get(precision)), make("cuda", precisions.get(precision))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "expected"), [("identity", 4), ("relu", 134), ("gelu_tanh", 164)])
def test_a_forward_epilogue_is_the_reference(gpu, name, expected, shape, precision):
    device, f = gpu(FUSED), activations.get(name)
    numpy, cuda = both(precision)
    arrays, n = layer(shape, precision, f), shape[1]
    h = np.empty((shape[0], n), arrays[0].dtype)
    z = np.empty_like(h) if f.reads == "z" else None
    numpy.affine_activation(*arrays, f, h, z, None, numpy.zeros(len(Slot), np.float64))
    on_device = [cuda.to_device(array) for array in arrays]
    found, found_z = cuda.empty(h.shape, h.dtype), None if z is None else cuda.empty(h.shape, h.dtype)
    mask = cuda.auxiliary(f, *h.shape)
    state = cuda.zeros(len(Slot), np.float64)
    tuned(lambda: cuda.affine_activation(*on_device, f, found, found_z, None, state, mask))
    assert epilogues(device)[-1] == expected
    close(found.get(), h, precision)
    if z is not None:
        close(found_z.get(), z, precision)
    if mask is not None:
        assert mask.written
        bits = np.unpackbits(mask.bits.get(), axis=1, bitorder="little")[:, :n]
        np.testing.assert_array_equal(bits, found.get().astype(np.float32) > 0)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "expected"), [("relu", 136), ("gelu_tanh", 192)])
@pytest.mark.parametrize("sums", [True, False])
def test_a_gradient_epilogue_is_the_reference(gpu, name, expected, shape, precision, sums):
    """gz_in of a layer of 8, 24, … whose forward pass has gone through its epilogue, from a layer of ``n_next``."""
    device, f = gpu(FUSED), activations.get(name)
    numpy, cuda = both(precision)
    (batch, n, _), n_next, master = shape, 7, precisions.get(precision).master_dtype
    h_in, W, b = layer(shape, precision, f)
    rng = np.random.default_rng(2)
    gz, W_next = (rng.normal(size=size).astype(h_in.dtype) for size in ((batch, n_next), (n_next, n)))
    h, state = np.empty((batch, n), h_in.dtype), numpy.zeros(len(Slot), np.float64)
    z = np.empty_like(h) if f.reads == "z" else None
    numpy.affine_activation(h_in, W, b, f, h, z, None, state)
    saved = h if z is None else z
    gz_in, gb = np.empty_like(h), np.empty(n, master)
    numpy.input_gradient(gz, W_next, f, saved, None, gz_in, gb if sums else None, False, state)

    state = cuda.zeros(len(Slot), np.float64)
    h_in, W, b, gz, W_next = map(cuda.to_device, (h_in, W, b, gz, W_next))
    h, found = cuda.empty(gz_in.shape, gz_in.dtype), cuda.empty(gz_in.shape, gz_in.dtype)
    z = None if z is None else cuda.empty(gz_in.shape, gz_in.dtype)
    found_gb, mask = cuda.empty(n, master), cuda.auxiliary(f, batch, n)
    tuned(lambda: cuda.affine_activation(h_in, W, b, f, h, z, None, state, mask))
    gradient = (gz, W_next, f, h if z is None else z, None, found, found_gb if sums else None)
    tuned(lambda: cuda.input_gradient(*gradient, False, state, mask))
    in_one = sums and master == gz_in.dtype
    assert epilogues(device)[-1] == expected + 16 * in_one
    close(found.get(), gz_in, precision)
    if sums:
        close(found_gb.get(), gb, precision)
        before = found_gb.get()
        tuned(lambda: cuda.input_gradient(*gradient, True, state, mask))
        close(found_gb.get(), 3 * before, precision)


def hidden(name="relu", precision="bfloat16", n=16, dropout=None, batch=6, n_in=5):
    """The epilogue of the last product of a hidden layer's forward pass."""
    f, cuda = activations.get(name), make("cuda", precisions.get(precision))
    arrays = [cuda.to_device(array) for array in layer((batch, n, n_in), precision, f)]
    h = cuda.empty((batch, n), arrays[0].dtype)
    z, mask = cuda.empty(h.shape, h.dtype) if f.reads == "z" else None, cuda.auxiliary(f, batch, n)
    tuned(lambda: cuda.affine_activation(*arrays, f, h, z, dropout, cuda.zeros(len(Slot), np.float64), mask))
    return mask


@pytest.mark.parametrize(
    "case",
    [
        {"precision": "float64"},
        {"dropout": Dropout(0.5, 0, 0)},
        {"name": "gelu"},
        {"name": "tanh"},
        {"name": "gelu_tanh", "n": 12},
    ],
    ids=str,
)
def test_what_no_epilogue_computes_goes_through_a_kernel(gpu, case):
    device = gpu(FUSED)
    mask = hidden(**case)
    assert set(epilogues(device)) == {1}
    assert mask is None or not mask.written


def test_a_product_over_one_has_no_gradient_epilogue(gpu):
    device = gpu(FUSED)
    net = MLP([5, 16, 1], "relu", precision="bfloat16", device="cuda")
    rng = np.random.default_rng(0)
    trainer = Trainer(net)
    for _ in range(3):
        trainer.step(rng.normal(size=(8, 5)), rng.normal(size=(8, 1)))
    assert 134 in epilogues(device)
    assert 136 not in epilogues(device)


@pytest.mark.parametrize(("seconds", "expected"), [(PLAIN, 1), (FUSED, 134)])
def test_the_faster_sequence_is_chosen_and_kept(gpu, seconds, expected):
    """Where kernels take no time, the way with the kernel ties with the epilogue, and stays."""
    device = gpu(seconds)
    hidden()
    assert epilogues(device)[-1] == expected
    device = gpu(FUSED - seconds)  # another process, to which the other way would be the faster one
    hidden()
    assert epilogues(device) == [expected] * 2


def test_a_slow_epilogue_is_not_chosen(gpu):
    device = gpu(FUSED, product_seconds=lambda queued: 0.125 if queued.epilogue == 1 else 1e6)
    hidden()
    assert epilogues(device)[-1] == 1


def test_an_epilogue_that_is_refused_is_not_chosen(gpu):
    device = gpu(FUSED, refuses=lambda epilogue: epilogue == 134)
    hidden()
    assert set(epilogues(device)) == {1}


def test_an_epilogue_that_computes_something_else_is_not_chosen(gpu, monkeypatch):
    from gpu_mlp.ops.ways import Ways

    device = gpu(FUSED)
    monkeypatch.setattr(Ways, "_close", lambda self, array, expected: False)
    hidden()
    assert epilogues(device)[-1] == 1


def test_an_epilogue_that_hides_a_nan_is_not_chosen(gpu, monkeypatch):
    """max(NaN, 0) may be 0: then a network that has diverged would go on with a finite cost."""
    device = gpu(FUSED)
    monkeypatch.setattr(Behaviour, "hides_nan", True)
    hidden()
    assert epilogues(device)[-1] == 1


def test_outside_of_tuned_work_nothing_is_fused(gpu):
    device = gpu(FUSED)
    hidden()
    device.products.clear()
    net = MLP([5, 16, 3], "relu", precision="bfloat16", device="cuda")
    net.forward(np.zeros((6, 5)))
    assert set(epilogues(device)) == {1}


def trained(precision="float32", activation="relu", optimizer=None, device="cuda", steps=5, **options):
    net = MLP([13, 32, 24, 3], activation, "softmax", precision=precision, device=device)
    trainer = Trainer(net, optimizer=optimizer or Adam(1e-2), **options)
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(40, 13)), rng.integers(0, 3, 40)
    costs = [float(trainer.step(x, y)) for _ in range(steps)]
    return np.asarray(net._ops.to_host(net._theta), np.float64), costs


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize(
    "options", [{}, {"optimizer": SGD(0.1)}, {"accumulate": 3}, {"clip_norm": 0.1}, {"graph": False}], ids=str
)
def test_training_by_epilogues_is_training_on_the_cpu(gpu, precision, activation, options):
    device = gpu(FUSED)
    theta, costs = trained(precision, activation, **options)
    assert {134, 136} & set(epilogues(device)) or {164, 192} & set(epilogues(device))
    expected, theirs = trained(precision, activation, device="cpu", **{**options, "graph": None})
    np.testing.assert_allclose(costs, theirs, rtol=10 * TOLERANCE[precision])
    assert np.linalg.norm(theta - expected) <= 20 * TOLERANCE[precision] * np.linalg.norm(expected)


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_ten_runs_by_epilogues_give_one_hash(gpu, activation):
    ends = set()
    for seconds in (FUSED, *[PLAIN] * 9):
        gpu(seconds)
        ends.add(trained("bfloat16", activation)[0].tobytes())
    assert len(ends) == 1


def test_a_step_by_epilogues_has_no_kernel_for_activations_and_none_for_casts(gpu):
    device = gpu(FUSED)
    net = MLP([13, 32, 24, 3], "relu", "softmax", precision="bfloat16", device="cuda")
    trainer = Trainer(net, graph=False)
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(40, 13)).astype(np.float32), rng.integers(0, 3, 40)
    for _ in range(2):
        device.log.clear()
        device.products.clear()
        trainer.step(x, y)
    kernels = [name for name, *_ in device.log]
    assert sorted(kernels) == sorted(  # the gather turns the rows of x into bfloat16
        ["begin_step", "gather", "set_state", "softmax_cross_entropy", "finish_sum"]
        + ["activation_gradient", "finish_column_sums"] * 3  # the sums for gb alone
        + ["prepare_update", "update", "finish_step"]
    )
    assert len(device.products) == 3 + 2 + 3


def test_a_cost_that_is_not_finite_is_seen_behind_epilogues(gpu):
    gpu(FUSED)
    net = MLP([13, 32, 3], "relu", "identity", device="cuda")
    trainer = Trainer(net, "mse")
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(40, 13)), rng.normal(size=(40, 3))
    for _ in range(3):
        trainer.step(x, y)
    net.weights[0][3, 5] = np.nan
    with pytest.raises(Diverged):
        trainer.fit((x, y), epochs=1, batch_size=40, progress=False)
