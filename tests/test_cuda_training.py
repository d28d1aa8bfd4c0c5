"""Whole training runs on a GPU: CUDA graphs, streams of data, arrays on the device, memory, and failures.

What these runs compute is compared with the NumPy reference in `test_cuda.py`; here it is how they get there. A test
that asks for `gpu` runs in both worlds; one for `emulated_gpu` needs what only that tells: what was called, and when.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from cuda_on_cpu import streams
from cuda_on_cpu.emulator import Uninitialised

from gpu_mlp import (
    EMA,
    L1,
    L2,
    LBFGS,
    MLP,
    SGD,
    Adam,
    AdamW,
    CrossEntropy,
    DeviceLost,
    Diverged,
    Muon,
    Trainer,
    feeding,
    notices,
)
from gpu_mlp.ops.interface import DeviceError, Layout, Slot
from gpu_mlp.planning import SCRATCH_BYTES, plan_memory


@pytest.fixture(autouse=True)
def _say_everything_again(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())


@pytest.fixture
def lagging(monkeypatch):
    """Let a kind of stream do its work as late as it may."""

    def let(kind):
        monkeypatch.setattr(streams.Order, "lagging", kind)

    yield let
    streams.drain_all()


def problem(rows=37, inputs=13, classes=3):
    rng = np.random.default_rng(9)
    return rng.normal(size=(rows, inputs)), rng.integers(0, classes, rows), rng.uniform(0.5, 1, rows)


def trained(optimizer=None, precision="float32", batch_size=8, epochs=3, fit=None, dataset=None, **options):
    """(θ, history) of a run with everything in it that changes from step to step."""
    net = MLP([13, 31, 3], "gelu", "softmax", dropout=0.25, precision=precision, device="cuda")
    trainer = Trainer(net, optimizer=optimizer or Adam(), schedule="cosine", **options)
    dataset = problem() if dataset is None else dataset
    history = trainer.fit(dataset, epochs=epochs, batch_size=batch_size, progress=False, **(fit or {}))
    return np.asarray(net._ops.to_host(net._theta)), history


def stored(monkeypatch, megabytes=0):
    """Have the data set streamed: the device says that this much memory is free."""
    from gpu_mlp.ops.cuda_ops import CudaOperations

    monkeypatch.setattr(CudaOperations, "free_bytes", lambda self: megabytes << 20)


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0.1, "regularizer": L2(1e-2)},
        {"accumulate": 3},
        {"optimizer": SGD(0.1)},
        {"optimizer": Muon()},
        {"average": EMA(0.9)},
    ],
    ids=str,
)
def test_a_replayed_step_gives_the_bits_of_a_launched_one(gpu, captures, graph_launches, options, precision):
    plain, history = trained(precision=precision, graph=False, **options)
    assert not graph_launches
    replayed, theirs = trained(precision=precision, graph=True, **options)
    assert len(graph_launches) > 10
    assert replayed.tobytes() == plain.tobytes()
    assert theirs["cost"] == history["cost"]


def test_a_replayed_step_costs_one_launch_and_one_to_set_it_going(emulated_gpu):
    net = MLP([13, 31, 3], output="softmax", device="cuda")
    trainer = Trainer(net, graph=True)
    x, y, _ = problem(8)
    host_calls = []
    for _ in range(6):
        before = emulated_gpu.counts.copy()
        trainer.step(x, y)
        host_calls.append(emulated_gpu.counts - before)
    assert [calls["graph launches"] for calls in host_calls] == [0, 1, 1, 1, 1, 1]
    assert host_calls[-1]["synchronisations"] == 0, "a step does not wait for the device"
    assert host_calls[-1]["allocations"] <= 3, "what the caller's arrays are copied through, and the cost"


def test_a_last_batch_that_is_shorter_is_recorded_too(gpu, captures, graph_launches):
    trained(epochs=4, batch_size=8, dataset=problem(19))  # 8 + 8 + 3, each launched once before it is recorded
    assert len(graph_launches) == 3 * 4 - 2


def test_what_a_callback_exchanges_is_recorded_anew(gpu):
    def exchange(trainer, row):
        trainer.clip_norm, trainer.optimizer = 0.05, Adam(lr=0.05)

    plain, _ = trained(graph=False, fit={"callbacks": [exchange]})
    replayed, _ = trained(graph=True, fit={"callbacks": [exchange]})
    assert replayed.tobytes() == plain.tobytes()
    assert plain.tobytes() != trained(graph=False)[0].tobytes()


def test_a_graph_outlives_scratch_that_grew_after_it(gpu):
    """A larger batch in between makes larger scratch; the addresses in the recording must stay valid."""
    ends = []
    for graph in (False, True):
        net = MLP([13, 31, 3], output="softmax", device="cuda")
        trainer = Trainer(net, clip_norm=1.0, graph=graph)
        x, y, _ = problem(600)
        for rows in (8, 8, 8, 600, 600, 600, 8, 8):
            trainer.step(x[:rows], y[:rows])
        ends.append(np.asarray(net._ops.to_host(net._theta)).tobytes())
    assert ends[0] == ends[1]


def test_where_nothing_can_be_captured_the_steps_still_run_and_it_is_said_once(gpu, monkeypatch):
    from gpu_mlp.ops import gemm

    monkeypatch.setattr(gemm.binding(), "in_graphs", False)
    plain, _ = trained(graph=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, _ = trained()
        trained()
    assert len([warning for warning in said if "CUDA graph" in str(warning.message)]) == 1
    assert found.tobytes() == plain.tobytes()


def test_a_capture_that_fails_falls_back(gpu, monkeypatch):
    import cupy

    def refuse(self, mode=None):
        raise RuntimeError("cudaErrorStreamCaptureUnsupported")

    plain, _ = trained(graph=False)
    monkeypatch.setattr(cupy.cuda.Stream, "begin_capture", refuse)
    with pytest.warns(RuntimeWarning, match="one kernel at a time"):
        found, _ = trained()
    assert found.tobytes() == plain.tobytes()


def test_cupys_own_cublas_gives_the_same_numbers(gpu, monkeypatch):
    """Where nvmath-python is missing. On a real device the other handle's workspace lets cuBLAS choose other ways."""
    import sys

    from gpu_mlp.ops import gemm

    expected, _ = trained(graph=False)
    monkeypatch.setitem(sys.modules, "nvmath.bindings", None)
    monkeypatch.setattr(gemm, "_bindings", type(gemm._bindings)())
    with pytest.warns(RuntimeWarning, match="nvmath-python"):
        found, _ = trained()
    assert not gemm.binding().in_graphs
    if gpu.real:
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    else:
        assert found.tobytes() == expected.tobytes()


