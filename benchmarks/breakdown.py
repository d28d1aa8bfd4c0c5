"""Where a step's time goes: GEMMs, activations, loss, update, and the rest, which is the host's.

On a CPU with Numba a recorded step is a list of jobs: each is run and timed by itself, with a layer's product and its
pass apart, which are one job otherwise; of lanes, which work side by side, the jobs tell the shares. What the step
takes beyond its jobs is the host's.

Elsewhere every operation of the interface is wrapped on the trainer's own operations, and the matrix product within
them; the innermost one that a thread is in is what the time goes to. At moments when several threads are at work it is
divided among them evenly, when none is inside an operation it is the host's. On a GPU the clock is its events, with the
step launched kernel by kernel (a graph cannot be looked into), and what lies between operations is the host's.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import plans

from gpu_mlp import Trainer
from gpu_mlp.bench import timing
from gpu_mlp.bench.peers.ours import Ours
from gpu_mlp.bench.records import Records
from gpu_mlp.bench.tasks import Task

HOST, GEMMS = "host", "GEMMs"
KINDS = {
    "affine_activation": "activation", "activate": "activation", "input_gradient": "activation",
    "weight_gradient": GEMMS, "descend": "update", "loss_and_gradient": "loss", "total_weight": "loss",
    "penalty": "update", "gradient_norm": "update", "update": "update",
}  # fmt: skip
PARTS = (GEMMS, "activation", "loss", "update", HOST)
Mark = tuple[float, int, str | None]  # when, which thread, what begins there (None: the last that began ends)


def measure(records: Records, deadline: float, device: str, seconds: float = 3.0, enough: float = 15.0) -> None:
    """Every step that is to be broken down."""
    for task in plans.broken_down(device, records.rehearsal):
        if records.done(task.name):
            continue
        if time.monotonic() > deadline - enough:
            return
        with records.attempt(task.name):
            parts, traced, plain = of_step(task, 0.0 if records.rehearsal else seconds)
            figures = {"seconds": parts, "traced": traced, "untraced": plain}
            records.add(task.name, task=task.as_json(), **({} if records.rehearsal else figures))


def of_step(task: Task, seconds: float) -> tuple[dict[str, float], float, float]:
    """Seconds of a step by part, all in all, and without being watched; the means of as many steps as there is time."""
    contender = Ours(task)
    if task.device == "cuda":
        contender.trainer = Trainer(contender.net, "cross_entropy", task.rule, graph=False)
    batch = contender.put(*task.data())
    for _ in range(3):
        contender.step(*batch)
    contender.wait()
    plain = min(timing.repeated(lambda: contender.step(*batch), contender.wait, 2)[0] for _ in range(3))
    repeats = max(1, int(seconds / max(plain, 1e-6)))
    if hasattr(contender.ops, "fuses"):
        parts = of_jobs(contender, batch, repeats)
        return parts, sum(parts.values()), plain
    clock: Any = DeviceClock() if task.device == "cuda" else HostClock()
    with watched(contender.ops, clock, task.device):
        for _ in range(repeats):
            clock.begin()
            contender.step(*batch)
            contender.wait()
            clock.end()
    parts = dict.fromkeys(PARTS, 0.0)
    for marks, start, end in clock.steps():
        for kind, share in divided(marks, start, end).items():
            parts[kind] += share / repeats
    return parts, sum(parts.values()), plain


def of_jobs(contender: Any, batch: Any, repeats: int) -> dict[str, float]:
    """Seconds of a step by part: medians of every job by itself, and of the step that they make up."""
    from gpu_mlp.ops.crew import crew
    from gpu_mlp.ops.jobs import program

    def timed(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def seconds_of(jobs: Sequence[Any]) -> list[float]:
        runs = [functools.partial(crew().run, program([job]), job.parts) for job in jobs]
        rounds = [[timed(run) for run in runs] for _ in range(repeats)]
        return [statistics.median(column) for column in zip(*rounds)]

    parts = dict.fromkeys(PARTS, 0.0)
    contender.ops.fuses = False
    try:
        steps = [timed(lambda: contender.step(*batch)) for _ in range(repeats + 1)][1:]
        jobs = contender.trainer._recorder.last.entries
        with contender.ops.tuned_for(0, 2):
            for job, taken in zip(jobs, seconds_of(jobs)):
                inner = [(kind_of(each), spent) for each, spent in zip(job.inner, seconds_of(job.inner))]
                whole = sum(spent for _, spent in inner)
                for kind, share in [(kind, spent / whole) for kind, spent in inner] or [(kind_of(job), 1.0)]:
                    parts[kind] += share * taken
    finally:
        del contender.ops.fuses
    parts[HOST] = max(0.0, statistics.median(steps) - sum(parts.values()))
    return parts


def kind_of(job: Any) -> str:
    """The part of a step that a job belongs to; one that multiplies does nothing else here."""
    fields = job.record.dtype.names
    if "gemm" in fields:
        return GEMMS if job.record["k"] else "activation"
    return "loss" if "smoothing" in fields or fields == ("weight", "state", "count") else "update"


def divided(marks: Sequence[Mark], start: float, end: float) -> dict[str, float]:
    """The time from ``start`` to ``end`` by what the threads were in, innermost first; `HOST` where in nothing."""
    found = dict.fromkeys(PARTS, 0.0)
    stacks: dict[int, list[str]] = {}
    before = start
    for when, thread, kind in [*sorted(marks, key=lambda mark: mark[0]), (end, 0, None)]:
        busy = [stack[-1] for stack in stacks.values() if stack]
        for part in busy or [HOST]:
            found[part] += max(0.0, when - before) / max(1, len(busy))
        before = max(before, when)
        stack = stacks.setdefault(thread, [])
        if kind is not None:
            stack.append(kind)
        elif stack:
            stack.pop()
    return found


class HostClock:
    """Marks by the host's clock."""

    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._steps: list[tuple[list[Mark], float, float]] = []
        self._start = 0.0

    def begin(self) -> None:
        self._marks, self._start = [], time.perf_counter()

    def mark(self, kind: str | None) -> None:
        self._marks.append((time.perf_counter(), threading.get_ident(), kind))

    def end(self) -> None:
        self._steps.append((self._marks, self._start, time.perf_counter()))

    def steps(self) -> Iterator[tuple[list[Mark], float, float]]:
        """The marks of every step, its start and its end."""
        yield from self._steps


