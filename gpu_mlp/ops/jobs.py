"""The jobs of a step on a CPU: what one part of each does, and the record of arguments that it reads.

Leans on `crew_kernels` for BLAS and addresses, and on `numba_kernels` for the passes. A job is made by one of the
functions at the end and done by the crew, now or as often as a recorded step is replayed: whatever changes from step to
step is in the state, as on a GPU. A part of a layer is some rows of it, or some columns where there are few rows: their
share of the product, and the pass over it while it is in the cache.

Numba keeps what it has compiled, by the date of the file that it is in; `_SOURCES` stands for the other files.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import get_cython_function_address
from numpy.typing import NDArray

from . import crew_kernels, numba_kernels
from .crew_kernels import MOST_PARTS, blas_dot, blas_gemm, invoke, pointer
from .interface import CLIP_EPS, Slot

Array = NDArray[Any]
PART_FLOP = (
    500_000  # a part of rows of fewer operations costs more to hand out than it saves; of columns of twice as many
)
ROW_MULTIPLE = 16  # parts end at a multiple of what a BLAS kernel takes at once
MANY, THIN = 256, 64  # rows from which on, and k up to which, a product is cut by rows
PASS_PART = 20_000  # elements of a pass that are worth a part
LOSS_PART = 2_000  # logarithms and exponentials
ROWS = 64  # of one part of a sum over rows: a fixed order, whatever the number of threads
FLAT = 1 << 16  # numbers of one part of a sum over θ
IDENTITY, RELU, GELU, SLOPE = range(4)  # f; SLOPE: gelu whose f′ stands in the place of z

_SOURCES = zlib.crc32(b"".join(Path(str(m.__file__)).read_bytes() for m in (crew_kernels, numba_kernels)))
_OPTIONS: dict[str, Any] = {"nopython": True, "fastmath": {"contract"}, "error_model": "numpy"}
_STATE = len(Slot)
_LEARNING_RATE, _STEP, _ROUND = int(Slot.LEARNING_RATE), int(Slot.STEP), int(Slot.ROUND)
_TOTAL_WEIGHT, _COST, _NORM = int(Slot.TOTAL_WEIGHT), int(Slot.COST), int(Slot.GRADIENT_NORM)
_LOSS_SCALE, _EPOCH_COST = int(Slot.LOSS_SCALE), int(Slot.EPOCH_COST)
_BAD_ROUND, _CURSOR = int(Slot.BAD_ROUND), int(Slot.CURSOR)


class Job(NamedTuple):
    """A compiled function, its record, in how many parts, and the arrays whose addresses stand in it by these names.

    inner: jobs that are done within it.
    """

    function: int
    record: Array
    parts: int
    arrays: dict[str, Array]
    inner: tuple[Job, ...] = ()


def _record(arrays: str, integers: str = "", reals: str = "") -> np.dtype[Any]:
    """Arguments: arrays' addresses (0 where there is none), integers, and numbers."""
    fields = [(name, "i8") for name in (arrays + " " + integers).split()]
    return np.dtype([*fields, *((name, "f8") for name in reals.split())])


_PRODUCT = "m n k lda ldb ldc ta tb by_rows step gemm"
_DROPOUT = "drop k0 k1 layer first_row"
PRODUCT = _record("a b c state", _PRODUCT, "alpha beta")
LAYER = _record("a b c bias h state", f"{_PRODUCT} f {_DROPOUT}", "alpha beta scale")
GRADIENT = _record("a b c saved sums gb state", f"{_PRODUCT} f accumulate {_DROPOUT}", "alpha beta scale")
LOSS = _record("z y weight g sums costs state", "rows n step", "smoothing clip")
SUMS = _record("out terms costs state", "n stride first count costs_count accumulate")
GATHER = _record("source rows out state", "count length step")
WEIGHT = _record("weight state", "count")
SGD = _record("theta g m state", "n step nesterov", "l1 l2 clip_norm decay momentum dampening")
ADAM = _record("theta g m v state", "n step decoupled epsilon_hat", "l1 l2 clip_norm decay beta1 beta2 eps")
PENALTY = _record("theta costs", "n step dot", "l1 l2")
FINISH = _record("state", "rows")
LANES = _record("programs", "count")
LANE_STATE = _record("source out")
ADD = _record("g out", "n step")
TOTAL = _record("x costs", "n step")


