"""What `test_parallel.py` starts under mpiexec: scenes of ranks that train together, one a launch.

    mpiexec -n 2 python -m mpi4py tests/parallel_program.py SCENE FOLDER

A scene leaves what it found in FOLDER, as SCENE-RANKS.npz or .json, or fails; on one rank it leaves what the others are
compared with, trained without any ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from gpu_mlp import (
    EMA,
    L2,
    LBFGS,
    MLP,
    SGD,
    Adam,
    Checkpoints,
    CrossEntropy,
    CSVLog,
    EarlyStopping,
    ElasticNet,
    Muon,
    Parallel,
    ReduceOnPlateau,
    Stream,
    Trainer,
)
from gpu_mlp.ops.interface import Slot
from gpu_mlp.parallel import ranks

ROWS, BATCH, EPOCHS = 242, 60, 10  # 50 steps; the last batch of an epoch has 2 rows, fewer than three ranks
RULES = {"sgd": SGD(0.05, momentum=0.9), "adam": Adam(0.01), "muon": Muon(0.01)}
NO_WEIGHTS, WEIGHTS = False, True
FEATURES = {
    "plain": (NO_WEIGHTS, {}),
    "weights": (WEIGHTS, {}),
    "dropout": (NO_WEIGHTS, {"dropout": 0.3}),
    "accumulate": (NO_WEIGHTS, {"accumulate": 3, "dropout": 0.3}),
    "clip": (NO_WEIGHTS, {"clip_norm": 0.3}),
    "penalty": (NO_WEIGHTS, {"regularizer": ElasticNet(1e-3, 1e-2, on="all")}),
    "class weights": (NO_WEIGHTS, {"loss": CrossEntropy(class_weight=(1.0, 2.0, 0.5, 1.0, 3.0))}),
    "all": (
        WEIGHTS,
        {"dropout": 0.3, "accumulate": 2, "clip_norm": 0.3, "regularizer": L2(1e-2), "average": EMA(0.9)},
    ),
}
SHARDED = ("dropout", "clip", "penalty")  # the features that are tried on slices by themselves too
ONE_LAYER = 1  # byte: a bucket ends with every layer
WAYS = {
    "one bucket": Parallel(bucket_bytes=1 << 30),
    "a bucket a layer": Parallel(bucket_bytes=ONE_LAYER),
    "sharded": Parallel(shard_optimizer=True, bucket_bytes=1 << 30),
    "sharded, a bucket a layer": Parallel(shard_optimizer=True, bucket_bytes=ONE_LAYER),
}


def problem(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and weights, some of which are 0."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, 20))
    return x, (x[:, :5] + rng.normal(size=(rows, 5))).argmax(axis=1), rng.integers(0, 3, rows) / 2


def network(dropout: float = 0.0, precision: str = "float64", device: str = "cpu") -> MLP:
    return MLP(
        [20, 40, 31, 5],
        activation="tanh",
        output="softmax",
        dropout=dropout,
        precision=precision,
        seed=4,
        device=device,
    )


def trained(
    rule, parallel, weighted=NO_WEIGHTS, dropout=0.0, precision="float64", device="cpu", epochs=EPOCHS, **options
):
    """(θ and the averaged θ, the trainer, the history) of a fit of 50 steps, where nothing else is said."""
    x, y, w = problem()
    trainer = Trainer(network(dropout, precision, device), optimizer=rule, parallel=parallel, **options)
    data = (x, y, w) if weighted else (x, y)
    history = trainer.fit(data, epochs, BATCH, validation=(x[:50], y[:50]), progress=False)
    ops = trainer.net._ops
    theta = [trainer.net._theta] if trainer._averaged is None else [trainer.net._theta, trainer._averaged]
    return np.concatenate([ops.to_host(part) for part in theta]), trainer, history


def digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes()).hexdigest()


def together(us: ranks.Ranks, array: np.ndarray, what: str) -> None:
    """Fail where the ranks do not have the same bits."""
    assert len(set(us.texts(digest(array)))) == 1, f"{what}: the ranks have other bits"


def steps(us: ranks.Ranks, folder: Path) -> None:
    """Every rule with every feature: θ after 50 steps, and the figures of every epoch."""
    found = {}
    for name, rule in RULES.items():
        for feature, (weighted, options) in FEATURES.items():
            alone = None
            if us.size == 1:
                theta, _, history = trained(rule, False, weighted, **options)
                found[f"{name}, {feature}"], alone = theta, theta
                found[f"{name}, {feature}: figures"] = figures(history)
            one = "sharded, a bucket a layer" if feature in SHARDED else "a bucket a layer"
            for way in WAYS if feature == "all" else (one,):
                theta, _, history = trained(rule, WAYS[way], weighted, **options)
                what = f"{name}, {feature}, {way}"
                together(us, theta, what)
                found[what], found[f"{what}: figures"] = theta, figures(history)
                if alone is not None and "sharded" not in way:  # a norm of slices is rounded in another order
                    assert theta.tobytes() == alone.tobytes(), f"{what}: other bits than without ranks"
        weighted, options = FEATURES["all"]
        again, _, _ = trained(rule, WAYS["a bucket a layer"], weighted, **options)
        assert again.tobytes() == found[f"{name}, all, a bucket a layer"].tobytes(), f"{name}: other bits when repeated"
    save(us, folder, "steps", found)


def figures(history) -> np.ndarray:
    columns = ("cost", "validation_loss", "validation_accuracy")
    return np.array([[row[column] for column in columns] for row in history])


def save(us: ranks.Ranks, folder: Path, scene: str, found: dict) -> None:
    if us.first:
        np.savez(folder / f"{scene}-{us.size}.npz", **found)


def more(us: ranks.Ranks, folder: Path) -> None:
    """What is not a rule with a feature: single steps, streams, stops, loss scales, wires, L-BFGS, evaluation."""
    found: dict[str, np.ndarray] = {}
    parallel = us.size > 1 and Parallel(bucket_bytes=ONE_LAYER)
    x, y, w = problem()

    trainer = Trainer(network(0.2), optimizer=Adam(0.01), parallel=parallel)
    for step in range(50):
        rows = np.random.default_rng(step).permutation(ROWS)[: 1 + 13 * step % 70]
        cost = float(trainer.step(x[rows], y[rows], w[rows] if step % 2 else None))
    found["a loop of steps"] = np.append(trainer.net.theta, cost)
    found["evaluate"] = np.array([*trainer.evaluate(x, y).values()])

    trainer = Trainer(network(), optimizer=SGD(0.1), parallel=parallel, schedule=ReduceOnPlateau(patience=1))
    stops = EarlyStopping(patience=3)
    log = folder / f"log-{us.size}.csv"
    history = trainer.fit(
        (x, y), 200, BATCH, validation=0.3, progress=False, early_stopping=stops, callbacks=[CSVLog(log)]
    )
    found["early stopping"], found["epochs"] = trainer.net.theta, np.array([len(history)])
    if us.first:
        assert len(log.read_text().splitlines()) == 1 + len(history)

    values = np.stack([x[:, 0] * 3, x[:, 1] ** 2], axis=1)
    net = MLP([20, 16, 2], activation="tanh", precision="float64", seed=1, device="cpu")
    trainer = Trainer(net, optimizer="adam", parallel=parallel)
    history = trainer.fit((x, values), 3, BATCH, validation=(x[:53], values[:53], w[:53]), progress=False)
    found["regression"] = np.array([history.last[f"validation_{name}"] for name in ("loss", "rmse", "r2")])

    net = MLP([20, 16, 5], activation="tanh", output="softmax", precision="float64", seed=1, device="cpu")
    Trainer(net, optimizer=LBFGS(), regularizer=L2(1e-2), parallel=parallel).fit((x, y, w), 8, progress=False)
    found["lbfgs"] = net.theta

    trainer = Trainer(network(precision="float32"), optimizer=SGD(0.1), parallel=parallel)
    history = trainer.fit(Stream(folder / "stream", memory="8MiB", buffer_rows=64, chunk_rows=16), 4, 50, 0.2, False)
    together(us, trainer.net.theta, "stream")
    found["stream"] = trainer.net.theta
    found["stream figures"] = figures(history)

    theta, trainer, _ = trained(SGD(0.5), parallel, precision="float16", clip_norm=1.0)
    together(us, theta, "float16")
    found["float16"] = theta
    ops, state = trainer.net._ops, trainer._state
    found["loss scale"] = np.array([ops.read_state(state, slot) for slot in (Slot.LOSS_SCALE, Slot.SKIPPED, Slot.STEP)])

    if us.size > 1:
        for sharded in (False, True):
            narrow = Parallel(sharded, "bfloat16", ONE_LAYER)
            theta, _, _ = trained(RULES["adam"], narrow)
            together(us, theta, "bfloat16 on the wire")
            again, _, _ = trained(RULES["adam"], narrow)
            assert again.tobytes() == theta.tobytes()
            found[f"narrow {sharded}"] = theta
        trainer = Trainer(network(), optimizer=Adam(), parallel=Parallel(shard_optimizer=True))
        held = sum(moment.size for moment in trainer.moments.values())
        assert held <= 2 * (trainer.net.layout.size // us.size + 64 * len(trainer.net.sizes)), (
            "the moments are not shared"
        )
    else:
        found["narrow False"] = found["narrow True"] = trained(RULES["adam"], False)[0]
    save(us, folder, "more", found)


def gpu(us: ranks.Ranks, folder: Path) -> None:
    """The same on emulated GPUs, with all streams but the null stream late: θ, with and without graphs."""
    sys.path.insert(0, str(Path(__file__).parent))
    from cuda_on_cpu import as_cupy, streams

    streams.Order.lagging = "side"
    warnings.simplefilter("error")
    found = {}
    options = {"dropout": 0.2, "clip_norm": 0.5, "regularizer": L2(1e-3), "precision": "float32", "device": "cuda"}
    options["epochs"] = 2
    for name, rule in {"adam": Adam(0.01), "muon": Muon(0.01)}.items():
        alone = trained(rule, False, **options)[0] if us.size == 1 else None
        if alone is not None:
            found[name] = alone
        for way, parallel in WAYS.items():
            for graph in (None, False) if parallel.bucket_bytes == ONE_LAYER else (None,):
                theta, _, _ = trained(rule, parallel, graph=graph, **options)
                together(us, theta, f"{name}, {way}, graph {graph}")
                if alone is not None:
                    assert theta.tobytes() == alone.tobytes(), f"{name}, {way}, graph {graph}: other bits on one rank"
                found[f"{name}, {way}, {graph}"] = theta
        theta, _, _ = trained(rule, Parallel(True, "bfloat16", ONE_LAYER), **options)
        together(us, theta, "bfloat16 on the wire")
        found[f"{name}, narrow"] = theta
    found["collectives"] = np.array([as_cupy.fake_cupy.device.counts["collectives"]])
    save(us, folder, "gpu", found)


def run(us: ranks.Ranks, folder: Path) -> None:
    """A run with checkpoints that a signal to one rank ends: FOLDER RANK SIGNAL STEP SHARDED; 0 for none."""
    rank, number, step, sharded = map(int, sys.argv[3:7])
    x, y, w = problem()
    parallel = Parallel(bool(sharded), bucket_bytes=ONE_LAYER) if us.size > 1 else False
    trainer = Trainer(network(0.3), optimizer=Adam(0.01), average=EMA(0.9), parallel=parallel, schedule="cosine")
    honest = trainer._step

    def watched(*arguments) -> None:
        honest(*arguments)
        if trainer.rounds == step and us.rank == rank:
            if number == 0:
                raise ZeroDivisionError(f"a callback of rank {rank}")
            os.kill(os.getpid(), number)

    trainer._step = watched
    resumes = folder / "checkpoints"
    history = trainer.fit(
        (x, y, w), EPOCHS, BATCH, validation=(x[:50], y[:50]), progress=False, resume=True,
        checkpoints=Checkpoints(resumes, "4 steps"), callbacks=[],
    )  # fmt: skip
    together(us, trainer.net.theta, "run")
    if us.first:
        record = {"stopped": history.stopped, "rounds": trainer.rounds, "cost": history["cost"]}
        (folder / "end.json").write_text(json.dumps(record))
        np.save(folder / "theta.npy", trainer.net.theta)


def differ(us: ranks.Ranks, folder: Path) -> None:
    """Ranks that were started with other options."""
    x, y, _ = problem()
    Trainer(network(), optimizer=Adam(0.01 if us.first else 0.02)).fit((x, y), 1, BATCH, progress=False)


if __name__ == "__main__":
    scene = {"steps": steps, "more": more, "gpu": gpu, "run": run, "differ": differ}[sys.argv[1]]
    scene(ranks.join(True), Path(sys.argv[2]))
