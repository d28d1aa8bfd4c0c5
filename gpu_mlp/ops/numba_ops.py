"""The NumPy operations with the passes that take the time compiled: one read and one write where NumPy makes several.

Leans on `numpy_ops`, whose passes it takes the place of, on `numba_kernels`, and on `crew` for threads. What has no
kernel, by its activation, loss, rule or type, is the reference's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..activations import Activation
from ..losses import NLL, CrossEntropy, Loss
from ..optimizers import SGD, Adam, Optimizer
from ..regularizers import ElasticNet
from . import numba_kernels as kernels
from . import philox
from .crew import PART_FLOP, crew
from .interface import Dropout, Slot
from .numpy_ops import Array, NumpyOperations, applies, blas_threads, keep_probability, one_blas_thread, quiet

EVEN_WEIGHTS = np.empty(0)
NARROW, WIDE = 1 << 14, 1 << 19  # weights of a layer
MICRO_BATCHES = 4  # a lane


class NumbaOperations(NumpyOperations):
    """`NumpyOperations` with compiled passes; the types that it stores in are those that it computes in."""

    part_elements = 100_000  # the crew is awake

    def lanes(self, rows: int, sizes: Sequence[int]) -> tuple[int, int]:
        """Lanes pay by what stays in the cache: of many rows, or where layers are so narrow that their passes take as
        long as their products. Else the crew shares every product, whose factors are larger then."""
        lanes, micro = super().lanes(rows, sizes)
        widest = max(n_in * n_out for n_in, n_out in zip(sizes, sizes[1:]))
        few = rows < MICRO_BATCHES * lanes * micro and widest > NARROW
        return (1, rows) if few or widest > WIDE else (lanes, micro)

    def tuned_for(self, flop: int, lanes: int = 1) -> AbstractContextManager[None]:
        threads = blas_threads()
        if lanes > 1 or threads < 2 or flop < 2 * PART_FLOP:
            return quiet(one_blas_thread(), self._sharing_passes(lanes))
        return quiet(one_blas_thread(), self._sharing_products(threads), self._sharing_passes(threads))

    def weight_gradient(self, gz: Array, h_in: Array, gW: Array, accumulate: bool) -> None:
        crew().gemm(gz.T, h_in, gW, self._threads, beta=float(accumulate))

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
        if regularizer is not None and regularizer.l1:  # a sign is no multiple of W
            super().descend(W, gz, h_in, optimizer, regularizer, shadow, state)
        elif applies(state):
            rate = float(state[Slot.LEARNING_RATE])
            decay = optimizer.weight_decay + (0.0 if regularizer is None else regularizer.l2)
            crew().gemm(gz.T, h_in, W, self._threads, alpha=-rate, beta=1 - rate * decay)

    def _finish_layer(
        self,
        product: Array,
        b: Array,
        f: Activation,
        h: Array,
        z: Array | None,
        dropout: Dropout | None,
        first: int,
        state: Array,
    ) -> None:
        finish = self._finisher(f)
        if finish is None or (z is None) == (f.reads == "z"):  # z is kept where f′ reads it, and only there
            super()._finish_layer(product, b, f, h, z, dropout, first, state)
            return

        def work(rows: slice) -> None:
            finish(product[rows], b, h[rows])
            if dropout is not None:
                self._drop(h[rows], dropout, first + rows.start, state)

        self._share(h.shape, work)

    def _finisher(self, f: Activation) -> Callable[[Array, Array, Array], None] | None:
        """The kernel that adds b and applies f."""
        if f.name == "identity":
            return lambda z, b, h: kernels.bias(z, b)
        if f.name == "relu":
            return lambda z, b, h: kernels.bias_relu(z, b)
        if f.name == "gelu" and self._compute == np.float32:
            return kernels.bias_gelu
        return None

    def _through_layer(
        self,
        gh: Array,
        f: Activation,
        saved: Array | None,
        dropout: Dropout | None,
        first: int,
        gz_in: Array,
        gb: Array | None,
        accumulate: bool,
        state: Array,
    ) -> None:
        through = self._gradient(f, dropout)
        if through is None or gb is None:
            super()._through_layer(gh, f, saved, dropout, first, gz_in, gb, accumulate, state)
            return
        read = gz_in if saved is None else saved  # identity's reads nothing
        masked = dropout if f.name != "relu" else None  # where h was dropped relu's is 0, and gz will be
        if not accumulate:
            gb[...] = 0

        def work(rows: slice) -> None:
            if masked is not None:
                self._drop(gz_in[rows], masked, first + rows.start, state)
            through(gz_in[rows], read[rows], sums[rows.start])

        parts = self._parts(gz_in.shape)
        sums = {rows.start: np.zeros_like(gb) if i else gb for i, rows in enumerate(parts)}
        self._for_each(parts, work, len(parts))
        for part in list(sums.values())[1:]:
            np.add(gb, part, out=gb)

    def _gradient(self, f: Activation, dropout: Dropout | None) -> Callable[[Array, Array, Array], None] | None:
        """The kernel that takes gh to gz and adds up its columns; relu's divides by keep itself."""
        if f.name == "identity":
            return lambda g, h, gb: kernels.column_sums(g, gb)
        if f.name == "relu":
            keep = 1.0 if dropout is None else keep_probability(dropout)
            return lambda g, h, gb: kernels.relu_gradient(g, h, g.dtype.type(1 / keep), gb)
        if f.name == "gelu" and self._compute == np.float32:
            return kernels.gelu_gradient
        return None

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
        labels = y.ndim == 1 and from_z and h.dtype == np.float32
        if not labels or not isinstance(loss, (CrossEntropy, NLL)) or loss.class_weight is not None:
            super().loss_and_gradient(loss, f, from_z, h, z, y, sample_weight, gz, gb, accumulate, state)
            return
        total = float(state[Slot.TOTAL_WEIGHT])
        share, scale = 1 / total if total else 0.0, float(state[Slot.LOSS_SCALE])
        sums = np.empty(h.shape[1], h.dtype) if gb is None else gb
        if gb is None or not accumulate:
            sums[...] = 0
        weights = EVEN_WEIGHTS if sample_weight is None else sample_weight
        state[Slot.COST] += kernels.softmax_cross_entropy(
            h, y, weights, float(loss.label_smoothing), float(loss.clip), share, scale, gz, sums
        )

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
        l1, l2 = (0.0, 0.0) if penalty is None else (penalty.l1, penalty.l2)
        numbers: tuple[float, ...]
        if type(optimizer) is SGD and optimizer.plain:
            rule, numbers = kernels.sgd, (l1, l2, 1 / scale, clip, c[0], optimizer.weight_decay)
        elif isinstance(optimizer, Adam) and not optimizer.amsgrad:
            lr, step_size, eps = c
            decay = 0.0 if optimizer.decoupled else optimizer.weight_decay
            shrink = 1 - lr * optimizer.weight_decay if optimizer.decoupled else 1.0
            rule, numbers = kernels.adam, (l1, l2, 1 / scale, clip, decay, shrink, *optimizer.betas, step_size, eps)
        else:
            super()._apply(theta, g, moments, optimizer, c, penalty, scale, clip)
            return
        rounded = [theta.dtype.type(number) for number in numbers]
        self._share(
            theta.shape, lambda part: rule(theta[part], g[part], *(moment[part] for moment in moments), *rounded)
        )

    # --- inside ---

    def _row_parts(self, rows: int, flop: int) -> list[slice]:
        return [slice(0, rows)]  # the crew shares the product itself, and then the pass

    def _matmul(self, a: Array, b: Array, out: Array, threads: int = 1) -> Array:
        return crew().gemm(a, b, out, self._threads)

    def _for_each(self, blocks: Sequence[Any], work: Callable[[Any], object], threads: int) -> None:
        crew().for_each(blocks, work, threads)

    def _drop(self, block: Array, dropout: Dropout, start: int, state: Array) -> None:
        """Drop entries of a block that begins at row ``start`` of the micro-batch, and divide the rest by keep."""
        round_ = int(state[Slot.ROUND])
        words = (dropout.seed & 0xFFFFFFFF, dropout.seed >> 32, dropout.layer + ((round_ >> 32) << 16))
        k0, k1, layer = map(np.uint64, words)
        kernels.mask(
            block, np.uint32(philox.keep_threshold(dropout.rate)), block.dtype.type(1 / keep_probability(dropout)),
            k0, k1, layer, np.uint64(round_ & 0xFFFFFFFF), np.uint64(dropout.first_row + start),
        )  # fmt: skip
