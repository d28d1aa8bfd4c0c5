"""L and the metrics of a network on data: arrays, or a stream that is read piece by piece, by one rank or by all.

Leans on the passes of `network` and on `metrics` for what is added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from . import checks
from . import metrics as merits
from .feeding import Parts
from .losses import Loss
from .metrics import Metric
from .network import MLP
from .ops.interface import Array, Slot
from .parallel.ranks import Ranks
from .shards import Piece
from .streams import Stream


def checked(net: MLP, loss: Loss, stream: Stream) -> Stream:
    """A stream whose every piece is checked as arrays are, by the threads that read it."""
    prepare = stream.preparation

    def check(piece: Piece) -> Piece:
        piece = prepare(piece)
        if piece.y is None:
            raise ValueError("no target; name it with target=")
        x, y, _, _ = net._check_host(piece.x, piece.y, None, loss)
        return Piece(x, y, checks.sample_weight(piece.w, len(x), whole=False))

    return stream.prepared(check)


def evaluate(net: MLP, loss: Loss, dataset: Parts | Stream, names: Sequence[str], among: Ranks) -> dict[str, float]:
    """{"loss": L, …} and the metrics of these names, of the weights at hand, on data that have been checked.

    Each of the ranks works on its part of the rows, or of the chunks of a stream, and has the figures of all.
    """
    ops = net._ops
    figures, merged = ([merits.make(name, loss.name, net.sizes[-1]) for name in names] for _ in range(2))
    if isinstance(dataset, Stream):
        pieces: Iterator[Parts] = (piece.arrays() for piece in dataset.pieces(among.rank, among.size))
    else:
        own = among.part(len(dataset[0]))
        pieces = iter([cast(Parts, tuple(None if part is None else part[own] for part in dataset))])
    mean = total = 0.0
    for x, y, w in pieces:
        found = _add_piece(net, loss, x, ops.to_device(y), None if w is None else ops.to_device(w), figures)
        weight = ops.read_state(net._state, Slot.TOTAL_WEIGHT)
        total += weight
        mean += (found - mean) * (weight / total if total else 0.0)
    if among.size > 1:
        mean, figures = _merged(among, mean, total, figures, merged), merged
    return {"loss": mean, **{figure.name: figure.value() for figure in figures}}


def _add_piece(net: MLP, loss: Loss, x: Array, y: Array, w: Array | None, figures: Sequence[Metric]) -> float:
    """L on some rows, which are added to the figures."""
    ops, from_z = net._ops, net.fuses(loss)
    net._begin(loss, y, w)
    for rows, work in net._predict(x, from_z):
        part = None if w is None else w[rows]
        net._add_loss(work, loss, y[rows], part)
        if from_z:
            ops.activate(net._f[-1], work.h[-1], work.h[-1])
        for figure in figures:
            figure.add(ops.to_host(work.h[-1]), ops.to_host(y[rows]), None if part is None else ops.to_host(part))
    return ops.read_state(net._state, Slot.COST)


def _merged(among: Ranks, mean: float, total: float, figures: Sequence[Metric], fresh: Sequence[Metric]) -> float:
    """The mean loss over the rows of all ranks, from each one's and its weight; ``fresh`` take the figures in."""
    sums = [np.array([total, mean]), *(figure.sums() for figure in figures)]
    ends = np.cumsum([len(part) for part in sums])[:-1]
    mean = total = 0.0
    for row in among.gather(np.concatenate(sums)):
        (weight, loss), *others = np.split(row, ends)
        total += weight
        mean += (loss - mean) * (weight / total if total else 0.0)
        for figure, other in zip(fresh, others):
            figure.merge(other)
    return float(mean)
