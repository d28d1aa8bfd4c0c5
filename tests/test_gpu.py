"""What only a GPU can tell, run with `pytest -m gpu`: whole runs, the same bits, flat memory, large arrays.

The comparisons of single operations are those of `test_cuda.py` and `test_cuda_training.py`, which run in both worlds.
"""

from __future__ import annotations

import gc
import hashlib
import importlib

import numpy as np
import pytest
from helpers import blobs
from test_cuda import RULES

from gpu_mlp import MLP, SGD, Adam, AdamW, ElasticNet, Parallel, Trainer, precision
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.losses import CrossEntropy
from gpu_mlp.ops.interface import Layout, Slot

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_gpu")]

STEPS = 1000  # over which memory must not grow
ELEMENTS = 2**31 + 2**21  # of the large arrays: more than 31 bits count
LARGE_BYTES = 20 << 30  # of free memory that the large arrays want

# How far the cost of an epoch may be from the CPU's, relatively. A run is a few dozen steps on a smooth problem, each
# of which lets a difference grow a little: some hundred times the gradient's own tolerance in float64 and float32; tf32
# and the 16-bit types round differently from the first product on, and the cost averages that over all samples.
CURVE = {"float64": 1e-10, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 3e-2, "float16": 1e-2}


def run(device="cuda", epochs=4, rule=None, precision="float32", sizes=(20, 96, 64, 5), rows=1500, **options):
    """(θ, history) of a run with shuffling, dropout, micro-batches, a penalty and a schedule in it."""
    x, y = blobs(rows, sizes[0], sizes[-1], spread=2.0)
    net = MLP(list(sizes), "gelu", "softmax", dropout=0.1, precision=precision, device=device, seed=3)
    options = {"accumulate": 2, "regularizer": ElasticNet(1e-5, 1e-4), "schedule": "cosine", **options}
    trainer = Trainer(net, optimizer=rule or Adam(lr=2e-3), **options)
    history = trainer.fit((x, y), epochs=epochs, batch_size=128, validation=0.2, progress=False)
    return np.asarray(net._ops.to_host(net._theta)), history


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", CURVE)
def test_the_cost_curve_is_the_cpus(precision):
    _, expected = run("cpu", precision=precision)
    _, found = run("cuda", precision=precision)
    assert np.isfinite(found["cost"]).all()
    np.testing.assert_allclose(found["cost"], expected["cost"], rtol=CURVE[precision])
    np.testing.assert_allclose(found["validation_loss"], expected["validation_loss"], rtol=CURVE[precision])
    np.testing.assert_allclose(found["validation_accuracy"], expected["validation_accuracy"], atol=0.02)
    assert found["cost"][-1] < found["cost"][0], "nothing was learned"


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_ten_runs_give_one_hash(precision):
    hashes = {hashlib.sha256(run(precision=precision)[0].tobytes()).hexdigest() for _ in range(10)}
    assert len(hashes) == 1


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(shard_optimizer=True), Parallel(bucket_bytes=1)], ids=str)
def test_one_rank_on_nccl_has_the_bits_of_none(parallel, graph):
    try:
        importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # the second where mpi4py finds no MPI
        pytest.skip(f"ranks need mpi4py and an MPI: {error}")
    if not importlib.import_module("cupy.cuda.nccl").available:
        pytest.skip("ranks on GPUs need NCCL (the extra nccl12 or nccl13)")
    alone, history = run(rule=AdamW(), parallel=False, graph=graph)
    summed, theirs = run(rule=AdamW(), parallel=parallel, graph=graph)
    assert summed.tobytes() == alone.tobytes()
    assert theirs["cost"] == history["cost"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule.name != "lbfgs"], ids=lambda rule: f"{rule.name}-{len(rule.moments)}"
)
def test_a_graph_changes_no_bit(captures, graph_launches, rule, precision):
    plain, history = run(rule=rule, precision=precision, graph=False)
    assert not graph_launches
    replayed, theirs = run(rule=rule, precision=precision, graph=True)
    assert len(graph_launches) > 30
    assert replayed.tobytes() == plain.tobytes()
    assert theirs["cost"] == history["cost"]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_stream_of_data_gives_the_bits_of_a_resident_set(monkeypatch, dtype, graph):
    """Copies of some megabytes that take as long as the steps they run beside."""
    from gpu_mlp.ops.cuda_ops import CudaOperations

    rng = np.random.default_rng(1)
    x = (rng.uniform(0, 255, (40_000, 512)) if dtype == "uint8" else rng.normal(size=(40_000, 512))).astype(dtype)
    y, ends = rng.integers(0, 4, len(x)), []
    for streamed in (False, True):
        if streamed:
            monkeypatch.setattr(CudaOperations, "free_bytes", lambda self: 0)
        net = MLP([512, 64, 4], output="softmax", device="cuda", seed=2)
        history = Trainer(net, optimizer=SGD(1e-6, momentum=0.9), graph=graph).fit(
            (x, y), epochs=3, batch_size=3000, progress=False
        )
        ends.append((net.theta.get().tobytes(), history["cost"]))
    assert ends[0] == ends[1]


