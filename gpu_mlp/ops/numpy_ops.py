"""The NumPy reference: every operation of the interface on a CPU, in the open and without a copy too many.

Leans on the tables for f, f′, L and the update rules. Elementwise passes run over blocks that stay in the cache, in
place and with scratch that is allocated once. The 16-bit precisions are here to check numbers, not for speed: their
GEMMs multiply float32 copies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import checks
from .. import precision as precision_table
from ..activations import Activation, Scratch
from ..averaging import EMA
from ..losses import FUSED, Loss
from ..optimizers import SGD, Muon, Optimizer
from ..precision import Precision
from ..regularizers import ElasticNet
from . import blas, philox, sharing
from .exchange import Bucket, Exchange
from .interface import ALIGNMENT, CLIP_EPS, Dropout, Layout, Operations, Recorder, Slot, Staging

Array = NDArray[Any]
BLOCK = 16384  # elements of one pass over rows: six such float32 arrays fit a 512 KiB second-level cache
FLAT_BLOCK = 65536  # elements of one pass over θ: it has many short passes, whose calls cost more than the cache saves
SMALL_GEMM = 32_000_000  # flop; below it a second BLAS thread gains little, and loses much on a busy machine
LARGE_GEMM = 1_000_000_000  # flop; from here on BLAS shares the work out itself, below it `sharing` does
LANE_FLOP = 50_000_000  # of a step's GEMMs that are worth another lane
HEAD_START_FLOP = 10_000_000  # that a thread is through with before it has woken another
ROW_MULTIPLE = 8  # of rows, that BLAS kernels take at once
LANE_ROWS = 32  # of a micro-batch, at least: below them a GEMM is slow
LANE_ELEMENTS = 1 << 18  # of all h of a micro-batch
MOST_WEIGHTS_A_ROW = 8192  # beyond them adding up the lanes' gradients costs more than the lanes gain


class NumpyOperations(Operations):
    """The operations on NumPy arrays; formulas, shapes and effects are those of `interface.Operations`."""

    device = "cpu"
    waits = False
    part_elements = 400_000  # of a pass that is worth another thread

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self._storage = precision.storage_dtype
        self._compute = precision.master_dtype
        self._scratch = _ScratchPool(self._compute)
        self._threads = 1  # that a GEMM is shared out among
        self._beside = 1  # that a long pass is shared out among

    # --- arrays ---

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Array:
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        raw = np.empty(count * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Array:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def to_device(self, array: Any, dtype: Any = None) -> Array:
        return np.ascontiguousarray(array, dtype)

    def owns(self, array: Any) -> bool:
        return False

    def to_host(self, array: Array) -> Array:
        return array

    def copy(self, source: Array, out: Array) -> None:
        np.copyto(out, source, casting="same_kind")

    def all_finite(self, array: Array, dtype: Any = None) -> bool:
        with np.errstate(over="ignore"):
            return checks.all_finite(np.asarray(array) if dtype is None else array.astype(dtype))

    def free_bytes(self) -> int | None:
        return None

    def recorder(self, wanted: bool | None = None) -> Recorder:
        return Recorder()

    def staging(self, shape: Sequence[int], dtype: Any) -> Staging:
        return _Unstaged(self.empty(shape, dtype))

    def exchange(self, ranks: Any, g: Array, buckets: Sequence[Bucket], wire: str, scatter: bool) -> Exchange:
        from .mpi import MPIExchange

        blas.keep_to(ranks.cores())
        return MPIExchange(ranks, g, buckets, wire, scatter)

    def write_state(self, state: Array, values: Mapping[Slot, float]) -> None:
        for slot, value in values.items():
            state[slot] = value

    def read_state(self, state: Array, slot: Slot) -> float:
        return float(state[slot])

    def snapshot_state(self, state: Array, slot: Slot) -> float:
        return float(state[slot])

    def lanes(self, rows: int, sizes: Sequence[int]) -> tuple[int, int]:
        weights = sum(n_in * n_out for n_in, n_out in zip(sizes, sizes[1:]))
        most = blas.threads() if self._storage == self._compute else 1
        lanes = min(most, 6 * rows * weights // LANE_FLOP, rows // LANE_ROWS)
        if lanes < 2 or weights > MOST_WEIGHTS_A_ROW * rows:
            return 1, rows
        in_cache = max(LANE_ROWS, LANE_ELEMENTS // sum(sizes[1:]))
        if in_cache * lanes < rows:
            return lanes, in_cache
        head_start = HEAD_START_FLOP // (6 * weights)  # of the calling thread, whose part the others need not wake for
        part = -(-(rows + head_start) // (ROW_MULTIPLE * lanes)) * ROW_MULTIPLE
        return lanes, min(part, rows)

    def tuned_for(self, flop: int, lanes: int = 1) -> AbstractContextManager[None]:
        threads = blas.threads()
        if lanes > 1:
            return quiet(blas.OneThread(), self._sharing_passes(lanes))
        if flop < SMALL_GEMM:
            return quiet(blas.OneThread())
        if threads > 1 and flop < LARGE_GEMM:
            return quiet(blas.OneThread(), self._sharing_products(threads))
        return quiet(self._sharing_passes(threads))

    def side_by_side(self, work: Callable[[int], None], states: Sequence[Array], g: Sequence[Array]) -> None:
        for state in states[1:]:
            state[...] = states[0]
            state[Slot.COST] = 0.0
        with self._sharing_passes(1):  # a lane is a thread's own
            self._for_each(range(len(states)), work, len(states))
        for state, gradient in zip(states[1:], g[1:]):
            states[0][Slot.COST] += state[Slot.COST]
            self._add(gradient, g[0])

    def gather(
        self, source: Array, rows: Array | None, out: Array, state: Array | None = None, scale: float = 1.0
    ) -> None:
        first = 0 if state is None else int(state[Slot.CURSOR])
        scaled = scale != 1.0 and out.dtype.kind not in "iub"
        if rows is not None:
            rows = rows[first : first + len(out)]
            if source.dtype == out.dtype and source.flags.c_contiguous and not scaled:
                self._share(  # it would first copy all of another order
                    out.shape, lambda part: np.take(source, rows[part], axis=0, out=out[part], mode="clip")
                )
                return
        for block in _row_blocks(len(out), 2 * source[0:1].size):  # small ones: several threads may each have a copy
            part = source[slice(first + block.start, first + block.stop) if rows is None else rows[block]]
            out[block] = part.astype(self._compute) * self._compute.type(scale) if scaled else part

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
        parts = self._row_parts(len(h), 2 * len(h) * W.size)
        if len(parts) < 2:
            self._affine_activation(h_in, W, b, f, h, z, dropout, 0, state)
            return

        def work(rows: slice) -> None:
            part = None if z is None else z[rows]
            self._affine_activation(h_in[rows], W, b, f, h[rows], part, dropout, rows.start, state)

        sharing.for_each(parts, work, self._threads)

    def _affine_activation(
        self,
        h_in: Array,
        W: Array,
        b: Array,
        f: Activation,
        h: Array,
        z: Array | None,
        dropout: Dropout | None,
        first: int,
        state: Array,
    ) -> None:
        """Some rows of it, the first of which is row ``first`` of the micro-batch."""
        product = self._matmul(h_in, W.T, h if z is None else z)  # there, or where it is of the wider type
        for block in _row_blocks(*h.shape):
            zb = product[block]
            np.add(zb, b, out=zb)
            hb = zb if product is h else self._output_block(h, block)
            f.f(zb, hb, self._scratch(zb.shape))
            if dropout is not None:
                self._mask(hb, dropout, first + block.start, state)
            if hb.dtype != h.dtype:
                h[block] = hb
                if z is not None:
                    z[block] = zb

    def activate(self, f: Activation, z: Array, h: Array) -> None:
        for block in _row_blocks(*z.shape):
            zb = self._widen(1, z[block])
            hb = self._output_block(h, block)
            f.f(zb, hb, self._scratch(zb.shape))
            if hb.dtype != h.dtype:
                h[block] = hb

    def total_weight(self, loss: Loss, y: Array, sample_weight: Array | None, state: Array) -> None:
        weights = _weights(loss, y, sample_weight)
        state[Slot.TOTAL_WEIGHT] = len(y) if weights is None else weights.sum(dtype=np.float64)

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
        total = float(state[Slot.TOTAL_WEIGHT])
        share = 1 / total if total else 0.0
        scale = float(state[Slot.LOSS_SCALE])
        sums = _ColumnSums(self, gb, accumulate)
        for block in _row_blocks(*h.shape):
            hb, yb = self._widen(0, h[block]), y[block]
            t = self._scratch(hb.shape)
            g = gz[block] if gz.dtype == self._compute else self._scratch.wide(1, hb.shape)
            values = FUSED[f.name, loss.name](loss, hb, yb, g, t) if from_z else loss.rows(hb, yb, g, t)
            if not from_z:
                saved = h if f.reads == "h" or z is None else z
                f.df(g, self._widen(0, saved[block]), t)
            weights = None if sample_weight is None else sample_weight[block]
            if weights is None:
                state[Slot.COST] += values.sum(dtype=np.float64) * share
                np.multiply(g, share * scale, out=g)
            else:
                state[Slot.COST] += np.dot(values, weights) * share
                np.multiply(g, (weights * (share * scale)).astype(g.dtype)[:, None], out=g)
            sums.add(g)
            if g.dtype != gz.dtype:
                gz[block] = g

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
        parts = self._row_parts(len(gz), 2 * len(gz) * W.size)
        if len(parts) < 2:
            self._input_gradient(gz, W, f, saved, dropout, 0, gz_in, gb, accumulate, state)
            return
        sums = [gb, *(None if gb is None else np.empty_like(gb) for _ in parts[1:])]

        def work(i: int) -> None:
            rows = parts[i]
            read = None if saved is None else saved[rows]
            self._input_gradient(
                gz[rows], W, f, read, dropout, rows.start, gz_in[rows], sums[i], accumulate and i == 0, state
            )

        sharing.for_each(range(len(parts)), work, self._threads)
        for part in sums[1:]:
            if gb is not None and part is not None:
                np.add(gb, part, out=gb)

    def _input_gradient(
        self,
        gz: Array,
        W: Array,
        f: Activation,
        saved: Array | None,
        dropout: Dropout | None,
        first: int,
        gz_in: Array,
        gb: Array | None,
        accumulate: bool,
        state: Array,
    ) -> None:
        """Some rows of it, the first of which is row ``first`` of the micro-batch, and their column sums."""
        gh = self._matmul(gz, W, gz_in)
        if f.reads == "none" and dropout is None and gb is None:
            if gh is not gz_in:
                gz_in[...] = gh
            return
        sums = _ColumnSums(self, gb, accumulate)
        for block in _row_blocks(*gz_in.shape):
            g = gh[block]
            if dropout is not None:
                self._mask(g, dropout, first + block.start, state)
            if saved is not None:
                s = self._widen(0, saved[block])
                if dropout is not None and f.reads == "h":  # h was divided by keep; where it was dropped, g is 0
                    s = np.multiply(s, keep_probability(dropout), out=self._scratch.wide(0, g.shape))
                f.df(g, s, self._scratch(g.shape))
            sums.add(g)
            if gh is not gz_in:
                gz_in[block] = g

    def weight_gradient(self, gz: Array, h_in: Array, gW: Array, accumulate: bool) -> None:
        if accumulate:
            product = self._matmul(gz.T, h_in, self._scratch.matrix(0, gW.shape), self._threads)
            np.add(gW, product, out=gW)
        else:
            self._matmul(gz.T, h_in, gW, self._threads)

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
        gW = self._matmul(gz.T, h_in, self._scratch.matrix(0, W.shape), self._threads)
        if not applies(state):
            return
        c = optimizer.coefficients(float(state[Slot.LEARNING_RATE]), 1)
        self._apply(W.reshape(-1), gW.reshape(-1), (), optimizer, c, regularizer, 1.0, 1.0)
        if shadow is not None:
            shadow[...] = W

    # --- update ---

    def penalty(self, theta: Array, n: int, regularizer: ElasticNet, state: Array) -> None:
        total = 0.0
        for block in _blocks(n):
            part = theta[block]
            if regularizer.l2:
                total += 0.5 * regularizer.l2 * float(np.dot(part, part))
            if regularizer.l1:
                total += regularizer.l1 * float(np.abs(part, out=self._scratch(part.size).a).sum())
        state[Slot.COST] += total

    def add_penalty_gradient(self, theta: Array, n: int, regularizer: ElasticNet, g: Array) -> None:
        for block in _blocks(n):
            _add_penalty_gradient(theta[block], regularizer, g[block], self._scratch(block.stop - block.start).a)

    def gradient_norm(
        self,
        theta: Array,
        g: Array,
        n: int,
        regularizer: ElasticNet | None,
        state: Array,
        parts: Sequence[slice] | None = None,
    ) -> None:
        total = 0.0
        scale = float(state[Slot.LOSS_SCALE])
        for whole in [slice(0, theta.size)] if parts is None else parts:
            for part, penalty in penalised_parts(whole.start, whole.stop, n, regularizer):
                t, gp = theta[part], g[part]
                for block in _blocks(t.size):
                    gb = self._effective_gradient(t[block], gp[block], penalty, scale)
                    total += float(np.dot(gb, gb))
        state[Slot.GRADIENT_NORM] = np.sqrt(total)

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
        if not applies(state):
            return
        norm, scale = float(state[Slot.GRADIENT_NORM]), float(state[Slot.LOSS_SCALE])
        clip = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + CLIP_EPS))
        c = optimizer.coefficients(float(state[Slot.LEARNING_RATE]), int(state[Slot.STEP]) + 1)
        first = 0
        if isinstance(optimizer, Muon):
            self._update_matrices(theta, g, moments, optimizer, layout, regularizer, clip, c[0], state)
            first = layout.n_weights
        for part, penalty in penalised_parts(first, theta.size, n, regularizer):
            self._apply(theta[part], g[part], [m[part] for m in moments], optimizer, c, penalty, scale, clip)
        if shadow is not None:
            np.copyto(shadow, theta, casting="same_kind")

    def average(self, theta: Array, averaged: Array, rule: EMA, state: Array) -> None:
        if not applies(state):
            return
        share = 1 - rule.decay_at(int(state[Slot.STEP]) + 1)
        for block in _blocks(theta.size):
            if share == 1:
                averaged[block] = theta[block]
                continue
            s = self._scratch(block.stop - block.start).a
            np.subtract(theta[block], averaged[block], out=s)
            np.multiply(s, share, out=s)
            np.add(averaged[block], s, out=averaged[block])

    def begin_step(self, learning_rate: float, round: int, cursor: int, state: Array) -> None:
        state[Slot.LEARNING_RATE], state[Slot.ROUND], state[Slot.CURSOR] = learning_rate, round, cursor
        state[Slot.COST] = state[Slot.GRADIENT_NORM] = 0.0

    def finish_step(self, rows: int, state: Array) -> None:
        state[Slot.EPOCH_COST] += rows * state[Slot.COST]
        finite = np.isfinite(state[Slot.GRADIENT_NORM])
        too_large = self.precision.loss_scaled and state[Slot.LOSS_SCALE] >= precision_table.LOSS_SCALE_MINIMUM
        if not np.isfinite(state[Slot.COST]) or not (finite or too_large):
            state[Slot.BAD_ROUND] = state[Slot.BAD_ROUND] or state[Slot.ROUND] + 1
        elif finite:
            state[Slot.STEP] += 1
        if self.precision.loss_scaled:
            self._move_loss_scale(finite, state)

    # --- inside ---

    @contextmanager
    def _sharing_products(self, threads: int) -> Iterator[None]:
        """Share every GEMM out among ``threads`` threads."""
        before, self._threads = self._threads, threads
        try:
            yield
        finally:
            self._threads = before

    @contextmanager
    def _sharing_passes(self, threads: int) -> Iterator[None]:
        """Share the long passes out among ``threads`` threads."""
        before, self._beside = self._beside, threads
        try:
            yield
        finally:
            self._beside = before

    def _row_parts(self, rows: int, flop: int) -> list[slice]:
        """The rows of a layer in parts, each of which a thread takes through the product and the pass after it."""
        return sharing.row_parts(rows, flop, self._threads)

    def _parts(self, shape: Sequence[int]) -> list[slice]:
        """The rows of a pass in parts, one a thread, where it is long enough."""
        threads = min(self._beside, math.prod(shape) // self.part_elements)
        step = max(1, -(-shape[0] // max(1, threads)))
        return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def _share(self, shape: Sequence[int], work: Callable[[slice], object]) -> None:
        """Call ``work(rows)`` for the parts of a pass."""
        if self._beside < 2:
            work(slice(0, shape[0]))
            return
        parts = self._parts(shape)
        self._for_each(parts, work, len(parts))

    def _for_each(self, blocks: Sequence[Any], work: Callable[[Any], object], threads: int) -> None:
        """`sharing.for_each`."""
        sharing.for_each(blocks, work, threads)

    def _add(self, g: Array, out: Array) -> None:
        """out ← out + g, both flat."""
        self._share(g.shape, lambda part: np.add(out[part], g[part], out=out[part]))

    def _move_loss_scale(self, finite: bool, state: Array) -> None:
        state[Slot.GOOD_STEPS] = state[Slot.GOOD_STEPS] + 1 if finite else 0
        if not finite:
            state[Slot.LOSS_SCALE] *= precision_table.LOSS_SCALE_BACKOFF
            state[Slot.SKIPPED] += 1
        elif state[Slot.GOOD_STEPS] == precision_table.LOSS_SCALE_INTERVAL:
            state[Slot.LOSS_SCALE] *= precision_table.LOSS_SCALE_GROWTH
            state[Slot.GOOD_STEPS] = 0

    def _matmul(self, a: Array, b: Array, out: Array, threads: int = 1) -> Array:
        """a b in ``out``, or in a new float32 array where ``out`` or a factor is of a 16-bit type."""
        if a.dtype == b.dtype == out.dtype == self._compute:
            return np.matmul(a, b, out=out) if threads < 2 else sharing.matmul(a, b, out, threads)
        product = np.matmul(a.astype(self._compute), b.astype(self._compute))
        if out.dtype == self._compute:
            out[...] = product
            return out
        return product

    def _multiply(self, a: Array, b: Array, out: Array) -> None:
        """out ← a b, of the type that is computed in."""
        self._matmul(a, b, out, self._threads)

    def _output_block(self, h: Array, block: slice) -> Array:
        """Where f writes a block of h: there, or in scratch where h is of a 16-bit type."""
        return h[block] if h.dtype == self._compute else self._scratch.wide(0, h[block].shape)

    def _widen(self, i: int, block: Array) -> Array:
        """``block`` itself, or its copy in the type that sums run in."""
        if block.dtype == self._compute:
            return block
        wide = self._scratch.wide(i, block.shape)
        wide[...] = block
        return wide

    def _mask(self, block: Array, dropout: Dropout, start: int, state: Array) -> None:
        """Drop entries of a block that begins at row ``start`` of the micro-batch, and divide the rest by keep."""
        threshold = philox.keep_threshold(dropout.rate)
        rows = dropout.first_row + start
        bits = philox.bits(dropout.seed, dropout.layer, int(state[Slot.ROUND]), rows, block.shape)
        kept = np.less(bits, threshold, out=self._scratch(block.shape).mask)
        np.multiply(block, kept, out=block)
        np.multiply(block, 1 / keep_probability(dropout), out=block)

    def _effective_gradient(
        self, theta: Array, g: Array, penalty: ElasticNet | None, scale: float, clip: float = 1.0
    ) -> Array:
        """clip · (g / scale + λ∇Ω(θ)) of one block, in scratch."""
        out = self._scratch.wide(0, theta.size)
        if scale == 1 and penalty is not None and not penalty.l1:  # the usual case, in a pass less
            np.multiply(theta, penalty.l2, out=out)
            np.add(g, out, out=out)
        else:
            np.multiply(g, 1 / scale, out=out)
            _add_penalty_gradient(theta, penalty, out, self._scratch(out.shape).a)
        if clip != 1.0:
            np.multiply(out, clip, out=out)
        return out

    def _apply(
        self,
        theta: Array,
        g: Array,
        moments: Sequence[Array],
        optimizer: Optimizer,
        c: Sequence[float],
        penalty: ElasticNet | None,
        scale: float,
        clip: float,
    ) -> None:
        """The rule, with the coefficients ``c``, on clip · (g / scale + λ∇Ω(θ)): flat arrays of one length."""
        for block in _blocks(theta.size):
            s = self._scratch(block.stop - block.start)
            gb = self._effective_gradient(theta[block], g[block], penalty, scale, clip)
            optimizer.rule(theta[block], gb, [m[block] for m in moments], tuple(c), (s.a, s.b))

    def _update_matrices(
        self,
        theta: Array,
        g: Array,
        moments: Sequence[Array],
        muon: Muon,
        layout: Layout,
        regularizer: ElasticNet | None,
        clip: float,
        lr: float,
        state: Array,
    ) -> None:
        """Muon's step for every W: the one rule whose elements mix."""
        factor = clip / float(state[Slot.LOSS_SCALE])
        for W, gW, m in zip(layout.weights(theta), layout.weights(g), layout.weights(moments[0])):
            short = min(W.shape)
            squares = [self._scratch.matrix(i, (short, short)) for i in (0, 1)]
            y, u = self._scratch.matrix(2, W.shape), self._scratch.matrix(3, W.shape)
            np.multiply(gW, factor, out=u)
            if regularizer is not None:
                _add_penalty_gradient(W, ElasticNet(clip * regularizer.l1, clip * regularizer.l2), u, y)
            muon.direction(u, m, y)
            muon.orthogonalise(u, (squares[0], squares[1], y), self._multiply)
            np.multiply(u, lr * muon.rate(W.shape), out=u)
            np.multiply(W, 1 - lr * muon.weight_decay, out=W)
            np.subtract(W, u, out=W)


