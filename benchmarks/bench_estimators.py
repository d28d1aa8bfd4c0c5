"""An epoch of MLPClassifier against one of scikit-learn's on the CPU: the same data, parameters and random state.

    pytest benchmarks/bench_estimators.py

Fashion-MNIST in float32 where it is installed, otherwise made-up data of its shape; hidden layers of 256 and 128,
batches of 256. Both fit in turn; prints the median seconds of an epoch, with what comes before it, and fails where
scikit-learn's is less than 1.5 times ours.
"""

from __future__ import annotations

import statistics
import time
import warnings

import numpy as np
import pytest

import gpu_mlp
from gpu_mlp import data

neural_network = pytest.importorskip("sklearn.neural_network")
ROUNDS, LIMIT = 7, 1.5
PAUSE = 0.3  # seconds; the threads of a BLAS look out for work for some time after their last product, and who comes
# next is not to be charged with it
PARAMETERS = {"hidden_layer_sizes": (256, 128), "batch_size": 256, "max_iter": 1, "random_state": 0}


def training_data() -> tuple[str, np.ndarray, np.ndarray]:
    """x, (60000, 784) float32 in [0, 1], and y, (60000,) labels."""
    try:
        raw = data.load("fashion-mnist")
    except FileNotFoundError:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (60000, 784), np.uint8), rng.integers(0, 10, 60000)
        return "made-up data", (x / np.float32(255)), y
    return "Fashion-MNIST", raw.x.reshape(len(raw.x), -1).astype(np.float32) / np.float32(255), np.asarray(raw.y)


def seconds(estimator: object, x: np.ndarray, y: np.ndarray) -> float:
    """The time of one fit, of one epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one epoch does not converge
        time.sleep(PAUSE)
        started = time.perf_counter()
        estimator.fit(x, y)
        return time.perf_counter() - started


def test_an_epoch_of_fashion_mnist(benchmark):
    name, x, y = training_data()
    ours, theirs = gpu_mlp.MLPClassifier(**PARAMETERS), neural_network.MLPClassifier(**PARAMETERS)
    seconds(ours, x[:5000], y[:5000]), seconds(theirs, x[:5000], y[:5000])
    pairs = [(seconds(theirs, x, y), seconds(ours, x, y)) for _ in range(ROUNDS)]
    figures = {
        "sklearn": statistics.median(a for a, _ in pairs),
        "gpu_mlp": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }
    assert ours.loss_ == pytest.approx(theirs.loss_, rel=1e-3), "they do not compute the same"
    benchmark.extra_info.update({key: round(value, 4) for key, value in figures.items()})
    benchmark.pedantic(lambda: seconds(ours, x, y), rounds=1, iterations=1)
    print(
        f"\n{name}: an epoch takes scikit-learn {figures['sklearn']:.2f} s and this library "
        f"{figures['gpu_mlp']:.2f} s, {figures['ratio']:.2f} times (medians of {ROUNDS} in turn)"
    )
    assert figures["ratio"] >= LIMIT