def test_lbfgs_says_once_that_it_is_not_recorded(gpu):
    x, y, _ = problem()
    for _ in range(2):
        net = MLP([13, 5, 3], "tanh", "softmax", device="cuda")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            Trainer(net, optimizer=LBFGS()).fit((x, y), epochs=2, progress=False)
        assert len(said) <= 1


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_streamed_set_gives_the_bits_of_a_resident_one(gpu, monkeypatch, shuffle):
    expected, history = trained(fit={"shuffle": shuffle})
    stored(monkeypatch)
    found, theirs = trained(fit={"shuffle": shuffle})
    assert found.tobytes() == expected.tobytes()
    assert theirs["cost"] == history["cost"]


@pytest.mark.parametrize("late", ["side", "null", "all"])
def test_whichever_stream_lags_every_copy_waits_for_its_buffer_and_every_step_for_its_copy(
    emulated_gpu, monkeypatch, lagging, late
):
    expected, _ = trained()
    stored(monkeypatch)
    lagging(late)
    found, _ = trained()
    assert found.tobytes() == expected.tobytes()


def test_a_buffer_goes_only_when_its_copy_has_landed(emulated_gpu, lagging):
    """The memory pools hand on at once what is let go of, whatever another stream still writes there."""
    from gpu_mlp.ops.staging import PinnedStaging

    staging, landed = PinnedStaging((4, 2), np.float32), []
    lagging("all")
    staging.host[...] = 1
    staging.send(4)
    staging._sent._token.stream.submit(lambda: landed.append(True))
    event = staging._sent
    assert not event.done
    del staging
    assert event.done


