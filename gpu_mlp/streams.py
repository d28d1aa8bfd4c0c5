"""Data sets larger than memory: the order of their rows, and the buffers that threads fill ahead of the training.

Leans on `folders` and `shards` for the files. The order of the rows is a function of the data set, the seed, the epoch
and ``buffer_rows``, and of nothing else: not of the memory, not of how many threads read, not of when they are done.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks, folders
from .data import SPLIT_STREAM
from .failures import BrokenData
from .parallel.ranks import Share
from .readers import PathLike
from .shards import NOWHERE, File, Piece, Room, Shard, chunks_of

BUFFER_BYTES = 64 << 20  # of the rows that are shuffled among each other, where ``buffer_rows`` is not given
CHUNKS_STREAM, BUFFER_STREAM = 3, 4  # beside the random streams of `data`
MOST_BUFFERS, MOST_THREADS = 4, 4
KEPT_IN_MEMORY = 0.5  # of the machine's; a set that takes more is gone from it before an epoch comes back to its start
Preparation = Callable[[Piece], Piece]


class Stream:
    """A data set on the disk, of any size: what `Trainer.fit` takes as ``data`` and as ``validation``.

    source: a folder of shards (.npy, .npz, .parquet, .csv or .tsv, of one kind), or one such file.
    target: the column or key of y; the .npy file of y; in a folder of .npy files the prefix of theirs, by default y.
    sample_weight: the like for the weights of the rows; None: there are none.
    memory: what the buffers may take, as bytes or as "512MiB"; the process needs some 150 MiB beside it.
    buffer_rows: how many rows are shuffled among each other; by default as many as take 64 MiB. A row goes into a
    buffer with the others of its chunk (1 MiB of rows that lie together; a row group of Parquet; a compressed .npz)
    and with other chunks that chance has chosen. The order follows from this number, and not from ``memory``.

    Raises ValueError, in one line, for files that are broken or do not agree, and for too little memory.
    """

    def __init__(
        self,
        source: PathLike,
        target: PathLike | None = None,
        sample_weight: PathLike | None = None,
        *,
        memory: int | str = "1GiB",
        buffer_rows: int | None = None,
        chunk_rows: int | None = None,
        require_target: bool = True,
    ) -> None:
        self.source = os.fspath(source)
        self.memory = checks.size("memory", memory)
        if buffer_rows is not None:
            checks.integer("buffer_rows", buffer_rows, 1)
        if chunk_rows is not None:
            checks.integer("chunk_rows", chunk_rows, 1)
        column, weight = (None if name is None else os.fspath(name) for name in (target, sample_weight))
        self.shards: list[Shard] = folders.find(self.source, folders.Wanted(column, weight, require_target))
        self._first = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self.preparation: Preparation = as_matrix
        self._settle(chunks_of(self.shards, chunk_rows))
        self._bypass_cache()
        self.row_bytes = max(shard.row_bytes for shard in self.shards)
        per_row = max(self.row_bytes, 4 * self.width)
        self.buffer_rows = max(1, int(BUFFER_BYTES // per_row)) if buffer_rows is None else int(buffer_rows)

    def _settle(self, chunks: NDArray[np.int64]) -> None:
        self.chunks = chunks
        self.n = int((chunks[:, 1] - chunks[:, 0]).sum())

    def __len__(self) -> int:
        """The number of rows."""
        return self.n

    @property
    def feature_names(self) -> list[str] | None:
        """The names of the columns of x; None where it is an array."""
        return self.shards[0].feature_names

    @cached_property
    def width(self) -> int:
        """The number of columns of x, as they are stored."""
        x = self.raw_piece(0).x
        return x.shape[1] if isinstance(x, np.ndarray) else len(x)

    @property
    def largest_chunk(self) -> int:
        """The rows of the largest chunk."""
        return int((self.chunks[:, 1] - self.chunks[:, 0]).max())

    # --- what it is ---

    def order(self, seed: int | None, epoch: int) -> Order:
        """The order of the rows in an epoch; ``seed`` None: as they are stored."""
        return Order(self.chunks, self.buffer_rows, seed, epoch)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set, in this order, from another: by names, sizes and the ends of its files.

        rows, shards and bytes are counts; schema is what the shards agree on; content and chunks are digests.
        """
        return {
            "kind": "stream",
            "rows": self.n,
            "shards": len(self.shards),
            "bytes": sum(file.size for shard in self.shards for file in shard.files),
            "schema": _digest(repr(sorted(self.shards[0].schema.items())).encode()),
            "content": self._content,
            "chunks": _digest(np.ascontiguousarray(self.chunks, "<i8").tobytes()),
            "buffer_rows": self.buffer_rows,
        }

    @cached_property
    def _content(self) -> str:
        files = [file for shard in self.shards for file in shard.files]
        return _digest(b"".join(f"{file.path.name} {file.size} ".encode() + file.sample() for file in files))

    def split(self, fraction: float, seed: int) -> tuple[Stream, Stream]:
        """What is kept, and round(fraction · n) rows that are held out: chunks that chance chooses, whole but for one.

        A function of the data set and the seed. Rows that lie together are held out together: files that are sorted
        by something should be shuffled once when they are written.
        """
        fraction = checks.real("fraction", fraction, 0, 1, open_minimum=True, open_maximum=True)
        if self.n < 2:
            raise ValueError(f"{self.source}: {self.n} row cannot be split")
        wanted = min(max(1, round(fraction * self.n)), self.n - 1)
        turn = np.random.default_rng([checks.integer("seed", seed, 0), SPLIT_STREAM]).permutation(len(self.chunks))
        chosen = self.chunks[turn]
        before = np.cumsum(chosen[:, 1] - chosen[:, 0])
        cut = int(np.searchsorted(before, wanted))  # this chunk holds the last of the rows that are held out
        middle = int(chosen[cut, 1] - (before[cut] - wanted))
        first, last = chosen[cut]
        held = np.concatenate([chosen[:cut], [[first, middle]]])
        kept = np.concatenate([chosen[cut + 1 :], [[middle, last]] if middle < last else np.empty((0, 2), np.int64)])
        return self._of(kept), self._of(held)

    def _of(self, chunks: NDArray[np.int64]) -> Stream:
        """The same files, with these chunks alone."""
        part = copy.copy(self)
        part._settle(chunks[np.argsort(chunks[:, 0])].astype(np.int64))
        return part

    def within(self, memory: int | str) -> Stream:
        """The same rows, with other memory."""
        other = copy.copy(self)
        other.memory = checks.size("memory", memory)
        return other

    def prepared(self, preparation: Preparation) -> Stream:
        """The same rows, each piece of them put through a function on its way in; threads call it side by side."""
        other = copy.copy(self)
        other.preparation = preparation
        return other

    # --- reading ---

    def raw_piece(self, chunk: int) -> Piece:
        """The rows of a chunk as they are stored."""
        shard, start, stop = self._place(*self.chunks[chunk].tolist())
        return shard.read(start, stop)

    def piece(self, chunk: int, into: Room = NOWHERE, rows: NDArray[np.int64] | None = None) -> Piece:
        """The rows of a chunk, prepared, or some of them by their ascending numbers; they may be in ``into`` then.

        BrokenData, naming the file and the rows, for whatever is wrong with them.
        """
        shard, start, stop = self._place(*self.chunks[chunk].tolist())
        with self._named(chunk):
            return self.preparation(shard.read(start, stop, into) if rows is None else shard.pick(start, stop, rows))

    @contextlib.contextmanager
    def _named(self, chunk: int) -> Iterator[None]:
        """Whatever is wrong with the rows of a chunk, as BrokenData that says where they are."""
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            shard, start, _ = self._place(*self.chunks[chunk].tolist())
            text = " ".join(str(error).split())
            rows = "" if str(shard.path) in text else f"{shard.path}, counted from row {start}: "
            raise BrokenData(f"{rows}{text}") from error

    def each(self, work: Callable[[Any, Any], None]) -> None:
        """Do ``work(x, y)`` on every chunk in turn; an error says which rows it was."""
        for chunk, piece in enumerate(self.pieces()):
            with self._named(chunk):
                work(piece.x, piece.y)

    def _place(self, start: int, stop: int) -> tuple[Shard, int, int]:
        """The shard that rows of the set lie in, and where they do there."""
        at = int(np.searchsorted(self._first, start, side="right")) - 1
        first = int(self._first[at])
        return self.shards[at], start - first, stop - first

    def will_need(self, chunks: Iterable[int]) -> None:
        """These chunks are about to be read."""
        wanted: dict[File, list[tuple[int, int]]] = {}
        for chunk in chunks:
            shard, start, stop = self._place(*self.chunks[chunk].tolist())
            for file, offset, count in shard.extents(start, stop):
                wanted.setdefault(file, []).append((offset, count))
        for file, extents in wanted.items():
            file.will_need(extents)

    @property
    def piece_bytes(self) -> int:
        """What the largest chunk takes while it is read."""
        overhead = max(shard.overhead for shard in self.shards) + 1
        return int(overhead * self.largest_chunk * max(self.row_bytes, 4 * self.width))

    def _bypass_cache(self) -> None:
        """Read past the page cache where the files take more than the system can keep there until the next epoch."""
        if not (hasattr(os, "O_DIRECT") and hasattr(os, "sysconf")):
            return
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if sum(file.size for shard in self.shards for file in shard.files) > KEPT_IN_MEMORY * memory:
            for shard in self.shards:
                for file in shard.files:
                    file.bypass = shard.as_it_lies

    def threads(self) -> int:
        """How many chunks can be read at once in a quarter of the memory."""
        waiting = any(file.bypass for shard in self.shards for file in shard.files)  # for the disk, nearly all the time
        most = MOST_THREADS if waiting else min(MOST_THREADS, os.cpu_count() or 1)
        return max(1, min(most, self.memory // 4 // max(1, self.piece_bytes)))

    def pieces(self, first: int = 0, step: int = 1) -> Iterator[Piece]:
        """Every chunk, prepared, in the order of the files, or every so many; the next ones are read meanwhile."""
        threads = self.threads()
        self._require(2 * self.piece_bytes, "a piece that is read and one that is worked on")
        with contextlib.ExitStack() as stack:
            pool = ThreadPoolExecutor(threads, "gpu-mlp-stream")
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            under_way: deque[Future[Piece]] = deque()
            for chunk in range(first, len(self.chunks), step):
                under_way.append(pool.submit(self.piece, chunk))
                if len(under_way) > threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

    def _require(self, needed: int, what: str) -> None:
        if needed > self.memory:
            raise ValueError(
                f"memory: {checks.shown_size(self.memory)} is too little for {self.source}: {what} take "
                f"{checks.shown_size(needed)}; allow more, lower buffer_rows={self.buffer_rows}, or write the files "
                "in smaller row groups or shards"
            )

    def ahead(self, share: Share | None = None) -> ReadAhead:
        """What fills buffers in the order of an epoch; with ``share`` those rows alone are kept, and asked for."""
        return ReadAhead(self, share)


def as_stored(piece: Piece) -> Piece:
    """The piece itself."""
    return piece


def as_matrix(piece: Piece) -> Piece:
    """A piece with its x as a matrix; a ValueError for a column of text."""
    if isinstance(piece.x, np.ndarray):
        return piece
    for name, column in piece.x.items():
        if column.dtype.kind not in "biuf":
            raise ValueError(f"column {name!r} holds text; train with `gpu-mlp train`, or give prepared() a function")
    return Piece(np.column_stack(list(piece.x.values())), piece.y, piece.w)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Order:
    """The rows of an epoch in their order: chunks in random turn, put into buffers, and shuffled within each.

    A function of the chunks, ``buffer_rows``, the seed and the epoch; ``first`` is where in the epoch each buffer
    begins, with n at the end.
    """

    def __init__(self, chunks: NDArray[np.int64], buffer_rows: int, seed: int | None, epoch: int) -> None:
        self._chunks, self._seed, self._epoch = chunks, seed, epoch
        self.turn = (
            np.arange(len(chunks)) if seed is None else _generator(seed, CHUNKS_STREAM, epoch).permutation(len(chunks))
        )
        lengths = (chunks[self.turn, 1] - chunks[self.turn, 0]).tolist()
        self.cuts, self.first, filled = [0], [0], 0
        for i, length in enumerate(lengths):
            if filled and filled + length > buffer_rows:
                self.cuts.append(i)
                self.first.append(self.first[-1] + filled)
                filled = 0
            filled += length
        self.cuts.append(len(lengths))
        self.first.append(self.first[-1] + filled)

    def __len__(self) -> int:
        """The number of buffers."""
        return len(self.cuts) - 1

    def chunks(self, buffer: int) -> list[int]:
        """The chunks of a buffer, in the order in which they lie there."""
        return self.turn[self.cuts[buffer] : self.cuts[buffer + 1]].tolist()

    def permutation(self, buffer: int) -> NDArray[np.int64]:
        """The order in which the rows of a buffer leave it."""
        rows = self.first[buffer + 1] - self.first[buffer]
        if self._seed is None:
            return np.arange(rows)
        return _generator(self._seed, BUFFER_STREAM, self._epoch, buffer).permutation(rows)

    def buffer_at(self, cursor: int) -> int:
        """The buffer that row number ``cursor`` of the epoch comes from."""
        return bisect.bisect_right(self.first, cursor) - 1

    def rows(self) -> NDArray[np.int64]:
        """The numbers of all rows, counted over the files, in their order: (n,)."""
        parts = []
        for buffer in range(len(self)):
            filled = np.concatenate([np.arange(*self._chunks[chunk]) for chunk in self.chunks(buffer)])
            parts.append(filled[self.permutation(buffer)])
        return np.concatenate(parts)


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *stream])))


