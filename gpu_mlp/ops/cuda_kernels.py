"""The kernels of `gpu_mlp.kernels` as calls on CuPy arrays: macros, grid, arguments and scratch of each.

Leans on `launch` for compiling and launching, and on `philox` for dropout. Which of them an operation takes, in which
order and beside which products, is for `cuda_ops` to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cupy
import numpy as np

from .. import precision as precision_table
from ..activations import IDENTITY, Activation
from ..averaging import EMA
from ..losses import NLL, CrossEntropy, Hinge, Huber, Loss
from ..optimizers import SGD, Muon, Optimizer
from ..precision import Precision
from ..regularizers import ElasticNet
from . import launch, philox
from .interface import ALIGNMENT, CLIP_EPS, Array, Dropout, Slot
from .launch import Macros

_ADD_TO_COST, _SET_NORM, _SET_TOTAL_WEIGHT = (np.int32(i) for i in range(3))  # enum Finish of kernels/flat.cu
_PREPARED = 8  # numbers that prepare_update leaves: applied, unscale, clip, and the rule's coefficients
_READS = {"none": 0, "h": 1, "z": 2}
_CATEGORICAL = (CrossEntropy, NLL)
_C_TYPES = {
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


class CudaKernels:
    """The kernels at one precision, on C-order arrays of the current device, in the current stream.

    T is the precision's storage type, of h, z, gz and b; S its master type, of sums, θ, its gradient and the moments. A
    state is a float64 array of ``len(Slot)`` numbers. `interface.Operations` has the formulas in full, and says what
    they read of the state.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self._storage = precision.storage_dtype.name
        self._master = precision.master_dtype
        self._scratch: dict[str, Array] = {}
        self._class_weights: dict[tuple[float, ...], Array] = {}

    # --- scratch ---

    def buffer(self, name: str, count: int, dtype: Any) -> Array:
        """The first ``count`` numbers of a scratch array that grows on demand and is then reused; (count,)."""
        if name not in self._scratch or self._scratch[name].size < count:
            self._scratch[name] = cupy.empty(max(count, ALIGNMENT), dtype)
        return self._scratch[name][:count]

    def buffers(self) -> list[Array]:
        """Every scratch array there is."""
        return list(self._scratch.values())

    # --- the state ---

    def write_state(self, state: Array, values: Mapping[Slot, float]) -> None:
        """state[slot] ← value."""
        for slot, value in values.items():
            self._launch("flat.cu", "set_state", launch.ONE_THREAD, np.int32(slot), np.float64(value), state)

    def begin_step(self, learning_rate: float, round: int, cursor: int, state: Array) -> None:
        """Set what a step takes from the host."""
        values = [np.float64(number) for number in (learning_rate, round, cursor)]
        self._launch("flat.cu", "begin_step", launch.ONE_THREAD, *values, state)

    def finish_step(self, rows: int, state: Array) -> None:
        """Count the step, and move the loss scale."""
        scaling = [
            np.float64(precision_table.LOSS_SCALE_GROWTH),
            np.float64(precision_table.LOSS_SCALE_BACKOFF),
            np.float64(precision_table.LOSS_SCALE_INTERVAL),
            np.float64(precision_table.LOSS_SCALE_MINIMUM),
        ]
        scaled = np.int32(self.precision.loss_scaled)
        self._launch("flat.cu", "finish_step", launch.ONE_THREAD, np.float64(rows), scaled, *scaling, state)

    # --- rows ---

    def gather(self, source: Array, rows: Array | None, out: Array, state: Array | None, scale: float) -> None:
        """out[i] ← scale · source[rows[first + i]], cast to out's dtype; source and out of any type in `_C_TYPES`.

        source: (n, …); rows: (≥ first + batch,) int64, or None for all in their order; out: (batch, …).
        """
        columns = math.prod(source.shape[1:])
        vec = launch.vector_length(columns, source, out)
        macros = launch.gather_macros(*(self._c_type(array.dtype.name) for array in (source, out)))
        geometry = launch.tile(len(out), columns, vec)
        arguments = source, rows, out, *_counts(len(out), columns), self._master.type(scale), state
        self._launch("gather.cu", "gather", geometry, *arguments, macros=macros, vec=vec)

    def _c_type(self, dtype: str) -> str:
        """The name of an element type in the kernels."""
        if dtype == self._storage:
            return "T"
        if dtype not in _C_TYPES:
            raise TypeError(
                f"gather: cannot cast {dtype} to a network of storage type {self._storage}; known: "
                f"{', '.join(_C_TYPES)}"
            )
        return _C_TYPES[dtype]

    # --- the passes over a layer ---

    def activate(
        self,
        f: Activation,
        product: Array,
        b: Array | None,
        h: Array,
        keeps_z: bool,
        dropout: Dropout | None,
        state: Array | None,
    ) -> None:
        """h = f(product + b), then dropout on h; with ``keeps_z`` product += b.

        product, h: (batch, n) T, which may be one array; b: (n,) T, or None for no bias. Dropout alone reads the state.
        """
        rows, n = h.shape
        bias = _flags(HAS_BIAS=b is not None)
        if f.rowwise and keeps_z:  # no f′ reads that z, so that no kernel is made for it
            self.activate(IDENTITY, product, b, product, False, None, state)
            self.activate(f, product, None, h, False, None, state)
        elif f.rowwise:
            macros: Macros = (*_flags(LOGARITHM=f.name == "log_softmax"), *bias)
            arguments: tuple[Any, ...] = product, b, h, *_counts(rows, n)
            self._launch("softmax.cu", "bias_softmax", launch.by_row(rows, n), *arguments, macros=macros)
        else:
            vec = launch.vector_length(n, product, h, b)
            macros = (("F", f"f_{f.name}"), *_flags(KEEPS_Z=keeps_z), *bias, *_flags(DROPOUT=dropout is not None))
            arguments = product, b, h, *_counts(rows, n), *_mask(dropout), state
            self._launch("forward.cu", "bias_activation", launch.tile(rows, n, vec), *arguments, macros=macros, vec=vec)

    def activation_gradient(
        self,
        f: Activation,
        g: Array,
        saved: Array | None,
        dropout: Dropout | None,
        gb: Array | None,
        accumulate: bool,
        state: Array,
    ) -> None:
        """g ← g ⊙ f′(saved), through the dropout mask, for an elementwise f; gb = Σ_batch g (or +=), in the same pass.

        g: (batch, n) T; saved: (batch, n) T, h or z as f′ reads it, or None where it reads none; gb: (n,) S, or None.
        """
        rows, n = g.shape
        vec = launch.vector_length(n, g, saved)
        geometry = launch.tile(rows, n, vec)
        partial = self._partial_sums(gb, geometry)
        macros = (
            ("DF", f"df_{f.name}"),
            ("READS", str(_READS[f.reads])),
            *_flags(DROPOUT=dropout is not None, HAS_SUMS=gb is not None),
        )
        arguments = g, saved, partial, *_counts(rows, n), *_mask(dropout), state
        self._launch("backward.cu", "activation_gradient", geometry, *arguments, macros=macros, vec=vec)
        self._finish_sums(partial, gb, geometry, accumulate)

    def column_sums(self, g: Array, gb: Array, accumulate: bool, state: Array) -> None:
        """gb = Σ_batch g (or +=), through the gradient kernel of the identity. g: (batch, n) T; gb: (n,) S."""
        self.activation_gradient(IDENTITY, g, None, None, gb, accumulate, state)

    def rowwise_gradient(self, f: Activation, g: Array, h: Array | None) -> None:
        """g ← the Jacobian product of softmax or log_softmax with g, at h = f(z). g, h: (batch, n) T."""
        rows, n = g.shape
        macros = _flags(LOGARITHM=f.name == "log_softmax", HAS_BIAS=False)
        arguments = g, h, *_counts(rows, n)
        self._launch("softmax.cu", "softmax_gradient", launch.by_row(rows, n), *arguments, macros=macros)

    def _partial_sums(self, gb: Array | None, geometry: launch.Geometry) -> Array | None:
        """Room for the sums of each block row of a tile; None where no sums are wanted."""
        return None if gb is None else self.buffer("partial", geometry[0][1] * gb.size, self._master)

    def _finish_sums(
        self, partial: Array | None, gb: Array | None, geometry: launch.Geometry, accumulate: bool
    ) -> None:
        """gb = the sum of what the block rows of ``geometry`` left in ``partial`` (or +=)."""
        if gb is None:
            return
        macros = (("DF", "df_identity"), *_flags(READS=False, DROPOUT=False, HAS_SUMS=False))
        arguments = partial, gb, *_counts(geometry[0][1], gb.size), np.int32(accumulate)
        self._launch("backward.cu", "finish_column_sums", launch.by_column(gb.size), *arguments, macros=macros)

    # --- the losses ---

    def total_weight(self, loss: Loss, y: Array, sample_weight: Array | None, state: Array) -> None:
        """TOTAL_WEIGHT ← Σ wᵢ over the batch; y as for `pointwise_loss`."""
        class_weight = self._class_weight(loss) if y.ndim == 1 else None
        if sample_weight is None and class_weight is None:
            self.write_state(state, {Slot.TOTAL_WEIGHT: len(y)})
            return
        geometry = launch.flat(len(y))
        partial = self._partial_cost(geometry)
        labels, classes = (None, 0) if class_weight is None else (y, class_weight.size)
        arguments = sample_weight, labels, class_weight, *_counts(len(y), classes), partial
        self._launch("flat.cu", "total_weight", geometry, *arguments)
        self._finish_sum(partial, _SET_TOTAL_WEIGHT, state)

    def pointwise_loss(
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
        """A loss that is a sum over the outputs, and its gradient gz; with ``through`` also f′, and gb = Σ_batch gz.

        h: (batch, n) T, ŷ, or z of the fused pair of f and the loss with ``from_z``; saved: (batch, n) T, what f′ of
        ``through`` reads; y: (batch, n) S or (batch,) int64; sample_weight: (batch,) float64; gz: (batch, n) T; gb:
        (n,) S.
        """
        rows, n = h.shape
        reads = 0 if through is None else _READS[through.reads]
        read = saved if reads else None
        vec = launch.vector_length(n, h, gz, read)
        geometry = launch.tile(rows, n, vec)
        partial_cost, partial = self._partial_cost(geometry), self._partial_sums(gb, geometry)
        name = f"{f.name}_{loss.name}" if from_z else loss.name
        macros = (
            ("VALUE", f"value_{name}"),
            ("SLOPE", f"slope_{name}"),
            ("DF", f"df_{IDENTITY.name if through is None else through.name}"),
            *_flags(MEAN=not isinstance(loss, _CATEGORICAL)),
            ("READS", str(reads)),
            *_flags(HAS_SUMS=gb is not None),
            *self._target_macros(loss, y),
            *((("HUBER_DELTA", launch.literal(loss.delta)),) if isinstance(loss, Huber) else ()),
        )
        targets = y, sample_weight, self._class_weight(loss)
        arguments = h, read, *targets, gz, partial, partial_cost, *_counts(rows, n), state
        self._launch("loss.cu", "pointwise_loss", geometry, *arguments, macros=macros, vec=vec)
        self._finish_sum(partial_cost, _ADD_TO_COST, state)
        self._finish_sums(partial, gb, geometry, accumulate)

    def cross_entropy(
        self, loss: Loss, z: Array, y: Array, sample_weight: Array | None, gz: Array, state: Array
    ) -> None:
        """The loss of softmax or log_softmax from z, and its gradient gz; z, gz: (batch, n) T, the rest as above."""
        rows, n = z.shape
        geometry = launch.by_row(rows, n)
        partial_cost = self._partial_cost(geometry)
        macros = self._target_macros(loss, y)
        arguments = z, y, sample_weight, self._class_weight(loss), gz, partial_cost, *_counts(rows, n), state
        self._launch("cross_entropy.cu", "softmax_cross_entropy", geometry, *arguments, macros=macros)
        self._finish_sum(partial_cost, _ADD_TO_COST, state)

    def _target_macros(self, loss: Loss, y: Array) -> Macros:
        clip = getattr(loss, "clip", 0.0)
        return (
            *((("PROBABILITY_CLIP", repr(float(clip))),) if clip else ()),
            *_flags(
                LABELS=y.ndim == 1,
                SIGNS=isinstance(loss, Hinge),
                CATEGORICAL=isinstance(loss, _CATEGORICAL),
                CLASS_WEIGHTS=self._class_weight(loss) is not None,
            ),
            ("LABEL_SMOOTHING", launch.literal(getattr(loss, "label_smoothing", 0.0))),
        )

    def _class_weight(self, loss: Loss) -> Array | None:
        """The class weights on the device, (classes,) S, kept there from the first use on."""
        weights = getattr(loss, "class_weight", None)
        if weights is None:
            return None
        if weights not in self._class_weights:
            self._class_weights[weights] = cupy.asarray(weights, self._master)
        return self._class_weights[weights]

    # --- the penalty and the norm ---

    def penalty(self, theta: Array, n: int, regularizer: ElasticNet, state: Array) -> None:
        """COST += λΩ(θ[:n]). theta: (≥ n,) S."""
        geometry = launch.flat(n)
        partial = self._partial_cost(geometry)
        factors = np.float64(regularizer.l1), np.float64(regularizer.l2)
        self._launch("flat.cu", "penalty", geometry, theta, np.int64(n), *factors, partial)
        self._finish_sum(partial, _ADD_TO_COST, state)

    def add_penalty_gradient(self, theta: Array, n: int, regularizer: ElasticNet, g: Array) -> None:
        """g[:n] += λ∇Ω(θ[:n]). theta, g: (≥ n,) S."""
        add = launch.elementwise("X theta, X l1, X l2", "X g", "g += l1 * sign(theta) + l2 * theta", self._master.name)
        add(theta[:n], *self._lambdas(regularizer), g[:n])

    def gradient_norm(
        self, theta: Array, g: Array, n: int, regularizer: ElasticNet | None, state: Array, parts: Sequence[slice]
    ) -> None:
        """GRADIENT_NORM ← ‖g / LOSS_SCALE + λ∇Ω(θ[:n])‖₂ over these parts of θ. theta, g: (size,) S."""
        geometries = [launch.flat(part.stop - part.start) for part in parts]
        partial = self._partial_cost(*geometries)
        at = 0
        for part, geometry in zip(parts, geometries):
            penalised = 0 if regularizer is None else max(0, min(n, part.stop) - part.start)
            counts = _counts(part.stop - part.start, penalised)
            arguments = theta[part], g[part], *counts, *self._lambdas(regularizer), partial[at:], state
            self._launch("flat.cu", "square_norm", geometry, *arguments)
            at += geometry[0][0]
        self._finish_sum(partial, _SET_NORM, state)

    # --- the updates ---

    def apply_rule(
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
        """One update of theta by a rule whose elements do not mix, at ``lr_factor`` times the learning rate.

        theta, g, each moment: (size,) S; shadow: (size,) T.
        """
        vec = launch.vector_length(theta.size, theta, g, shadow, *moments)
        macros = (*launch.rule_macros(optimizer), *_flags(HAS_SHADOW=shadow is not None))
        prepared = self._prepared()
        numbers = np.float64(clip_norm or 0), np.float64(CLIP_EPS), np.float64(lr_factor)
        one = launch.ONE_THREAD
        self._launch("update.cu", "prepare_update", one, *numbers, prepared, state, macros=macros, vec=vec)
        slots = [*moments, None, None, None][:3]
        counts = _counts(theta.size, 0 if regularizer is None else n)
        arguments = theta, g, *slots, shadow, *counts, *self._lambdas(regularizer), prepared
        self._launch("update.cu", "update", launch.flat(theta.size, vec), *arguments, macros=macros, vec=vec)

    def prepare_descent(self, optimizer: SGD, decay: float, gz: Array, h_in: Array, state: Array) -> Array:
        """α = −η and β = 1 − η · decay of W ← α gzᵀ h_in + β W, as scratch, (2,) S.

        Where the step is not applied α is 0, β is 1, and gz and h_in, (batch, n_out) and (batch, n_in) T, become zeros.
        """
        factors = self.buffer("factors", 2, self._master)
        macros = (*launch.rule_macros(optimizer), *_flags(HAS_SHADOW=False))
        numbers = np.float64(decay), factors, state
        self._launch("update.cu", "prepare_descent", launch.ONE_THREAD, *numbers, macros=macros)
        geometry = launch.flat(max(gz.size, h_in.size))
        arguments = gz, np.int64(gz.size), h_in, np.int64(h_in.size), state
        self._launch("update.cu", "disarm", geometry, *arguments, macros=macros)
        return factors

    def muon_direction(
        self, W: Array, gW: Array, m: Array, muon: Muon, regularizer: ElasticNet | None, has_shadow: bool
    ) -> Array:
        """m ← the average of Muon's gradients of one W, and the direction that is to be orthogonalised, of norm 1.

        W, gW, m: (n_out, n_in) S; returns scratch of that shape and type. The last `apply_rule` has left the numbers of
        the step. has_shadow: whether `muon_apply` gets one, so that both take the same module.
        """
        geometry, size = launch.flat(W.size), np.int64(W.size)
        u = self.buffer("u", W.size, self._master).reshape(W.shape)
        partial = self._partial_cost(geometry)
        macros = _flags(HAS_SHADOW=has_shadow)
        numbers = *self._lambdas(regularizer), self._master.type(muon.momentum), np.int32(muon.nesterov)
        arguments = W, gW, m, u, size, *numbers, partial, self._prepared()
        self._launch("muon.cu", "muon_direction", geometry, *arguments, macros=macros)
        norm = partial, np.int64(partial.size), np.float64(muon.eps)
        self._launch("muon.cu", "muon_normalise", geometry, u, size, *norm, macros=macros)
        return u

    def muon_apply(self, W: Array, u: Array, muon: Muon, shadow: Array | None, state: Array) -> None:
        """W ← (1 − η weight_decay) W − η rate u, shadow ← W. W, u: (n_out, n_in) S; shadow: (n_out, n_in) T."""
        macros = _flags(HAS_SHADOW=shadow is not None)
        numbers = np.int64(W.size), np.float64(muon.rate(W.shape)), np.float64(muon.weight_decay)
        arguments = W, u, shadow, *numbers, self._prepared(), state
        self._launch("muon.cu", "muon_apply", launch.flat(W.size), *arguments, macros=macros)

    def average(self, theta: Array, averaged: Array, rule: EMA, state: Array) -> None:
        """averaged ← averaged + (1 − d)(θ − averaged). theta, averaged: (n,) S."""
        vec = launch.vector_length(theta.size, theta, averaged)
        numbers = np.int64(theta.size), np.float64(rule.decay), np.int32(rule.warmup)
        geometry = launch.flat(theta.size, vec)
        self._launch("average.cu", "average", geometry, theta, averaged, *numbers, state, vec=vec)

    def _prepared(self) -> Array:
        """What an update needs, worked out by the kernel prepare_update; (_PREPARED,) float64."""
        return self.buffer("prepared", _PREPARED, np.float64)

    # --- inside ---

    def _launch(
        self,
        name: str,
        function: str,
        geometry: launch.Geometry,
        *arguments: Any,
        macros: Macros = (),
        vec: int = 1,
    ) -> None:
        """Launch a function of the source ``name``, made for these macros and ``vec`` elements a load."""
        try:
            launch.launch(launch.kernel(name, function, self._storage, vec, macros), geometry, arguments)
        except Exception as error:
            raise launch.device_error(error, function, arguments) from error

    def _partial_cost(self, *geometries: launch.Geometry) -> Array:
        """Room for one number a block of these grids; (blocks,) float64."""
        return self.buffer("partial_cost", sum(math.prod(grid) for grid, _ in geometries), np.float64)

    def _finish_sum(self, partial: Array, finish: np.int32, state: Array) -> None:
        """Add up what the blocks left, and put it where ``finish`` says."""
        self._launch("flat.cu", "finish_sum", launch.ONE_BLOCK, partial, np.int64(partial.size), finish, state)

    def _lambdas(self, regularizer: ElasticNet | None) -> tuple[Any, Any]:
        l1, l2 = (0.0, 0.0) if regularizer is None else (regularizer.l1, regularizer.l2)
        return self._master.type(l1), self._master.type(l2)


def _flags(**values: bool) -> Macros:
    """Macros that are 0 or 1."""
    return tuple((name, str(int(value))) for name, value in values.items())


def _counts(*numbers: int) -> tuple[np.int64, ...]:
    """Lengths, as the kernels take them."""
    return tuple(np.int64(number) for number in numbers)


def _mask(dropout: Dropout | None) -> tuple[Any, ...]:
    """The numbers of a dropout mask, in the order of the kernels' parameters."""
    if dropout is None:
        return np.uint32(0), np.uint32(0), np.uint64(0), np.int64(0)
    threshold = philox.keep_threshold(dropout.rate)
    return np.uint32(threshold), np.uint32(dropout.layer), np.uint64(dropout.seed), np.int64(dropout.first_row)