@pytest.mark.parametrize("forgotten", ["free", "receive", "release"])
def test_a_wait_that_is_forgotten_is_seen(emulated_gpu, monkeypatch, lagging, forgotten):
    from gpu_mlp.ops.staging import PinnedStaging

    expected, _ = trained(graph=False)
    stored(monkeypatch)
    monkeypatch.setattr(PinnedStaging, forgotten, lambda self: None)
    seen = []
    for late in ("side", "null", "all"):
        lagging(late)
        try:
            found, _ = trained(graph=False)
        except Uninitialised:  # the step came before the first copy
            seen.append(late)
        else:
            seen += [late] * (found.tobytes() != expected.tobytes())
    assert seen


def test_a_set_that_does_not_fit_streams_and_one_that_does_is_resident(gpu, monkeypatch):
    made = []
    for kind in (feeding.Resident, feeding.Streamed):
        honest = kind.__init__
        monkeypatch.setattr(
            kind, "__init__", lambda self, *a, _honest=honest: (made.append(type(self).__name__), _honest(self, *a))[1]
        )
    trained(epochs=1)
    stored(monkeypatch)
    trained(epochs=1)
    assert made == ["Resident", "Streamed"]


@pytest.mark.parametrize("dtype", ["uint8", "float64", "float16"])
def test_streamed_bytes_are_cast_on_the_device(gpu, monkeypatch, dtype):
    x, y, w = problem()
    x = (np.abs(x) * 40).astype(dtype)
    if dtype == "float16":
        x = x.astype(np.float32)
    expected, _ = trained(precision="float64", dataset=(x, y, w))
    stored(monkeypatch)
    found, _ = trained(precision="float64", dataset=(x, y, w))
    assert found.tobytes() == expected.tobytes()


# --- arrays on the device --------------------------------------------------------------------------------------------


class Foreign:
    """A device array of another library, which says where its memory is."""

    def __init__(self, array):
        self._array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.data.ptr, False),
            "version": 3,
            "strides": None,
        }


def test_arrays_on_the_device_are_used_where_they_are(gpu):
    import cupy

    x, y, w = problem()
    expected, _ = trained(dataset=(x.astype(np.float32), y, w))
    on_device = tuple(map(cupy.asarray, (x.astype(np.float32), y, w)))
    with gpu.read_only(*on_device):
        found, _ = trained(dataset=on_device)
    assert found.tobytes() == expected.tobytes()


def test_a_bfloat16_array_of_another_library_keeps_its_type(gpu):
    """The array interface calls it two bytes of anything; DLPack tells."""
    import cupy
    import ml_dtypes

    class Both(Foreign):
        def __dlpack__(self, **options):
            return self._array.__dlpack__(**options)

        def __dlpack_device__(self):
            return 2, 0

    net = MLP([13, 31, 3], output="softmax", precision="bfloat16", device="cuda")
    x = cupy.asarray(problem()[0].astype(ml_dtypes.bfloat16))
    foreign = Both(x)
    assert foreign.__cuda_array_interface__["typestr"] == "<V2"
    np.testing.assert_array_equal(net.forward(foreign).get(), net.forward(x).get())


def test_what_comes_from_the_device_goes_back_there(gpu):
    import cupy

    net = MLP([13, 31, 3], output="softmax", device="cuda")
    x, y, _ = problem()
    on_device = cupy.asarray(x, np.float32)
    y_hat = net.forward(on_device)
    assert isinstance(y_hat, cupy.ndarray)
    np.testing.assert_array_equal(y_hat.get(), net.forward(x))
    assert type(net.forward(x)) is np.ndarray
    J, g = net.cost_and_gradients(on_device, cupy.asarray(y), "cross_entropy")
    expected, h = net.cost_and_gradients(x, y, "cross_entropy")
    assert expected == J
    assert isinstance(g.weights[0], cupy.ndarray)
    assert isinstance(g.input, cupy.ndarray)
    np.testing.assert_array_equal(g.theta.get(), h.theta)
    assert net.cost(on_device, cupy.asarray(y), "cross_entropy") == expected


