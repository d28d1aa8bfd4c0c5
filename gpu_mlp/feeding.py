"""How minibatches reach the operations: from a data set that lives on the device, or through it from host or disk.

Leans on the operations for gathering and staging, and on `streams` for what is read from a disk. A feed puts one
minibatch after the other into buffers that stay where they are, so that a step can be recorded; the order of the
samples in an array is the same whichever feed it is. Where ranks train together, every rank's feed tells of whole
minibatches and fetches this rank's part of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ops.interface import Array, Operations, Staging
from .parallel.ranks import ALONE, Ranks
from .streams import Order, ReadAhead

SPARE_BYTES = 64 << 20  # of a device's memory that a resident data set leaves free
Parts = tuple[Array, Array, "Array | None"]  # x, y and the sample weights, or None


class Buffers:
    """Where a minibatch lies while it is worked on: x in the storage type, y, and the sample weights or None."""

    def __init__(self, ops: Operations, rows: int, x: Array, y: Array, w: Array | None) -> None:
        self.x = ops.empty((rows, x.shape[1]), ops.precision.storage_dtype)
        self.y = ops.empty((rows, *y.shape[1:]), y.dtype)
        self.w = None if w is None else ops.empty(rows, w.dtype)

    def first(self, rows: int) -> Parts:
        """The first rows of each."""
        return self.x[:rows], self.y[:rows], None if self.w is None else self.w[:rows]


class Gathered:
    """The x of a minibatch, whose rows are gathered when they are asked for: by the thread that works on them.

    For a device whose lanes are threads. ``rows`` and ``state`` are those of `Operations.gather`.
    """

    def __init__(self, ops: Operations, source: Array, rows: Array | None, out: Array, state: Array) -> None:
        self._ops, self._source, self._rows, self._out, self._state = ops, source, rows, out, state
        self.shape = out.shape

    def __len__(self) -> int:
        """The rows of the minibatch."""
        return len(self._out)

    def __getitem__(self, part: slice) -> Array:
        """Some of the rows, (rows, n_0), in the storage type."""
        out, first = self._out[part], part.indices(len(self))[0]
        if self._rows is None:
            self._ops.gather(self._source[first:], None, out, self._state)
        else:
            self._ops.gather(self._source, self._rows[first:], out, self._state)
        return out


class Resident:
    """A data set on the device, from which each minibatch is gathered by the numbers of its rows.

    x: (n, n_0) of any real type; y: (n,) or (n, n_L); w: (n,) or None. All on the device.
    """

    def __init__(
        self, ops: Operations, x: Array, y: Array, w: Array | None, batch_size: int, ranks: Ranks = ALONE
    ) -> None:
        self._ops, self._sources, self._batch_size = ops, (x, y, w), batch_size
        self._buffers = Buffers(ops, ranks.most(batch_size), x, y, w)
        self._order = ops.empty(len(x), np.int64) if ops.waits else None
        self._rows: Array | None = None
        self._cursor = 0

    def epoch(self, order: NDArray[np.int64] | None, first: int = 0) -> Iterator[tuple[int, int]]:
        """(cursor, rows) of every minibatch of an epoch in this order of the rows; None: as they are stored.

        The first ``first`` rows of that order are left out, a whole number of minibatches: a resumed run has had them.
        """
        self._rows = order
        if order is not None and self._order is not None:
            self._ops.copy(order, self._order)
            self._rows = self._order
        for cursor in range(first, len(self._sources[0]), self._batch_size):
            self._cursor = cursor
            yield self._piece(cursor)

    def again(self, back: int) -> tuple[int, int] | None:
        """Make the minibatch of so many steps ago the one at hand; its (cursor, rows)."""
        return self._piece(self._cursor - back * self._batch_size)

    def _piece(self, cursor: int) -> tuple[int, int]:
        return cursor, min(self._batch_size, len(self._sources[0]) - cursor)

    @property
    def key(self) -> Any:
        """What tells recordings apart: which arrays a minibatch is fetched from."""
        return self._rows is None

    @property
    def moving(self) -> tuple[Array, ...]:
        """What a step reads and has elsewhere in the next epoch."""
        return () if self._rows is None or self._rows is self._order else (self._rows,)

    def fetch(self, rows: int, state: Array) -> Parts:
        """The rows from the state's CURSOR on; queues operations alone."""
        x, y, w = self._buffers.first(rows)
        sources = self._sources
        for source, out in zip(sources[1:], (y, w)):
            if source is not None:
                self._ops.gather(source, self._rows, out, state)
        if not self._ops.waits:
            return Gathered(self._ops, sources[0], self._rows, x, state), y, w
        self._ops.gather(sources[0], self._rows, x, state)
        return x, y, w


