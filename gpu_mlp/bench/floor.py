"""The floor of a step: its GEMMs and nothing else, three a layer, two in the first, into buffers of their own.

On the CPU by NumPy's BLAS under every setting of its threads; for each product the setting counts that is fastest for
it, so that no step is compared with a product that the BLAS could have done sooner.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import precision as precisions
from . import machine
from .tasks import Task

Samples = dict[str, list[float]]  # by setting: the seconds of every product


def make(task: Task) -> Any:
    """The floor of a task on its device."""
    return (OnGPU if task.device == "cuda" else OnCPU)(task)


def products(task: Task) -> Iterator[tuple[str, int, int]]:
    """(kind, layer, operations) of every GEMM in the order of a step."""
    layers = task.layers
    for l, (n_in, n_out) in enumerate(layers):
        yield "fprop", l, 2 * task.batch * n_in * n_out
    for l in reversed(range(len(layers))):
        n_in, n_out = layers[l]
        if l:
            yield "dgrad", l, 2 * task.batch * n_in * n_out
        yield "wgrad", l, 2 * task.batch * n_in * n_out


def thread_settings() -> list[int]:
    """1, 2, 4, … and all processors."""
    most = machine.cores()
    return sorted({*(1 << k for k in range(most.bit_length()) if 1 << k <= most), most})


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """NumPy's BLAS on so many threads."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(count, "blas"):
        yield


class OnCPU:
    """The GEMMs of a step through `numpy.matmul`."""

    def __init__(self, task: Task) -> None:
        dtype = precisions.get(task.precision).master_dtype  # 16-bit types are multiplied in float32 there
        rng = np.random.default_rng(2)

        def numbers(rows: int, columns: int) -> Any:
            return rng.random((rows, columns), np.float32).astype(dtype)

        h = [numbers(task.batch, n) for n in task.sizes]
        gz = [numbers(task.batch, n) for n in task.sizes]
        W = [numbers(n_out, n_in) for n_in, n_out in task.layers]
        out, gW = [np.empty_like(a) for a in h], [np.empty_like(w) for w in W]
        factors = {
            "fprop": lambda l: (h[l], W[l].T, out[l + 1]),
            "dgrad": lambda l: (gz[l + 1], W[l], out[l]),
            "wgrad": lambda l: (gz[l + 1].T, h[l], gW[l]),
        }
        self.products = [factors[kind](l) for kind, l, _ in products(task)]
        self.settings = thread_settings()

    def once(self) -> list[float]:
        """The seconds of every product, under the setting at hand."""
        times, started = [], time.perf_counter()
        for a, b, out in self.products:
            np.matmul(a, b, out=out)
            ended = time.perf_counter()
            times.append(ended - started)
            started = ended
        return times

    def sample(self, repeats: int, before: Callable[[], None]) -> Samples:
        """The seconds of every product under every setting, each the mean of ``repeats`` passes."""
        found = {}
        for setting in self.settings:
            before()
            with blas_threads(setting):
                for _ in range(max(1, repeats // 2)):  # to wake up, as everybody's samples begin
                    self.once()
                passes = [self.once() for _ in range(repeats)]
            found[_words(setting)] = [sum(column) / repeats for column in zip(*passes)]
        return found


def _words(setting: int) -> str:
    return f"{setting} thread{'s' * (setting > 1)}"


class OnGPU:
    """The GEMMs of a step through the operations' own way to cuBLAS, as one queue of work.

    Each by the algorithm that was found fastest, as in a step, and one after the other.
    """

    def __init__(self, task: Task) -> None:
        from ..ops import make as operations
        from ..ops.gemm import GEMM

        of = precisions.get(task.precision)
        ops, self.gemm = operations("cuda", of), GEMM(of)
        rng = np.random.default_rng(2)

        def numbers(rows: int, columns: int) -> Any:
            row = ops.to_device((rng.random(columns) - 0.5).astype(of.storage_dtype))
            array = ops.empty((rows, columns), of.storage_dtype)
            array[...] = row
            return array

        h = [numbers(task.batch, n) for n in task.sizes]
        gz = [numbers(task.batch, n) for n in task.sizes]
        W = [numbers(n_out, n_in) for n_in, n_out in task.layers]
        out = [ops.empty(a.shape, a.dtype) for a in h]
        gW = [ops.empty(w.shape, of.master_dtype) for w in W]
        arguments: dict[str, Any] = {
            "fprop": lambda l: (h[l], W[l], out[l + 1], False, True),
            "dgrad": lambda l: (gz[l + 1], W[l], out[l], False, False),
            "wgrad": lambda l: (gz[l + 1], h[l], gW[l], True, False),
        }
        self.products = [arguments[kind](l) for kind, l, _ in products(task)]
        self._queue(searching=True)

    def once(self) -> None:
        """Queue every product."""
        self._queue(searching=False)

    def _queue(self, searching: bool) -> None:
        from ..ops import search

        with search.tuning(searching):
            for arguments in self.products:
                self.gemm(*arguments)

    def sample(self, repeats: int, before: Callable[[], None]) -> Samples:
        """The seconds of one pass, under the one setting that there is."""
        from . import device

        before()
        self.once()
        device.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            self.once()
        device.wait()
        return {"cuBLAS": [(time.perf_counter() - started) / repeats]}


def best(rounds: Sequence[Mapping[str, Sequence[float]]]) -> tuple[list[float], list[str]]:
    """The floor in every round, and the setting that was chosen for each product: that of the lowest median."""
    count = len(next(iter(rounds[0].values())))
    chosen = [
        min(rounds[0], key=lambda setting: statistics.median(r[setting][i] for r in rounds)) for i in range(count)
    ]
    return [sum(r[setting][i] for i, setting in enumerate(chosen)) for r in rounds], chosen
