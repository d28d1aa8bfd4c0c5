"""What a step costs on N ranks, reckoned from the rates of one and of the link: a model, and its check.

    python benchmarks/parallel_model.py                                      # tables for many GPUs, from assumed rates
    python benchmarks/parallel_model.py --sizes 8192,8192,8192,8192 --rows 4096 --far 25
    python benchmarks/parallel_model.py --check parallel.json                # against what parallel.py has measured
    python benchmarks/parallel_model.py --write                              # both, into the tables of PARALLEL.md

The model: a rank works on its share of the rows; a layer costs three GEMMs (the first one two) at the rate of GEMMs,
and its elementwise passes at that of memory. A bucket of gradient can leave when its last layer's gW is done, and the
link takes one bucket after the other: 2 (N − 1) / N of its bytes for a sum, and two latencies for each doubling of N.
What the link has not done when the backward pass ends is waited for (without overlap: all of it), then comes the update
at the rate of memory. With a sharded optimizer the link takes half of that for the gradient, and the other half for θ,
after the update. The ring's cost is that of Thakur, Rabenseifner and Gropp (2005), "Optimization of collective
communication operations in MPICH".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from gpu_mlp.ops.interface import Layout  # noqa: E402
from gpu_mlp.parallel import BUCKET_BYTES  # noqa: E402
from gpu_mlp.parallel.buckets import cut  # noqa: E402

UPDATE_BYTES = 28  # a parameter and update of Adam: g, and θ and two moments that are read and written, in float32
COUNTS = (1, 8, 64, 1024)


@dataclass(frozen=True)
class Rates:
    """What a rank can do: operations of GEMMs, bytes of memory and bytes of the link a second; seconds of latency."""

    flop: float
    memory: float
    near: float  # the link to the ranks of the same machine, of which there are ``node``
    far: float  # the link to others
    latency: float = 20e-6
    node: int = 8
    overlaps: bool = True  # whether sums go on beside the backward pass: not where a core does both

    def link(self, ranks: int) -> float:
        """Bytes a second of the link that a sum over so many ranks is bound by."""
        return self.near if ranks <= self.node else self.far


@dataclass(frozen=True)
class Job:
    """A step: widths n_0 … n_L, rows of all ranks together, and bytes of a number in memory and on the wire."""

    sizes: tuple[int, ...]
    rows: int
    ranks: int
    storage: int = 2
    wire: int = 4
    bucket_bytes: int = BUCKET_BYTES
    sharded: bool = False

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(n_in, n_out) of every layer."""
        return list(zip(self.sizes, self.sizes[1:]))

    @property
    def layout(self) -> Layout:
        """Where θ's parts lie; θ is float32."""
        return Layout(self.sizes, 4)

    @property
    def part(self) -> int:
        """The rows of the rank that has the most."""
        return -(-self.rows // self.ranks)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: what is computed, what of the sums is waited for, the update, and all of the link's work."""

    compute: float
    waiting: float
    update: float
    link: float

    @property
    def step(self) -> float:
        """All that the step takes."""
        return self.compute + self.waiting + self.update


def reckon(job: Job, rates: Rates) -> Cost:
    """The cost of a step."""
    ready, compute = _backward(job, rates)
    halves = 1 if job.sharded else 2  # of a sum: to whom it belongs, and back to all
    free = total = 0.0
    if job.ranks > 1:
        for bucket in cut(job.layout, job.ranks, job.bucket_bytes, False):
            taken = _moved(job, rates, (bucket.stop - bucket.start) * job.wire, halves)
            free = max(free, ready[bucket.layer] if rates.overlaps else compute) + taken
            total += taken
    waiting = max(0.0, free - compute)
    update = job.layout.size * UPDATE_BYTES / rates.memory
    if job.sharded and job.ranks > 1:
        back = _moved(job, rates, job.layout.size * 4, 1)
        return Cost(compute, waiting + back, update / job.ranks, total + back)
    return Cost(compute, waiting, update, total)


def _backward(job: Job, rates: Rates) -> tuple[list[float], float]:
    """When each layer's gW is done, counted from the start of the step, and when the last one is."""
    gemm = [2 * job.part * n_in * n_out / rates.flop for n_in, n_out in job.layers]
    numbers = [job.part * n_out * job.storage / rates.memory for _, n_out in job.layers]
    now = sum(gemm) + 2 * sum(numbers)  # forward: z is read, h written
    ready = [0.0] * len(gemm)
    for l in reversed(range(len(gemm))):
        now += gemm[l] * (2 if l else 1) + 3 * numbers[l]  # gh and h are read, gz is written
        ready[l] = now
    return ready, now


def _moved(job: Job, rates: Rates, count: int, halves: int) -> float:
    """Seconds of one or both halves of a sum of so many bytes."""
    ring = halves * (job.ranks - 1) / job.ranks * count / rates.link(job.ranks)
    return ring + halves * math.ceil(math.log2(job.ranks)) * rates.latency


# --- many GPUs -------------------------------------------------------------------------------------------------------


def table(job: Job, rates: Rates, counts: Sequence[int] = COUNTS) -> Iterator[str]:
    """Markdown: the same rows for each rank (they grow with the ranks), then the same rows in all."""
    for title, grows in (("the same rows a GPU", True), ("the same rows in all", False)):
        yield f"| GPUs, {title} | rows | compute, ms | waiting, ms | update, ms | step, ms | efficiency |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        rows = job.rows if grows else job.rows * max(counts)
        one = reckon(dataclasses.replace(job, rows=rows, ranks=1), rates).step
        for ranks in counts:
            now = dataclasses.replace(job, ranks=ranks, rows=rows * ranks if grows else rows)
            cost = reckon(now, rates)
            gained = one / cost.step / (1 if grows else ranks)
            figures = [1e3 * number for number in (cost.compute, cost.waiting, cost.update, cost.step)]
            yield f"| {ranks} | {now.rows:,} | " + " | ".join(f"{f:.3g}" for f in figures) + f" | {gained:.0%} |"
        yield ""


# --- the check -------------------------------------------------------------------------------------------------------


def calibrated(measured: Mapping[str, Any]) -> tuple[Job, Rates]:
    """The job that was measured, and rates from its parts: one rank's steps, the updates, and the sums by themselves.

    No step of several ranks is used, so that what is reckoned for those is a prediction.
    """
    sizes = tuple(int(size) for size in measured["sizes"].split(","))
    job = Job(sizes, measured["batch"], measured["ranks"], storage=4)
    middle = {name: statistics.median(v) / measured["steps"] for name, v in measured["sums"].items()}
    update = statistics.median(measured["updates"]) / measured["steps"]
    alone = statistics.median(measured["seconds"]["alone"]) / measured["steps"]
    memory = job.layout.size * UPDATE_BYTES / update
    passes = 5 * sum(sizes[1:]) * job.rows * job.storage / memory
    flop = 2 * job.rows * sum((3 if l else 2) * a * b for l, (a, b) in enumerate(job.layers))
    counts = {name: len(cut(job.layout, job.ranks, size, False)) for name, size in _buckets(measured).items()}
    latency, link = _line([(counts[name], middle[name]) for name in counts], job)
    return job, Rates(flop / (alone - update - passes), memory, link, link, latency, overlaps=False)


def _buckets(measured: Mapping[str, Any]) -> dict[str, int]:
    """The ways that differ in their buckets alone, and their bytes."""
    named = {f"buckets of {int(size) >> 10} KiB": int(size) for size in measured["buckets"].split(",")}
    return {**named, "one bucket": 1 << 62}


def _line(points: Sequence[tuple[int, float]], job: Job) -> tuple[float, float]:
    """(latency, link) of the line through (buckets, seconds of a sum) by least squares: its slope and its height."""
    x, y = zip(*points)
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in points) / sum((a - mean_x) ** 2 for a in x)
    slope = max(0.0, slope)
    height = mean_y - slope * mean_x
    moved = 2 * (job.ranks - 1) / job.ranks * job.layout.size * job.wire
    return slope / (2 * math.ceil(math.log2(job.ranks))), moved / height


