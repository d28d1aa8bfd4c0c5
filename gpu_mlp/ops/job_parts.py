"""What one part of each job of a step on a CPU does, and the record of arguments that it reads.

Leans on `crew_kernels` for BLAS and addresses, and on `numba_kernels` for the passes; `jobs` makes the records. A
part of a layer is some rows of it, or some columns where there are few rows: their share of the product, and the pass
over it while it is in the cache. Whatever changes from step to step is in the state, as on a GPU.

Numba keeps what it has compiled while the file that it is in stays as it is; `_SOURCES` stands for the other files.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numpy.typing import NDArray

from . import crew_kernels, formulas, numba_kernels, rules
from .crew_kernels import blas_dot, blas_gemm, invoke, pointer
from .formulas import FROM_H, IDENTITY, RELU
from .interface import CLIP_EPS, Slot

Array = NDArray[Any]
ROWS = 64  # of one part of a sum over rows: a fixed order, whatever the number of threads
FLAT = 1 << 16  # numbers of one part of a sum over θ

_SOURCES = zlib.crc32(
    b"".join(Path(str(m.__file__)).read_bytes() for m in (crew_kernels, formulas, numba_kernels, rules))
)
_OPTIONS: dict[str, Any] = {"nopython": True, "fastmath": {"contract"}, "error_model": "numpy"}
_STATE = len(Slot)
_LEARNING_RATE, _STEP, _ROUND = int(Slot.LEARNING_RATE), int(Slot.STEP), int(Slot.ROUND)
_TOTAL_WEIGHT, _COST, _NORM = int(Slot.TOTAL_WEIGHT), int(Slot.COST), int(Slot.GRADIENT_NORM)
_LOSS_SCALE, _EPOCH_COST = int(Slot.LOSS_SCALE), int(Slot.EPOCH_COST)
_BAD_ROUND, _CURSOR = int(Slot.BAD_ROUND), int(Slot.CURSOR)


def _record(arrays: str, integers: str = "", reals: str = "") -> np.dtype[Any]:
    """Arguments: arrays' addresses (0 where there is none), integers, and numbers."""
    fields = [(name, "i8") for name in (arrays + " " + integers).split()]
    return np.dtype([*fields, *((name, "f8") for name in reals.split())])


_PRODUCT = "m n k lda ldb ldc ta tb by_rows step gemm"
_DROPOUT = "drop k0 k1 layer first_row"
PRODUCT = _record("a b c state", _PRODUCT, "alpha beta")
LAYER = _record("a b c bias h state", f"{_PRODUCT} {_DROPOUT}", "scale")
GRADIENT = _record("a b c saved sums gb state", f"{_PRODUCT} accumulate {_DROPOUT}", "scale")
LOSS = _record("z y weight g sums costs state", "rows n step", "smoothing clip")
SUMS = _record("out terms costs state", "n stride first count costs_count accumulate")
GATHER = _record("source rows out state", "count length step")
WEIGHT = _record("weight state", "count")
RULE = _record("theta g m v state", "n step decoupled", "l1 l2 clip_norm decay beta1 beta2 eps extra")
PENALTY = _record("theta costs", "n step dot", "l1 l2")
FINISH = _record("state", "rows")
LANES = _record("programs", "count")
BESIDE = _record("table", "count")
LANE_STATE = _record("source out")
ADD = _record("g out", "n step")
TOTAL = _record("x costs", "n step")
WATCH = _record("x costs state", "n count")


# --- one part of each ----------------------------------------------------------------------------------------------


class _Cache(FunctionCache):
    """Numba's cache of compiled code, which knows of the other files too."""

    def _index_key(self, *arguments: Any) -> Any:
        return (*super()._index_key(*arguments), _SOURCES)