# --- one part of each ----------------------------------------------------------------------------------------------


class _Cache(FunctionCache):
    """Numba's cache of compiled code, which knows of the other files too."""

    def _index_key(self, *arguments: Any) -> Any:
        return (*super()._index_key(*arguments), _SOURCES)


def _compiled(define: Callable[[Any], Callable[[int, int], None]]) -> Callable[[Any], int]:
    """The address of the function that ``define`` makes for a type of numbers, compiled when it is first asked for."""
    kept = []

    @functools.cache
    def address(kind: Any) -> int:
        part = define(kind)
        function: Any = CFunc(part, ((types.int64, types.int64), types.void), {}, _OPTIONS)
        function._cache = _Cache(part)
        function.compile()
        kept.append(function)  # the code would be gone with it
        return int(function.address)

    return address


_inlined: Any = njit(nogil=True, error_model="numpy", fastmath={"contract"})


@_inlined
def _part(whole: int, step: int, index: int) -> Any:
    """Where part ``index`` of ``whole`` begins, and how long it is."""
    first = index * step
    return first, max(np.int64(0), min(step, whole - first))


@_inlined
def _applies(state: Array) -> Any:
    """Whether a step's gradient may be applied: nothing was out of the finite numbers, in this step or before it."""
    return np.isfinite(state[_COST]) and np.isfinite(state[_NORM]) and state[_BAD_ROUND] == 0


@_inlined
def _multiply(r: Any, size: int, alpha: Any, beta: Any, first: int, count: int) -> None:
    """Some rows, or columns, of C ← α op(A) op(B) + β C, whose numbers have ``size`` bytes. BLAS is column-major: C in
    C order is Cᵀ = Bᵀ Aᵀ in its eyes, so the factors change places."""
    m, n, a, b, c = r.m, r.n, r.a, r.b, r.c
    if r.by_rows:
        m = count
        a += first * size * (1 if r.ta else r.lda)
        c += first * size * r.ldc
    else:
        n = count
        b += first * size * (r.ldb if r.tb else 1)
        c += first * size
    ta, tb = np.int64(84 if r.ta else 78), np.int64(84 if r.tb else 78)  # T, N
    blas_gemm(r.gemm, tb, ta, n, m, r.k, alpha, b, r.ldb, a, r.lda, beta, c, r.ldc)


@_inlined
def _drop(r: Any, block: Array, scale: Any, row: int) -> None:
    """Drop entries of a block that begins at row ``row`` of the micro-batch, and multiply the rest by ``scale``."""
    state = carray(pointer(r.state), (_STATE,), np.float64)
    round_ = np.int64(state[_ROUND])
    layer = np.uint64(r.layer + ((round_ >> 32) << 16))
    numba_kernels.mask(
        block, np.uint32(r.drop), scale, np.uint64(r.k0), np.uint64(r.k1), layer, np.uint64(round_ & 0xFFFFFFFF),
        np.uint64(r.first_row + row),
    )  # fmt: skip