class DeviceClock:
    """Marks by events on the GPU's queue."""

    def __init__(self) -> None:
        self._marks: list[tuple[Any, str | None]] = []
        self._steps: list[tuple[Any, list[tuple[Any, str | None]], Any]] = []

    @staticmethod
    def _event() -> Any:
        import cupy

        event = cupy.cuda.Event()
        event.record()
        return event

    def begin(self) -> None:
        self._marks, self._start = [], self._event()

    def mark(self, kind: str | None) -> None:
        self._marks.append((self._event(), kind))

    def end(self) -> None:
        end = self._event()
        end.synchronize()
        self._steps.append((self._start, self._marks, end))

    def steps(self) -> Iterator[tuple[list[Mark], float, float]]:
        """The marks of every step, its start and its end; of one thread, for there is one queue."""
        import cupy

        for start, marks, end in self._steps:
            since = [cupy.cuda.get_elapsed_time(start, event) / 1e3 for event, _ in marks]
            yield (
                [(t, 0, kind) for t, (_, kind) in zip(since, marks)],
                0.0,
                cupy.cuda.get_elapsed_time(start, end) / 1e3,
            )


@contextlib.contextmanager
def watched(ops: Any, clock: Any, device: str) -> Iterator[None]:
    """Meanwhile every operation of ``ops``, and every matrix product, marks its start and end."""

    def marking(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def marked(*arguments: Any, **named: Any) -> Any:
            clock.mark(kind)
            try:
                return function(*arguments, **named)
            finally:
                clock.mark(None)

        return marked

    place, name = _product(ops, device)
    product = getattr(place, name)
    replaced = {operation: marking(getattr(ops, operation), kind) for operation, kind in KINDS.items()}
    if device == "cuda":  # in one stream, since a clock follows one
        replaced |= {"independent": contextlib.nullcontext, "hides_update": lambda rows, size: False}
    for operation, function in replaced.items():
        setattr(ops, operation, function)
    setattr(place, name, marking(product, GEMMS))
    try:
        yield
    finally:
        setattr(place, name, product)
        for operation in replaced:
            delattr(ops, operation)


def _product(ops: Any, device: str) -> tuple[Any, str]:
    """Where the matrix product of a device is to be found, with its epilogue where it has one."""
    if device == "cpu":
        return np, "matmul"
    from gpu_mlp.ops import gemm, lt

    return (gemm.GEMM, "__call__") if gemm.binding().lt is None else (lt.Plan, "run")
