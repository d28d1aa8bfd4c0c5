"""Threads that stay awake between the parts of a step: they share its jobs, and whatever else is cut into parts.

Leans on `crew_kernels`, and on `jobs` for products. To wake a thread that sleeps takes a tenth of a millisecond, as
long as a small product; so ours look for work for a millisecond before they fall asleep, without Python's lock and
giving way to any other program. A BLAS has such threads too, but its products wait for the slowest of them, and what
comes between two products has to wake others.

The parts of a job are a function of its shape and the number of threads, whoever comes to do them: the same bits every
time.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import crew_kernels as kernels
from . import jobs, sharing

LOOKS = 30_000  # for work, before a thread falls asleep: a millisecond


class Crew:
    """The calling thread and up to so many others as the machine has processors beside its own.

    One caller at a time: for a second one, or within a part, the work is the caller's alone.
    """

    def __init__(self) -> None:
        room = np.zeros(kernels.SIZE + 16, np.int64)
        start = -room.ctypes.data % 128 // 8
        self._control = room[start : start + kernels.SIZE]  # keeps the memory
        self._base = self._control.ctypes.data
        self._give_way = _address_of_yield()
        self._most = max(1, (os.cpu_count() or 1) - 1)
        self._callers_processor = -1
        self._dismissed = False
        self._busy = threading.Lock()
        self._wake = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._work: Callable[[int], object] = _nothing
        self._errors: list[tuple[int, BaseException]] = []

    def do(self, work: Sequence[jobs.Job]) -> None:
        """Do some jobs, one after the other. Their BLAS is limited to one thread, or the parts would have several."""
        self.run(jobs.program(work), max(job.parts for job in work))

    def run(self, program: NDArray[np.int64], parts: int) -> None:
        """Do the jobs of a program, of which none has more than so many parts."""
        if parts < 2 or not self._busy.acquire(blocking=False):
            kernels.run_alone(program)
            return
        try:
            self._enlist(parts - 1)
            at = offered = 0
            try:
                while (at := kernels.run(self._base, program, at, offered, self._give_way)) < len(program):
                    offered = 1
                    if sleepers := kernels.to_be_woken(self._base):
                        self._rouse(sleepers)
            except BaseException:  # an interrupt with a job on offer: nobody may write to its arrays later
                kernels.join(self._base, self._give_way)
                raise
        finally:
            self._busy.release()

    def gemm(
        self,
        a: NDArray[Any],
        b: NDArray[Any],
        out: NDArray[Any],
        threads: int,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> NDArray[Any]:
        """out ← alpha · a b + beta · out. a: (m, k); b: (k, n), each or its transpose C-order; out: (m, n) C-order.

        All float32, or all float64. BLAS is limited to one thread, or the parts would have several each.
        """
        if not (out.size and a.size):
            return np.multiply(out, beta, out=out) if beta else np.matmul(a, b, out=out)
        self.do([jobs.product(a, b, out, threads, alpha, beta)])
        return out

    def for_each(self, blocks: Sequence[Any], work: Callable[[Any], object], threads: int) -> None:
        """Call ``work(block)`` for every block, on up to ``threads`` threads; returns when all are done.

        What the calls write must not overlap; of floating-point errors they say nothing.
        """
        parts = min(threads, len(blocks), kernels.MOST_PARTS)
        if parts < 2 or not self._busy.acquire(blocking=False):
            sharing.for_each(blocks, work, 1)
            return
        try:
            self._errors.clear()
            self._work = lambda index: sharing.in_turn(blocks[index::parts], work)
            self._enlist(parts - 1)
            kernels.publish(self._base, 0, 0, parts, True)
            try:
                if sleepers := kernels.to_be_woken(self._base):
                    self._rouse(sleepers)
                while (index := kernels.claim(self._base)) >= 0:
                    self._work(index)
            finally:  # also when interrupted: whoever comes next may write to the same arrays
                kernels.join(self._base, self._give_way)
                self._work = _nothing
        finally:
            self._busy.release()
        if self._errors:
            raise min(self._errors, key=lambda found: found[0])[1]

    def dismiss(self) -> None:
        """Let the threads end; the crew is not used any more."""
        self._dismissed = True
        for _ in self._threads:
            self._wake.release()

    def _rouse(self, sleepers: int) -> None:
        self._callers_processor = _processor()
        self._wake.release(sleepers)

    def _leave_the_callers_processor(self) -> None:
        """Move elsewhere. Who is woken up begins where it was woken from, as far as the system knows for a short while
        alone; but the caller goes on there, and both would have half of a processor for some milliseconds."""
        if _processor() == self._callers_processor and hasattr(os, "sched_setaffinity"):
            allowed = os.sched_getaffinity(0)
            elsewhere = allowed - {self._callers_processor}
            if elsewhere:
                os.sched_setaffinity(0, elsewhere)
                os.sched_setaffinity(0, allowed)

    def _enlist(self, count: int) -> None:
        while len(self._threads) < min(count, self._most):
            self._threads.append(threading.Thread(target=self._serve, name="gpu_mlp", daemon=True))
            self._threads[-1].start()

    def _serve(self) -> None:
        while not self._dismissed:
            index = kernels.serve(self._base, self._give_way, LOOKS)
            if index == kernels.ASLEEP_NOW:
                self._wake.acquire()
                self._leave_the_callers_processor()
            elif index != kernels.LOOK_AGAIN:
                try:
                    self._work(index)
                except BaseException as error:  # the caller's, who raises it
                    self._errors.append((index, error))
                finally:
                    kernels.finished(self._base)


def _nothing(index: int) -> None:
    """No work."""


def _address_of_yield() -> int:
    """The address of the system's function that lets other threads run."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def _processor() -> int:
    """The number of the processor that this thread runs on; -1 where the system does not tell."""
    return int(_GETCPU()) if _GETCPU is not None else -1


_GETCPU = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None
_crew: Crew | None = None


def crew() -> Crew:
    """This process's one crew."""
    global _crew
    if _crew is None:
        _crew = Crew()
    return _crew


def _forget_crew() -> None:
    """A forked child has the crew's memory without its threads."""
    global _crew
    _crew = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_crew)