class Streamed:
    """A data set on the host, larger than the device's memory: two minibatches of it at a time on the device.

    While one is computed on, the next is gathered on the host and copied. x, y, w as in `Resident`, as NumPy arrays;
    memory maps too.
    """

    moving: Parts | tuple[()] = ()

    def __init__(
        self,
        ops: Operations,
        x: NDArray[Any],
        y: NDArray[Any],
        w: NDArray[Any] | None,
        batch_size: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ops, self._sources, self._batch_size, self._ranks = ops, (x, y, w), batch_size, ranks
        self._buffers = Buffers(ops, ranks.most(batch_size), x, y, w)
        self._slots = [self._slot() for _ in range(2)]
        self.key = 0  # which slot holds the minibatch at hand
        self._order: NDArray[np.int64] | None = None
        self._pieces: list[tuple[int, int]] = []
        self._at = 0

    def _slot(self) -> list[Staging | None]:
        most = self._ranks.most(self._batch_size)
        shapes = [None if part is None else (most, *part.shape[1:]) for part in self._sources]
        return [
            None if shape is None or part is None else self._ops.staging(shape, part.dtype)
            for shape, part in zip(shapes, self._sources)
        ]

    def epoch(self, order: NDArray[np.int64] | None, first: int = 0) -> Iterator[tuple[int, int]]:
        """(cursor, rows) of every minibatch of an epoch in this order of the rows; None: as they are stored.

        ``first``: how many rows of the epoch have been trained on before; the minibatches go on from there.
        """
        self._order = order
        yield from self._send_all(first, len(self._sources[0]))

    def _send_all(self, first: int, n: int) -> Iterator[tuple[int, int]]:
        self._pieces = [(cursor, min(self._batch_size, n - cursor)) for cursor in range(first, n, self._batch_size)]
        if self._pieces:
            self._load(0, 0)
        for at, piece in enumerate(self._pieces):
            self._at, self.key = at, at % 2
            self._receive()
            yield piece
            self._release()
            if at + 1 < len(self._pieces):  # the step is queued, and the device busy with it
                self._load(1 - self.key, at + 1)

    def again(self, back: int) -> tuple[int, int] | None:
        """Make the minibatch of so many steps ago the one at hand; its (cursor, rows)."""
        self._release()
        self._load(self.key, self._at - back)
        self._receive()
        return self._pieces[self._at - back]

    def _receive(self) -> None:
        for staging in self._staged(self.key):
            staging.receive()

    def _release(self) -> None:
        for staging in self._staged(self.key):
            staging.release()

    def _load(self, slot: int, piece: int) -> None:
        """Gather a minibatch on the host and send it on its way."""
        cursor, rows = self._pieces[piece]
        own = self._ranks.part(rows)
        cursor, rows = cursor + own.start, own.stop - own.start
        staged = self._slots[slot]
        for staging in self._staged(slot):
            staging.free()
        self._gather(cursor, [None if staging is None else staging.host[:rows] for staging in staged])
        for staging in self._staged(slot):
            staging.send(rows)

    def _gather(self, cursor: int, outs: list[NDArray[Any] | None]) -> None:
        """Fill the host's buffers with the rows from this one on."""
        for part, out in zip(self._sources, outs):
            if part is None or out is None:
                continue
            if self._order is None:
                np.copyto(out, part[cursor : cursor + len(out)])
            else:
                np.take(part, self._order[cursor : cursor + len(out)], axis=0, out=out, mode="clip")

    def _staged(self, slot: int) -> list[Staging]:
        return [staging for staging in self._slots[slot] if staging is not None]

    def fetch(self, rows: int, state: Array) -> Parts:
        """The minibatch that has just been received, cast where it has to be; queues operations alone."""
        x, y, w = map(self._cast, self._slots[self.key], self._buffers.first(rows))
        return x, y, w

    def _cast(self, staging: Staging | None, out: Array | None) -> Array | None:
        """What was received, in the type of ``out``: there, or where it is."""
        if staging is None or out is None:
            return None
        received = staging.device[: len(out)]
        if received.dtype == out.dtype:
            return received
        self._ops.gather(received, None, out)
        return out


class FromDisk(Streamed):
    """A data set on the disk, of which threads read the next rows while minibatches of the last ones are made."""

    def __init__(self, ops: Operations, ahead: ReadAhead, batch_size: int, ranks: Ranks = ALONE) -> None:
        super().__init__(ops, *ahead.like, batch_size, ranks)
        self._ahead = ahead

    def epoch(self, order: Order, first: int = 0) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        """(cursor, rows) of every minibatch of an epoch in this order, from row number ``first`` of it on."""
        self._ahead.begin(order, first)
        try:
            yield from self._send_all(first, self._ahead.n)
        finally:
            self._ahead.close()

    def _gather(self, cursor: int, outs: list[NDArray[Any] | None]) -> None:
        self._ahead.take(cursor, outs)


class Single:
    """One minibatch at a time, handed over by the caller."""

    key = None

    def __init__(self, ops: Operations, x: Array, y: Array, w: Array | None, fixed: bool) -> None:
        """``fixed``: copy what is put into buffers that stay where they are; x, y, w: the like of what will be put."""
        self._ops = ops
        self._buffers = Buffers(ops, len(x), x, y, w) if fixed else None
        self._batch: Parts = (x, y, w)

    def takes(self, x: Array, y: Array, w: Array | None) -> bool:
        """Whether a minibatch fits the buffers."""
        if self._buffers is None:
            return True
        room = self._buffers
        fits = len(x) <= len(room.x) and x.shape[1:] == room.x.shape[1:] and y.shape[1:] == room.y.shape[1:]
        return fits and y.dtype == room.y.dtype and (w is None) == (room.w is None)

    def put(self, x: Array, y: Array, w: Array | None) -> None:
        """Hand over a minibatch."""
        if self._buffers is None:
            self._batch = (self._ops.to_device(x, self._ops.precision.storage_dtype), y, w)
            return
        self._batch = self._buffers.first(len(x))
        for source, out in zip((x, y, w), self._batch):
            if source is not None:
                self._ops.copy(source, out)

    @property
    def moving(self) -> tuple[Array, ...]:
        """What a step reads and has elsewhere the next time."""
        return () if self._buffers is not None else tuple(part for part in self._batch if part is not None)

    def again(self, back: int) -> tuple[int, int] | None:
        """The minibatch that was handed over last; None for one before it, which is gone."""
        return None if back else (0, len(self._batch[0]))

    def fetch(self, rows: int, state: Array) -> Parts:
        """The minibatch that was handed over."""
        return self._batch


Feed = Resident | Streamed | FromDisk | Single
