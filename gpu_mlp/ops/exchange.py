"""The seam between ranks: sums of gradients over them, and slices of θ that each of them sends to the others.

Two implementations, `mpi` for arrays on the host and `nccl` for those on GPUs. Every rank calls the same methods in the
same order; like operations they queue work, and what is queued after them sees what they wrote.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .interface import Array, Slot


@dataclass(frozen=True)
class Bucket:
    """A range of θ that is summed over the ranks at once: start … stop, of which ``slices`` are the ranks', end to end.

    It is final once the gradient of layer ``layer`` is.
    """

    start: int
    stop: int
    slices: tuple[slice, ...]
    layer: int


class Exchange(abc.ABC):
    """What the ranks of a job send each other of the flat gradient ``g``, bucket by bucket."""

    def __init__(self, ranks: Any, g: Array, buckets: Sequence[Bucket], wire: str, scatter: bool) -> None:
        """ranks: `parallel.ranks.MPIRanks`; wire: "full" or "bfloat16"; scatter: a rank needs its own slices alone."""
        self.ranks, self.g, self.buckets = ranks, g, list(buckets)
        self.wire, self.scatter = wire, scatter

    @abc.abstractmethod
    def begin(self, bucket: int) -> None:
        """Begin to sum g over the ranks in a bucket, once what is queued so far is done; buckets begin in turn."""

    def poke(self) -> None:  # noqa: B027  (most transports move on by themselves)
        """Let what is under way move on."""

    @abc.abstractmethod
    def finish(self) -> None:
        """What is queued from now on sees the sums of all buckets, or of this rank's slices with ``scatter``."""

    @abc.abstractmethod
    def gather(self, flat: Array) -> None:
        """Give every rank the slices that the others have of ``flat``, an array of g's size and type."""

    @abc.abstractmethod
    def sum_state(self, state: Array, slot: Slot, squares: bool = False) -> None:
        """A number of the state ← Σ over the ranks of theirs; with ``squares`` √ Σ of their squares."""
