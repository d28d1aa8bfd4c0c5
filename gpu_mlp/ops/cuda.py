"""The fused operations on plain CuPy arrays, for people with a training loop of their own.

    from gpu_mlp.ops import cuda

    h, z = cuda.affine(x, W, b, "gelu", keep_z=True)        # z = x Wᵀ + b, h = gelu(z): a GEMM and one pass
    z2 = cuda.affine(h, W2, b2)
    L, gz2 = cuda.loss_and_gradient("cross_entropy", z2, y, output="softmax")  # one pass over z2
    gh = cuda.product(gz2, W2)                              # gz W, without a transposed copy
    gz, gb = cuda.activation_gradient(gh, z, "gelu")        # gh ⊙ f′(z) over gh, and its column sums: one pass
    gW = cuda.product(gz, x, transpose_a=True)
    update = cuda.Update(AdamW(lr=1e-3), theta); update(g)  # every parameter in one launch

Arrays are C-order, of one of the types float64, float32, float16 and bfloat16; 16-bit values are computed with and
summed in float32. Nothing here waits for the device, work goes to CuPy's current stream, and the same call gives the
same bits. A network's own layers run on the same kernels. A wrong shape or dtype is a ValueError or TypeError that
names it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from .. import activations, checks, losses, optimizers, precision, regularizers
from ..losses import Loss
from ..optimizers import LBFGS, Muon, Optimizer
from ..regularizers import ElasticNet
from . import launch
from .cuda_ops import CudaOperations
from .interface import Array, Dropout, Layout, Slot

__all__ = [
    "Dropout",
    "Update",
    "activation_gradient",
    "affine",
    "derivative",
    "function",
    "gather",
    "loss_and_gradient",
    "product",
    "softmax",
    "softmax_gradient",
]

_STORAGE = ("float64", "float32", "float16", "bfloat16")


def function(name: str, dtype: Any = np.float32) -> Any:
    """f of an elementwise activation as a `cupy.ElementwiseKernel`: ``h = f(z)`` for any shape and strides.

    name: of `activations.ACTIVATIONS`; dtype: of the arrays.
    """
    return _elementwise(name, "f", dtype)


def derivative(name: str, dtype: Any = np.float32) -> Any:
    """f′ of an elementwise activation as a `cupy.ElementwiseKernel`, of z or of h as the table's ``reads`` says."""
    return _elementwise(name, "df", dtype)


def affine(
    x: Array,
    W: Array,
    b: Array,
    activation: str = "identity",
    *,
    keep_z: bool = False,
    dropout: Dropout | None = None,
    round: int = 0,
    tf32: bool = False,
) -> Any:
    """h = f(x Wᵀ + b), then inverted dropout.

    x: (batch, n_in); W: (n_out, n_in); b: (n_out,); of one dtype. Returns h, (batch, n_out), or with ``keep_z`` (h, z).
    ``dropout`` and ``round`` determine the mask; see `Dropout`. ``tf32``: let a float32 GEMM round its factors.
    """
    f = activations.get(activation, "activation")
    _matrix("x", x)
    _matrix("W", W, (None, x.shape[1]))
    _array("b", b, (W.shape[0],))
    _one_dtype(x=x, W=W, b=b)
    if dropout is not None and f.rowwise:
        raise ValueError(f"dropout: not behind {activation}, whose entries belong together")
    ops = _operations(x.dtype.name, tf32)
    h = cupy.empty((len(x), len(W)), x.dtype)
    z = cupy.empty_like(h) if keep_z else None
    ops.affine_activation(x, W, b, f, h, z, dropout, _state(ops, {Slot.ROUND: round} if dropout else {}))
    return (h, z) if keep_z else h


def activation_gradient(
    gh: Array,
    saved: Array | None,
    activation: str,
    *,
    dropout: Dropout | None = None,
    round: int = 0,
    gb: Array | None = None,
) -> tuple[Array, Array]:
    """gz = gh ⊙ f′ in place of gh, and gb = Σ_batch gz, in one pass.

    gh: (batch, n), which is overwritten; saved: (batch, n), z or h as the activation's ``reads`` says, None where it
    reads none. Returns (gz, gb); gb: (n,) in float32, for float64 in float64; an array that is given is added to.
    """
    f = activations.get(activation, "activation")
    if f.rowwise:
        raise ValueError(f"activation: {activation} has a Jacobian; use softmax_gradient")
    _matrix("gh", gh)
    if f.reads != "none" and saved is None:
        raise ValueError(f"saved: f′ of {activation} reads {f.reads}, got None")
    if saved is not None:
        _array("saved", saved, gh.shape)
        _one_dtype(gh=gh, saved=saved)
    ops = _operations(gh.dtype.name)
    accumulate = gb is not None
    gb = cupy.empty(gh.shape[1], ops.precision.master_dtype) if gb is None else gb
    _array("gb", gb, (gh.shape[1],), ops.precision.master)
    state = _state(ops, {Slot.ROUND: round} if dropout else {})
    ops.kernels.activation_gradient(f, gh, None if f.reads == "none" else saved, dropout, gb, accumulate, state)
    return gh, gb


