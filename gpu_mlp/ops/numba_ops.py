"""The NumPy operations with the work of a step as compiled jobs, which a step is replayed from without Python.

Leans on `numpy_ops`, whose passes it takes the place of, on `jobs`, on `tape` for writing them down and on `crew` for
doing them. What is no job, by its activation, loss, rule or type, is the reference's own; in a step that is written
down it is a call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..activations import Activation
from ..averaging import EMA
from ..losses import NLL, CrossEntropy, Loss
from ..optimizers import SGD, Optimizer
from ..regularizers import ElasticNet
from . import blas, formulas, jobs, philox, rules, sharing
from .crew import crew
from .exchange import Bucket, Exchange
from .interface import Dropout, Layout, Recorder, Slot
from .jobs import Job
from .numpy_ops import Array, NumpyOperations, keep_probability, penalised_parts
from .tape import Entry, TapeRecorder

NARROW, WIDE = 1 << 14, 1 << 19  # weights of a layer
MICRO_BATCHES = 4  # a lane


class NumbaOperations(NumpyOperations):
    """`NumpyOperations` as jobs; the types that it stores in are those that it computes in."""

    watches = True
    part_elements = 100_000  # the crew is awake
    fuses = True  # a layer's product and its pass in one job; apart they can be timed

    def __init__(self, precision: Any) -> None:
        super().__init__(precision)
        self._own = threading.local()  # a thread's: what it writes down, and what waits

    # --- now or later ---

    def recorder(self, wanted: bool | None = None) -> Recorder:
        settings = lambda: (self._threads, self._beside, self.fuses)  # noqa: E731
        return Recorder() if wanted is False else TapeRecorder(self._writing_down, settings)

    def _writing_down(self, work: Callable[[], None]) -> list[Entry]:
        """What ``work`` queues, of which nothing is done."""
        before = self._entries
        self._own.entries = entries = list[Entry]()
        try:
            work()
        finally:
            self._own.entries = before
        return entries

    @property
    def _entries(self) -> list[Entry] | None:
        """What is being written by this thread; None where all is done at once."""
        return getattr(self._own, "entries", None)

    def _queue(self, *work: Job) -> None:
        """Do some jobs, now or in a step that is written down."""
        self._queue_held()
        if (entries := self._entries) is None:
            crew().do(work)
        else:
            entries.extend(work)

    def _queue_call(self, call: Callable[..., object], *arguments: Any) -> None:
        """The same for what is no job."""
        self._queue_held()
        if (entries := self._entries) is None:
            call(*arguments)
        else:
            entries.append(functools.partial(call, *arguments))

    def _queue_shared(self, make: Callable[[int], Sequence[Job]]) -> None:
        """Jobs of which the first is a product, made for a number of threads; it may have to wait for a second one."""
        held = self._held
        if held is None or self._threads < 2:
            self._queue(*make(self._threads))
        else:
            held.append(make)

    @property
    def _held(self) -> list[Callable[[int], Sequence[Job]]] | None:
        """What waits for its neighbour; None where nothing has to."""
        return getattr(self._own, "held", None)

    def _queue_held(self) -> None:
        """Queue what has waited: two products beside each other, each on half of the threads."""
        held = self._held
        if not held:
            return
        self._own.held = None
        if len(held) == 2:
            half = self._threads // 2
            (one, *after_one), (other, *after_other) = held[0](half), held[1](self._threads - half)
            self._queue(jobs.beside([one, other]), *after_one, *after_other)
        else:
            for make in held:
                self._queue(*make(self._threads))
        self._own.held = []

    @contextmanager
    def independent(self) -> Iterator[None]:
        self._own.held = []
        try:
            yield
            self._queue_held()
        finally:
            self._own.held = None

    # --- settings ---

    def lanes(self, rows: int, sizes: Sequence[int]) -> tuple[int, int]:
        """Lanes pay by what stays in the cache: of many rows, or where layers are so narrow that their passes take as
        long as their products. Else the crew shares every product, whose factors are larger then."""
        lanes, micro = super().lanes(rows, sizes)
        widest = max(n_in * n_out for n_in, n_out in zip(sizes, sizes[1:]))
        few = rows < MICRO_BATCHES * lanes * micro and widest > NARROW
        return (1, rows) if few or widest > WIDE else (lanes, micro)

    @contextmanager
    def tuned_for(self, flop: int, lanes: int = 1) -> Iterator[None]:
        before = self._threads, self._beside
        with np.errstate(**sharing.QUIET), blas.OneThread():
            threads = blas.threads()
            shared = lanes == 1 and threads > 1 and flop >= 2 * jobs.PART_FLOP
            self._threads, self._beside = (threads, threads) if shared else (1, lanes)
            try:
                yield
            finally:
                self._threads, self._beside = before

    def auxiliary(self, f: Activation, rows: int, n: int) -> Any:
        return SLOPES if f.name in formulas.WITH_SLOPE and self._compute == np.float32 else None

    # --- a step's frame ---

    def side_by_side(self, work: Callable[[int], None], states: Sequence[Array], g: Sequence[Array]) -> None:
        if len(states) == 1:
            work(0)
            return
        if self._entries is None:
            super().side_by_side(work, states, g)
            return
        with self._sharing_passes(1):  # a lane is a thread's own
            written = [self._writing_down(functools.partial(work, i)) for i in range(len(states))]
        mine = [[entry for entry in entries if isinstance(entry, Job)] for entries in written]
        if sum(map(len, mine)) == sum(map(len, written)):
            self._queue(*jobs.lanes(mine, states, g, self._beside))
        else:
            self._queue_call(super().side_by_side, work, states, g)

    def gather(
        self, source: Array, rows: Array | None, out: Array, state: Array | None = None, scale: float = 1.0
    ) -> None:
        alike = source.dtype == out.dtype and source.shape[1:] == out.shape[1:]
        orders = source.flags.c_contiguous and out.flags.c_contiguous
        numbers = rows is None or (rows.dtype == np.int64 and rows.flags.c_contiguous)
        if alike and orders and numbers and scale == 1 and out.size:
            self._queue(jobs.gather(source, rows, out, state, self._beside))
        else:
            self._queue_call(super().gather, source, rows, out, state, scale)

    def write_state(self, state: Array, values: Mapping[Slot, float]) -> None:
        self._queue_call(super().write_state, state, values)

    def watch(self, x: Array, state: Array) -> None:
        if x.size:
            self._queue(*jobs.watch(x, state, self._beside))

    def total_weight(self, loss: Loss, y: Array, sample_weight: Array | None, state: Array) -> None:
        if _weighs_rows_alone(loss, sample_weight):
            self._queue(jobs.total_weight(len(y), sample_weight, state))
        else:
            self._queue_call(super().total_weight, loss, y, sample_weight, state)

    def finish_step(self, rows: int, state: Array) -> None:
        self._queue(jobs.finish_step(rows, state))

    def exchange(self, ranks: Any, g: Array, buckets: Sequence[Bucket], wire: str, scatter: bool) -> Exchange:
        return _Queued(super().exchange(ranks, g, buckets, wire, scatter), self._queue_call)

    # --- forward ---

    def affine_activation(
        self,
        h_in: Array,
        W: Array,
        b: Array,
        f: Activation,
        h: Array,
        z: Array | None,
        dropout: Dropout | None,
        state: Array,
        auxiliary: Any = None,
    ) -> None:
        code = self._code(f, auxiliary)
        kept = (z is not None) == (f.reads == "z")  # z is kept where f′ reads it, and only there
        if code is None or not kept or not (h.size and h_in.size):
            self._queue_call(super().affine_activation, h_in, W, b, f, h, z, dropout, state, auxiliary)
            return
        drop = {} if dropout is None else _mask(dropout)
        if not self.fuses:
            self._multiply(h_in, W.T, h if z is None else z)
        self._queue(jobs.layer(h_in, W, b, code, h, z, drop, state, self._threads, self.fuses))

    def _code(self, f: Activation, auxiliary: Any) -> int | None:
        """The number of an activation that jobs know."""
        if auxiliary is SLOPES:
            return formulas.WITH_SLOPE[f.name]
        if self._compute == np.float32 and f.name in formulas.FROM_H:
            return formulas.FROM_H[f.name]
        return formulas.IN_EVERY_TYPE.get(f.name)

    def _multiply(self, a: Array, b: Array, out: Array) -> None:
        self._queue(jobs.product(a, b, out, self._threads))

    # --- the loss ---

    def loss_and_gradient(
        self,
        loss: Loss,
        f: Activation,
        from_z: bool,
        h: Array,
        z: Array | None,
        y: Array,
        sample_weight: Array | None,
        gz: Array,
        gb: Array | None,
        accumulate: bool,
        state: Array,
    ) -> None:
        labels = y.ndim == 1 and y.dtype == np.int64 and y.flags.c_contiguous and from_z and h.dtype == np.float32
        if (
            not (labels and h.size)
            or not isinstance(loss, (CrossEntropy, NLL))
            or not _weighs_rows_alone(loss, sample_weight)
        ):
            self._queue_call(
                super().loss_and_gradient, loss, f, from_z, h, z, y, sample_weight, gz, gb, accumulate, state
            )
            return
        self._queue(
            *jobs.softmax_cross_entropy(
                h, y, sample_weight, float(loss.label_smoothing), float(loss.clip), gz, gb, accumulate, state,
                self._beside,
            )
        )  # fmt: skip

    # --- backward ---

    def input_gradient(
        self,
        gz: Array,
        W: Array,
        f: Activation,
        saved: Array | None,
        dropout: Dropout | None,
        gz_in: Array,
        gb: Array | None,
        accumulate: bool,
        state: Array,
        auxiliary: Any = None,
    ) -> None:
        code, some = self._code(f, auxiliary), gz.size and gz_in.size
        if some and gb is None and f.name == "identity" and dropout is None:
            self._multiply(gz, W, gz_in)
            return
        if not some or gb is None or code is None:
            self._queue_call(
                super().input_gradient, gz, W, f, saved, dropout, gz_in, gb, accumulate, state, auxiliary
            )  # fmt: skip
            return
        drop = {} if dropout is None else _mask(dropout)
        if f.name == "relu":  # where h was dropped it is 0, and so will gz be
            drop = {"scale": drop.get("scale", 1.0)}

        def make(threads: int) -> list[Job]:
            return jobs.gradient(gz, W, code, saved, drop, gz_in, gb, accumulate, state, threads, self.fuses)

        if self.fuses:
            self._queue_shared(make)
        else:
            self._multiply(gz, W, gz_in)
            self._queue(*make(self._threads))

    def weight_gradient(self, gz: Array, h_in: Array, gW: Array, accumulate: bool) -> None:
        if gz.size and h_in.size:
            self._queue_shared(lambda threads: [jobs.product(gz.T, h_in, gW, threads, beta=float(accumulate))])
        else:
            self._queue_call(super().weight_gradient, gz, h_in, gW, accumulate)

    def descend(
        self,
        W: Array,
        gz: Array,
        h_in: Array,
        optimizer: SGD,
        regularizer: ElasticNet | None,
        shadow: Array | None,
        state: Array,
    ) -> None:
        l1, l2 = (0.0, 0.0) if regularizer is None else (regularizer.l1, regularizer.l2)
        if l1 or not (gz.size and h_in.size):  # a sign is no multiple of W
            self._queue_call(super().descend, W, gz, h_in, optimizer, regularizer, shadow, state)
        else:
            decay = optimizer.weight_decay + l2
            self._queue(jobs.product(gz.T, h_in, W, self._threads, beta=decay, state=state))

    # --- update ---

    def penalty(self, theta: Array, n: int, regularizer: ElasticNet, state: Array) -> None:
        if n:
            self._queue(*jobs.penalty(theta[:n], regularizer.l1, regularizer.l2, state, self._beside))

    def gradient_norm(
        self,
        theta: Array,
        g: Array,
        n: int,
        regularizer: ElasticNet | None,
        state: Array,
        parts: Sequence[slice] | None = None,
    ) -> None:
        self._queue_call(super().gradient_norm, theta, g, n, regularizer, state, parts)

    def update(
        self,
        theta: Array,
        g: Array,
        moments: Sequence[Array],
        optimizer: Optimizer,
        layout: Layout,
        n: int,
        regularizer: ElasticNet | None,
        clip_norm: float | None,
        shadow: Array | None,
        state: Array,
    ) -> None:
        rule = None if shadow is not None else rules.of(optimizer)
        if rule is None:
            arguments = (theta, g, moments, optimizer, layout, n, regularizer, clip_norm, shadow, state)
            self._queue_call(super().update, *arguments)
            return
        numbers = {**rule.numbers, "clip_norm": clip_norm or 0.0}
        for part, penalty in penalised_parts(0, theta.size, n, regularizer):
            numbers["l1"], numbers["l2"] = (0.0, 0.0) if penalty is None else (penalty.l1, penalty.l2)
            mine = {name: moment[part] for name, moment in zip(rule.moments, moments)}
            self._queue(jobs.update(rule.number, theta[part], g[part], mine, state, self._beside, **numbers))

    def average(self, theta: Array, averaged: Array, rule: EMA, state: Array) -> None:
        self._queue_call(super().average, theta, averaged, rule, state)

    # --- inside ---

    def _row_parts(self, rows: int, flop: int) -> list[slice]:
        return [slice(0, rows)]  # the crew shares the product itself, and then the pass

    def _matmul(self, a: Array, b: Array, out: Array, threads: int = 1) -> Array:
        return crew().gemm(a, b, out, self._threads)

    def _for_each(self, blocks: Sequence[Any], work: Callable[[Any], object], threads: int) -> None:
        crew().for_each(blocks, work, threads)


class _Slopes:
    """Says that a layer's z holds f′(z), which the forward pass has at hand, and the backward pass alone reads."""

    def first(self, rows: int) -> _Slopes:
        """The like for fewer rows."""
        return self