def check(measured: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(way, seconds of a step that were measured, seconds that the model says)."""
    job, rates = calibrated(measured)
    found = {name: statistics.median(v) / measured["steps"] for name, v in measured["seconds"].items()}
    yield "alone", found["alone"], reckon(dataclasses.replace(job, ranks=1), rates).step
    for name, size in _buckets(measured).items():
        yield name, found[name], reckon(dataclasses.replace(job, bucket_bytes=size), rates).step
    yield "sharded", found["sharded"], reckon(dataclasses.replace(job, sharded=True), rates).step


def checked(measured: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: the check as a table."""
    yield "| way | measured, ms | over one rank | model, ms | model / measured |"
    yield "| --- | --- | --- | --- | --- |"
    alone = measured["seconds"]["alone"]
    for name, found, said in check(measured):
        gained = statistics.median(a / b for a, b in zip(alone, measured["seconds"][name]))
        yield f"| {name} | {found * 1e3:.1f} | {gained:.2f} | {said * 1e3:.1f} | {said / found:.2f} |"


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = HERE / "PARALLEL.md"
BLOCK = re.compile(r"(<!-- (model|check): (\w+) -->\n).*?(<!-- end of \w+ -->)", re.S)
ASSUMED = Rates(600e12, 2700e9, 350e9, 45e9)
USUAL = Job((4096,) * 9, 8192, 1)


def written(page: str) -> str:
    """The page with its tables as they are now."""

    def block(found: re.Match[str]) -> str:
        if found[2] == "model":
            lines = table(dataclasses.replace(USUAL, wire=4 if found[3] == "full" else 2), ASSUMED)
        else:
            lines = checked(json.loads((HERE / "results" / "parallel" / f"{found[3]}.json").read_text()))
        body = "\n".join(lines).rstrip()
        return f"{found[1]}\n{body}\n\n{found[4]}"

    return BLOCK.sub(block, page)


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the tables, or the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual, assumed = USUAL, ASSUMED
    parser.add_argument("--sizes", default=",".join(map(str, usual.sizes)), help="widths")
    parser.add_argument("--rows", type=int, default=usual.rows, help="of a GPU, where they are the same for each")
    parser.add_argument("--flop", type=float, default=assumed.flop / 1e12, help="TFLOP/s of a GPU's GEMMs")
    parser.add_argument("--memory", type=float, default=assumed.memory / 1e9, help="GB/s of a GPU's memory")
    parser.add_argument("--near", type=float, default=assumed.near / 1e9, help="GB/s of the link within a machine")
    parser.add_argument("--far", type=float, default=assumed.far / 1e9, help="GB/s of the link between machines")
    parser.add_argument("--latency", type=float, default=assumed.latency * 1e6, help="microseconds")
    parser.add_argument("--node", type=int, default=assumed.node, help="GPUs of a machine")
    parser.add_argument("--wire", choices=["full", "bfloat16"], default="full")
    parser.add_argument("--shard-optimizer", action="store_true")
    parser.add_argument("--bucket-bytes", type=int, default=BUCKET_BYTES)
    parser.add_argument("--check", type=Path, help="JSON that parallel.py --out has written")
    parser.add_argument("--write", action="store_true", help="draw the tables of PARALLEL.md")
    chosen = parser.parse_args()
    if chosen.write:
        PAGE.write_text(written(PAGE.read_text()))
        return
    if chosen.check is not None:
        print("\n".join(checked(json.loads(chosen.check.read_text()))))
        return
    sizes = tuple(int(size) for size in chosen.sizes.split(","))
    wire = 4 if chosen.wire == "full" else 2
    job = Job(sizes, chosen.rows, 1, wire=wire, bucket_bytes=chosen.bucket_bytes, sharded=chosen.shard_optimizer)
    rates = Rates(
        chosen.flop * 1e12, chosen.memory * 1e9, chosen.near * 1e9, chosen.far * 1e9, chosen.latency * 1e-6, chosen.node
    )
    print("\n".join(table(job, rates)).rstrip())


if __name__ == "__main__":
    main()