class _Slot:
    """The memory of one buffer, and what is being read into it."""

    def __init__(self, like: Sequence[NDArray[Any] | None], rows: int) -> None:
        self.parts = [None if a is None else np.empty((rows, *a.shape[1:]), a.dtype) for a in like]
        self.plan: Future[tuple[NDArray[np.int64], NDArray[np.bool_] | None]]  # see ReadAhead._plan
        self.reading: list[Future[None]] = []


class ReadAhead:
    """The buffers of an epoch, which threads fill while the rows of the one before are trained on.

    Every chunk of a buffer is a task of its own, which waits for nothing but the buffer's plan, a task that was begun
    before: whatever order they end in, the same bytes stand in the same place. A failure comes out of `take`.
    """

    def __init__(self, stream: Stream, share: Share | None = None) -> None:
        self._stream, self._share = stream, share
        self.like = stream.piece(0).arrays()  # the dtypes and widths of all pieces
        capacity = min(stream.n, max(stream.buffer_rows, stream.largest_chunk))
        row = sum(a[:1].nbytes for a in self.like if a is not None)
        threads = stream.threads()
        room = stream.memory - threads * stream.piece_bytes
        needed = 1 if capacity == stream.n else 2
        wanted = min(MOST_BUFFERS, 1 - (-stream.n // capacity)) if needed > 1 else 1
        if share is not None:
            capacity = share.most(capacity)
        stream._require(
            threads * stream.piece_bytes + needed * capacity * row,
            f"{needed} buffers of {capacity} rows and what fills them",
        )
        count = max(needed, min(wanted, room // max(1, capacity * row)))
        self._slots = [_Slot(self.like, capacity) for _ in range(count)]
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._herald: ThreadPoolExecutor | None = None  # announces to the disk what the pool has not come to yet
        self._order: Order | None = None
        self._window = range(0)  # the buffers that are in the slots or on their way there

    @property
    def n(self) -> int:
        """The rows of an epoch."""
        return self._stream.n

    def begin(self, order: Order, cursor: int = 0) -> None:
        """Begin to read for an epoch in this order, from row number ``cursor`` of it on."""
        self.close()
        if cursor >= order.first[-1]:
            cursor = order.first[-1] - 1  # nothing is left; a look back may follow
        self._order, self._pool = order, ThreadPoolExecutor(self._threads, "gpu-mlp-stream")
        self._herald = ThreadPoolExecutor(1, "gpu-mlp-stream")
        self._advance(order.buffer_at(cursor))

    def take(self, cursor: int, outs: list[NDArray[Any] | None]) -> None:
        """Fill the arrays for x, y and the weights with the rows of the epoch from number ``cursor`` on."""
        order, done = self._order, 0
        assert order is not None  # begin comes first
        rows = next(len(out) for out in outs if out is not None)
        while done < rows:
            buffer = order.buffer_at(cursor + done)
            slot = self._ready(buffer)
            at = cursor + done - order.first[buffer]
            chosen = slot.plan.result()[0][at : at + rows - done]
            for part, out in zip(slot.parts, outs):
                if part is not None and out is not None:
                    np.take(part, chosen, axis=0, out=out[done : done + len(chosen)], mode="clip")
            done += len(chosen)

    def _ready(self, buffer: int) -> _Slot:
        """The slot of a buffer, once all of it is there."""
        assert self._order is not None
        if self._pool is None or buffer not in self._window:
            self.begin(self._order, self._order.first[buffer])  # a look back, beyond what is still there
        self._advance(buffer)
        slot = self._slots[buffer % len(self._slots)]
        for reading in slot.reading:
            reading.result()
        slot.reading = []
        return slot

    def _advance(self, buffer: int) -> None:
        """Forget the buffers before this one, and begin to fill their slots with the next ones."""
        assert self._order is not None
        start = max(self._window.stop, buffer)
        self._window = range(buffer, min(buffer + len(self._slots), len(self._order)))
        for b in range(start, self._window.stop):
            self._fill(b)

    def _fill(self, buffer: int) -> None:
        assert self._order is not None
        assert self._pool is not None
        assert self._herald is not None
        order, slot, at = self._order, self._slots[buffer % len(self._slots)], 0
        chunks = order.chunks(buffer)
        self._herald.submit(self._announce, chunks)
        slot.plan = self._pool.submit(self._plan, order, buffer)
        slot.reading = []
        for chunk in chunks:
            start, stop = self._stream.chunks[chunk].tolist()
            slot.reading.append(self._pool.submit(self._read, chunk, slot, at))
            at += stop - start

    def _plan(self, order: Order, buffer: int) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Where in the slot each row that leaves a buffer lies; which of the rows that come are kept, if not all."""
        turn = order.permutation(buffer)
        if self._share is None:
            return turn, None
        kept = np.zeros(len(turn), bool)
        kept[turn[self._share.mask(order.first[buffer], order.first[buffer + 1])]] = True
        return (np.cumsum(kept) - 1)[turn], kept

    def _announce(self, chunks: list[int]) -> None:
        """Let the system read ahead on the disk; that a file is gone is told where its rows are read."""
        with contextlib.suppress(ValueError, OSError):
            self._stream.will_need(chunks)

    def _read(self, chunk: int, slot: _Slot, at: int) -> None:
        start, stop = self._stream.chunks[chunk].tolist()
        kept, rows, count = slot.plan.result()[1], None, stop - start
        if kept is not None:
            rows = np.flatnonzero(kept[at : at + stop - start])
            at, count = int(np.count_nonzero(kept[:at])), len(rows)
            if not count:
                return
        room = [None if part is None else part[at : at + count] for part in slot.parts]
        for part, out in zip(self._stream.piece(chunk, room, rows).arrays(), room):
            if part is not None and out is not None and part.ctypes.data != out.ctypes.data:
                if part.shape != out.shape:
                    raise BrokenData(f"{self._stream.source}: {part.shape} values where {out.shape} were expected")
                out[...] = part

    def close(self) -> None:
        """Stop reading, and wait for the reads that are under way."""
        for threads in (self._pool, self._herald):
            if threads is not None:
                threads.shutdown(
                    wait=True, cancel_futures=True
                )  # a task waits for none that is begun later, so this ends
        self._pool, self._herald, self._window = None, None, range(0)
