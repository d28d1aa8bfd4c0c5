"""Sums over ranks whose arrays are on GPUs, one GPU a rank, through CuPy's NCCL.

Leans on `exchange` for what it means, and on MPI for one thing: the first rank's name of the communicator goes to the
others as text. Buckets travel on a stream of their own beside the backward pass, held to its order by events; a CUDA
graph holds them like everything else. NCCL adds in an order that follows from the ranks, their GPUs and the size of the
bucket: the same job on the same machines has the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cupy
from cupy.cuda import nccl

from .exchange import Bucket, Exchange
from .interface import Array, Slot
from .launch import device_error, elementwise

if not nccl.available:
    raise ValueError(
        "parallel: CuPy finds no NCCL, through which ranks on GPUs add up (pip install "
        f"nvidia-nccl-cu{cupy.cuda.runtime.runtimeGetVersion() // 1000})"
    )

Copy = Callable[[Array, Array], None]  # (source, out): cast on the device, in the current stream


class NcclExchange(Exchange):
    """Sums of float32 or float64 CuPy arrays; with the wire "bfloat16" rounded before they travel, and by each sum."""

    def __init__(
        self, ranks: Any, g: Array, buckets: Sequence[Bucket], wire: str, scatter: bool, narrow: Any, copy: Copy
    ) -> None:
        """narrow: the type on the wire where it is not g's own; copy: what casts to it and back."""
        super().__init__(ranks, g, buckets, wire, scatter)
        self._comm = _communicator(ranks)
        self._stream = _stream(cupy.cuda.device.get_device_id())
        self._copy = copy
        self._sent = g if narrow is None else cupy.empty(g.size, narrow)
        self._type = _TYPES[self._sent.dtype.name]
        self._forks = [cupy.cuda.Event(disable_timing=True) for _ in range(len(buckets) + 1)]
        self._join = cupy.cuda.Event(disable_timing=True)

    def begin(self, bucket: int) -> None:
        b = self.buckets[bucket]
        with self._beside(self._forks[bucket]):
            if self._sent is not self.g:
                self._copy(self.g[b.start : b.stop], self._sent[b.start : b.stop])
            if self.scatter:
                self._scatter(b)
            else:
                there = self._at(self._sent, b.start)
                self._comm.allReduce(there, there, b.stop - b.start, self._type, nccl.NCCL_SUM, self._stream.ptr)
            if self._sent is not self.g:
                part = b.slices[self.ranks.rank] if self.scatter else slice(b.start, b.stop)
                self._copy(self._sent[part], self.g[part])

    def finish(self) -> None:
        with self._named():
            self._join.record(self._stream)
            cupy.cuda.get_current_stream().wait_event(self._join)

    def gather(self, flat: Array) -> None:
        kind = _TYPES[flat.dtype.name]
        with self._beside(self._forks[-1]):
            for b in self.buckets:
                own, count = b.slices[self.ranks.rank], _common_length(b)
                if count is not None:
                    self._comm.allGather(
                        self._at(flat, own.start), self._at(flat, b.start), count, kind, self._stream.ptr
                    )
                    continue
                with _grouped():
                    for rank, part in enumerate(b.slices):
                        there = self._at(flat, part.start)
                        self._comm.broadcast(there, there, part.stop - part.start, kind, rank, self._stream.ptr)
        self.finish()

    def sum_state(self, state: Array, slot: Slot, squares: bool = False) -> None:
        number = state[slot : slot + 1]
        if squares:
            number *= number
        with self._beside(self._forks[-1]):
            there = number.data.ptr
            self._comm.allReduce(there, there, 1, _TYPES["float64"], nccl.NCCL_SUM, self._stream.ptr)
        self.finish()
        if squares:
            elementwise("X square", "X root", "root = sqrt(square)", "float64")(number, number)

    def _scatter(self, b: Bucket) -> None:
        """Every rank's slice of a bucket ← its sum; slices of several lengths go one by one, in one launch."""
        own, count = b.slices[self.ranks.rank], _common_length(b)
        if count is not None:
            self._comm.reduceScatter(
                self._at(self._sent, b.start), self._at(self._sent, own.start), count, self._type, nccl.NCCL_SUM,
                self._stream.ptr,
            )  # fmt: skip
            return
        with _grouped():
            for rank, part in enumerate(b.slices):
                there = self._at(self._sent, part.start)
                self._comm.reduce(
                    there, there, part.stop - part.start, self._type, nccl.NCCL_SUM, rank, self._stream.ptr
                )

    @contextlib.contextmanager
    def _beside(self, fork: Any) -> Iterator[None]:
        """Work for our stream, which begins once what is queued so far in the current one is done."""
        with self._named():
            fork.record(cupy.cuda.get_current_stream())
            self._stream.wait_event(fork)
            with self._stream:
                yield

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of NCCL and of the device as such."""
        try:
            yield
        except Exception as error:
            raise device_error(error, "a sum over the ranks", (self.g,)) from error

    @staticmethod
    def _at(array: Array, start: int) -> int:
        """The address of an element."""
        return int(array.data.ptr) + start * int(array.itemsize)


_TYPES = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64, "bfloat16": nccl.NCCL_BFLOAT16}


def _common_length(bucket: Bucket) -> int | None:
    """The length of every rank's slice; None where they are not the same."""
    lengths = {part.stop - part.start for part in bucket.slices}
    return lengths.pop() if len(lengths) == 1 else None


@contextlib.contextmanager
def _grouped() -> Iterator[None]:
    """NCCL calls that are launched as one."""
    nccl.groupStart()
    try:
        yield
    finally:
        nccl.groupEnd()


@functools.cache
def _stream(device: int) -> Any:
    """The stream of a device that sums run in, beside whatever stream computes."""
    return cupy.cuda.Stream(non_blocking=True)


@functools.cache
def _communicator(ranks: Any) -> Any:
    """NCCL's own connection of the ranks, on their current devices."""
    device = cupy.cuda.Device()
    gpus = ranks.texts(f"{device.pci_bus_id} of {socket.gethostname()}")
    for rank, gpu in enumerate(gpus):
        if (other := gpus.index(gpu)) != rank:
            raise ValueError(
                f"parallel: ranks {other} and {rank} are both on GPU {gpu}; start one process per GPU, each of which "
                "sees a GPU of its own or all of them"
            )
    name = ranks.told(nccl.get_unique_id().hex() if ranks.first else "")
    return nccl.NcclCommunicator(ranks.size, bytes.fromhex(name), ranks.rank)
