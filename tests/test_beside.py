"""What runs beside something else on a GPU: the two gradients of a layer, and the update under lower layers' products.

In the emulation a stream does its work at once or as late as it may; where a wait is missing, one of the two shows.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from cuda_on_cpu import streams

from gpu_mlp import EMA, L2, MLP, SGD, Adam, AdamW, Diverged, Muon, Trainer, notices

LAGS = ["", "side", "null", "all"]


@pytest.fixture
def gpu(emulated_gpu, monkeypatch, tmp_path):
    """The emulated GPU, which finds gradients side by side the faster way, and every W large."""
    from gpu_mlp.ops import cuda_ops, gemm, search

    emulated_gpu.orders, emulated_gpu.races = (0,), False
    monkeypatch.setattr(notices, "_said", set())

    def last(candidates):
        for work in candidates:
            work()
        streams.drain_all()  # a search waits
        return len(candidates) - 1

    monkeypatch.setattr(search, "fastest", last)
    monkeypatch.setattr(cuda_ops, "_HIDDEN_SIZE", 1)
    monkeypatch.setattr(cuda_ops, "_HIDING_ROWS", 1)

    def afresh(cache="1"):
        monkeypatch.setenv("GPU_MLP_CACHE", "0" if cache == "0" else str(tmp_path))
        monkeypatch.setattr(gemm, "_bindings", threading.local())
        return emulated_gpu

    afresh()
    yield afresh
    streams.Order.lagging = ""
    streams.drain_all()


def trained(optimizer=None, steps=5, rows=24, precision="float32", **options):
    net = MLP([13, 31, 24, 17, 3], "relu", "softmax", precision=precision, device="cuda")
    trainer = Trainer(net, optimizer=optimizer or Adam(1e-2), **options)
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(rows, 13)), rng.integers(0, 3, rows)
    costs = [float(trainer.step(x, y)) for _ in range(steps)]
    return np.asarray(net._ops.to_host(net._theta)).tobytes(), costs


def one_after_the_other(gpu, monkeypatch, **options):
    """The same runs with nothing beside anything."""
    from gpu_mlp.ops.cuda_ops import CudaOperations
    from gpu_mlp.ops.ways import Ways

    honest = Ways.pick
    with monkeypatch.context() as patch:
        patch.setattr(CudaOperations, "hides_update", lambda self, rows, size: False)
        patch.setattr(
            Ways, "pick",
            lambda self, key, ways, *rest, **named: (
                "in turn" if "beside" in ways else honest(self, key, ways, *rest, **named)
            ),
        )  # fmt: skip
        gpu().products.clear()
        result = trained(**options)
    gpu()
    return result


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": AdamW(), "precision": "bfloat16"}, {"regularizer": L2(1e-2), "average": EMA(0.9)},
     {"optimizer": SGD(0.1, momentum=0.9)}, {"accumulate": 3}, {"clip_norm": 0.1}, {"precision": "float16"},
     {"optimizer": SGD(0.1)}, {"optimizer": Muon()}],
    ids=str,
)  # fmt: skip
def test_whichever_stream_lags_the_bits_are_those_of_one_stream(gpu, monkeypatch, options, graph):
    expected = one_after_the_other(gpu, monkeypatch, graph=graph, **options)
    growing = isinstance(options.get("optimizer"), Muon)  # scratch: what it had is handed on in the null stream's order
    for late in ("", "side") if growing else LAGS:
        streams.Order.lagging = late
        assert trained(graph=graph, **options) == expected, late
        streams.Order.lagging = ""


def forgetting(monkeypatch, name):
    from gpu_mlp.ops.beside import Beside

    if name == "mark":  # the stream beside does not wait for what came before
        monkeypatch.setattr(Beside, "mark", lambda self: None)
    else:
        monkeypatch.setattr(Beside, "join", lambda self: None)


@pytest.mark.parametrize("part", ["gradients", "update"])
@pytest.mark.parametrize("forgotten", ["mark", "join"])
def test_a_wait_that_is_forgotten_is_seen(gpu, monkeypatch, forgotten, part):
    from gpu_mlp.ops.cuda_ops import CudaOperations

    expected = one_after_the_other(gpu, monkeypatch, graph=False)
    if part == "gradients":
        monkeypatch.setattr(CudaOperations, "hides_update", lambda self, rows, size: False)
    else:
        gpu("0")  # nothing is searched, so that no gradients are beside each other
    forgetting(monkeypatch, forgotten)
    seen = []
    for late in LAGS:
        streams.Order.lagging = late
        try:
            seen += [late] * (trained(graph=False) != expected)
        except Exception:  # a cost that is not finite, or memory that was never written
            seen.append(late)
        streams.Order.lagging = ""
        streams.drain_all()
    assert seen


def test_a_graph_takes_the_streams_along_and_one_that_is_not_joined_is_refused(gpu, monkeypatch):
    from gpu_mlp.ops.beside import Beside

    expected = one_after_the_other(gpu, monkeypatch)
    device = gpu()
    before = device.counts["graph launches"]
    assert trained() == expected
    assert device.counts["graph launches"] > before
    monkeypatch.setattr(Beside, "join", lambda self: None)
    with pytest.warns(RuntimeWarning, match="Unjoined"):
        trained()


def test_products_beside_each_other_have_each_a_workspace(gpu):
    device = gpu()
    trained(graph=False)
    device.products.clear()
    trained(graph=False)
    places = {(queued.stream, queued.workspace) for queued in device.products}
    assert len(places) == 2
    assert len({workspace for _, workspace in places}) == 2


def test_the_gradients_of_hidden_layers_are_beside_each_other_and_the_lowest_layers_is_not(gpu):
    device = gpu()
    trained(graph=False, steps=2)
    device.products.clear()
    trained(graph=False, steps=1)
    beside = [queued for queued in device.products if queued.stream]
    assert len(beside) == 3  # of four layers


def test_gradients_in_turn_stay_in_one_stream(gpu, monkeypatch):
    from gpu_mlp.ops import search

    monkeypatch.setattr(search, "fastest", lambda candidates: 0)
    device = gpu()
    trained(graph=False, steps=2)
    device.products.clear()
    trained(graph=False, steps=1)
    assert {queued.stream for queued in device.products} == {0}


def test_where_nothing_is_kept_nothing_is_beside(gpu):
    device = gpu("0")
    trained(graph=False)
    assert {queued.stream for queued in device.products} == {0}


def test_layers_above_the_lowest_are_updated_early_and_the_rest_in_one_launch(gpu):
    device = gpu()
    trained(graph=False, steps=1, precision="bfloat16")
    device.log.clear()
    trained(graph=False, steps=1, precision="bfloat16")
    kernels = [name for name, *_ in device.log]
    updates = [i for i, name in enumerate(kernels) if name == "update"]
    assert len(updates) == 3 + 1 + 1  # of three layers; of the lowest; of all biases
    assert kernels[updates[0] + 1 :].count("activation_gradient") == 2, "before the lower layers' gradients"


@pytest.mark.parametrize(
    "options", [{"clip_norm": 1.0}, {"precision": "float16"}, {"accumulate": 2}, {"optimizer": Muon()}], ids=str
)
def test_what_needs_the_whole_gradient_is_updated_at_the_end(gpu, options):
    device = gpu()
    trained(graph=False, steps=1, **options)
    kernels = [name for name, *_ in device.log]
    assert kernels.count("update") == 1


def test_small_layers_are_updated_at_the_end(gpu, monkeypatch):
    from gpu_mlp.ops import cuda_ops

    monkeypatch.setattr(cuda_ops, "_HIDDEN_SIZE", 1 << 20)
    device = gpu()
    trained(graph=False, steps=1)
    assert [name for name, *_ in device.log].count("update") == 1


@pytest.mark.parametrize("graph", [True, False])
def test_a_cost_that_is_not_finite_leaves_every_layer_as_it_is(gpu, graph):
    gpu()
    net = MLP([13, 31, 24, 3], ["relu", "exp"], "identity", device="cuda")
    trainer = Trainer(net, "mse", graph=graph)
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(24, 13)), rng.normal(size=(24, 3))
    for _ in range(3):
        trainer.step(x, y)
    before = net.theta.get().tobytes()
    x[3] = 1e6
    trainer.step(x, y)
    assert net.theta.get().tobytes() == before
    with pytest.raises(Diverged):
        trainer.save("never.safetensors")


def test_ten_runs_give_one_hash(gpu):
    ends = set()
    for run in range(10):
        streams.Order.lagging = LAGS[run % len(LAGS)]
        ends.add(trained()[0])
        streams.Order.lagging = ""
    assert len(ends) == 1
