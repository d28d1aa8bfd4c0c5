"""The processes of a job: who they are, and what they tell each other on the host.

Leans on mpi4py alone, and only where a program was started with it. Every rank has to call the same methods in the same
order. Sums are in the order of the ranks, so that every rank and every run has the same bits; what is told is text or
numbers, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..notices import say_once

ROW_MULTIPLE = 8  # that the parts of a large batch are cut at: odd shapes slow down matrix units
LEAST_PART = 64  # rows, of a batch that is cut so
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # what a launcher tells
LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
LAUNCH = "mpiexec -n N python -m mpi4py"
MOMENT = 3.0  # seconds that a rank which fails waits for the others to fail alike
DIGEST = 16
T = TypeVar("T")


class Ranks:
    """A job of one process, or the part that jobs of several have in common."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1  # among those on this machine

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.rank == 0

    def part(self, rows: int) -> slice:
        """This rank's rows of a batch: the ranks' parts lie end to end, and are empty where the batch is short."""
        if self.size == 1:
            return slice(0, rows)
        unit = ROW_MULTIPLE if rows >= LEAST_PART * self.size else 1
        units = -(-rows // unit)
        start, stop = (min(rows, unit * (units * r // self.size)) for r in (self.rank, self.rank + 1))
        return slice(start, stop)

    def most(self, rows: int) -> int:
        """The rows of the largest part of a batch of at most so many."""
        return min(rows, -(-rows // self.size) + ROW_MULTIPLE) if self.size > 1 else rows

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every rank's (n,) float64 numbers, as (size, n), on every rank."""
        return values[None]

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Σ over the ranks of (n,) float64 numbers, in the order of the ranks."""
        total = np.zeros_like(values)
        for row in self.gather(values):
            total += row
        return total

    def texts(self, text: str) -> list[str]:
        """Every rank's text, on every rank."""
        return [text]

    def told(self, text: str) -> str:
        """The first rank's text, on every rank."""
        return text

    def broadcast(self, array: NDArray[Any]) -> None:
        """array ← the first rank's, in place; C order, of the same shape and type everywhere."""

    def gathered(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """Every rank's 1-d array, of one type and any length, on the first rank; nothing on the others."""
        return [array]

    def barrier(self) -> None:
        """Wait for every rank."""

    def parted(self) -> None:
        """The last call of a rank that fails."""

    def on_first(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returns on the first rank, which alone does it, and None elsewhere; its error on every rank."""
        result, error = None, None
        if self.first:
            try:
                result = work()
            except (ValueError, TypeError, OSError) as found:
                error = found
        kind, text = json.loads(self.told(json.dumps([_kind(error), str(error)])))
        if error is not None:
            raise error
        if kind:
            raise {"TypeError": TypeError, "FileNotFoundError": FileNotFoundError, "OSError": OSError}.get(
                kind, ValueError
            )(text)
        return result

    def blame(self, failure: str) -> str:
        """What this rank should tell of its failure, which ends the job: all of it, with the rank's name, or nothing.

        Where every rank fails within a moment for the same reason, bad options say, the first one tells it alone.
        """
        return failure

    def cores(self) -> int:
        """How many of the cores that this process may use are its own, where ranks on one machine share them."""
        return len(_cores())


def _kind(error: BaseException | None) -> str:
    return "" if error is None else type(error).__name__


class Share:
    """Which rows of an epoch of ``n`` are a rank's, in minibatches of ``batch``."""

    def __init__(self, ranks: Ranks, batch: int, n: int) -> None:
        self._ranks, self._batch, self._n = ranks, batch, n

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether each of the rows start … stop, counted in the epoch's order, is one of them."""
        row = np.arange(start, stop)
        at, last = row % self._batch, self._n // self._batch * self._batch
        own, rest = self._ranks.part(self._batch), self._ranks.part(self._n - last)
        in_last = row >= last
        first, end = np.where(in_last, rest.start, own.start), np.where(in_last, rest.stop, own.stop)
        found: NDArray[np.bool_] = (at >= first) & (at < end)
        return found

    def most(self, rows: int) -> int:
        """At most so many of ``rows`` rows in a row are among them."""
        return min(rows, (rows // self._batch + 2) * self._ranks.most(self._batch))


class MPIRanks(Ranks):
    """The ranks of MPI's world, through mpi4py."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.comm = mpi, mpi.COMM_WORLD.Dup()  # apart from what the program itself sends
        self.rank, self.size = self.comm.rank, self.comm.size
        near = self.comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = near.rank, near.size
        self._near = near
        self._failures = self.comm.Dup()  # of its own, since a rank that fails may be waited for in any other

    @cached_property
    def halves(self) -> tuple[Any, Any]:
        """A communicator for each half of a sum: in each of them collectives begin in one order on all ranks."""
        return self.comm.Dup(), self.comm.Dup()

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.empty((self.size, values.size), np.float64)
        self.comm.Allgather(np.ascontiguousarray(values, np.float64), found)
        return found

    def texts(self, text: str) -> list[str]:
        return _texts(self.comm, text)

    def told(self, text: str) -> str:
        content = np.frombuffer(text.encode(), np.uint8) if self.first else np.empty(0, np.uint8)
        length = np.array([content.size], np.int64)
        self.comm.Bcast(length)
        sent = content.copy() if self.first else np.empty(int(length[0]), np.uint8)
        self.comm.Bcast(sent)
        return sent.tobytes().decode()

    def broadcast(self, array: NDArray[Any]) -> None:
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, 1 << 30):  # counts beyond 2³¹ are not every MPI's
            self.comm.Bcast(flat[start : start + (1 << 30)])

    def gathered(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        lengths = np.empty(self.size, np.int64)
        self.comm.Allgather(np.array([array.size], np.int64), lengths)
        if not self.first:
            self.comm.Send(np.ascontiguousarray(array), dest=0)
            return []
        parts = [np.ascontiguousarray(array)]
        for rank in range(1, self.size):
            part = np.empty(int(lengths[rank]), array.dtype)
            self.comm.Recv(part, source=rank)
            parts.append(part)
        return parts

    def barrier(self) -> None:
        self.comm.Barrier()

    def blame(self, failure: str) -> str:
        said, found = _digest(failure), np.empty((self.size, DIGEST), np.uint8)
        request = self._failures.Iallgather(said, found)
        if not _within(MOMENT, request.Test) or (found != said).any():
            return f"rank {self.rank}: {failure}"
        return failure if self.first else ""

    def parted(self) -> None:
        """Wait a moment for the others, who may still have something to tell: a rank that ends the job ends them."""
        _within(MOMENT, self._failures.Ibarrier().Test)

    def cores(self) -> int:
        own = _cores()
        others = [set(json.loads(text)) for text in _texts(self._near, json.dumps(sorted(own)))]
        share = sum((Fraction(1, sum(core in cores for cores in others)) for core in own), Fraction(0))
        return max(1, math.floor(share))


def _digest(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=DIGEST).digest(), np.uint8)


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    """Whether something is done before so much time has passed."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _texts(comm: Any, text: str) -> list[str]:
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = np.empty(comm.size, np.int64)
    comm.Allgather(np.array([content.size], np.int64), lengths)
    found = np.empty(int(lengths.sum()), np.uint8)
    comm.Allgatherv(content, [found, lengths.tolist()])
    ends = np.cumsum(lengths)
    return [found[end - length : end].tobytes().decode() for end, length in zip(ends.tolist(), lengths.tolist())]


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


ALONE = Ranks()
_joined: MPIRanks | None = None
_left = False


def join(wanted: bool | None) -> Ranks:
    """The ranks of the job that this process is of.

    wanted: None, where the program was started so; True, also where there is one rank; False, never. None means alone
    in a program without mpi4py; ValueError where that is wanted all the same, or where MPI sees fewer ranks than were
    started.
    """
    global _joined
    if wanted is False or multiprocessing.parent_process() is not None:
        return ALONE
    if not has_mpi4py():
        if wanted:
            raise ValueError(f"parallel: the program was not started with mpi4py: {LAUNCH} PROGRAM …")
        if started() > 1:
            say_once(
                f"this is one of {started()} processes that a launcher started, and it trains by itself: for one "
                f"training on all of them start it as {LAUNCH} PROGRAM …; parallel=False says that it is meant"
            )
        return ALONE
    if _joined is None:
        from mpi4py import MPI

        _joined = MPIRanks(MPI)
    if _joined.size == 1 and started() > 1:
        raise ValueError(
            f"parallel: the launcher started {started()} processes, and MPI sees one: mpi4py was built for another MPI "
            "than that of the launcher (srun: try --mpi=pmi2 or --mpi=pmix); parallel=False trains each by itself"
        )
    return _joined if wanted or _joined.size > 1 else ALONE


def joined() -> Ranks:
    """The ranks that this process has joined; `ALONE` where it has not, or has left them."""
    return ALONE if _joined is None or _left else _joined


def leave() -> None:
    """Go on alone, and tell what there is to tell, in a process that had joined."""
    global _left
    _left = True


def has_mpi4py() -> bool:
    """Whether the program was started as ``python -m mpi4py``, or has imported mpi4py's MPI itself."""
    return "mpi4py.run" in sys.modules or "mpi4py.MPI" in sys.modules


def started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes a launcher says that it started; 1 where there is none, or it does not say."""
    return max((int(environment[name]) for name in SIZES if environment.get(name, "").isdigit()), default=1)


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Which process of this machine this is, as the launcher says; 0 where it does not."""
    found = (int(environment[name]) for name in LOCAL_RANKS if environment.get(name, "").isdigit())
    return next(found, 0)