class Function:
    """What one part of a job does: compiled for a type of numbers when it is first asked for.

    record: the arguments that it reads; define(kind, …): the function of a record's address and the number of the part,
    for numbers of a kind, and whatever else is settled when it is compiled.
    """

    def __init__(self, record: np.dtype[Any], define: Callable[..., Callable[[int, int], None]]) -> None:
        self.record, self._define = record, define
        self._made: dict[Any, Any] = {}

    def address(self, *kind: Any) -> int:
        """Where the code lies."""
        if kind not in self._made:
            part = self._define(*kind)
            made: Any = CFunc(part, ((types.int64, types.int64), types.void), {}, _OPTIONS)
            made._cache = _Cache(part)
            made.compile()
            self._made[kind] = made  # the code would be gone with it
        return int(self._made[kind].address)


def _compiled(record: np.dtype[Any]) -> Callable[[Callable[..., Callable[[int, int], None]]], Function]:
    return lambda define: Function(record, define)


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


@_compiled(PRODUCT)
def product(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(LAYER)
def layer(kind: Any, f: int, drops: bool) -> Callable[[int, int], None]:
    """z = h_in Wᵀ + b and h = f(z), with dropout; z lies in C, and h there too where f′ is worked out from it."""
    size, from_h = np.dtype(kind).itemsize, f in FROM_H.values()

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), LAYER)[0]
        first, count = _part(r.m if r.by_rows else r.n, r.step, index)
        if r.k:
            _multiply(r, size, kind(1), kind(0), first, count)
        start, count, columns = (first * r.n, count, r.n) if r.by_rows else (first, r.m, count)
        bias = carray(pointer(r.bias + (0 if r.by_rows else first * size)), (columns,), kind)
        h = carray(pointer(r.h + start * size), (count, r.n), kind)
        z = carray(pointer(r.c + start * size), (count, r.n), kind)
        if f == IDENTITY:
            numba_kernels.bias(z, bias)
        elif f == RELU:
            numba_kernels.bias_relu(z, bias)
        elif from_h:
            numba_kernels.bias_value(f, z, bias)
        else:
            numba_kernels.bias_slope(f, z, bias, h)
        if drops:
            _drop(r, h, kind(r.scale), first)

    return part


@_compiled(GRADIENT)
def gradient(kind: Any, f: int, drops: bool) -> Callable[[int, int], None]:
    """gz_in = (gz W) ⊙ f′ in C, through the mask, and its column sums: of a part of the columns into gb, of a part of
    the rows into a row of ``sums``, (parts, 2, n), whose other half is scratch."""
    size, from_h = np.dtype(kind).itemsize, f in FROM_H.values()

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), GRADIENT)[0]
        whole, n = r.m if r.by_rows else r.n, r.n
        first, count = _part(whole, r.step, index)
        if r.k:
            _multiply(r, size, kind(1), kind(0), first, count)
        scale, keep, columns = kind(r.scale), kind(1 / r.scale), n if r.by_rows else count
        room = carray(pointer(r.sums + 2 * size * (index * n if r.by_rows else first)), (2, columns), kind)
        some, total = room[0], room[1]
        total[:] = 0
        top, bottom = (first, first + count) if r.by_rows else (0, r.m)
        for start in range(top, bottom, ROWS):
            rows = min(ROWS, bottom - start)
            some[:] = 0
            at = (start * n + (0 if r.by_rows else first)) * size
            g = carray(pointer(r.c + at), (rows, n), kind)
            saved = carray(pointer(r.saved + at), (rows, n), kind)
            if drops:
                _drop(r, g, scale, start)
            if f == IDENTITY:
                numba_kernels.column_sums(g, some)
            elif f == RELU:
                numba_kernels.relu_gradient(g, saved, scale, some)
            elif from_h:
                numba_kernels.value_gradient(f, g, saved, keep, some)
            else:
                numba_kernels.slope_gradient(g, saved, some)
            for j in range(columns):
                total[j] += some[j]
        if r.gb:
            gb = carray(pointer(r.gb + (0 if r.by_rows else first * size)), (columns,), kind)
            for j in range(columns):
                gb[j] = gb[j] + total[j] if r.accumulate else total[j]

    return part


