"""In steady state a training step makes no new array of batch × width, nor of θ's size, on the CPU at full precision.

Measured with tracemalloc, which sees every NumPy buffer: the peak over several steps stays below the smallest such
array. The 16-bit precisions are left out: their products on a CPU go through float32 copies, as `numpy_ops` says.
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc

import helpers  # noqa: F401  (one BLAS thread)
import numpy as np
import pytest

from gpu_mlp import EMA, L2, LBFGS, MLP, SGD, Adam, ElasticNet, Trainer, activations, losses, optimizers, progress
from gpu_mlp.feeding import Resident
from gpu_mlp.ops.numpy_ops import BLOCK

# Every hidden batch × width and θ are several times the blocks that elementwise passes work through.
LARGE = {"sizes": [96, 256, 320, 10], "batch": 512}
# And here a whole batch is less than one block.
SMALL = {"sizes": [40, 96, 104, 10], "batch": 96}


@pytest.fixture(autouse=True)
def _small_ufunc_buffers():
    """NumPy's ufuncs convert and broadcast through buffers of their own, 8192 elements each; here they hardly count."""
    before = np.setbufsize(512)
    yield
    np.setbufsize(before)


def smallest_array(sizes, batch, dtype=np.float32):
    """Bytes of the smallest of batch × hidden width and θ."""
    theta = sum(m * (n + 1) for n, m in zip(sizes, sizes[1:]))
    return min([theta, *(batch * n for n in sizes[1:-1])]) * np.dtype(dtype).itemsize


def hardly_more(sizes, batch, dtype=np.float32):
    """Bytes of the smallest of all these and batch × outputs: what fits is a few numbers a sample, and no matrix.

    And 4 KiB for the small objects that Python itself makes.
    """
    return min(smallest_array(sizes, batch, dtype), batch * sizes[-1] * np.dtype(dtype).itemsize) + 4096