# --- memory ----------------------------------------------------------------------------------------------------------


def levels(pool):
    """Bytes that arrays use, that the pool holds, and that the driver has left."""
    import cupy

    gc.collect()
    return pool.used_bytes(), pool.total_bytes(), cupy.cuda.Device().mem_info[0]


@pytest.mark.parametrize("graph", [None, False])
def test_memory_is_flat_over_a_thousand_steps(real_gpu, graph):
    x, y = blobs(256, 64, 10)
    net = MLP([64, 512, 512, 10], "gelu", "softmax", dropout=0.1, precision="bfloat16", device="cuda")
    trainer = Trainer(net, optimizer=AdamW(), clip_norm=1.0, accumulate=2, graph=graph)
    for _ in range(5):
        trainer.step(x, y)
    used, held, free = levels(real_gpu.pool)
    for step in range(STEPS):
        trainer.step(x, y)
        if step % 100 == 99:
            now = levels(real_gpu.pool)
            assert now[:2] == (used, held), f"after {step + 1} steps"
            assert now[2] >= free - (16 << 20), f"the driver's memory shrinks: after {step + 1} steps"


@pytest.mark.parametrize(
    ("precision", "optimizer", "activation"),
    [("bfloat16", AdamW(), "gelu"), ("float32", SGD(1e-3), "relu"), ("tf32", Adam(), "silu")],
)
def test_the_plan_holds_for_all_that_the_pool_takes(real_gpu, precision, optimizer, activation):
    before = real_gpu.pool.total_bytes()
    net = MLP([784, 4096, 4096, 10], activation, "softmax", precision=precision, device="cuda")
    trainer = Trainer(net, optimizer=optimizer)
    real_gpu.pool.free_all_blocks()  # through which the first weights came
    x, y = blobs(8192, 784, 10, dtype=np.float32)
    for _ in range(4):
        trainer.step(x, y)
    assert real_gpu.pool.total_bytes() - before <= trainer.plan(8192).total


# --- arrays of other libraries ---------------------------------------------------------------------------------------