class _Unstaged(Staging):
    """One buffer that is host and device in one."""

    def __init__(self, buffer: Array) -> None:
        self.host = self.device = buffer

    def free(self) -> None:
        pass

    def send(self, rows: int) -> None:
        pass

    def receive(self) -> None:
        pass

    def release(self) -> None:
        pass


class _ScratchPool(threading.local):
    """Scratch of one thread, so that one network can predict from several: grown on demand, then reused."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._flat: dict[str, Array] = {}
        self._views: dict[Any, Any] = {}

    def __call__(self, shape: Any) -> Scratch:
        """The temporaries that a table's functions take."""
        key = ("t", shape)
        if key not in self._views:
            a, b, c = (self._view(name, shape, self._dtype) for name in "abc")
            self._views[key] = Scratch(a, b, c, self._view("mask", shape, np.dtype(bool)))
        return self._views[key]

    def wide(self, i: int, shape: Any) -> Array:
        """One of two further blocks."""
        return self._cached(f"wide{i}", shape)

    def matrix(self, i: int, shape: Any) -> Array:
        """One of four buffers as large as the largest W that asks for it."""
        return self._cached(f"matrix{i}", shape)

    def _cached(self, name: str, shape: Any) -> Array:
        key = (name, shape)
        if key not in self._views:
            self._views[key] = self._view(name, shape, self._dtype)
        return self._views[key]

    def _view(self, name: str, shape: Any, dtype: np.dtype) -> Array:
        count = int(np.prod(shape))
        if name not in self._flat or self._flat[name].size < count:
            self._flat[name] = np.empty(max(count, BLOCK), dtype)
            self._views.clear()  # views of a buffer that has been replaced would keep it alive
        return self._flat[name][:count].reshape(shape)


