"""How fast data larger than memory reaches the training, against reading its file from end to end.

    python benchmarks/stream_throughput.py --gigabytes 20 --memory 1GiB

writes a synthetic float32 set (`gpu-mlp make-data`), then takes in turn, in a process of its own each:

    read     the bytes of the set, file after file, in blocks of 1 MiB into one buffer
    feed     every row through the buffers of `Stream` in shuffled order, into minibatches, without a network
    train    an epoch of `Trainer.fit` with a linear network of one output, so that the input is what there is to do

Cold: before each the files are put out of the page cache (posix_fadvise, DONTNEED); warm: the set has just been read.
Feed and train run with what they may allocate limited to --memory (RLIMIT_DATA), and print their peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from gpu_mlp import MLP, SGD, Stream, Trainer, checks
from gpu_mlp.synthetic import Synthetic, write

BATCH, PROGRAM = 4096, 320 << 20  # rows of a minibatch; bytes of --memory that are not the buffers'


def read(folder: Path, memory: int) -> int:
    """All bytes of the set; how many."""
    block, total = np.empty(1 << 20, np.uint8), 0
    for path in sorted(folder.glob("*.npy")):
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the system reads further ahead
            while count := file.readinto(block):
                total += count
    return total


def feed(folder: Path, memory: int) -> int:
    """Every row once, in minibatches; the bytes of them."""
    stream = Stream(folder, memory=memory - PROGRAM)
    ahead = stream.ahead()
    outs = [np.empty((BATCH, *part.shape[1:]), part.dtype) for part in ahead.like if part is not None]
    ahead.begin(stream.order(0, 0))
    for cursor in range(0, stream.n, BATCH):
        rows = min(BATCH, stream.n - cursor)
        ahead.take(cursor, [*(out[:rows] for out in outs), None])
    ahead.close()
    return stream.n * sum(out[:1].nbytes for out in outs)


def train(folder: Path, memory: int) -> int:
    """An epoch; the bytes of its rows."""
    stream = Stream(folder, memory=memory - PROGRAM)
    net = MLP([stream.width, 1], output="identity", device="cpu")
    Trainer(net, optimizer=SGD(lr=0.01)).fit(stream, epochs=1, batch_size=BATCH, progress=False)
    return int(stream.n * stream.row_bytes)


MEASURED = {"read": read, "feed": feed, "train": train}


def child(name: str, folder: Path, memory: int) -> None:
    """One measurement; prints bytes, seconds and peak resident bytes as JSON."""
    if name != "read":
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    started = time.perf_counter()
    count = MEASURED[name](folder, memory)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"bytes": count, "seconds": seconds, "peak": peak}))


def measure(name: str, folder: Path, memory: int, cold: bool) -> tuple[float, int]:
    """(GB/s, peak resident bytes) of a measurement in a process of its own."""
    for path in folder.glob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        if cold:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    words = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--memory", str(memory)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    return found["bytes"] / found["seconds"] / 1e9, found["peak"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="also with the set in the page cache")
    parser.add_argument("--folder", type=Path, default=Path("stream_throughput.set"))
    parser.add_argument("--keep", action="store_true", help="keep the set, and take one that is there")
    parser.add_argument("--child", choices=MEASURED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    memory = checks.size("memory", given.memory)
    if given.child:
        child(given.child, given.folder, memory)
        return
    rows = int(given.gigabytes * 1e9 / (4 * given.features + 4))
    if not (given.keep and given.folder.exists()):
        started = time.perf_counter()
        write(Synthetic(rows, given.features, "regression"), given.folder)
        print(f"{rows:,} rows, {given.gigabytes:g} GB, written in {time.perf_counter() - started:.0f} s", flush=True)
    try:
        for cold in [True, False] if given.warm else [True]:
            report(given.folder, memory, given.repeats, cold)
    finally:
        if not given.keep:
            shutil.rmtree(given.folder)


def report(folder: Path, memory: int, repeats: int, cold: bool) -> None:
    """Every measurement in turn, so many times, and the medians against reading."""
    rates: dict[str, list[float]] = {name: [] for name in MEASURED}
    peaks = dict.fromkeys(MEASURED, 0)
    if not cold:
        measure("read", folder, memory, cold)
    for _ in range(repeats):
        for name in MEASURED:
            rate, peak = measure(name, folder, memory, cold)
            rates[name].append(rate)
            peaks[name] = max(peaks[name], peak)
    base = statistics.median(rates["read"])
    for name, found in rates.items():
        median = statistics.median(found)
        each = " ".join(f"{rate:.2f}" for rate in found)
        print(
            f"{'cold' if cold else 'warm'} {name:5}  {median:6.2f} GB/s  {median / base:6.1%} of reading"
            f"  peak {checks.shown_size(peaks[name])}  ({each})",
            flush=True,
        )


if __name__ == "__main__":
    main()