def peak_of(run):
    """Bytes that were allocated at the worst moment within ``run()`` beyond those at its start."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def problem(sizes, batch, output="softmax", dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, sizes[0])).astype(dtype)
    y = rng.integers(0, sizes[-1], batch) if output in ("softmax", "log_softmax") else rng.random((batch, sizes[-1]))
    return x, y if y.ndim == 1 else y.astype(dtype)


def trainer_of(sizes, activation="relu", output="softmax", dropout=0.0, precision="float32", **options):
    net = MLP(sizes, activation, output, dropout=dropout, precision=precision)
    return Trainer(net, **options)


def step_peak(trainer, sizes, batch, sample_weight=None, dtype=np.float32):
    x, y = problem(sizes, batch, trainer.net.output, dtype)
    for _ in range(3):
        trainer.step(x, y, sample_weight)
    return peak_of(lambda: [float(trainer.step(x, y, sample_weight)) for _ in range(2)])


def rules():
    for name, rule in optimizers.OPTIMIZERS.items():
        if name != "lbfgs":
            yield rule()
    yield SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)
    yield Adam(amsgrad=True, weight_decay=0.1)
    yield optimizers.RMSprop(lr=1e-3, centered=True, momentum=0.5)


@pytest.mark.parametrize("rule", [*rules()], ids=repr)
def test_step_with_every_optimizer(rule):
    limit = smallest_array(**LARGE)
    assert limit > 4 * BLOCK * 4  # far above one block
    assert step_peak(trainer_of(LARGE["sizes"], optimizer=rule), **LARGE) < hardly_more(**LARGE)


@pytest.mark.parametrize(
    ("activation", "output"),
    [
        *zip(sorted(activations.ACTIVATIONS), itertools.cycle(["softmax", "identity", "sigmoid"])),
        *(("relu", output) for output in ["log_softmax", "exp", "gelu", "tanh"]),
    ],
)
def test_step_with_activations(activation, output):
    assert step_peak(trainer_of(LARGE["sizes"], activation, output), **LARGE) < hardly_more(**LARGE)


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_step_with_every_loss(loss):
    output = {"cross_entropy": "softmax", "nll": "log_softmax", "poisson": "exp", "binary_cross_entropy": "sigmoid"}
    trainer = trainer_of(LARGE["sizes"], output=output.get(loss, "identity"), loss=loss)
    if loss == "hinge":
        x, y = problem(**LARGE)
        trainer.step(x, y)
        assert peak_of(lambda: trainer.step(x, y)) < hardly_more(**LARGE)
    else:
        assert step_peak(trainer, **LARGE) < hardly_more(**LARGE)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.1},
        {"regularizer": ElasticNet(1e-4, 1e-4)},
        {"regularizer": L2(1e-4, on="all"), "optimizer": "sgd"},
        {"accumulate": 4},
        {"accumulate": 3, "clip_norm": 0.1, "regularizer": L2(1e-4), "optimizer": "muon"},
        {"optimizer": "sgd", "apply_at_once": False},
        {"optimizer": "sgd", "apply_at_once": True},
        {"schedule": "inverse_scaling"},
        {"average": EMA()},
        {"loss": losses.CrossEntropy(label_smoothing=0.1, class_weight=np.arange(1.0, 11).tolist())},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [LARGE, SMALL], ids=["large", "small"])
def test_step_with_options(options, case):
    micro_batches = options.get("accumulate", 1)
    trainer = trainer_of(case["sizes"], **options)
    assert step_peak(trainer, case["sizes"], micro_batches * case["batch"]) < smallest_array(**case)


@pytest.mark.parametrize("activation", ["relu", "gelu", "softmax"])
@pytest.mark.parametrize("rule", ["sgd", "adam", "muon", SGD(lr=0.01, momentum=0.9)], ids=str)
def test_step_on_a_batch_smaller_than_a_block(activation, rule):
    assert SMALL["batch"] * max(SMALL["sizes"]) < BLOCK
    assert step_peak(trainer_of(SMALL["sizes"], activation, optimizer=rule), **SMALL) < smallest_array(**SMALL)


def test_step_with_dropout():
    """The random numbers are made block by block: what they need does not grow with the batch."""
    trainer = trainer_of(LARGE["sizes"], ["relu", "gelu"], dropout=0.3)
    peak = step_peak(trainer, **LARGE)
    assert peak < smallest_array(**LARGE)
    assert step_peak(trainer, LARGE["sizes"], 4 * LARGE["batch"]) < peak + 16 * 3 * LARGE["batch"]  # numbers a sample


def test_step_with_sample_weights():
    w = np.random.default_rng(0).random(LARGE["batch"])
    assert step_peak(trainer_of(LARGE["sizes"]), **LARGE, sample_weight=w) < hardly_more(**LARGE)


def test_step_in_float64():
    trainer = trainer_of(LARGE["sizes"], precision="float64", optimizer="adam")
    assert step_peak(trainer, **LARGE, dtype=np.float64) < hardly_more(**LARGE, dtype=np.float64)


def test_memory_is_flat_over_many_steps():
    trainer = trainer_of(SMALL["sizes"], dropout=0.2, regularizer=L2(1e-4), clip_norm=1.0)
    x, y = problem(**SMALL)
    levels = []
    tracemalloc.start()
    try:
        for _ in range(4):
            for _ in range(60):
                trainer.step(x, y)
            gc.collect()
            levels.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # Python keeps some freed objects for later, and a batch of samples is the least that a step could hold back
    assert levels[-1] - levels[1] < 120 * SMALL["batch"]


# --- inside fit --------------------------------------------------------------------------------------------------


class Watch:
    """Stands in for the progress display, whose ``advance`` comes after every step, to read the memory between steps.

    ``peaks`` holds one number a step from the second step of each epoch on: what its minibatch and update needed beyond
    what was allocated before.
    """

    def __init__(self, *arguments, **options):
        Watch.last = self
        self.peaks, self.levels, self._before = [], [], None

    def advance(self, rows):
        peak = tracemalloc.get_traced_memory()[1]
        if self._before is not None:
            self.peaks.append(peak - self._before)
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]

    def end_epoch(self, figures):
        self._before = None
        self.levels.append(tracemalloc.get_traced_memory()[0])

    def close(self):
        pass


def fit_watch(monkeypatch, trainer, dataset, batch, epochs=2, **options):
    """The memory of a run, its first epoch left out."""
    monkeypatch.setattr("gpu_mlp.fitting.Progress", Watch)
    trainer.fit(dataset, epochs=1, batch_size=batch, progress=False, **options)
    tracemalloc.start()
    try:
        trainer.fit(dataset, epochs=epochs, batch_size=batch, progress=False, **options)
    finally:
        tracemalloc.stop()
    steps = -(-len(dataset[0]) // batch)
    assert len(Watch.last.peaks) == epochs * (steps - 1)
    return Watch.last


def rows_of(case, n, output="softmax"):
    return problem(case["sizes"], n, output)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "sgd"},
        {"optimizer": "adamw", "clip_norm": 1.0},
        {"optimizer": SGD(lr=0.01, momentum=0.9), "accumulate": 2, "regularizer": L2(1e-4)},
        {"dropout": 0.2, "activation": "gelu"},
        {"output": "sigmoid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_of_fit(monkeypatch, options, shuffle):
    trainer = trainer_of(LARGE["sizes"], **options)
    x, y = rows_of(LARGE, 3 * LARGE["batch"] - 100, trainer.net.output)
    watch = fit_watch(monkeypatch, trainer, (x, y), LARGE["batch"], shuffle=shuffle)
    limit = smallest_array(LARGE["sizes"], LARGE["batch"] // trainer.accumulate)
    assert max(watch.peaks) < limit


@pytest.mark.parametrize(
    "kind",
    ["float64", "float32", "uint8", "F-order float32", "F-order float64", "every other row", "every other column"],
)
def test_steps_of_fit_whatever_x_is(monkeypatch, kind):
    """A step gathers its rows and no more, however x is stored: a table is not copied again for every minibatch."""
    sizes, batch = [640, 256, 10], 256
    n = 4 * batch
    rng = np.random.default_rng(0)
    whole = rng.random((2 * n, 2 * sizes[0])).astype(np.float32)
    x = whole[:n, : sizes[0]].copy()
    x = {
        "float64": lambda: x.astype(np.float64),
        "float32": lambda: x,
        "uint8": lambda: (x * 255).astype(np.uint8),
        "F-order float32": lambda: np.asfortranarray(x),
        "F-order float64": lambda: np.asfortranarray(x.astype(np.float64)),
        "every other row": lambda: whole[::2, : sizes[0]],
        "every other column": lambda: whole[:n, ::2],
    }[kind]()
    trainer = trainer_of(sizes)
    watch = fit_watch(monkeypatch, trainer, (x, rng.integers(0, 10, n)), batch)
    assert max(watch.peaks) < smallest_array(sizes, batch)


def test_memory_of_a_run_does_not_grow_with_its_epochs(monkeypatch):
    trainer = trainer_of(SMALL["sizes"])
    x, y = rows_of(SMALL, 3 * SMALL["batch"])
    watch = fit_watch(monkeypatch, trainer, (x, y), SMALL["batch"], epochs=40, validation=(x[:50], y[:50]))
    assert watch.levels[-1] - watch.levels[9] < 30 * 2000  # one row of the history an epoch, and no array


def test_prediction_of_many_rows_takes_them_in_chunks(monkeypatch):
    """forward on a large x needs the output, and buffers for a chunk of it alone."""
    monkeypatch.setattr("gpu_mlp.network.CHUNK_ROWS", 256)
    net = MLP([20, 256, 10], output="softmax")
    x = np.random.default_rng(0).normal(size=(20_000, 20)).astype(np.float32)
    net.forward(x)
    hidden = x.shape[0] * 256 * 4
    assert peak_of(lambda: net.forward(x)) < x.shape[0] * 10 * 4 + hidden / 10


# --- the measuring itself ----------------------------------------------------------------------------------------


def test_the_measure_sees_an_array_of_that_size():
    limit = smallest_array(**LARGE)
    assert peak_of(lambda: np.empty(limit, np.uint8) is None) >= limit
    assert peak_of(lambda: None) < 1000


@pytest.mark.parametrize("operation", ["affine_activation", "input_gradient", "weight_gradient", "update"])
@pytest.mark.parametrize("case", [LARGE, SMALL], ids=["large", "small"])
def test_a_step_that_copies_would_be_caught(monkeypatch, operation, case):
    trainer = trainer_of(case["sizes"], optimizer="adam", graph=False)  # a step that is replayed calls no operation
    honest = getattr(trainer.net._ops, operation)

    def copying(*arguments):
        result = honest(*arguments)
        arrays = [a for a in arguments if isinstance(a, np.ndarray) and a.nbytes >= smallest_array(**case)]
        for array in arrays:
            array.copy()
        assert arrays or operation != "update"
        return result

    monkeypatch.setattr(trainer.net._ops, operation, copying)
    assert step_peak(trainer, **case) >= smallest_array(**case)


def test_a_run_that_copies_would_be_caught(monkeypatch):
    trainer = trainer_of(LARGE["sizes"])
    honest = Resident.epoch

    def copying(feed, order, first=0):
        for piece in honest(feed, order, first):
            np.ones((LARGE["batch"], 256), np.float32)
            yield piece

    monkeypatch.setattr(Resident, "epoch", copying)
    x, y = rows_of(LARGE, 3 * LARGE["batch"])
    assert max(fit_watch(monkeypatch, trainer, (x, y), LARGE["batch"]).peaks) >= smallest_array(**LARGE)


def test_progress_and_lbfgs_are_where_this_file_takes_them_to_be():
    assert {"advance", "end_epoch", "close"} <= set(dir(progress.Progress))
    assert LBFGS().moments == ()
