"""The gradient of a trainer on its way over the ranks, and what of θ this rank updates.

Leans on `buckets` for the cut and on an exchange of the operations for the way. A bucket goes out as soon as its last
gradient is stored, while the layers below are still in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..ops.interface import Array, Layout, Operations, Slot
from ..optimizers import Muon, Optimizer
from ..workspace import Sink
from . import Parallel
from .buckets import cut
from .ranks import MPIRanks


class Reduction:
    """Sums the flat gradient ``g`` over the ranks, step by step: `begin`, `stored` for every pass and layer, `finish`.

    ``mine`` are the slices of θ that this rank updates, each with where its moments lie among ``size`` numbers.
    """

    def __init__(
        self, ops: Operations, ranks: MPIRanks, layout: Layout, g: Array, optimizer: Optimizer, options: Parallel
    ) -> None:
        self._ranks = ranks
        self.sharded = options.shard_optimizer
        whole = self.sharded and isinstance(optimizer, Muon)  # its rule sees whole matrices
        self._buckets = cut(layout, ranks.size, options.bucket_bytes, whole)
        self.exchange = ops.exchange(ranks, g, self._buckets, options.wire, self.sharded)
        self._layers = len(layout.spans)
        self._left = [0] * self._layers  # passes of each layer that are still to come
        self._begun = 0
        self.mine = self._slices(ranks.rank) if self.sharded else [(slice(0, layout.size), slice(0, layout.size))]
        self.size = self.mine[-1][1].stop if self.mine else 0

    def _slices(self, rank: int) -> list[tuple[slice, slice]]:
        """The slices of θ that a rank updates, and where each lies when they are put end to end."""
        found, at = [], 0
        for bucket in self._buckets:
            part = bucket.slices[rank]
            length = part.stop - part.start
            if length:
                found.append((part, slice(at, at + length)))
                at += length
        return found

    # --- a step ---

    def begin(self, passes: int) -> None:
        """The passes of a step begin, of which each stores every layer's gradient: so many, one after the other.

        0: they are on several threads, and `finish` comes when they are done.
        """
        self._left = [passes] * self._layers
        self._begun = 0

    def watched(self, sink: Sink) -> Sink:
        """The sink that stores gradients, and sends what is final on its way."""

        def stored(l: int, gz: Array, h: Array, accumulate: bool) -> None:
            sink(l, gz, h, accumulate)
            self._left[l] -= 1
            if self._left[l] == 0:
                self._send(l)
            elif self._begun:
                self.exchange.poke()

        return stored

    def _send(self, layer: int) -> None:
        """Begin every bucket that is final once this layer is."""
        while self._begun < len(self._buckets) and self._buckets[self._begun].layer >= layer:
            self.exchange.begin(self._begun)
            self._begun += 1
        if self._begun:
            self.exchange.poke()

    def finish(self, state: Array) -> None:
        """g and COST are those of the whole batch; g in this rank's slices only, where the optimizer is sharded."""
        self._send(0)
        self.exchange.sum_state(state, Slot.COST)
        self.exchange.finish()

    # --- moments, of which each rank has its slices ---

    def whole(self, ops: Operations, array: Array, size: int) -> Any:
        """An array of θ's size on the host, on the first rank, from the ranks' slices; empty elsewhere."""
        own = ops.to_host(array)
        parts = self._ranks.gathered(own)
        out = ops.to_host(ops.zeros(size if parts else 0, own.dtype))
        for rank, part in enumerate(parts):
            for theta, kept in self._slices(rank):
                out[theta] = part[kept]
        return out

    def take(self, ops: Operations, whole: Array, out: Array) -> None:
        """out ← this rank's slices of an array of θ's size."""
        for theta, kept in self.mine:
            ops.copy(whole[theta], out[kept])

    def others(self) -> Iterator[slice]:
        """The buckets of θ, of which other ranks may have updated slices."""
        for bucket in self._buckets:
            yield slice(bucket.start, bucket.stop)