@_compiled
def _product(kind: Any) -> Callable[[int, int], None]:
    """C ← α op(A) op(B) + β C; with a state W ← W − η (A B + β W), where the step may be applied."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), PRODUCT)[0]
        first, count = _part(r.m if r.by_rows else r.n, r.step, index)
        alpha, beta = r.alpha, r.beta
        if r.state:
            state = carray(pointer(r.state), (_STATE,), np.float64)
            if not _applies(state):
                return
            alpha, beta = -state[_LEARNING_RATE], 1 - state[_LEARNING_RATE] * r.beta
        _multiply(r, size, kind(alpha), kind(beta), first, count)

    return part


@_inlined
def _through(f: int, z: Array, bias: Array, h: Array) -> None:
    """The pass of a layer's forward half; h is z but for gelu."""
    if f == RELU:
        numba_kernels.bias_relu(z, bias)
    elif f == GELU:
        numba_kernels.bias_gelu(z, bias, h)
    elif f == SLOPE:
        numba_kernels.bias_gelu_slope(z, bias, h)
    else:
        numba_kernels.bias(z, bias)


@_compiled
def _layer(kind: Any) -> Callable[[int, int], None]:
    """z = h_in Wᵀ + b and h = f(z), with dropout; z lies in C, h there too but for gelu."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), LAYER)[0]
        first, count = _part(r.m if r.by_rows else r.n, r.step, index)
        if r.k:
            _multiply(r, size, kind(r.alpha), kind(r.beta), first, count)
        start, count, columns = (first * r.n, count, r.n) if r.by_rows else (first, r.m, count)
        bias = carray(pointer(r.bias + (0 if r.by_rows else first * size)), (columns,), kind)
        h = carray(pointer(r.h + start * size), (count, r.n), kind)
        _through(r.f, carray(pointer(r.c + start * size), (count, r.n), kind), bias, h)
        if r.drop:
            _drop(r, h, kind(r.scale), first)

    return part


@_inlined
def _back(f: int, g: Array, saved: Array, scale: Any, gb: Array) -> None:
    """The pass of a layer's backward half."""
    if f == RELU:
        numba_kernels.relu_gradient(g, saved, scale, gb)
    elif f == GELU:
        numba_kernels.gelu_gradient(g, saved, gb)
    elif f == SLOPE:
        numba_kernels.slope_gradient(g, saved, gb)
    else:
        numba_kernels.column_sums(g, gb)


@_compiled
def _gradient(kind: Any) -> Callable[[int, int], None]:
    """gz_in = (gz W) ⊙ f′ in C, through the mask, and its column sums: of a part of the columns into gb, of a part of
    the rows into a row of ``sums``, (parts, 2, n), whose other half is scratch."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), GRADIENT)[0]
        whole, n = r.m if r.by_rows else r.n, r.n
        first, count = _part(whole, r.step, index)
        if r.k:
            _multiply(r, size, kind(r.alpha), kind(r.beta), first, count)
        scale, columns = kind(r.scale), n if r.by_rows else count
        room = carray(pointer(r.sums + 2 * size * (index * n if r.by_rows else first)), (2, columns), kind)
        some, total = room[0], room[1]
        total[:] = 0
        top, bottom = (first, first + count) if r.by_rows else (0, r.m)
        for start in range(top, bottom, ROWS):
            rows = min(ROWS, bottom - start)
            some[:] = 0
            at = (start * n + (0 if r.by_rows else first)) * size
            g = carray(pointer(r.c + at), (rows, n), kind)
            if r.drop and r.f != RELU:  # where h was dropped relu's is 0, and gz will be
                _drop(r, g, scale, start)
            _back(r.f, g, carray(pointer(r.saved + at), (rows, n), kind), scale, some)
            for j in range(columns):
                total[j] += some[j]
        if r.gb:
            gb = carray(pointer(r.gb + (0 if r.by_rows else first * size)), (columns,), kind)
            for j in range(columns):
                gb[j] = gb[j] + total[j] if r.accumulate else total[j]

    return part


@_compiled
def _loss(kind: Any) -> Callable[[int, int], None]:
    """Softmax and cross-entropy of some rows; Σ wᵢ Lᵢ / TOTAL_WEIGHT into costs[i], column sums into a row of sums."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), LOSS)[0]
        first, count = _part(r.rows, r.step, index)
        state = carray(pointer(r.state), (_STATE,), np.float64)
        total, n, at = state[_TOTAL_WEIGHT], r.n, first * r.n * size
        costs = carray(pointer(r.costs), (index + 1,), np.float64)
        sums = carray(pointer(r.sums + index * n * size), (n,), kind)
        sums[:] = 0
        weights = carray(pointer(r.weight + 8 * first), (count if r.weight else 0,), np.float64)
        costs[index] = numba_kernels.softmax_cross_entropy(
            carray(pointer(r.z + at), (count, n), kind), carray(pointer(r.y + 8 * first), (count,), np.int64), weights,
            r.smoothing, r.clip, 1 / total if total else 0.0, state[_LOSS_SCALE],
            carray(pointer(r.g + at), (count, n), kind), sums,
        )  # fmt: skip

    return part


