"""An epoch of MLPClassifier against one of scikit-learn's on the CPU: the same data, parameters and random state.

Fashion-MNIST in float32 where it is installed, otherwise made-up data of its shape; hidden layers of 256 and 128,
batches of 256. Both fit in turn, data checks and all that comes before an epoch included, and must end at one loss.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np

import gpu_mlp
from gpu_mlp import data
from gpu_mlp.bench import timing
from gpu_mlp.bench.records import Records

ROUNDS = 7
PARAMETERS = {"hidden_layer_sizes": (256, 128), "batch_size": 256, "max_iter": 1, "random_state": 0}
SAME = 1e-3  # of the loss


def measure(records: Records, rows: int | None = None, rounds: int = ROUNDS) -> None:
    """The one record of this part."""
    name, x, y = training_data()
    x, y = x[:rows], y[:rows]
    told: dict[str, Any] = {"data": name, "rows": len(x), "parameters": {**PARAMETERS}}
    if records.done("an epoch"):
        return
    try:
        from sklearn import neural_network
    except ImportError:
        records.add("an epoch", **told, absent={"scikit-learn": "scikit-learn is not installed"})
        return
    ours, theirs = gpu_mlp.MLPClassifier(**PARAMETERS, device="cpu"), neural_network.MLPClassifier(**PARAMETERS)
    seconds(ours, x[:5000], y[:5000]), seconds(theirs, x[:5000], y[:5000])
    pairs = [(seconds(theirs, x, y), seconds(ours, x, y)) for _ in range(rounds)]
    if not abs(ours.loss_ - theirs.loss_) <= SAME * abs(theirs.loss_):
        records.add("an epoch", **told, wrong={"gpu_mlp": f"loss {ours.loss_}, scikit-learn's {theirs.loss_}"})
        return
    if not records.rehearsal:
        told["contenders"] = {
            "gpu_mlp": timing.spread([b for _, b in pairs]), "scikit-learn": timing.spread([a for a, _ in pairs])
        }  # fmt: skip
        told["over_ours"] = {"scikit-learn": timing.ratios([a for a, _ in pairs], [b for _, b in pairs])}
    records.add("an epoch", **told)


def training_data() -> tuple[str, np.ndarray, np.ndarray]:
    """x, (60000, 784) float32 in [0, 1], and y, (60000,) labels."""
    try:
        raw = data.load("fashion-mnist")
    except FileNotFoundError:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (60000, 784), np.uint8), rng.integers(0, 10, 60000)
        return "made-up data", (x / np.float32(255)), y
    return "Fashion-MNIST", raw.x.reshape(len(raw.x), -1).astype(np.float32) / np.float32(255), np.asarray(raw.y)


def seconds(estimator: Any, x: np.ndarray, y: np.ndarray) -> float:
    """The time of one fit, of one epoch."""
    timing.settle()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one epoch does not converge
        started = time.perf_counter()
        estimator.fit(x, y)
        return time.perf_counter() - started