class _ColumnSums:
    """Σ over the batch of blocks of rows, each summed by BLAS and then added, so that the order is fixed."""

    def __init__(self, ops: NumpyOperations, out: Array | None, accumulate: bool) -> None:
        self._out = out
        if out is not None:
            self._part = ops._scratch.wide(1, out.shape) if ops._storage == ops._compute else np.empty_like(out)
            if not accumulate:
                out[...] = 0

    def add(self, block: Array) -> None:
        if self._out is not None:
            ones = _ones(len(block), block.dtype)
            np.add(self._out, np.dot(ones, block, out=self._part), out=self._out)


@contextmanager
def quiet(*inner: AbstractContextManager[None]) -> Iterator[None]:
    """Without NumPy's warnings of numbers that are not finite, which the state tells of, inside other contexts."""
    with np.errstate(**sharing.QUIET), ExitStack() as stack:
        for context in inner:
            stack.enter_context(context)
        yield


_ONES: dict[np.dtype, Array] = {}


def _ones(n: int, dtype: np.dtype) -> Array:
    if dtype not in _ONES or _ONES[dtype].size < n:
        _ONES[dtype] = np.ones(max(n, BLOCK), dtype)
    return _ONES[dtype][:n]


def keep_probability(dropout: Dropout) -> float:
    """The exact probability with which the mask keeps an entry."""
    return philox.keep_threshold(dropout.rate) / philox.LEVELS