@_compiled
def _sums(kind: Any) -> Callable[[int, int], None]:
    """out ← (out +) Σ_i of the rows of ``terms``, in turn; COST += Σ costs."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), SUMS)[0]
        if r.out:
            out = carray(pointer(r.out), (r.n,), kind)
            terms = carray(pointer(r.terms), (r.count, r.stride), kind)
            if not r.accumulate:
                out[:] = 0
            for i in range(r.count):
                for j in range(r.n):
                    out[j] += terms[i, r.first + j]
        if r.state:
            state = carray(pointer(r.state), (_STATE,), np.float64)
            for cost in carray(pointer(r.costs), (r.costs_count,), np.float64):
                state[_COST] += cost

    return part


@_compiled
def _gather(kind: Any) -> Callable[[int, int], None]:
    """Some rows of out ← source[rows[first + i]], copied as they are in units of ``kind``."""

    unit = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), GATHER)[0]
        first, count = _part(r.count, r.step, index)
        length, cursor = r.length, np.int64(0)
        if r.state:
            cursor = np.int64(carray(pointer(r.state), (_STATE,), np.float64)[_CURSOR])
        size = length * unit
        for i in range(first, first + count):
            row = cursor + i
            if r.rows:
                row = carray(pointer(r.rows), (row + 1,), np.int64)[row]
            source = carray(pointer(r.source + row * size), (length,), kind)
            out = carray(pointer(r.out + i * size), (length,), kind)
            for j in range(length):
                out[j] = source[j]

    return part


@_compiled
def _weight(kind: Any) -> Callable[[int, int], None]:
    """TOTAL_WEIGHT ← Σ w, or the number of rows."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), WEIGHT)[0]
        state = carray(pointer(r.state), (_STATE,), np.float64)
        total = 0.0
        if r.weight:
            for w in carray(pointer(r.weight), (r.count,), kind):
                total += w
        state[_TOTAL_WEIGHT] = total if r.weight else float(r.count)

    return part


@_inlined
def _clip(state: Array, clip_norm: float) -> float:
    """What the gradient is multiplied by, where it is clipped."""
    return min(1.0, clip_norm / (state[_NORM] + CLIP_EPS)) if clip_norm else 1.0