def test_a_step_on_device_arrays_waits_for_nothing(emulated_gpu):
    import cupy

    net = MLP([13, 31, 3], output="softmax", device="cuda")
    trainer = Trainer(net)
    x, y, w = (cupy.asarray(a) for a in problem())
    costs = []
    for _ in range(4):
        before = emulated_gpu.counts.copy()
        costs.append(trainer.step(x, y, w))
        assert (emulated_gpu.counts - before)["synchronisations"] == 0
    assert [float(cost) for cost in costs] == sorted(map(float, costs), reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:, :5], y), r"x: expected shape \(batch, 13\), got \(37, 5\)"),
        (lambda x, y: (x.astype(complex), y), "x: expected real numbers"),
        (lambda x, y: (x * np.inf, y), "x: an entry is not finite"),
        (lambda x, y: (x, y[:5]), "y: expected 37 rows"),
        (lambda x, y: (x, y + 7), "y"),
    ],
)
def test_bad_arrays_on_the_device_are_refused(gpu, change, message):
    import cupy

    x, y, _ = problem()
    x, y = change(cupy.asarray(x), cupy.asarray(y))
    net = MLP([13, 31, 3], output="softmax", device="cuda")
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(net).fit((x, y), progress=False)


def test_a_network_on_the_cpu_refuses_arrays_of_a_gpu(gpu):
    import cupy

    with pytest.raises(TypeError, match="x: is on a GPU and the network on the CPU"):
        MLP([13, 3], device="cpu").forward(Foreign(cupy.zeros((2, 13))))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (AdamW(), {}),
        (SGD(0.1), {}),
        (SGD(0.1), {"clip_norm": 1.0}),
        (SGD(0.1), {"regularizer": L1(1e-3)}),
        (Muon(), {"accumulate": 4}),
    ],
)
def test_a_step_takes_what_was_planned(gpu, optimizer, options, activation, precision):
    import gc

    gpu.hurry()
    gc.collect()
    before = gpu.bytes_in_use()
    net = MLP([64, 256, 192, 10], activation, "softmax", precision=precision, device="cuda")
    trainer = Trainer(net, optimizer=optimizer, **options)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(256, 64)), rng.integers(0, 10, 256)
    for _ in range(3):
        trainer.step(x, y)
    gc.collect()
    used = gpu.bytes_in_use() - before
    plan = trainer.plan(256)
    assert used <= plan.total
    assert used >= plan.total - SCRATCH_BYTES - 64 * 10 * 256, "nothing is planned that is not there"


def test_the_plan_keeps_to_the_bound():
    """(θ, gradient, moments) + the inputs and h of every layer + z where needed + two gz + 32 MiB."""
    sizes = [784, 4096, 4096, 10]
    plan = plan_memory(sizes, ["gelu", "gelu", "softmax"], "bfloat16", AdamW(), 8192)
    parameters, rows = Layout(sizes, 4).size, 8192
    bound = parameters * (4 + 4 + 2 * 4 + 2) + rows * 2 * (784 + 2 * 4096 + 10) + rows * 2 * 2 * 4096
    bound += 2 * rows * 2 * 4096 + (32 << 20)
    assert plan.total <= bound + rows * (4 * 10 + 16)  # the targets and the weights of the minibatch


@pytest.mark.parametrize("processors", [132, 148, 160])
def test_the_partial_sums_of_a_large_device_fit_the_plan(emulated_gpu, monkeypatch, processors):
    from gpu_mlp.ops import gemm, launch

    monkeypatch.setattr(launch, "processors", lambda: processors)
    packs = {"float64": (2, 8), "float32": (4, 4), "bfloat16": (8, 4)}  # elements of a pack, bytes of a sum
    largest = max(
        launch.tile(1 << 20, n, vec)[0][1] * n * size for vec, size in packs.values() for n in range(vec, 20000, vec)
    )
    assert largest + max(gemm.WORKSPACE_BYTES.values()) + (1 << 20) <= SCRATCH_BYTES