def loss_and_gradient(
    loss: str | Loss,
    h: Array,
    y: Array,
    *,
    output: str = "identity",
    sample_weight: Array | None = None,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """L, a float64 array of no dimension on the device, and ``scale`` · ∂L/∂z of the output layer, (batch, n).

    loss: a name or a `losses.Loss`; output: the output activation. For the pairs of `losses.FUSED` h is z, the weighted
    input of the output layer, and both come out of one pass; for all others h is ŷ = f(z), and f′ has to read h.
    y: (batch, n), or (batch,) int64 labels; sample_weight: (batch,) float64.
    """
    chosen, f = losses.get(loss), activations.get(output, "output")
    _matrix("h", h)
    chosen.check_output(output, h.shape[1])
    checks.target_shape("y", y, len(h), h.shape[1], chosen.takes_labels)
    fused = (output, chosen.name) in losses.FUSED
    if not fused and f.reads == "z":
        raise ValueError(f"output: f′ of {output} reads z, which is not kept here; apply it as a layer of its own")
    ops = _operations(h.dtype.name)
    y = cupy.ascontiguousarray(y, np.int64 if y.ndim == 1 else ops.precision.master_dtype)
    if sample_weight is not None:
        _array("sample_weight", sample_weight, (len(h),), "float64")
    state = _state(ops, {Slot.LOSS_SCALE: scale})
    gz = cupy.empty_like(h)
    ops.total_weight(chosen, y, sample_weight, state)
    ops.loss_and_gradient(chosen, f, fused, h, None, y, sample_weight, gz, None, False, state)
    return state[Slot.COST], gz


def softmax(z: Array, *, logarithm: bool = False) -> Array:
    """Row-wise softmax of z, (batch, n), or its logarithm; as a new array."""
    _matrix("z", z)
    h = cupy.empty_like(z)
    _operations(z.dtype.name).activate(activations.get("log_softmax" if logarithm else "softmax"), z, h)
    return h


def softmax_gradient(g: Array, h: Array, *, logarithm: bool = False) -> Array:
    """The Jacobian product of softmax (or its logarithm) at h = softmax(z), in place of g; both (batch, n)."""
    _matrix("g", g)
    _array("h", h, g.shape)
    _one_dtype(g=g, h=h)
    _operations(g.dtype.name).kernels.rowwise_gradient(activations.get("log_softmax" if logarithm else "softmax"), g, h)
    return g


def product(
    a: Array,
    b: Array,
    out: Array | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    tf32: bool = False,
) -> Array:
    """out = alpha · op(a) op(b) + beta · out, one cuBLAS call; 16-bit factors are summed in float32.

    out: (m, n) of the factors' dtype or, for 16-bit factors, of float32; None makes one of the factors' dtype.
    """
    _matrix("a", a)
    _matrix("b", b)
    _one_dtype(a=a, b=b)
    m, k = a.shape[::-1] if transpose_a else a.shape
    inner, n = b.shape[::-1] if transpose_b else b.shape
    if k != inner:
        raise ValueError(f"b: expected {k} along the dimension that is summed over, got {inner}")
    if out is None:
        out = cupy.empty((m, n), a.dtype)
    _array("out", out, (m, n), a.dtype.name, "float32" if a.dtype.itemsize == 2 else a.dtype.name)
    _operations(a.dtype.name, tf32).gemm(a, b, out, transpose_a, transpose_b, float(alpha), float(beta))
    return out


def gather(source: Array, rows: Array, dtype: Any = None, *, scale: float = 1.0) -> Array:
    """source[rows] in ``dtype``, times ``scale``: bytes to 16-bit floats between 0 and 1 in one pass, say.

    source: (n, …) of integers, bools or floats; rows: (batch,) int64; dtype: a float type, by default the source's own.
    """
    dtype = np.dtype(source.dtype if dtype is None else dtype)
    _array("rows", rows, (None,), "int64")
    flat = source.reshape(len(source), -1)
    out = cupy.empty((len(rows), flat.shape[1]), dtype)
    _operations(checks.choice("dtype", dtype.name, _STORAGE)).gather(flat, rows, out, None, scale)
    return out.reshape(len(rows), *source.shape[1:])


class Update:
    """One optimizer over one flat array of parameters: penalty, clipping, the rule, in one launch.

    optimizer: a name or an `optimizers.Optimizer` whose elements do not mix (not Muon, not LBFGS).
    theta: (n,) float32 or float64, which every call updates in place. shadow: (n,) float16 or bfloat16, a copy of θ
    that every call renews. regularizer: on all of θ. clip_norm: as in `Trainer`.
    """

    def __init__(
        self,
        optimizer: str | Optimizer,
        theta: Array,
        *,
        shadow: Array | None = None,
        regularizer: ElasticNet | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.optimizer = optimizers.get(optimizer)
        if isinstance(self.optimizer, (Muon, LBFGS)):
            raise ValueError(f"optimizer: {self.optimizer.name} needs more than a flat array; use Trainer")
        _array("theta", theta, (None,), "float32", "float64")
        if shadow is not None:
            _array("shadow", shadow, theta.shape, "float16", "bfloat16")
        self._ops = _operations(theta.dtype.name if shadow is None else shadow.dtype.name)
        self.theta, self.shadow = theta, shadow
        self._regularizer = regularizers.check(regularizer)
        self._clip_norm = None if clip_norm is None else checks.real("clip_norm", clip_norm, 0, open_minimum=True)
        self.moments = {
            name: cupy.full(theta.shape, self.optimizer.initial(name), theta.dtype) for name in self.optimizer.moments
        }
        self._state = _state(self._ops, {})
        self._layout = Layout([1, 1], theta.itemsize)

    def __call__(self, g: Array, lr: float | None = None) -> None:
        """One update with the gradient g, (n,) of θ's dtype; ``lr`` in place of the optimizer's own."""
        _array("g", g, self.theta.shape, self.theta.dtype.name)
        ops, state, n = self._ops, self._state, 0 if self._regularizer is None else self.theta.size
        rate = self.optimizer.lr if lr is None else checks.real("lr", lr, 0)
        ops.write_state(state, {Slot.LEARNING_RATE: rate, Slot.GRADIENT_NORM: 0.0})
        if self._clip_norm is not None:
            ops.gradient_norm(self.theta, g, n, self._regularizer, state)
        ops.update(
            self.theta, g, list(self.moments.values()), self.optimizer, self._layout, n,
            self._regularizer, self._clip_norm, self.shadow, state,
        )  # fmt: skip
        ops.finish_step(0, state)


# --- inside ----------------------------------------------------------------------------------------------------------


@functools.cache
def _operations(dtype: str, tf32: bool = False) -> CudaOperations:
    """The operations whose storage type is ``dtype``; one for each, since they keep scratch."""
    return CudaOperations(precision.get("tf32" if tf32 and dtype == "float32" else dtype))


def _state(ops: CudaOperations, values: dict[Slot, float]) -> Array:
    state = cupy.zeros(len(Slot), np.float64)
    ops.write_state(state, {Slot.LOSS_SCALE: 1.0, **values})
    return state


def _elementwise(name: str, prefix: str, dtype: Any) -> Any:
    f = activations.get(name, "name")
    if f.rowwise:
        raise ValueError(f"name: {name} works on rows; use softmax")
    dtype = checks.choice("dtype", np.dtype(dtype).name, _STORAGE)
    compute = precision.get(dtype).master
    return launch.elementwise("X z", "X h", f"h = static_cast<X>({prefix}_{name}(static_cast<S>(z)))", compute)


def _matrix(argument: str, array: Any, shape: Sequence[int | None] = (None, None)) -> None:
    _array(argument, array, shape)


def _array(argument: str, array: Any, shape: Sequence[int | None], *dtypes: str) -> None:
    """``array`` is a C-order CuPy array of this shape (None: any length) and of one of these dtypes."""
    if not isinstance(array, cupy.ndarray):
        raise TypeError(f"{argument}: expected a CuPy array, got {type(array).__name__}")
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{argument}: expected shape ({wanted}), got {array.shape}")
    accepted = dtypes or _STORAGE
    if array.dtype.name not in accepted:
        raise TypeError(f"{argument}: expected {' or '.join(dict.fromkeys(accepted))}, got {array.dtype}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{argument}: expected C order, got strides {array.strides}; use cupy.ascontiguousarray")


def _one_dtype(**arrays: Array) -> None:
    names = {name: array.dtype.name for name, array in arrays.items()}
    if len(set(names.values())) > 1:
        raise TypeError(f"{', '.join(names)}: expected one dtype, got {', '.join(names.values())}")