@_compiled
def _sgd(kind: Any) -> Callable[[int, int], None]:
    """SGD on some of θ, with momentum where there is one."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), SGD)[0]
        state = carray(pointer(r.state), (_STATE,), np.float64)
        if not _applies(state):
            return
        first, count = _part(r.n, r.step, index)
        at, clip = first * size, _clip(state, r.clip_norm)
        theta, g = carray(pointer(r.theta + at), (count,), kind), carray(pointer(r.g + at), (count,), kind)
        numbers = kind(r.l1), kind(r.l2), kind(1 / state[_LOSS_SCALE]), kind(clip), kind(state[_LEARNING_RATE])
        if not r.m:
            numba_kernels.sgd(theta, g, *numbers, kind(r.decay))
            return
        share = 1.0 if state[_STEP] == 0 else 1 - r.dampening
        m = carray(pointer(r.m + at), (count,), kind)
        numba_kernels.momentum(theta, g, m, *numbers, kind(r.decay), kind(r.momentum), kind(share), r.nesterov != 0)

    return part


@_compiled
def _adam(kind: Any) -> Callable[[int, int], None]:
    """Adam on some of θ; both bias corrections are moved into the step size and ε."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), ADAM)[0]
        state = carray(pointer(r.state), (_STATE,), np.float64)
        if not _applies(state):
            return
        first, count = _part(r.n, r.step, index)
        at, clip = first * size, _clip(state, r.clip_norm)
        lr, step = state[_LEARNING_RATE], state[_STEP] + 1
        root = np.sqrt(1 - r.beta2**step)
        step_size, eps = lr * root / (1 - r.beta1**step), r.eps * (1.0 if r.epsilon_hat else root)
        decay, shrink = (0.0, 1 - lr * r.decay) if r.decoupled else (r.decay, 1.0)
        numba_kernels.adam(
            carray(pointer(r.theta + at), (count,), kind), carray(pointer(r.g + at), (count,), kind),
            carray(pointer(r.m + at), (count,), kind), carray(pointer(r.v + at), (count,), kind),
            kind(r.l1), kind(r.l2), kind(1 / state[_LOSS_SCALE]), kind(clip), kind(decay), kind(shrink),
            kind(r.beta1), kind(r.beta2), kind(step_size), kind(eps),
        )  # fmt: skip

    return part


@_compiled
def _penalty(kind: Any) -> Callable[[int, int], None]:
    """costs[i] ← λΩ of some of θ."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), PENALTY)[0]
        first, count = _part(r.n, r.step, index)
        squares = absolute = 0.0
        for start in range(first, first + count, FLAT):
            length = min(FLAT, first + count - start)
            if r.l2:
                squares += blas_dot(r.dot, length, kind(0), r.theta + start * size)
            if r.l1:
                for t in carray(pointer(r.theta + start * size), (length,), kind):
                    absolute += abs(t)
        carray(pointer(r.costs), (index + 1,), np.float64)[index] = 0.5 * r.l2 * squares + r.l1 * absolute

    return part


@_compiled
def _finish(kind: Any) -> Callable[[int, int], None]:
    """Count a step whose gradient is not scaled."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), FINISH)[0]
        state = carray(pointer(r.state), (_STATE,), kind)
        state[_EPOCH_COST] += r.rows * state[_COST]
        if np.isfinite(state[_COST]) and np.isfinite(state[_NORM]):
            state[_STEP] += 1
        elif state[_BAD_ROUND] == 0:
            state[_BAD_ROUND] = state[_ROUND] + 1

    return part


@_compiled
def _lanes(kind: Any) -> Callable[[int, int], None]:
    """All jobs of a lane's program."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), LANES)[0]
        programs = carray(pointer(r.programs), (r.count, 2), kind)
        program = carray(pointer(programs[index, 0]), (programs[index, 1], 3), kind)
        for i in range(program.shape[0]):
            for j in range(program[i, 2]):
                invoke(program[i, 0], program[i, 1], np.int64(j))

    return part


@_compiled
def _begin_lane(kind: Any) -> Callable[[int, int], None]:
    """A lane's state ← the first one's, with a COST of 0."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), LANE_STATE)[0]
        out = carray(pointer(r.out), (_STATE,), kind)
        out[:] = carray(pointer(r.source), (_STATE,), kind)
        out[_COST] = 0.0

    return part


@_compiled
def _add(kind: Any) -> Callable[[int, int], None]:
    """Some of out ← out + g."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), ADD)[0]
        first, count = _part(r.n, r.step, index)
        out = carray(pointer(r.out + first * size), (count,), kind)
        g = carray(pointer(r.g + first * size), (count,), kind)
        for i in range(count):
            out[i] += g[i]

    return part


@_compiled
def _total(kind: Any) -> Callable[[int, int], None]:
    """costs[i] ← Σ of some of x."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), TOTAL)[0]
        first, count = _part(r.n, r.step, index)
        found = numba_kernels.total(carray(pointer(r.x + first * size), (count,), kind))
        carray(pointer(r.costs), (index + 1,), np.float64)[index] = found

    return part