def test_memory_is_flat_over_many_steps(gpu):
    net = MLP([13, 31, 3], output="softmax", device="cuda")
    trainer = Trainer(net)
    gpu.hurry()
    x, y, w = problem(8)
    for _ in range(3):
        trainer.step(x, y, w)
    levels = {(trainer.step(x, y, w), gpu.bytes_in_use())[1] for _ in range(40)}
    assert len(levels) == 1


def test_a_batch_that_does_not_fit_goes_through_in_parts(gpu):
    gpu.hurry()
    wide = [13, 4096, 3]
    ends = []
    for limited in (False, True):
        net = MLP(wide, output="softmax", precision="float64", device="cuda")
        trainer = Trainer(net)
        x, y, _ = problem(512)
        trainer.step(x[:2], y[:2])
        if limited:
            # For h and two gz of a quarter of the batch, and a real device's partial sums; not for those of a half.
            room = 3 * 128 * 4096 * 8 + (10 << 20)
            warned = pytest.warns(RuntimeWarning, match="a step of 512 rows does not fit .* micro-batches")
            with gpu.limited_to(room), warned as said:
                trainer.step(x, y)
            assert len(said) == 1
            assert trainer.accumulate >= 4
        else:
            trainer.step(x, y)
        ends.append(np.asarray(net._ops.to_host(net._theta)))
    assert np.linalg.norm(ends[1] - ends[0]) <= 1e-12 * np.linalg.norm(ends[0])


def test_a_row_that_does_not_fit_is_an_error_with_the_plan(emulated_gpu):
    net = MLP([13, 31, 3], output="softmax", device="cuda")
    trainer = Trainer(net)
    before = np.asarray(net._ops.to_host(net._theta))
    emulated_gpu.memory_limit = emulated_gpu.memory.bytes_in_use()
    with (
        warnings.catch_warnings(),
        pytest.raises(MemoryError, match=r"a step of 37 rows does not fit the device's memory: 32\.\d MiB planned"),
    ):
        warnings.simplefilter("ignore")
        trainer.fit(problem(), progress=False)
    emulated_gpu.memory_limit = None
    assert np.asarray(net._ops.to_host(net._theta)).tobytes() == before.tobytes()


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_lost_device_is_told_whichever_call_is_the_first_to_fail(emulated_gpu, monkeypatch, streamed, graph):
    """A GPU's error shows at any later call: a launch, a copy, or the recording of an event."""
    emulated_gpu.orders, emulated_gpu.races = (0,), False
    if streamed:
        stored(monkeypatch)
    for calls in range(30):
        net = MLP([13, 31, 3], output="softmax", device="cuda")

        def break_down(trainer, row, calls=calls):
            emulated_gpu.broken_after = calls

        with pytest.raises(DeviceLost) as caught:
            Trainer(net, graph=graph).fit(problem(), epochs=3, batch_size=8, progress=False, callbacks=[break_down])
        emulated_gpu.broken_after = None
        assert len(caught.value.history) == 1
        assert np.isfinite(net.theta).all()


@pytest.mark.parametrize("graph", [True, False])
def test_a_lost_device_leaves_the_last_whole_epoch(emulated_gpu, graph, tmp_path):
    net = MLP([13, 31, 3], output="softmax", precision="bfloat16", device="cuda")
    kept = []

    def at_the_end(trainer, row):
        kept.append(np.array(net._ops.to_host(net._theta)))
        if len(kept) == 2:
            emulated_gpu.broken_after = 60

    with pytest.raises(DeviceLost, match=r"epoch 3: .*\(.*\) failed .*illegal memory access") as caught:
        Trainer(net, graph=graph).fit(problem(), epochs=5, batch_size=8, progress=False, callbacks=[at_the_end])
    assert len(caught.value.history) == 2
    assert caught.value.history.stopped == "device lost"
    assert net.device == "cpu"
    np.testing.assert_array_equal(net.theta, kept[1])
    emulated_gpu.broken_after = None
    back = MLP.load(net.save(tmp_path / "model.safetensors"), device="cpu")
    np.testing.assert_array_equal(back.forward(problem()[0]), net.forward(problem()[0]))


