"""The operations on an NVIDIA GPU: which kernels and products each takes, in which order, and in which stream.

Leans on `cuda_kernels` for the kernels, on `gemm` for products, and on `epilogues`, `ways` and `beside` for the
choices between them. Formulas, shapes and effects are those of `interface.Operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import cupy
import numpy as np

from .. import checks
from .. import precision as precision_table
from ..activations import Activation
from ..averaging import EMA
from ..losses import Loss
from ..optimizers import SGD, Muon, Optimizer
from ..precision import Precision
from ..regularizers import ElasticNet
from . import epilogues, search
from .beside import Beside
from .cuda_kernels import CudaKernels
from .epilogues import Mask
from .exchange import Bucket, Exchange
from .gemm import GEMM, binding
from .graphs import GraphRecorder
from .interface import Array, Dropout, Layout, Operations, Recorder, Slot, Staging
from .launch import device_error
from .staging import PinnedStaging
from .ways import Ways

# The update of a layer's W is done aside where reading and writing it takes several times what two more launches cost
# (a million parameters at some 28 bytes are 10 microseconds of an H100's memory), and where the products of a layer
# below, 8 fs a row and parameter, are long enough to hide its 9 ps a parameter. All others share the launch at the end.
_HIDDEN_SIZE, _HIDING_ROWS = 1 << 20, 1024
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


class CudaOperations(Operations):
    """The operations on CuPy arrays of the current device, in the current stream."""

    device = "cuda"
    waits = True
    out_of_memory = cupy.cuda.memory.OutOfMemoryError

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.kernels = CudaKernels(precision)
        self.gemm = GEMM(precision)
        self._ways = Ways(precision.name, self._as_float32)
        self._pairing, self._partner = False, cast("Callable[[], None] | None", None)  # see `independent`
        self._gradient_stream: Beside | None = None
        self._update_stream: Beside | None = None

    # --- arrays ---

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Array:
        return cupy.empty(shape, dtype)  # CuPy's allocations begin at multiples of 512 bytes

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Array:
        return cupy.zeros(shape, dtype)

    def to_device(self, array: Any, dtype: Any = None) -> Array:
        try:
            if self.owns(array) and _needs_dlpack(array):
                array = cupy.from_dlpack(array)
            if not self.owns(array):  # cast on the host: what travels is seldom the larger type
                return cupy.asarray(np.ascontiguousarray(array, dtype))
            array = cupy.ascontiguousarray(cupy.asarray(array))
            return array if dtype is None or array.dtype == dtype else self._cast(array, dtype)
        except Exception as error:
            raise device_error(error, "copy to the device", (array,)) from error

    def owns(self, array: Any) -> bool:
        if hasattr(array, "__cuda_array_interface__"):
            return True
        return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_CUDA

    def to_host(self, array: Array) -> Any:
        try:
            return cupy.asnumpy(array)
        except Exception as error:
            raise device_error(error, "copy to the host", (array,)) from error

    def copy(self, source: Array, out: Array) -> None:
        if isinstance(source, np.ndarray) and source.shape == out.shape and not isinstance(source, cupy.ndarray):
            try:
                out.set(np.ascontiguousarray(source, out.dtype))
            except Exception as error:
                raise device_error(error, "copy to the device", (out,)) from error
        elif source.flags.c_contiguous and out.flags.c_contiguous:
            self.gather(source.reshape(1, -1), None, out.reshape(1, -1))
        else:
            out[...] = source

    def _as_float32(self, array: Array) -> Array:
        return array if array.dtype == np.float32 else self._cast(array, np.float32)

    def _cast(self, array: Array, dtype: Any) -> Array:
        """``array``, C-order, in another type, by our own kernel: CuPy's do not know every 16-bit type everywhere."""
        out = cupy.empty(array.shape, dtype)
        self.copy(array, out)
        return out

    def all_finite(self, array: Array, dtype: Any = None) -> bool:
        dtype = np.dtype(array.dtype if dtype is None else dtype)
        if array.dtype.itemsize == 2 and array.dtype.kind not in "iu":
            array = self._cast(cupy.ascontiguousarray(array), np.float32)
        limit = checks.LARGEST.get(dtype.name, np.inf if array.dtype.kind in "iub" else np.finfo(np.float64).max)
        return not array.size or bool((cupy.abs(array) <= limit).all())  # a NaN is not; nor infinity

    def free_bytes(self) -> int | None:
        pool = cupy.get_default_memory_pool()
        return int(cupy.cuda.Device().mem_info[0]) + pool.total_bytes() - pool.used_bytes()

    def auxiliary(self, f: Activation, rows: int, n: int) -> Any:
        library = binding().lt
        kept = library is not None and library.choices.path is not None  # else no epilogue is ever chosen
        return Mask.empty(rows, n) if kept and f.name == "relu" and self.precision.storage != "float64" else None

    def recorder(self, wanted: bool | None = None) -> Recorder:
        return GraphRecorder(self.kernels.buffers, wanted)

    def staging(self, shape: Sequence[int], dtype: Any) -> Staging:
        return PinnedStaging(shape, dtype)

    def exchange(self, ranks: Any, g: Array, buckets: Sequence[Bucket], wire: str, scatter: bool) -> Exchange:
        from .nccl import NcclExchange

        if wire == "full":
            return NcclExchange(ranks, g, buckets, wire, scatter, None, self.copy)
        narrow = CudaOperations(precision_table.get("bfloat16"))  # whose kernels cast to it
        return NcclExchange(ranks, g, buckets, wire, scatter, narrow.precision.storage_dtype, narrow.copy)

    def write_state(self, state: Array, values: Mapping[Slot, float]) -> None:
        self.kernels.write_state(state, values)

    def read_state(self, state: Array, slot: Slot) -> float:
        return float(self.to_host(state[slot : slot + 1])[0])

    def snapshot_state(self, state: Array, slot: Slot) -> Any:
        return state[slot].copy()

    def lanes(self, rows: int, sizes: Sequence[int]) -> tuple[int, int]:
        return 1, rows  # every kernel fills the device by itself

    def tuned_for(self, flop: int, lanes: int = 1) -> AbstractContextManager[None]:
        return nullcontext()

    def side_by_side(self, work: Callable[[int], None], states: Sequence[Array], g: Sequence[Array]) -> None:
        for state in states[1:]:
            self.copy(states[0], state)
            self.write_state(state, {Slot.COST: 0.0})
        total, cost = g[0], slice(Slot.COST, Slot.COST + 1)
        for i, (state, gradient) in enumerate(zip(states, g)):
            work(i)
            if i:
                total += gradient
                states[0][cost] += state[cost]

    def gather(
        self, source: Array, rows: Array | None, out: Array, state: Array | None = None, scale: float = 1.0
    ) -> None:
        self.kernels.gather(source, rows, out, state, scale)

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
        product = h if z is None else z

        def plain() -> None:
            self.gemm(h_in, W, product, transpose_b=True)
            self.kernels.activate(f, product, b, h, z is not None, dropout, state)

        if auxiliary is not None:
            auxiliary.written = False
        found = None if dropout is not None else epilogues.forward(f, z, auxiliary)
        if found is None or self.precision.storage == "float64":
            plain()
            return
        epilogue, kept = found

        def fused(bias: Array = b) -> Any:
            return self.gemm.fused(epilogue, h_in, W, h, transpose_b=True, bias=bias, auxiliary=kept)

        def hides_nothing(way: str) -> bool:
            nothing = cupy.full(b.shape, np.nan, np.float32)
            fused(nothing if b.dtype == np.float32 else self._cast(nothing, b.dtype))()
            return bool(cupy.isnan(self._as_float32(h)).all())  # a network that diverges must not look sound

        key = "affine", f.name, "x".join(map(str, (*h.shape, W.shape[1]))), f"epilogue {epilogue}"
        results = [h] if z is None else [h, z]
        way = self._ways.run(key, plain, {"epilogue": fused}, results, sound=hides_nothing)
        if auxiliary is not None:
            auxiliary.written = way == "epilogue"

    def activate(self, f: Activation, z: Array, h: Array) -> None:
        self.kernels.activate(f, z, None, h, False, None, None)

    def total_weight(self, loss: Loss, y: Array, sample_weight: Array | None, state: Array) -> None:
        self.kernels.total_weight(loss, y, sample_weight, state)

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
        if from_z and f.rowwise:
            self.kernels.cross_entropy(loss, h, y, sample_weight, gz, state)
        else:
            saved = h if f.reads == "h" or z is None else z
            through = f if not (from_z or f.rowwise) else None
            sums = gb if through is not None or from_z else None
            self.kernels.pointwise_loss(
                loss, f, from_z, through, h, saved, y, sample_weight, gz, sums, accumulate, state
            )
        if not from_z and f.rowwise:
            self.kernels.rowwise_gradient(f, gz, h)
        if gb is not None and f.rowwise:
            self.kernels.column_sums(gz, gb, accumulate, state)

    # --- backward ---

    @contextmanager
    def independent(self) -> Iterator[None]:
        if not search.tuned():
            yield
            return
        self._partner, self._pairing = None, True
        self._second_stream().mark()
        try:
            yield
        finally:
            self._partner, self._pairing = None, False

    def _second_stream(self) -> Beside:
        """Where a layer's second gradient runs beside the first."""
        if self._gradient_stream is None:
            self._gradient_stream = Beside()
        return self._gradient_stream

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
        def work() -> None:
            self._input_gradient(gz, W, f, saved, dropout, gz_in, gb, accumulate, state, auxiliary)

        if self._pairing:
            self._partner = work
        work()

    def _input_gradient(
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
        auxiliary: Any,
    ) -> None:
        def plain() -> None:
            self.gemm(gz, W, gz_in)
            if f.rowwise:
                self.kernels.rowwise_gradient(f, gz_in, saved)
                if gb is not None:
                    self.kernels.column_sums(gz_in, gb, accumulate, state)
            elif f.reads != "none" or dropout is not None or gb is not None:
                self.kernels.activation_gradient(f, gz_in, saved, dropout, gb, accumulate, state)

        read = None if dropout is not None else epilogues.gradient(f, saved, auxiliary)
        if read is None or self.precision.storage == "float64":
            plain()
            return

        def fused() -> Any:
            product = self.gemm.fused(epilogues.GRADIENT[f.name], gz, W, gz_in, auxiliary=read)
            if product is None or gb is None:
                return product

            def both() -> None:
                product()
                self.kernels.column_sums(gz_in, gb, accumulate, state)

            return both

        def summing() -> Any:
            if accumulate:  # the epilogue overwrites
                return fused()
            return self.gemm.fused(epilogues.GRADIENT_AND_SUMS[f.name], gz, W, gz_in, bias=gb, auxiliary=read)

        offers = {"epilogue": fused}
        if gb is not None and gb.dtype == gz_in.dtype:
            offers["epilogue with sums"] = summing
        key = "gradient", f.name, "x".join(map(str, (*gz_in.shape, gz.shape[1]))), f"sums {gb is not None}"
        results = [gz_in] if gb is None else [gz_in, gb]
        self._ways.run(key, plain, offers, results, again=not accumulate)

    def weight_gradient(self, gz: Array, h_in: Array, gW: Array, accumulate: bool) -> None:
        def work() -> None:
            self.gemm(gz, h_in, gW, transpose_a=True, beta=1.0 if accumulate else 0.0)

        partner = self._partner
        if partner is None:
            work()
            return
        second = self._second_stream()

        def beside() -> None:
            with second.queue():
                work()
            second.join()

        def in_turn_or_beside() -> str:
            work()  # finds its algorithm
            ways = {"in turn": _sequence(partner, work), "beside": _sequence(second.mark, partner, beside)}
            best = list(ways)[search.fastest(list(ways.values()))]
            second.mark()
            partner()
            return best

        key = "gradients", "x".join(map(str, (len(gz), *gW.shape)))
        way = self._ways.pick(key, ("in turn", "beside"), in_turn_or_beside, again=not accumulate)
        (beside if way == "beside" else work)()

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
            self._descend_in_two(W, gz, h_in, optimizer, regularizer, shadow, state)
            return
        decay = optimizer.weight_decay + (0.0 if regularizer is None else regularizer.l2)
        factors = self.kernels.prepare_descent(optimizer, decay, gz, h_in, state)
        self.gemm(gz, h_in, W, transpose_a=True, factors=factors)
        if shadow is not None:
            self.copy(W, shadow)

    def _descend_in_two(
        self,
        W: Array,
        gz: Array,
        h_in: Array,
        optimizer: SGD,
        regularizer: ElasticNet,
        shadow: Array | None,
        state: Array,
    ) -> None:
        gW = self.kernels.buffer("gW", W.size, W.dtype).reshape(W.shape)
        self.gemm(gz, h_in, gW, transpose_a=True)
        flat = None if shadow is None else shadow.reshape(-1)
        self.kernels.apply_rule(W.reshape(-1), gW.reshape(-1), (), optimizer, W.size, regularizer, None, flat, state)

    # --- update ---

    def penalty(self, theta: Array, n: int, regularizer: ElasticNet, state: Array) -> None:
        self.kernels.penalty(theta, n, regularizer, state)

    def add_penalty_gradient(self, theta: Array, n: int, regularizer: ElasticNet, g: Array) -> None:
        self.kernels.add_penalty_gradient(theta, n, regularizer, g)

    def gradient_norm(
        self,
        theta: Array,
        g: Array,
        n: int,
        regularizer: ElasticNet | None,
        state: Array,
        parts: Sequence[slice] | None = None,
    ) -> None:
        parts = [slice(0, theta.size)] if parts is None else parts
        self.kernels.gradient_norm(theta, g, n, regularizer, state, parts)

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
        if not isinstance(optimizer, Muon):
            self.kernels.apply_rule(theta, g, moments, optimizer, n, regularizer, clip_norm, shadow, state)
            return
        first = layout.n_weights
        tail = None if shadow is None else shadow[first:]
        self.kernels.apply_rule(
            theta[first:],
            g[first:],
            [m[first:] for m in moments],
            optimizer.adamw,
            max(0, n - first),
            regularizer,
            clip_norm,
            tail,
            state,
            optimizer.adamw.lr / optimizer.lr,
        )
        self._update_matrices(theta, g, moments[0], optimizer, layout, regularizer, shadow, state)

    def _update_matrices(
        self,
        theta: Array,
        g: Array,
        moment: Array,
        muon: Muon,
        layout: Layout,
        regularizer: ElasticNet | None,
        shadow: Array | None,
        state: Array,
    ) -> None:
        """Muon's step for every W; `apply_rule` has just left its numbers."""
        shadows = [None] * len(layout.weights(theta)) if shadow is None else layout.weights(shadow)
        for W, gW, m, copy in zip(layout.weights(theta), layout.weights(g), layout.weights(moment), shadows):
            u = self.kernels.muon_direction(W, gW, m, muon, regularizer, shadow is not None)
            self.kernels.muon_apply(W, self._orthogonalise(u, muon), muon, copy, state)

    def _orthogonalise(self, x: Array, muon: Muon) -> Array:
        """X ← a X + (b A + c A²) X with A = X Xᵀ (Xᵀ X where X is tall), in GEMMs alone."""
        a, b, c = muon.ns_coefficients
        tall = x.shape[0] > x.shape[1]
        side = min(x.shape)
        buffer = self.kernels.buffer
        gram, polynomial = (buffer(name, side * side, x.dtype).reshape(side, side) for name in ("A", "B"))
        y = buffer("y", x.size, x.dtype).reshape(x.shape)
        for _ in range(muon.ns_steps):
            self.gemm(x, x, gram, transpose_a=tall, transpose_b=not tall)
            polynomial[...] = gram
            self.gemm(gram, gram, polynomial, alpha=c, beta=b)
            y[...] = x
            if tall:
                self.gemm(x, polynomial, y, beta=a)
            else:
                self.gemm(polynomial, x, y, beta=a)
            x, y = y, x
        return x

    def hides_update(self, rows: int, size: int) -> bool:
        return rows >= _HIDING_ROWS and size >= _HIDDEN_SIZE

    @contextmanager
    def aside(self) -> Iterator[None]:
        if self._update_stream is None:
            self._update_stream = Beside()
        self._update_stream.mark()
        with self._update_stream.queue():
            yield

    def join(self) -> None:
        if self._update_stream is not None:
            self._update_stream.join()

    def average(self, theta: Array, averaged: Array, rule: EMA, state: Array) -> None:
        self.kernels.average(theta, averaged, rule, state)

    def begin_step(self, learning_rate: float, round: int, cursor: int, state: Array) -> None:
        self.kernels.begin_step(learning_rate, round, cursor, state)

    def finish_step(self, rows: int, state: Array) -> None:
        self.kernels.finish_step(rows, state)


def _sequence(*works: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for work in works:
            work()

    return run


def _needs_dlpack(array: Any) -> bool:
    """Whether DLPack alone tells an array's type: the CUDA array interface has no bfloat16, only two bytes ("V2")."""
    if isinstance(array, cupy.ndarray):
        return False
    told = getattr(array, "__cuda_array_interface__", None)
    return told is None or (told["typestr"][1:2] == "V" and hasattr(array, "__dlpack__"))