# --- jobs ----------------------------------------------------------------------------------------------------------


def product(
    a: Array, b: Array, out: Array, threads: int, alpha: float = 1.0, beta: float = 0.0, state: Array | None = None
) -> Job:
    """out ← α a b + β out. a: (m, k); b: (k, n), each or its transpose C-order; out: (m, n) C-order; none empty.

    With a state out ← out − LEARNING_RATE · (a b + β · out), where the step may be applied.
    """
    numbers, parts = _cut(a, b, out, threads)
    return _job(_product, PRODUCT, parts, out.dtype, a=a, b=b, c=out, state=state, alpha=alpha, beta=beta, **numbers)


def layer(
    h_in: Array, W: Array, b: Array, f: int, h: Array, z: Array | None, drop: Mapping[str, float], state: Array,
    threads: int, multiplies: bool = True,
) -> Job:  # fmt: skip
    """`Operations.affine_activation`; without ``multiplies`` the product lies in z, or h where there is no z."""
    out = h if z is None else z
    numbers, parts = _cut(h_in, W.T, out, threads, "drop" in drop)
    if not multiplies:
        numbers["k"] = 0
    return _job(
        _layer, LAYER, parts, h.dtype, a=h_in, b=W.T, c=out, bias=b, h=h, state=state, f=f, alpha=1.0, beta=0.0,
        **numbers, **drop,
    )  # fmt: skip


def gradient(
    gz: Array, W: Array, f: int, saved: Array | None, drop: Mapping[str, float], gz_in: Array, gb: Array,
    accumulate: bool, state: Array, threads: int, multiplies: bool = True,
) -> list[Job]:  # fmt: skip
    """`Operations.input_gradient`; without ``multiplies`` gh lies in ``gz_in``."""
    numbers, parts = _cut(gz, W, gz_in, threads, "drop" in drop)
    if not multiplies:
        numbers["k"] = 0
    n, apart = len(gb), parts > 1 and bool(numbers["by_rows"])
    sums = np.empty((parts if apart else 1, 2, n), gb.dtype)
    first = _job(
        _gradient, GRADIENT, parts, gb.dtype, a=gz, b=W, c=gz_in, saved=gz_in if saved is None else saved, sums=sums,
        gb=None if apart else gb, state=state, f=f, accumulate=accumulate, alpha=1.0, beta=0.0,
        **{"scale": 1.0, **numbers, **drop},
    )  # fmt: skip
    return [first, _add_up(gb, sums.reshape(-1, 2 * n), n, accumulate)] if apart else [first]


def softmax_cross_entropy(
    z: Array, y: Array, weight: Array | None, smoothing: float, clip: float, gz: Array, gb: Array | None,
    accumulate: bool, state: Array, threads: int,
) -> list[Job]:  # fmt: skip
    """`Operations.loss_and_gradient` of softmax and cross-entropy with labels. z: float32; weight: float64."""
    (rows, n), parts, step = z.shape, *_ranges(len(z), z.size, threads, LOSS_PART)
    sums, costs = np.empty((parts, n), z.dtype), np.empty(parts)
    first = _job(
        _loss, LOSS, parts, z.dtype, z=z, y=y, weight=weight, g=gz, sums=sums, costs=costs, state=state, rows=rows,
        n=n, step=step, smoothing=smoothing, clip=clip,
    )  # fmt: skip
    return [first, _add_up(gb, sums, 0, accumulate, costs, state)]


