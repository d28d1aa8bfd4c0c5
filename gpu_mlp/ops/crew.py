"""Threads that stay awake between the parts of a step: they share matrix products, and whatever else is cut into parts.

Leans on `crew_kernels`, and on the BLAS that SciPy has, called on one thread for each part. To wake a thread that
sleeps takes a tenth of a millisecond, as long as a small product; so ours look for work for half a millisecond before
they fall asleep, without Python's lock and giving way to any other program. A BLAS has such threads too, but its
products wait for the slowest of them: beside two other programs on two processors one of 0.7 ms was seen to take 40 ms
on average, and 2.6 ms here.

The parts of a product are a function of its shape and the number of threads, whoever comes to do them: the same bits
every time.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address
from numpy.typing import NDArray

from . import crew_kernels as kernels
from . import sharing

PART_FLOP = 1_000_000  # a part of fewer operations costs more to hand out than it saves
ROW_MULTIPLE = 16  # parts end at a multiple of what a BLAS kernel takes at once
LOOKS = 50_000  # for work, before a thread falls asleep: half a millisecond


class Crew:
    """The calling thread and up to so many others as the machine has processors beside its own.

    One caller at a time: for a second one, or within a part, the work is the caller's alone.
    """

    def __init__(self) -> None:
        room = np.zeros(kernels.SIZE + 16, np.int64)
        start = -room.ctypes.data % 128 // 8
        self._control = room[start : start + kernels.SIZE]  # keeps the memory
        self._base, self._job = self._control.ctypes.data, self._control[kernels.JOB :]
        self._scalars: dict[int, NDArray[Any]] = {4: np.ones(2, np.float32), 8: np.ones(2, np.float64)}  # alpha, beta
        self._give_way = _address_of_yield()
        self._most = max(1, (os.cpu_count() or 1) - 1)
        self._ticket = 0
        self._callers_processor = -1
        self._dismissed = False
        self._busy = threading.Lock()
        self._wake = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._work: Callable[[int], object] = _nothing
        self._errors: list[tuple[int, BaseException]] = []

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
        (m, n), k = out.shape, a.shape[1]
        if not (m and n and k):
            return np.multiply(out, beta, out=out) if beta else np.matmul(a, b, out=out)
        ta, tb = not a.flags.c_contiguous, not b.flags.c_contiguous
        function, parts = _GEMM_OF_BLAS[out.itemsize], min(threads, 2 * m * n * k // PART_FLOP)
        if parts < 2 or not self._busy.acquire(blocking=False):
            if alpha == 1 and beta == 0:
                return np.matmul(a, b, out=out)
            numbers = out.dtype.type(alpha), out.dtype.type(beta)
            kernels.whole_product(function, a.T if ta else a, b.T if tb else b, out, ta, tb, *numbers)
            return out
        try:
            by_rows = m >= n
            length = m if by_rows else n
            step = -(-length // (parts * ROW_MULTIPLE)) * ROW_MULTIPLE
            parts, scalars = -(-length // step), self._scalars[out.itemsize]
            scalars[0], scalars[1] = alpha, beta
            self._enlist(parts - 1)
            sleepers = kernels.offer_product(
                self._base, self._job, function, a.T if ta else a, b.T if tb else b, out,
                ta, tb, step, by_rows, self._next_ticket(), parts,
            )  # fmt: skip
            try:
                if sleepers:
                    self._rouse(sleepers)
                kernels.do_product(self._base, self._job, scalars, parts, self._give_way)
            except BaseException:  # an interrupt, before the product was begun here: nobody may write to ``out`` later
                kernels.join(self._base, parts, self._give_way)
                raise
        finally:
            self._busy.release()
        return out

    def for_each(self, blocks: Sequence[Any], work: Callable[[Any], object], threads: int) -> None:
        """Call ``work(block)`` for every block, on up to ``threads`` threads; returns when all are done.

        What the calls write must not overlap; of floating-point errors they say nothing.
        """
        parts = min(threads, len(blocks))
        if parts < 2 or not self._busy.acquire(blocking=False):
            sharing.for_each(blocks, work, 1)
            return
        try:
            self._errors.clear()
            self._work = lambda index: sharing.in_turn(blocks[index::parts], work)
            self._enlist(parts - 1)
            sleepers = kernels.publish(self._base, self._next_ticket(), parts, True)
            try:
                if sleepers:
                    self._rouse(sleepers)
                while (index := kernels.claim(self._base)) >= 0:
                    self._work(index)
            finally:  # also when interrupted: whoever comes next may write to the same arrays
                kernels.join(self._base, parts, self._give_way)
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

    def _next_ticket(self) -> int:
        """What tells this word from the last one that said the same."""
        self._ticket = (self._ticket + 1) & 0x7FFFFFFF
        return self._ticket

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
            index = kernels.serve(
                self._base, self._job, self._scalars[4], self._scalars[8], self._give_way, LOOKS
            )  # fmt: skip
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


def _blas_address(name: str) -> int:
    """The address of a BLAS function of SciPy's; ImportError where its integers are not of 32 bits."""
    from scipy.linalg import cython_blas

    told = ctypes.pythonapi.PyCapsule_GetName
    told.restype, told.argtypes = ctypes.c_char_p, [ctypes.py_object]
    signature = told(cython_blas.__pyx_capi__[name]) or b""
    if signature.count(b"int *") != 6 and signature.count(b"int32_t *") != 6:
        raise ImportError(f"{name} of SciPy takes other integers than expected: {signature.decode()}")
    return int(get_cython_function_address("scipy.linalg.cython_blas", name))


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


_GEMM_OF_BLAS = {4: _blas_address("sgemm"), 8: _blas_address("dgemm")}  # by the bytes of a number
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