def _blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, FLAT_BLOCK):
        yield slice(start, min(start + FLAT_BLOCK, n))


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def penalised_parts(
    first: int, last: int, n: int, regularizer: ElasticNet | None
) -> Iterator[tuple[slice, ElasticNet | None]]:
    """first … last in two: what of it lies in the prefix of length ``n`` that the regularizer covers, and the rest."""
    middle = min(last, max(first, n))
    if first < middle:
        yield slice(first, middle), regularizer
    if middle < last:
        yield slice(middle, last), None


def applies(state: Array) -> bool:
    """Whether a step's gradient may be applied: nothing was out of the finite numbers, in this step or before it."""
    finite = np.isfinite(state[Slot.COST]) and np.isfinite(state[Slot.GRADIENT_NORM])
    return bool(finite and state[Slot.BAD_ROUND] == 0)


def _weights(loss: Loss, y: Array, sample_weight: Array | None) -> Array | None:
    """The weight of every row: the sample's times its class's; None where all are 1."""
    by_class = loss.label_weights(y)
    if by_class is None or sample_weight is None:
        return by_class if sample_weight is None else sample_weight
    return by_class * sample_weight


def _add_penalty_gradient(theta: Array, regularizer: ElasticNet | None, g: Array, scratch: Array) -> None:
    """g += l1 · sign(θ) + l2 · θ, in place."""
    if regularizer is None:
        return
    if regularizer.l2:
        np.multiply(theta, regularizer.l2, out=scratch)
        np.add(g, scratch, out=g)
    if regularizer.l1:
        np.sign(theta, out=scratch)
        np.multiply(scratch, regularizer.l1, out=scratch)
        np.add(g, scratch, out=g)