def gather(source: Array, rows: Array | None, out: Array, state: Array | None, threads: int) -> Job:
    """`Operations.gather` of rows that are copied as they are; both C-order and of one type."""
    row_bytes = out.nbytes // len(out)
    unit = next(kind for kind in (np.int64, np.int32, np.int16, np.int8) if row_bytes % np.dtype(kind).itemsize == 0)
    parts, step = _ranges(len(out), out.size, threads, PASS_PART)
    return _job(
        _gather, GATHER, parts, unit, source=source, rows=rows, out=out, state=state, count=len(out),
        length=row_bytes // np.dtype(unit).itemsize, step=step,
    )  # fmt: skip


def total_weight(rows: int, weight: Array | None, state: Array) -> Job:
    """`Operations.total_weight`, without classes' weights. weight: (rows,) float64."""
    return _job(_weight, WEIGHT, 1, np.float64, weight=weight, state=state, count=rows)


def sgd(theta: Array, g: Array, moments: Sequence[Array], state: Array, threads: int, **numbers: float) -> Job:
    """SGD on a part of θ; numbers: l1, l2, clip_norm (0: none), decay, momentum, dampening, nesterov."""
    parts, step = _ranges(theta.size, theta.size, threads, PASS_PART)
    m = moments[0] if moments else None
    return _job(_sgd, SGD, parts, theta.dtype, theta=theta, g=g, m=m, state=state, n=theta.size, step=step, **numbers)


def adam(theta: Array, g: Array, moments: Sequence[Array], state: Array, threads: int, **numbers: float) -> Job:
    """Adam on a part of θ; numbers: l1, l2, clip_norm (0: none), decay, decoupled, beta1, beta2, eps, epsilon_hat."""
    parts, step = _ranges(theta.size, theta.size, threads, PASS_PART)
    m, v = moments
    return _job(
        _adam, ADAM, parts, theta.dtype, theta=theta, g=g, m=m, v=v, state=state, n=theta.size, step=step, **numbers
    )


def penalty(theta: Array, l1: float, l2: float, state: Array, threads: int) -> list[Job]:
    """COST += l1 ‖θ‖₁ + l2/2 ‖θ‖₂²"""
    parts, step = _ranges(theta.size, theta.size, threads, PASS_PART)
    costs = np.empty(parts)
    dot = _DOT[theta.itemsize]
    first = _job(
        _penalty, PENALTY, parts, theta.dtype, theta=theta, costs=costs, n=theta.size, step=step, dot=dot, l1=l1, l2=l2
    )
    return [first, _add_up(None, costs, 0, True, costs, state)]


def finish_step(rows: int, state: Array) -> Job:
    """`Operations.finish_step`, without loss scaling."""
    return _job(_finish, FINISH, 1, np.float64, state=state, rows=rows)


def lanes(work: Sequence[Sequence[Job]], states: Sequence[Array], g: Sequence[Array], threads: int) -> list[Job]:
    """`Operations.side_by_side` of lanes that have these jobs each."""
    programs = [program(mine) for mine in work]
    table = np.array([[address(lane), len(lane)] for lane in programs], np.int64)
    begin = [_job(_begin_lane, LANE_STATE, 1, np.float64, source=states[0], out=state) for state in states[1:]]
    beside = _job(_lanes, LANES, len(work), np.int64, programs=table, count=len(work))
    beside.arrays.update((f"program {i}", lane) for i, lane in enumerate(programs))
    costs = [state[Slot.COST : Slot.COST + 1] for state in states[1:]]
    end = [_add_up(None, cost, 0, True, cost, states[0]) for cost in costs]
    inner = tuple(job for mine in work for job in mine)
    return [*begin, beside._replace(inner=inner), *end, *(add(gradient, g[0], threads) for gradient in g[1:])]


def add(g: Array, out: Array, threads: int) -> Job:
    """out ← out + g, both flat."""
    parts, step = _ranges(g.size, g.size, threads, PASS_PART)
    return _job(_add, ADD, parts, g.dtype, g=g, out=out, n=g.size, step=step)


