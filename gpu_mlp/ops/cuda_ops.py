"""The operations on an NVIDIA GPU: CuPy arrays, the kernels of `gpu_mlp.kernels`, and cuBLAS.

Leans on `launch` for kernels and `gemm` for products. Formulas, shapes and effects are those of
`interface.Operations`; the kernels are compiled for the types, the activation, the loss and the rule at hand when
they are first needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import cupy
import numpy as np

from .. import checks
from .. import precision as precision_table
from ..activations import IDENTITY, Activation
from ..averaging import EMA
from ..losses import NLL, CrossEntropy, Hinge, Huber, Loss
from ..optimizers import SGD, Muon, Optimizer
from ..precision import Precision
from ..regularizers import ElasticNet
from . import epilogues, launch, philox, search
from .beside import Beside
from .epilogues import Mask
from .exchange import Bucket, Exchange
from .gemm import GEMM, binding
from .graphs import GraphRecorder
from .interface import ALIGNMENT, CLIP_EPS, Array, Dropout, Layout, Operations, Recorder, Slot, Staging
from .launch import Macros, kernel
from .staging import PinnedStaging
from .ways import Ways

_ADD_TO_COST, _SET_NORM, _SET_TOTAL_WEIGHT = (np.int32(i) for i in range(3))  # enum Finish of kernels/flat.cu
_PREPARED = 8  # numbers that prepare_update leaves: applied, unscale, clip, and the rule's coefficients
# The update of a layer's W is done aside where reading and writing it takes several times what two more launches cost
# (a million parameters at some 28 bytes are 10 microseconds of an H100's memory), and where the products of a layer
# below, 8 fs a row and parameter, are long enough to hide its 9 ps a parameter. All others share the launch at the end.
_HIDDEN_SIZE, _HIDING_ROWS = 1 << 20, 1024
_READS = {"none": 0, "h": 1, "z": 2}
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_CATEGORICAL = (CrossEntropy, NLL)
_PLAIN: Macros = (("DF", "df_identity"), ("READS", "0"), ("DROPOUT", "0"), ("HAS_SUMS", "0"))


class CudaOperations(Operations):
    """The operations on CuPy arrays of the current device, in the current stream."""

    device = "cuda"
    waits = True
    out_of_memory = cupy.cuda.memory.OutOfMemoryError

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self._storage = precision.storage_dtype.name
        self._master = precision.master_dtype
        self._gemm = GEMM(precision)
        self._ways = Ways(precision.name, self._as_float32)
        self._scratch: dict[str, Array] = {}
        self._class_weights: dict[tuple[float, ...], Array] = {}
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
            raise launch.device_error(error, "copy to the device", (array,)) from error

    def owns(self, array: Any) -> bool:
        if hasattr(array, "__cuda_array_interface__"):
            return True
        return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in _DLPACK_CUDA

    def to_host(self, array: Array) -> Any:
        try:
            return cupy.asnumpy(array)
        except Exception as error:
            raise launch.device_error(error, "copy to the host", (array,)) from error

    def copy(self, source: Array, out: Array) -> None:
        if isinstance(source, np.ndarray) and source.shape == out.shape and not isinstance(source, cupy.ndarray):
            try:
                out.set(np.ascontiguousarray(source, out.dtype))
            except Exception as error:
                raise launch.device_error(error, "copy to the device", (out,)) from error
        elif source.flags.c_contiguous and out.flags.c_contiguous:
            self.gather(source.reshape(1, -1), None, out.reshape(1, -1))
        else:
            out[...] = source

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
        return Mask.empty(rows, n) if kept and f.name == "relu" and self._storage != "float64" else None

    def recorder(self, wanted: bool | None = None) -> Recorder:
        return GraphRecorder(lambda: list(self._scratch.values()), wanted)

    def staging(self, shape: Sequence[int], dtype: Any) -> Staging:
        return PinnedStaging(shape, dtype)

    def exchange(self, ranks: Any, g: Array, buckets: Sequence[Bucket], wire: str, scatter: bool) -> Exchange:
        from .nccl import NcclExchange

        if wire == "full":
            return NcclExchange(ranks, g, buckets, wire, scatter, None, self.copy)
        narrow = CudaOperations(precision_table.get("bfloat16"))  # whose kernels cast to it
        return NcclExchange(ranks, g, buckets, wire, scatter, narrow.precision.storage_dtype, narrow.copy)

    def write_state(self, state: Array, values: Mapping[Slot, float]) -> None:
        for slot, value in values.items():
            self._launch("flat.cu", "set_state", 1, (), launch.ONE_THREAD, np.int32(slot), np.float64(value), state)

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
        columns = math.prod(source.shape[1:])
        vec = launch.vector_length(columns, source, out)
        names = [_c_type(array.dtype.name, self._storage) for array in (source, out)]
        macros = launch.gather_macros(*names)
        self._launch(
            "gather.cu",
            "gather",
            vec,
            macros,
            launch.tile(len(out), columns, vec),
            source,
            rows,
            out,
            np.int64(len(out)),
            np.int64(columns),
            self._master.type(scale),
            state,
        )

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
            self._gemm(h_in, W, product, transpose_b=True)
            self._activate(f, product, b, h, z is not None, dropout, state)

        if auxiliary is not None:
            auxiliary.written = False
        found = None if dropout is not None else epilogues.forward(f, z, auxiliary)
        if found is None or self._storage == "float64":
            plain()
            return
        epilogue, kept = found

        def fused(bias: Array = b) -> Any:
            return self._gemm.fused(epilogue, h_in, W, h, transpose_b=True, bias=bias, auxiliary=kept)

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
        self._activate(f, z, None, h, False, None, None)

    def total_weight(self, loss: Loss, y: Array, sample_weight: Array | None, state: Array) -> None:
        class_weight = self._class_weight(loss) if y.ndim == 1 else None
        if sample_weight is None and class_weight is None:
            self.write_state(state, {Slot.TOTAL_WEIGHT: len(y)})
            return
        geometry = launch.flat(len(y))
        partial = self._buffer("partial_cost", max(1, geometry[0][0]), np.float64)
        labels = y if class_weight is not None else None
        classes = np.int64(0 if class_weight is None else class_weight.size)
        self._launch(
            "flat.cu",
            "total_weight",
            1,
            (),
            geometry,
            sample_weight,
            labels,
            class_weight,
            np.int64(len(y)),
            classes,
            partial,
        )
        self._finish(partial, geometry[0][0], _SET_TOTAL_WEIGHT, state)

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
        rowwise_pair = from_z and f.rowwise
        if rowwise_pair:
            self._cross_entropy(loss, h, y, sample_weight, gz, state)
        else:
            saved = h if f.reads == "h" or z is None else z
            through = f if not (from_z or f.rowwise) else None
            sums = gb if through is not None or from_z else None
            self._pointwise_loss(loss, f, from_z, through, h, saved, y, sample_weight, gz, sums, accumulate, state)
        if not from_z and f.rowwise:
            self._rowwise_gradient(f, gz, h)
        if gb is not None and f.rowwise:
            self._column_sums(gz, gb, accumulate, state)

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
            self._gemm(gz, W, gz_in)
            if f.rowwise:
                self._rowwise_gradient(f, gz_in, saved)
                if gb is not None:
                    self._column_sums(gz_in, gb, accumulate, state)
            elif f.reads != "none" or dropout is not None or gb is not None:
                self._activation_gradient(f, gz_in, saved, dropout, gb, accumulate, state)

        read = None if dropout is not None else epilogues.gradient(f, saved, auxiliary)
        if read is None or self._storage == "float64":
            plain()
            return

        def fused() -> Any:
            product = self._gemm.fused(epilogues.GRADIENT[f.name], gz, W, gz_in, auxiliary=read)
            if product is None or gb is None:
                return product

            def both() -> None:
                product()
                self._column_sums(gz_in, gb, accumulate, state)

            return both

        def summing() -> Any:
            if accumulate:  # the epilogue overwrites
                return fused()
            return self._gemm.fused(epilogues.GRADIENT_AND_SUMS[f.name], gz, W, gz_in, bias=gb, auxiliary=read)

        offers = {"epilogue": fused}
        if gb is not None and gb.dtype == gz_in.dtype:
            offers["epilogue with sums"] = summing
        key = "gradient", f.name, "x".join(map(str, (*gz_in.shape, gz.shape[1]))), f"sums {gb is not None}"
        results = [gz_in] if gb is None else [gz_in, gb]
        self._ways.run(key, plain, offers, results, again=not accumulate)

    def weight_gradient(self, gz: Array, h_in: Array, gW: Array, accumulate: bool) -> None:
        def work() -> None:
            self._gemm(gz, h_in, gW, transpose_a=True, beta=1.0 if accumulate else 0.0)

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
        factors = self._buffer("factors", 2, self._gemm.scalar)
        macros = (*launch.rule_macros(optimizer), ("HAS_SHADOW", "0"))
        self._launch("update.cu", "prepare_descent", 1, macros, launch.ONE_THREAD, np.float64(decay), factors, state)
        geometry = launch.flat(max(gz.size, h_in.size))
        counts = np.int64(gz.size), np.int64(h_in.size)
        self._launch("update.cu", "disarm", 1, macros, geometry, gz, counts[0], h_in, counts[1], state)
        self._gemm(gz, h_in, W, transpose_a=True, factors=factors)
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
        gW = self._buffer("gW", W.size, W.dtype).reshape(W.shape)
        self._gemm(gz, h_in, gW, transpose_a=True)
        flat = None if shadow is None else shadow.reshape(-1)
        self._apply_rule(W.reshape(-1), gW.reshape(-1), (), optimizer, W.size, regularizer, None, flat, state)

    # --- update ---

    def penalty(self, theta: Array, n: int, regularizer: ElasticNet, state: Array) -> None:
        geometry = launch.flat(n)
        partial = self._buffer("partial_cost", max(1, geometry[0][0]), np.float64)
        self._launch(
            "flat.cu",
            "penalty",
            1,
            (),
            geometry,
            theta,
            np.int64(n),
            np.float64(regularizer.l1),
            np.float64(regularizer.l2),
            partial,
        )
        self._finish(partial, geometry[0][0], _ADD_TO_COST, state)

    def add_penalty_gradient(self, theta: Array, n: int, regularizer: ElasticNet, g: Array) -> None:
        add = launch.elementwise("X theta, X l1, X l2", "X g", "g += l1 * sign(theta) + l2 * theta", self._master.name)
        add(theta[:n], *self._lambdas(regularizer), g[:n])

    def gradient_norm(
        self,
        theta: Array,
        g: Array,
        n: int,
        regularizer: ElasticNet | None,
        state: Array,
        parts: Sequence[slice] | None = None,
    ) -> None:
        whole = [slice(0, theta.size)] if parts is None else parts
        geometries = [launch.flat(part.stop - part.start) for part in whole]
        blocks = [geometry[0][0] for geometry in geometries]
        partial = self._buffer("partial_cost", max(1, sum(blocks)), np.float64)
        at = 0
        for part, geometry in zip(whole, geometries):
            penalised = 0 if regularizer is None else max(0, min(n, part.stop) - part.start)
            self._launch(
                "flat.cu",
                "square_norm",
                1,
                (),
                geometry,
                theta[part],
                g[part],
                np.int64(part.stop - part.start),
                np.int64(penalised),
                *self._lambdas(regularizer),
                partial[at:],
                state,
            )
            at += geometry[0][0]
        self._finish(partial, at, _SET_NORM, state)

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
            self._apply_rule(theta, g, moments, optimizer, n, regularizer, clip_norm, shadow, state)
            return
        first = layout.n_weights
        tail = None if shadow is None else shadow[first:]
        self._apply_rule(
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
        vec = launch.vector_length(theta.size, theta, averaged)
        self._launch(
            "average.cu",
            "average",
            vec,
            (),
            launch.flat(theta.size, vec),
            theta,
            averaged,
            np.int64(theta.size),
            np.float64(rule.decay),
            np.int32(rule.warmup),
            state,
        )

    def begin_step(self, learning_rate: float, round: int, cursor: int, state: Array) -> None:
        values = [np.float64(number) for number in (learning_rate, round, cursor)]
        self._launch("flat.cu", "begin_step", 1, (), launch.ONE_THREAD, *values, state)

    def finish_step(self, rows: int, state: Array) -> None:
        self._launch(
            "flat.cu",
            "finish_step",
            1,
            (),
            launch.ONE_THREAD,
            np.float64(rows),
            np.int32(self.precision.loss_scaled),
            np.float64(precision_table.LOSS_SCALE_GROWTH),
            np.float64(precision_table.LOSS_SCALE_BACKOFF),
            np.float64(precision_table.LOSS_SCALE_INTERVAL),
            np.float64(precision_table.LOSS_SCALE_MINIMUM),
            state,
        )

    def _second_stream(self) -> Beside:
        """Where a layer's second gradient runs beside the first."""
        if self._gradient_stream is None:
            self._gradient_stream = Beside()
        return self._gradient_stream

    def _as_float32(self, array: Array) -> Array:
        return array if array.dtype == np.float32 else self._cast(array, np.float32)

    def _cast(self, array: Array, dtype: Any) -> Array:
        """``array``, C-order, in another type, by our own kernel: CuPy's do not know every 16-bit type everywhere."""
        out = cupy.empty(array.shape, dtype)
        self.copy(array, out)
        return out

    # --- the kernels of the passes ---

    def _activate(
        self,
        f: Activation,
        product: Array,
        b: Array | None,
        h: Array,
        keeps_z: bool,
        dropout: Dropout | None,
        state: Any,
    ) -> None:
        rows, n = h.shape
        has_bias = ("HAS_BIAS", str(int(b is not None)))
        if f.rowwise and keeps_z:  # no f′ reads that z, so that no kernel is made for it
            self._activate(IDENTITY, product, b, product, False, None, state)
            self._activate(f, product, None, h, False, None, state)
            return
        if f.rowwise:
            macros: Macros = (("LOGARITHM", str(int(f.name == "log_softmax"))), has_bias)
            self._launch(
                "softmax.cu",
                "bias_softmax",
                1,
                macros,
                launch.by_row(rows, n),
                product,
                b,
                h,
                np.int64(rows),
                np.int64(n),
            )
            return
        vec = launch.vector_length(n, product, h, b)
        macros = (
            ("F", f"f_{f.name}"),
            ("KEEPS_Z", str(int(keeps_z))),
            has_bias,
            ("DROPOUT", str(int(dropout is not None))),
        )
        self._launch(
            "forward.cu",
            "bias_activation",
            vec,
            macros,
            launch.tile(rows, n, vec),
            product,
            b,
            h,
            np.int64(rows),
            np.int64(n),
            *_mask(dropout),
            state,
        )

    def _activation_gradient(
        self,
        f: Activation,
        g: Array,
        saved: Array | None,
        dropout: Dropout | None,
        gb: Array | None,
        accumulate: bool,
        state: Array,
    ) -> None:
        rows, n = g.shape
        vec = launch.vector_length(n, g, saved)
        geometry = launch.tile(rows, n, vec)
        partial = None if gb is None else self._buffer("partial", max(1, geometry[0][1]) * n, self._master)
        macros = (
            ("DF", f"df_{f.name}"),
            ("READS", str(_READS[f.reads])),
            ("DROPOUT", str(int(dropout is not None))),
            ("HAS_SUMS", str(int(gb is not None))),
        )
        self._launch(
            "backward.cu",
            "activation_gradient",
            vec,
            macros,
            geometry,
            g,
            saved,
            partial,
            np.int64(rows),
            np.int64(n),
            *_mask(dropout),
            state,
        )
        self._finish_sums(partial, gb, geometry[0][1], accumulate)

    def _column_sums(self, g: Array, gb: Array, accumulate: bool, state: Array) -> None:
        """gb = Σ_batch g, through the gradient kernel of the identity."""
        self._activation_gradient(IDENTITY, g, None, None, gb, accumulate, state)

    def _finish_sums(self, partial: Array | None, gb: Array | None, parts: int, accumulate: bool) -> None:
        if gb is None:
            return
        self._launch(
            "backward.cu",
            "finish_column_sums",
            1,
            _PLAIN,
            launch.by_column(gb.size),
            partial,
            gb,
            np.int64(parts),
            np.int64(gb.size),
            np.int32(accumulate),
        )

    def _rowwise_gradient(self, f: Activation, g: Array, h: Array | None) -> None:
        rows, n = g.shape
        macros = (("LOGARITHM", str(int(f.name == "log_softmax"))), ("HAS_BIAS", "0"))
        self._launch(
            "softmax.cu", "softmax_gradient", 1, macros, launch.by_row(rows, n), g, h, np.int64(rows), np.int64(n)
        )

    # --- the kernels of the losses ---

    def _pointwise_loss(
        self,
        loss: Loss,
        f: Activation,
        from_z: bool,
        through: Activation | None,
        h: Array,
        saved: Array,
        y: Array,
        sample_weight: Array | None,
        gz: Array,
        gb: Array | None,
        accumulate: bool,
        state: Array,
    ) -> None:
        """A loss that is a sum over the outputs; with ``through`` also f′, and the bias gradient."""
        rows, n = h.shape
        reads = 0 if through is None else _READS[through.reads]
        vec = launch.vector_length(n, h, gz, saved if reads else None)
        geometry = launch.tile(rows, n, vec)
        parts = max(1, geometry[0][0] * geometry[0][1])
        partial_cost = self._buffer("partial_cost", parts, np.float64)
        partial = None if gb is None else self._buffer("partial", max(1, geometry[0][1]) * n, self._master)
        name = f"{f.name}_{loss.name}" if from_z else loss.name
        macros: Macros = (
            ("VALUE", f"value_{name}"),
            ("SLOPE", f"slope_{name}"),
            ("DF", f"df_{IDENTITY.name if through is None else through.name}"),
            ("MEAN", str(int(not isinstance(loss, _CATEGORICAL)))),
            ("READS", str(reads)),
            ("HAS_SUMS", str(int(gb is not None))),
            *self._target_macros(loss, y),
        )
        if isinstance(loss, Huber):
            macros = (*macros, ("HUBER_DELTA", launch.literal(loss.delta)))
        self._launch(
            "loss.cu",
            "pointwise_loss",
            vec,
            macros,
            geometry,
            h,
            saved if reads else None,
            y,
            sample_weight,
            self._class_weight(loss),
            gz,
            partial,
            partial_cost,
            np.int64(rows),
            np.int64(n),
            state,
        )
        self._finish(partial_cost, geometry[0][0] * geometry[0][1], _ADD_TO_COST, state)
        self._finish_sums(partial, gb, geometry[0][1], accumulate)

    def _cross_entropy(
        self, loss: Loss, z: Array, y: Array, sample_weight: Array | None, gz: Array, state: Array
    ) -> None:
        rows, n = z.shape
        geometry = launch.by_row(rows, n)
        partial_cost = self._buffer("partial_cost", max(1, geometry[0][0]), np.float64)
        self._launch(
            "cross_entropy.cu",
            "softmax_cross_entropy",
            1,
            self._target_macros(loss, y),
            geometry,
            z,
            y,
            sample_weight,
            self._class_weight(loss),
            gz,
            partial_cost,
            np.int64(rows),
            np.int64(n),
            state,
        )
        self._finish(partial_cost, geometry[0][0], _ADD_TO_COST, state)

    def _target_macros(self, loss: Loss, y: Array) -> Macros:
        categorical = isinstance(loss, _CATEGORICAL)
        clip = getattr(loss, "clip", 0.0)
        return (
            *((("PROBABILITY_CLIP", repr(float(clip))),) if clip else ()),
            ("LABELS", str(int(y.ndim == 1))),
            ("SIGNS", str(int(isinstance(loss, Hinge)))),
            ("CATEGORICAL", str(int(categorical))),
            ("CLASS_WEIGHTS", str(int(self._class_weight(loss) is not None))),
            ("LABEL_SMOOTHING", launch.literal(getattr(loss, "label_smoothing", 0.0))),
        )

    def _class_weight(self, loss: Loss) -> Array | None:
        """The class weights on the device, kept there from the first use on."""
        weights = getattr(loss, "class_weight", None)
        if weights is None:
            return None
        if weights not in self._class_weights:
            self._class_weights[weights] = cupy.asarray(weights, self._master)
        return self._class_weights[weights]

    # --- the kernels of the update ---

    def _apply_rule(
        self,
        theta: Array,
        g: Array,
        moments: Sequence[Array],
        optimizer: Optimizer,
        n: int,
        regularizer: ElasticNet | None,
        clip_norm: float | None,
        shadow: Array | None,
        state: Array,
        lr_factor: float = 1.0,
    ) -> None:
        vec = launch.vector_length(theta.size, theta, g, shadow, *moments)
        macros = (*launch.rule_macros(optimizer), ("HAS_SHADOW", str(int(shadow is not None))))
        prepared = self._buffer("prepared", _PREPARED, np.float64)
        self._launch(
            "update.cu",
            "prepare_update",
            vec,
            macros,
            launch.ONE_THREAD,
            np.float64(clip_norm or 0),
            np.float64(CLIP_EPS),
            np.float64(lr_factor),
            prepared,
            state,
        )
        slots = [*moments, None, None, None][:3]
        self._launch(
            "update.cu",
            "update",
            vec,
            macros,
            launch.flat(theta.size, vec),
            theta,
            g,
            *slots,
            shadow,
            np.int64(theta.size),
            np.int64(0 if regularizer is None else n),
            *self._lambdas(regularizer),
            prepared,
        )

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
        """Muon's step for every W; `prepare_update` has just left its numbers."""
        prepared = self._buffer("prepared", _PREPARED, np.float64)
        macros = (("HAS_SHADOW", str(int(shadow is not None))),)
        shadows = [None] * len(layout.weights(theta)) if shadow is None else layout.weights(shadow)
        for W, gW, m, copy in zip(layout.weights(theta), layout.weights(g), layout.weights(moment), shadows):
            geometry = launch.flat(W.size)
            u = self._buffer("u", W.size, self._master).reshape(W.shape)
            partial = self._buffer("partial_cost", geometry[0][0], np.float64)
            self._launch(
                "muon.cu",
                "muon_direction",
                1,
                macros,
                geometry,
                W,
                gW,
                m,
                u,
                np.int64(W.size),
                *self._lambdas(regularizer),
                self._master.type(muon.momentum),
                np.int32(muon.nesterov),
                partial,
                prepared,
            )
            self._launch(
                "muon.cu",
                "muon_normalise",
                1,
                macros,
                geometry,
                u,
                np.int64(W.size),
                partial,
                np.int64(geometry[0][0]),
                np.float64(muon.eps),
            )
            u = self._orthogonalise(u, muon)
            self._launch(
                "muon.cu",
                "muon_apply",
                1,
                macros,
                geometry,
                W,
                u,
                copy,
                np.int64(W.size),
                np.float64(muon.rate(W.shape)),
                np.float64(muon.weight_decay),
                prepared,
                state,
            )

    def _orthogonalise(self, x: Array, muon: Muon) -> Array:
        """X ← a X + (b A + c A²) X with A = X Xᵀ (Xᵀ X where X is tall), in GEMMs alone."""
        a, b, c = muon.ns_coefficients
        tall = x.shape[0] > x.shape[1]
        side = min(x.shape)
        gram, polynomial = (self._buffer(name, side * side, self._master).reshape(side, side) for name in ("A", "B"))
        y = self._buffer("y", x.size, self._master).reshape(x.shape)
        for _ in range(muon.ns_steps):
            self._gemm(x, x, gram, transpose_a=tall, transpose_b=not tall)
            polynomial[...] = gram
            self._gemm(gram, gram, polynomial, alpha=c, beta=b)
            y[...] = x
            if tall:
                self._gemm(x, polynomial, y, beta=a)
            else:
                self._gemm(polynomial, x, y, beta=a)
            x, y = y, x
        return x

    # --- inside ---

    def _launch(self, name: str, function: str, vec: int, macros: Macros, geometry: Any, *arguments: Any) -> None:
        try:
            launch.launch(kernel(name, function, self._storage, vec, macros), geometry, arguments)
        except Exception as error:
            raise launch.device_error(error, function, arguments) from error

    def _finish(self, partial: Array, count: int, finish: np.int32, state: Array) -> None:
        self._launch("flat.cu", "finish_sum", 1, (), launch.ONE_BLOCK, partial, np.int64(count), finish, state)

    def _lambdas(self, regularizer: ElasticNet | None) -> tuple[Any, Any]:
        l1, l2 = (0.0, 0.0) if regularizer is None else (regularizer.l1, regularizer.l2)
        return self._master.type(l1), self._master.type(l2)

    def _buffer(self, name: str, count: int, dtype: Any) -> Array:
        """The first ``count`` numbers of a scratch array that grows on demand and is then reused."""
        if name not in self._scratch or self._scratch[name].size < count:
            self._scratch[name] = cupy.empty(max(count, ALIGNMENT), dtype)
        return self._scratch[name][:count]


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


def _mask(dropout: Dropout | None) -> tuple[Any, ...]:
    """The numbers of a dropout mask, in the order of the kernels' parameters."""
    if dropout is None:
        return np.uint32(0), np.uint32(0), np.uint64(0), np.int64(0)
    threshold = philox.keep_threshold(dropout.rate)
    return np.uint32(threshold), np.uint32(dropout.layer), np.uint64(dropout.seed), np.int64(dropout.first_row)


def _c_type(dtype: str, storage: str) -> str:
    """The name of an element type in the kernels."""
    if dtype == storage:
        return "T"
    names = {
        "float64": "double",
        "float32": "float",
        "int64": "long long",
        "int32": "int",
        "int16": "short",
        "int8": "signed char",
        "uint64": "unsigned long long",
        "uint32": "unsigned int",
        "uint16": "unsigned short",
        "uint8": "unsigned char",
        "bool": "bool",
        "float16": "Float16Source",
        "bfloat16": "BFloat16Source",
    }
    if dtype not in names:
        raise TypeError(
            f"gather: cannot cast {dtype} to a network of storage type {storage}; known: {', '.join(names)}"
        )
    return names[dtype]
