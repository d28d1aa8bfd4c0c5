"""What ranks that train together gain over one, and what it costs: samples per second, bucket by bucket.

    mpiexec -n 2 python -m mpi4py benchmarks/parallel.py                   # 2 ranks with one BLAS thread each
    mpiexec -n 1 python -m mpi4py benchmarks/parallel.py --device cuda     # what the whole path adds on one GPU

Every way takes its turn in every round: one rank alone, with the others asleep, then all ranks in each way. A ratio is
taken within a round, and its median is what is told. Set OMP_NUM_THREADS for other threads a rank than one; on a CPU
the cores should be idle, for ranks wait for each other.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is imported

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpu_mlp import MLP, Parallel, Trainer, optimizers
from gpu_mlp.ops.interface import Slot
from gpu_mlp.parallel import ranks

BUCKETS = [1 << 18, 1 << 20, 1 << 22, 1 << 24]


def ways(buckets: list[int], precision: str) -> dict[str, Parallel]:
    """What is measured beside one rank alone."""
    found = {f"buckets of {size >> 10} KiB": Parallel(bucket_bytes=size) for size in buckets}
    found["one bucket"] = Parallel(bucket_bytes=1 << 62)
    found["sharded"] = Parallel(shard_optimizer=True)
    found["bfloat16 between ranks"] = Parallel(wire="bfloat16")
    return found


def trainer(chosen: argparse.Namespace, parallel: Parallel | bool) -> Trainer:
    """A trainer of its own, on weights of its own."""
    sizes = [int(size) for size in chosen.sizes.split(",")]
    net = MLP(sizes, "relu", "softmax", precision=chosen.precision, device=chosen.device)
    return Trainer(net, optimizer=optimizers.get(chosen.optimizer), parallel=parallel)


def timed(trained: Trainer, x: Any, y: Any, steps: int) -> float:
    """Seconds of so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        cost = trained.step(x, y)
    float(cost)  # waits for the device
    return time.perf_counter() - start


def summed(trained: Trainer, sums: int) -> float:
    """Seconds of so many sums of the gradient over the ranks, with nothing to compute meanwhile."""
    reduction, state = trained._update.reduction, trained._state
    assert reduction is not None
    trained._update.g[...] = 0  # what is summed up again and again does not grow
    start = time.perf_counter()
    for _ in range(sums):
        reduction.begin(0)
        reduction.finish(state)
    trained.net._ops.read_state(state, Slot.COST)  # waits for the device
    return time.perf_counter() - start


def updated(trained: Trainer, updates: int) -> float:
    """Seconds of so many updates without a pass before them."""
    trained._update._early = []  # nothing has been updated within a backward pass
    start = time.perf_counter()
    for _ in range(updates):
        trained._update.apply()
    trained.net._ops.read_state(trained._state, Slot.COST)
    return time.perf_counter() - start


def asleep(us: ranks.Ranks) -> None:
    """Wait for every rank without keeping a processor busy."""
    if isinstance(us, ranks.MPIRanks):
        here = us.comm.Ibarrier()
        while not here.Test():
            time.sleep(0.002)


def main() -> None:
    """Measure, and tell on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1024,1024,1024,10")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2, help="of a sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--buckets", default=",".join(map(str, BUCKETS)), help="bytes")
    parser.add_argument("--out", type=Path, help="JSON file for the samples")
    chosen = parser.parse_args()

    us = ranks.join(True)
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in chosen.sizes.split(",")]
    x = rng.normal(size=(chosen.batch, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], chosen.batch)
    alone = trainer(chosen, False)
    if us.first:
        x, y = alone.net._ops.to_device(x), alone.net._ops.to_device(y)
        timed(alone, x, y, 3)
    asleep(us)
    if not us.first:
        x, y = alone.net._ops.to_device(x), alone.net._ops.to_device(y)
    found = ways([int(size) for size in chosen.buckets.split(",")], chosen.precision)
    trained = {name: trainer(chosen, parallel) for name, parallel in found.items()}
    for each in trained.values():
        timed(each, x, y, 3)
    seconds: dict[str, list[float]] = {name: [] for name in ("alone", *trained)}
    sums: dict[str, list[float]] = {name: [] for name in trained if name != "sharded"}
    updates: list[float] = []
    for _ in range(chosen.rounds):
        asleep(us)
        if us.first:
            seconds["alone"].append(timed(alone, x, y, chosen.steps))
            updates.append(updated(alone, chosen.steps))
        asleep(us)
        for name, each in trained.items():
            us.barrier()
            seconds[name].append(timed(each, x, y, chosen.steps))
        for name, taken in sums.items():
            us.barrier()
            taken.append(summed(trained[name], chosen.steps))
    if us.first:
        tell(us.size, chosen, seconds, {"sums": sums, "updates": updates})


def tell(size: int, chosen: argparse.Namespace, seconds: dict[str, list[float]], parts: dict[str, Any]) -> None:
    """The table, and the file: every sample in seconds of ``steps`` steps, sums or updates."""
    rows = chosen.batch * chosen.steps
    print(
        f"{chosen.sizes.replace(',', '-')} at {chosen.batch}, {chosen.optimizer}, {chosen.precision}, {chosen.device}"
    )
    threads = os.environ["OMP_NUM_THREADS"] if chosen.device == "cpu" else "-"
    print(f"{size} ranks, BLAS threads of each: {threads}; {chosen.rounds} rounds of {chosen.steps} steps\n")
    print(f"{'way':<26} {'step, ms':>9} {'samples/s':>10} {'over alone':>11}")
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["alone"], taken))
        median = statistics.median(taken)
        print(f"{name:<26} {median / chosen.steps * 1e3:>9.1f} {rows / median:>10.0f} {ratio:>11.3f}")
    if chosen.out is not None:
        record = {**vars(chosen), "out": str(chosen.out), "ranks": size, "seconds": seconds, **parts}
        chosen.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
