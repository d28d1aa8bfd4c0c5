"""How the flat gradient is cut: into buckets that go out one after the other, and each into a slice a rank.

Leans on the layout of θ. A bucket is a contiguous range of θ that is final at one moment of the backward pass: the W of
neighbouring layers, output layer first; the biases are the last one. A rank sums up its own slice of each, and with a
sharded optimizer updates that slice.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.exchange import Bucket
from ..ops.interface import Layout


def cut(layout: Layout, ranks: int, bucket_bytes: int, whole: bool) -> list[Bucket]:
    """The buckets of θ in the order in which they become final; ``whole``: no slice may cut a W."""
    spans = layout.spans
    stop, buckets = layout.n_weights, []
    owners = _owners(spans, ranks)
    for l in range(len(spans) - 1, -1, -1):
        start = spans[l].start
        if (stop - start) * layout.itemsize >= bucket_bytes or l == 0:
            slices = _whole(spans, owners, ranks, start, stop) if whole else _even(start, stop, ranks, layout.unit)
            buckets.append(Bucket(start, stop, slices, l))
            stop = start
    slices = _even(layout.n_weights, layout.size, ranks, layout.unit)
    return [*buckets, Bucket(layout.n_weights, layout.size, slices, 0)]


def _even(start: int, stop: int, ranks: int, unit: int) -> tuple[slice, ...]:
    """start … stop in as many slices of about the same length, each a multiple of ``unit``."""
    units = -(-(stop - start) // unit)
    bounds = [min(stop, start + unit * -(-units * r // ranks)) for r in range(ranks + 1)]
    return tuple(slice(a, b) for a, b in zip(bounds, bounds[1:]))


def _owners(spans: Sequence[slice], ranks: int) -> list[int]:
    """Which rank each W is of: neighbours together, so that every rank has about the same of them, in numbers."""
    total = sum(span.stop - span.start for span in spans)
    before, owners = 0, []
    for span in spans:
        length = span.stop - span.start
        owners.append(min(ranks - 1, (2 * before + length) * ranks // (2 * total)))
        before += length
    return owners


def _whole(spans: Sequence[slice], owners: Sequence[int], ranks: int, start: int, stop: int) -> tuple[slice, ...]:
    """start … stop in a slice a rank, with the W that it owns."""
    slices, at = [], start
    for rank in range(ranks):
        end = max((span.stop for span, owner in zip(spans, owners) if owner <= rank and span.stop <= stop), default=at)
        slices.append(slice(at, max(at, end)))
        at = max(at, end)
    return tuple(slices)