SLOPES = _Slopes()


class _Queued(Exchange):
    """An exchange whose calls are part of a step that is written down."""

    def __init__(self, inner: Exchange, queue: Callable[..., None]) -> None:
        super().__init__(inner.ranks, inner.g, inner.buckets, inner.wire, inner.scatter)
        self._inner, self._queue = inner, queue

    def begin(self, bucket: int) -> None:
        self._queue(self._inner.begin, bucket)

    def poke(self) -> None:
        self._queue(self._inner.poke)

    def finish(self) -> None:
        self._queue(self._inner.finish)

    def gather(self, flat: Array) -> None:
        self._queue(self._inner.gather, flat)

    def sum_state(self, state: Array, slot: Slot, squares: bool = False) -> None:
        self._queue(self._inner.sum_state, state, slot, squares)


def _weighs_rows_alone(loss: Loss, sample_weight: Array | None) -> bool:
    """Whether a row's weight is the sample's, as jobs read it, and no class has one."""
    as_read = sample_weight is None or sample_weight.dtype == np.float64
    return as_read and getattr(loss, "class_weight", None) is None


def _mask(dropout: Dropout) -> dict[str, float]:
    """What a job knows of a layer's dropout."""
    return {
        "drop": philox.keep_threshold(dropout.rate), "scale": 1 / keep_probability(dropout),
        "k0": dropout.seed & 0xFFFFFFFF, "k1": dropout.seed >> 32, "layer": dropout.layer,
        "first_row": dropout.first_row,
    }  # fmt: skip