def test_an_error_names_the_operation_and_the_shapes(emulated_gpu):
    net = MLP([13, 31, 3], output="softmax", device="cuda")
    for _ in range(2):
        net.forward(problem()[0])
    messages = set()
    for calls in range(6):
        emulated_gpu.broken_after = calls
        with pytest.raises(DeviceError) as caught:
            net.forward(problem()[0])
        messages.add(str(caught.value).split(" failed")[0])
    emulated_gpu.broken_after = None
    assert "GEMM(float32 (37, 13), float32 (31, 13), float32 (37, 31))" in messages
    assert "bias_activation(float32 (37, 31), float32 (31,), float32 (37, 31), float64 (12,))" in messages
    assert "copy to the host(float32 (37, 3))" in messages


@pytest.mark.parametrize("optimizer", [Adam(), SGD(1e-9), SGD(1e-9, weight_decay=0.1)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_cost_that_is_not_finite_is_named_with_step_and_layer(gpu, monkeypatch, optimizer, streamed):
    """And the weights are those before the epoch, though the device had gone on with its queue."""
    if streamed:
        stored(monkeypatch)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 13)) * 0.01
    x[17] = 1.0
    net = MLP([13, 4, 4, 3], ["relu", "exp"], output="identity", device="cuda")
    net.weights[0][...], net.weights[1][...] = 1.0, 20.0  # of the row of ones exp(13 * 4 * 20), of the others little
    before = np.asarray(net._ops.to_host(net._theta)).copy()
    trainer = Trainer(net, "mse", optimizer)
    with pytest.raises(Diverged, match=r"epoch 1, step 3: the cost is not finite, first in layer 1; .*last good"):
        trainer.fit((x, rng.normal(size=(40, 3))), epochs=3, batch_size=8, shuffle=False, progress=False)
    np.testing.assert_array_equal(np.asarray(net._ops.to_host(net._theta)), before)


@pytest.mark.parametrize("regularizer", [None, L2(0.1)])
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_plain_sgd_is_one_product_and_a_bad_step_leaves_the_weights(gpu, precision, regularizer):
    """W ← (1 - ηλ) W - η gzᵀ h; with a cost that is not finite W keeps its bits whatever is in gz and h."""
    net = MLP([5, 4], precision=precision, device="cuda")
    ops, rng = net._ops, np.random.default_rng(0)
    W, gz, h = (rng.normal(size=shape) for shape in ((4, 5), (7, 4), (7, 5)))
    storage = net._precision.storage_dtype
    on_device = ops.to_device(W, net._theta.dtype)
    shadow = ops.to_device(W, storage) if net._shadow is not None else None
    state = net._new_state()
    ops.begin_step(0.5, 0, 0, state)
    rule = SGD(0.5, weight_decay=0.25)
    ops.descend(on_device, ops.to_device(gz, storage), ops.to_device(h, storage), rule, regularizer, shadow, state)
    decay = 0.25 + (0.1 if regularizer else 0.0)
    expected = (1 - 0.5 * decay) * W - 0.5 * gz.T @ h
    tolerance = 1e-13 if precision == "float64" else 2e-2
    np.testing.assert_allclose(on_device.get(), expected, atol=tolerance)
    if shadow is not None:
        np.testing.assert_array_equal(shadow.get(), on_device.get().astype(storage))
    before = on_device.get()
    gz[2], h[3] = np.nan, np.inf
    ops.write_state(state, {Slot.COST: np.nan})
    ops.descend(on_device, ops.to_device(gz, storage), ops.to_device(h, storage), rule, regularizer, shadow, state)
    assert on_device.get().tobytes() == before.tobytes()


def test_a_class_weight_is_looked_up_for_labels_on_the_device_that_nobody_looked_at(gpu):
    """`step` does not look at values on the device; a label out of range must not read beyond the weights."""
    import cupy

    net = MLP([4, 3], output="softmax", device="cuda")
    trainer = Trainer(net, CrossEntropy(class_weight=(1.0, 2.0, 3.0)))
    with pytest.raises(ValueError, match="label 99"):
        trainer.fit((cupy.zeros((4, 4), np.float32), cupy.asarray([0, 1, 2, 99])), progress=False)
    trainer.step(cupy.zeros((4, 4), np.float32), cupy.asarray([0, 1, 2, 99]))