def total(x: Array, threads: int) -> Job:
    """Σ x, in parts, into the job's array ``costs``. x: C-order."""
    parts, step = _ranges(x.size, x.size, threads, PASS_PART)
    return _job(_total, TOTAL, parts, x.dtype, x=x, costs=np.empty(parts), n=x.size, step=step)


def program(jobs: Sequence[Job]) -> Array:
    """What the crew runs: (jobs, 3) int64, of addresses in the jobs, which have to be kept."""
    return np.array([(job.function, address(job.record), job.parts) for job in jobs], np.int64).reshape(-1, 3)


def _job(function: Callable[[Any], int], dtype: np.dtype[Any], parts: int, kind: Any, **arguments: Any) -> Job:
    """A job of a function for numbers of a ``kind``; arguments that are not given are 0."""
    record, arrays = np.zeros((), dtype), {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
            value = address(value)
        if value is not None:
            record[name] = value
    return Job(function(np.dtype(kind).type), record, parts, arrays)


def _add_up(
    out: Array | None,
    terms: Array,
    first: int,
    accumulate: bool,
    costs: Array | None = None,
    state: Array | None = None,
) -> Job:
    """out ← (out +) Σ_i terms[i, first:first + n], and the costs to COST."""
    kind = np.float64 if out is None else out.dtype
    return _job(
        _sums, SUMS, 1, kind, out=out, terms=terms, costs=costs, state=state, n=0 if out is None else len(out),
        stride=terms.shape[-1], first=first, count=len(terms), costs_count=0 if costs is None else len(costs),
        accumulate=accumulate,
    )  # fmt: skip


def _cut(a: Array, b: Array, out: Array, threads: int, whole_rows: bool = False) -> tuple[dict[str, Any], int]:
    """A product's numbers in a record, and its parts: of rows, or where there are few of them of columns, so that no
    factor gets too thin. Every part packs the other factor for itself."""
    (m, n), k = out.shape, a.shape[1]
    ta, tb = not a.flags.c_contiguous, not b.flags.c_contiguous
    by_rows = whole_rows or m >= min(n, MANY) or k < THIN
    worth = PART_FLOP if by_rows else 2 * PART_FLOP
    parts = max(1, min(threads, 2 * m * n * k // worth, MOST_PARTS))
    length = m if by_rows else n
    step = -(-length // (parts * ROW_MULTIPLE)) * ROW_MULTIPLE
    numbers = {
        "m": m, "n": n, "k": k, "lda": m if ta else k, "ldb": k if tb else n, "ldc": n, "ta": ta, "tb": tb,
        "by_rows": by_rows, "step": step, "gemm": _GEMM[out.itemsize],
    }  # fmt: skip
    return numbers, -(-length // step)


def _ranges(length: int, elements: int, threads: int, worth: int) -> tuple[int, int]:
    """In how many parts ``length`` things are done, and of how many each, where ``worth`` elements make a good part."""
    parts = max(1, min(threads, elements // worth, MOST_PARTS))
    step = max(1, -(-length // parts))
    return -(-length // step), step


def address(array: Array) -> int:
    """Where the first number of an array lies."""
    return int(array.__array_interface__["data"][0])


def _blas_address(name: str, integers: int) -> int:
    """The address of a BLAS function of SciPy's; ImportError where its integers are not of 32 bits."""
    from scipy.linalg import cython_blas

    told = ctypes.pythonapi.PyCapsule_GetName
    told.restype, told.argtypes = ctypes.c_char_p, [ctypes.py_object]
    signature = told(cython_blas.__pyx_capi__[name]) or b""
    if signature.count(b"int *") != integers and signature.count(b"int32_t *") != integers:
        raise ImportError(f"{name} of SciPy takes other integers than expected: {signature.decode()}")
    return int(get_cython_function_address("scipy.linalg.cython_blas", name))


_GEMM = {4: _blas_address("sgemm", 6), 8: _blas_address("dgemm", 6)}  # by the bytes of a number
_DOT = {4: _blas_address("sdot", 3), 8: _blas_address("ddot", 3)}