@_compiled(LOSS)
def loss(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(SUMS)
def sums(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(GATHER)
def gather(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(WEIGHT)
def weight(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(RULE)
def update(kind: Any, f: int) -> Callable[[int, int], None]:
    """A step of a rule on some of θ; of a moment that it does not have the address is 0."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), RULE)[0]
        state = carray(pointer(r.state), (_STATE,), np.float64)
        if not _applies(state):
            return
        first, count = _part(r.n, r.step, index)
        at, lr = first * size, state[_LEARNING_RATE]
        a, b, c = rules.coefficients(f, lr, state[_STEP] + 1, r.beta1, r.beta2, r.eps, r.extra)
        decay, shrink = (0.0, 1 - lr * r.decay) if r.decoupled else (r.decay, 1.0)
        numba_kernels.update(
            f, carray(pointer(r.theta + at), (count,), kind), carray(pointer(r.g + at), (count,), kind),
            carray(pointer(r.m + at), (count,), kind), carray(pointer(r.v + at), (count,), kind),
            kind(r.l1), kind(r.l2), kind(1 / state[_LOSS_SCALE]), kind(_clip(state, r.clip_norm)), kind(decay),
            kind(shrink), kind(r.beta1), kind(r.beta2), kind(a), kind(b), kind(c),
        )  # fmt: skip

    return part


@_compiled(PENALTY)
def penalty(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(FINISH)
def finish(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(LANES)
def lanes(kind: Any) -> Callable[[int, int], None]:
    """All jobs of a lane's program."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), LANES)[0]
        programs = carray(pointer(r.programs), (r.count, 2), kind)
        program = carray(pointer(programs[index, 0]), (programs[index, 1], 3), kind)
        for i in range(program.shape[0]):
            for j in range(program[i, 2]):
                invoke(program[i, 0], program[i, 1], np.int64(j))

    return part


@_compiled(BESIDE)
def beside(kind: Any) -> Callable[[int, int], None]:
    """A part of one of several jobs, whose parts are counted through."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), BESIDE)[0]
        table = carray(pointer(r.table), (r.count, 3), kind)
        for i in range(r.count):
            if index < table[i, 2]:
                invoke(table[i, 0], table[i, 1], np.int64(index))
                return
            index -= table[i, 2]

    return part


@_compiled(LANE_STATE)
def begin_lane(kind: Any) -> Callable[[int, int], None]:
    """A lane's state ← the first one's, with a COST of 0."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), LANE_STATE)[0]
        out = carray(pointer(r.out), (_STATE,), kind)
        out[:] = carray(pointer(r.source), (_STATE,), kind)
        out[_COST] = 0.0

    return part


@_compiled(ADD)
def add(kind: Any) -> Callable[[int, int], None]:
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


@_compiled(TOTAL)
def total(kind: Any) -> Callable[[int, int], None]:
    """costs[i] ← Σ of some of x."""
    size = np.dtype(kind).itemsize

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), TOTAL)[0]
        first, count = _part(r.n, r.step, index)
        found = numba_kernels.total(carray(pointer(r.x + first * size), (count,), kind))
        carray(pointer(r.costs), (index + 1,), np.float64)[index] = found

    return part


@_compiled(WATCH)
def watch(kind: Any) -> Callable[[int, int], None]:
    """COST ← NaN where x has a number that is not finite; its sums are in ``costs``, which may only have overflown."""

    def part(record: int, index: int) -> None:
        r = carray(pointer(record), (1,), WATCH)[0]
        whole = 0.0
        for found in carray(pointer(r.costs), (r.count,), np.float64):
            whole += found
        if np.isfinite(whole):
            return
        for number in carray(pointer(r.x), (r.n,), kind):
            if not np.isfinite(number):
                carray(pointer(r.state), (_STATE,), np.float64)[_COST] = np.nan
                return

    return part