def of_torch(array, dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch.from_numpy(array).to(dtype=getattr(torch, dtype), device="cuda")


def of_jax(array, dtype):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no CUDA")
    return jax.numpy.asarray(array, getattr(jax.numpy, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("library", [of_torch, of_jax], ids=["torch", "jax"])
def test_arrays_of_other_libraries_are_used_where_they_are(monkeypatch, library, dtype):
    """The bits of a run on arrays from the host; and no byte of x goes back there."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    x, y = blobs(600, 20, 5, dtype=np.float32)
    x = x.astype(precision.get("bfloat16").storage_dtype).astype(np.float32)  # the same numbers in both types
    theirs, ends = (library(x, dtype), library(y.astype(np.int32), "int32")), []
    for data in ((x, y), theirs):
        net = MLP([20, 32, 5], output="softmax", precision=dtype, device="cuda", seed=5)
        Trainer(net).fit(data, epochs=2, batch_size=64, progress=False)
        ends.append(net.theta.get().tobytes())
        assert type(net.forward(data[0])).__module__.split(".")[0] == ("numpy" if data[0] is x else "cupy")
    assert ends[0] == ends[1]


# --- arrays beyond 2^31 elements -------------------------------------------------------------------------------------


@pytest.fixture
def large():
    """Operations in bfloat16 on a device with room for large arrays."""
    import cupy

    from gpu_mlp.ops.cuda_ops import CudaOperations

    free = cupy.cuda.Device().mem_info[0]
    if free < LARGE_BYTES:
        pytest.skip(f"{free / 2**30:.1f} GiB of the device's memory are free, {LARGE_BYTES / 2**30:.0f} wanted")
    yield CudaOperations(precision.get("bfloat16"))
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()


def repeated(tile, count):
    """``count`` numbers on the device: those of ``tile``, over and over."""
    import cupy

    tile = cupy.asarray(tile)
    array = cupy.empty(count, tile.dtype)
    whole = count // tile.size
    array[: whole * tile.size].reshape(whole, tile.size)[...] = tile
    array[whole * tile.size :] = tile[: count - whole * tile.size]
    return array


def pattern(count, dtype, period=4099):
    """``count`` random numbers that repeat after a prime number of them, so that a wrong row shows."""
    return repeated(np.random.default_rng(7).normal(size=period).astype(dtype), count)


def ends_agree(work, *arrays):
    """``work`` on large arrays, and on copies of their first and last rows alone: the same bits in both places."""
    edges = [(slice(0, 40), [a[:40].copy() for a in arrays]), (slice(-40, None), [a[-40:].copy() for a in arrays])]
    work(*arrays)
    for rows, parts in edges:
        work(*parts)
        for whole, part in zip(arrays, parts):
            assert whole[rows].get().tobytes() == part.get().tobytes(), f"rows {rows}"


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_activations_beyond_31_bits(large, name):
    n, f = 1024, ACTIVATIONS[name]
    state, b = large.zeros(len(Slot), np.float64), pattern(n, large.precision.storage_dtype)

    def forward(z):
        large.kernels.activate(f, z, b, z, False, None, state)

    def backward(g):
        large.kernels.activation_gradient(f, g, saved[: len(g)], None, None, False, state)

    z = pattern(ELEMENTS, large.precision.storage_dtype).reshape(-1, n)
    ends_agree(forward, z)
    saved = z
    g = pattern(ELEMENTS, large.precision.storage_dtype, 4093).reshape(-1, n)
    first = g[:40].copy()
    tail, of_tail = g[-40:].copy(), z[-40:].copy()
    backward(g)
    backward(first)
    large.kernels.activation_gradient(f, tail, of_tail, None, None, False, state)
    assert g[:40].get().tobytes() == first.get().tobytes()
    assert g[-40:].get().tobytes() == tail.get().tobytes()


def test_softmax_and_cross_entropy_beyond_31_bits(large):
    import cupy

    n = 1024
    z = pattern(ELEMENTS, large.precision.storage_dtype).reshape(-1, n)
    gz, y = cupy.empty_like(z), cupy.arange(len(z), dtype=np.int64) % n
    state = large.zeros(len(Slot), np.float64)
    large.write_state(state, {Slot.LOSS_SCALE: 1.0, Slot.TOTAL_WEIGHT: 64.0})
    large.kernels.cross_entropy(CrossEntropy(), z, y, None, gz, state)
    for rows in (slice(0, 40), slice(-40, None)):
        part = cupy.empty((40, n), gz.dtype)
        large.kernels.cross_entropy(CrossEntropy(), z[rows].copy(), y[rows].copy(), None, part, state)
        assert gz[rows].get().tobytes() == part.get().tobytes()
    del gz
    ends_agree(lambda h: large.kernels.activate(ACTIVATIONS["softmax"], h, None, h, False, None, None), z)


def test_gathers_and_copies_beyond_31_bits(large):
    import cupy

    source, columns = repeated(np.arange(251, dtype=np.uint8), ELEMENTS), 512
    last = ELEMENTS // columns - 1
    numbers = np.array([0, 1, last // 2, last - 4096, last - 4095, last - 1, last]).clip(0)
    out = cupy.empty((len(numbers), columns), large.precision.storage_dtype)
    large.gather(source.reshape(-1, columns), cupy.asarray(numbers), out)
    expected = (numbers[:, None] * columns + np.arange(columns)) % 251
    np.testing.assert_array_equal(out.get().astype(np.int64), expected)
    twin = cupy.zeros_like(source)
    large.copy(source, twin)
    for part in (slice(0, 1000), slice(-(2**22), None)):
        assert twin[part].get().tobytes() == source[part].get().tobytes()


def test_an_update_beyond_31_bits(large):
    """Plain SGD with a penalty, on a θ of 8 GiB."""
    state = large.zeros(len(Slot), np.float64)
    large.write_state(state, {Slot.LOSS_SCALE: 1.0, Slot.LEARNING_RATE: 0.5})
    layout, rule = Layout([1, 1], 4), SGD(0.5)

    def update(theta, g):
        large.update(theta, g, (), rule, layout, theta.size, ElasticNet(0.0, 0.125), None, None, state)

    theta, g = pattern(ELEMENTS, np.float32), pattern(ELEMENTS, np.float32, 4093)
    expected = theta[-40:].get() - np.float32(0.5) * (g[-40:].get() + np.float32(0.125) * theta[-40:].get())
    ends_agree(update, theta, g)
    np.testing.assert_allclose(theta[-40:].get(), expected, rtol=1e-5, atol=1e-6)


def test_a_penalty_beyond_31_bits(large):
    """Every element counts once in a sum: all of them are 1."""
    import cupy

    theta, state = cupy.ones(ELEMENTS, np.float32), large.zeros(len(Slot), np.float64)
    large.penalty(theta, theta.size, ElasticNet(0.0, 2.0), state)
    assert large.read_state(state, Slot.COST) == ELEMENTS
