"""The buffers of one pass through a network, allocated once per batch size and reused.

Leans on the operations for memory and on the activation table for what f′ reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .activations import Activation
from .ops.interface import Array, Operations

Sink = Callable[[int, Array, Array, bool], None]  # layer, gz, h, accumulate


class Workspace:
    """h of every layer, z where f′ reads it, and two buffers for the gz of neighbouring layers.

    ``h[0]`` is the input, (rows, n_0), set by whoever runs a pass; ``h[l + 1]`` and ``z[l]`` are layer l's,
    (rows, n_{l+1}), and so is ``auxiliary[l]``, what a device's forward pass leaves for its backward pass.
    """

    def __init__(
        self, ops: Operations, sizes: Sequence[int], activations: Sequence[Activation], from_z: bool, rows: int
    ) -> None:
        dtype = ops.precision.storage_dtype
        reads_z = [f.reads == "z" for f in activations]
        if from_z:
            reads_z[-1] = False  # the fused pair takes z of the output layer from h[L]
        self._sizes = sizes
        self.rows = rows
        self.h: list[Array] = [None, *(ops.empty((rows, n), dtype) for n in sizes[1:])]
        self.z = [ops.empty((rows, n), dtype) if needed else None for n, needed in zip(sizes[1:], reads_z)]
        hidden = zip(activations[:-1], sizes[1:])
        self.auxiliary = [*(ops.auxiliary(f, rows, n) for f, n in hidden), None]
        self._gz = [ops.empty(rows * max(sizes[1:]), dtype) for _ in range(min(2, len(sizes) - 1))]
        self._short: dict[int, Workspace] = {}

    def gz(self, layer: int) -> Array:
        """The buffer for layer ``layer``'s gz, (rows, n_{layer+1}); neighbouring layers alternate between two."""
        n = self._sizes[layer + 1]
        return self._gz[layer % 2][: self.rows * n].reshape(self.rows, n)

    def first(self, rows: int) -> Workspace:
        """The same buffers seen through their first ``rows`` rows."""
        if rows == self.rows:
            return self
        if rows not in self._short:
            short = object.__new__(Workspace)
            short._sizes, short.rows, short._gz, short._short = self._sizes, rows, self._gz, {}
            short.h = [None, *(h[:rows] for h in self.h[1:] if h is not None)]
            short.z = [z if z is None else z[:rows] for z in self.z]
            short.auxiliary = [kept if kept is None else kept.first(rows) for kept in self.auxiliary]
            self._short[rows] = short
        return self._short[rows]


@dataclass(frozen=True)
class Lane:
    """What micro-batches are worked through with, one after the other: their buffers, and what they add up in.

    ``g`` is the flat gradient that ``gb`` and whatever ``sink`` writes to are views of; COST and what a pass reads are
    in ``state``. Several lanes run side by side.
    """

    work: Workspace
    g: Array
    gb: Sequence[Array]
    sink: Sink
    state: Array
