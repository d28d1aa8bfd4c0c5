"""Sums over ranks whose arrays are on the host, through mpi4py.

Leans on `exchange` for what it means. A sum is two collectives that do not block: each rank is sent its slice by all
(all-to-all), adds them up in the order of the ranks, and sends the sum to all (all-gather). That moves as many bytes as
MPI's own all-reduce at its best, and fixes the order: the bits depend neither on the MPI library and what it finds
fastest, nor on how the gradient is cut into buckets. With a sharded optimizer the second half is that of θ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import precision
from .exchange import Bucket, Exchange
from .interface import Array, Slot


class MPIExchange(Exchange):
    """Sums of float32 or float64 NumPy arrays; with the wire "bfloat16" what is sent is rounded, and sums are not."""

    def __init__(self, ranks: Any, g: Array, buckets: Sequence[Bucket], wire: str, scatter: bool) -> None:
        super().__init__(ranks, g, buckets, wire, scatter)
        mpi = ranks.mpi
        self._in_place, self._wait_all = mpi.IN_PLACE, mpi.Request.Waitall
        self._narrow = precision.get("bfloat16").storage_dtype if wire == "bfloat16" else None
        self._full = {4: mpi.FLOAT, 8: mpi.DOUBLE}[g.itemsize]
        self._type = self._full if self._narrow is None else mpi.UINT16_T
        sent = g.dtype if self._narrow is None else np.dtype(np.uint16)
        own = [_length(bucket.slices[ranks.rank]) for bucket in buckets]
        self._received = [np.empty((ranks.size, n), sent) for n in own]
        self._sent = [
            g[bucket.start : bucket.stop] if self._narrow is None else np.empty(bucket.stop - bucket.start, sent)
            for bucket in buckets
        ]
        self._sums: deque[tuple[int, Any]] = deque()
        self._gathers: list[Any] = []

    def begin(self, bucket: int) -> None:
        b, sent, received = self.buckets[bucket], self._sent[bucket], self._received[bucket]
        if self._narrow is not None:
            sent.view(self._narrow)[...] = self.g[b.start : b.stop]
        n = received.shape[1]
        places = [n * rank for rank in range(self.ranks.size)]
        request = self.ranks.halves[0].Ialltoallv(
            [sent, *_places(b), self._type], [received, [n] * self.ranks.size, places, self._type]
        )
        self._sums.append((bucket, request))

    def poke(self) -> None:
        while self._sums and self._sums[0][1].Test():
            self._add_up(self._sums.popleft()[0])

    def finish(self) -> None:
        while self._sums:
            bucket, request = self._sums.popleft()
            request.Wait()
            self._add_up(bucket)
        self._wait_all(self._gathers)
        self._gathers = []
        if self._narrow is not None and not self.scatter:
            for b, sent in zip(self.buckets, self._sent):
                self.g[b.start : b.stop] = sent.view(self._narrow)

    def _add_up(self, bucket: int) -> None:
        """The sum of what has come for this rank's slice, and on to the others with it."""
        b, sent, received = self.buckets[bucket], self._sent[bucket], self._received[bucket]
        own = b.slices[self.ranks.rank]
        total = self.g[own]
        parts = received if self._narrow is None else received.view(self._narrow)
        total[...] = parts[0]
        for part in parts[1:]:
            np.add(total, part if self._narrow is None else part.astype(total.dtype), out=total)
        if self.scatter:
            return
        if self._narrow is not None:
            sent.view(self._narrow)[own.start - b.start : own.stop - b.start] = total
        self._gathers.append(self.ranks.halves[1].Iallgatherv(self._in_place, [sent, *_places(b), self._type]))

    def gather(self, flat: Array) -> None:
        self._wait_all(
            [
                self.ranks.halves[1].Iallgatherv(self._in_place, [flat[b.start : b.stop], *_places(b), self._full])
                for b in self.buckets
            ]
        )

    def sum_state(self, state: Array, slot: Slot, squares: bool = False) -> None:
        value = np.array([state[slot]])
        state[slot] = np.sqrt(self.ranks.sum(value * value)[0]) if squares else self.ranks.sum(value)[0]


def _length(part: slice) -> int:
    return part.stop - part.start


def _places(bucket: Bucket) -> tuple[list[int], list[int]]:
    """How many numbers of a bucket each rank has, and where they begin in it."""
    return [_length(part) for part in bucket.slices], [part.start - bucket.start for part in bucket.slices]
