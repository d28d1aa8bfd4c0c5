"""The jobs of a step on a CPU: each a compiled function of `job_parts`, its record of arguments, and how it is cut.

Leans on `job_parts`, and on SciPy for the addresses of a BLAS. The crew does jobs, now or as often as a recorded step
is replayed. How a job is cut is a function of its shape and the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba.extending import get_cython_function_address
from numpy.typing import NDArray

from . import job_parts
from .crew_kernels import MOST_PARTS
from .interface import Slot
from .job_parts import Function

Array = NDArray[Any]
PART_FLOP = 500_000  # of a part of rows that is worth handing out; of columns, twice as many
PASS_PART, LOSS_PART = 20_000, 2_000  # elements of a pass, or of one with an exponential each, that are worth a part
MANY, THIN = 256, 64  # rows of gW from which on, and k up to which, a product is cut by rows
ROW_MULTIPLE = 16  # parts end at a multiple of what a BLAS kernel takes at once


class Job(NamedTuple):
    """A compiled function, its record, in how many parts, and the arrays whose addresses stand in it by these names.

    inner: jobs that are done within it.
    """

    function: int
    record: Array
    parts: int
    arrays: dict[str, Array]
    inner: tuple[Job, ...] = ()


def product(
    a: Array, b: Array, out: Array, threads: int, alpha: float = 1.0, beta: float = 0.0, state: Array | None = None
) -> Job:
    """out ← α a b + β out. a: (m, k); b: (k, n), each or its transpose C-order; out: (m, n) C-order; none empty.

    With a state out ← out − LEARNING_RATE · (a b + β · out), where the step may be applied.
    """
    numbers, parts = _cut(a, b, out, threads)
    return _job(
        job_parts.product, parts, out.dtype, a=a, b=b, c=out, state=state, alpha=alpha, beta=beta, **numbers,
    )  # fmt: skip


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
        job_parts.layer, parts, h.dtype, f, "drop" in drop, a=h_in, b=W.T, c=out, bias=b, h=h, state=state,
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
        job_parts.gradient, parts, gb.dtype, f, "drop" in drop, a=gz, b=W, c=gz_in,
        saved=gz_in if saved is None else saved, sums=sums, gb=None if apart else gb, state=state,
        accumulate=accumulate, **{"scale": 1.0, **numbers, **drop},
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
        job_parts.loss, parts, z.dtype, z=z, y=y, weight=weight, g=gz, sums=sums, costs=costs, state=state, rows=rows,
        n=n, step=step, smoothing=smoothing, clip=clip,
    )  # fmt: skip
    return [first, _add_up(gb, sums, 0, accumulate, costs, state)]


def gather(source: Array, rows: Array | None, out: Array, state: Array | None, threads: int) -> Job:
    """`Operations.gather` of rows that are copied as they are; both C-order and of one type."""
    row_bytes = out.nbytes // len(out)
    unit = next(kind for kind in (np.int64, np.int32, np.int16, np.int8) if row_bytes % np.dtype(kind).itemsize == 0)
    parts, step = _ranges(len(out), out.size, threads, PASS_PART)
    return _job(
        job_parts.gather, parts, unit, source=source, rows=rows, out=out, state=state, count=len(out),
        length=row_bytes // np.dtype(unit).itemsize, step=step,
    )  # fmt: skip


def total_weight(rows: int, weight: Array | None, state: Array) -> Job:
    """`Operations.total_weight`, without classes' weights. weight: (rows,) float64."""
    return _job(job_parts.weight, 1, np.float64, weight=weight, state=state, count=rows)


def update(
    rule: int, theta: Array, g: Array, moments: Mapping[str, Array], state: Array, threads: int, **numbers: float
) -> Job:
    """A step of a rule of `rules` on a part of θ; moments and numbers by their names in `job_parts.RULE`."""
    parts, step = _ranges(theta.size, theta.size, threads, PASS_PART)
    return _job(
        job_parts.update, parts, theta.dtype, rule, theta=theta, g=g, **moments, state=state, n=theta.size, step=step,
        **numbers,
    )  # fmt: skip


def penalty(theta: Array, l1: float, l2: float, state: Array, threads: int) -> list[Job]:
    """COST += l1 ‖θ‖₁ + l2/2 ‖θ‖₂²"""
    parts, step = _ranges(theta.size, theta.size, threads, PASS_PART)
    costs = np.empty(parts)
    dot = _DOT[theta.itemsize]
    first = _job(
        job_parts.penalty, parts, theta.dtype, theta=theta, costs=costs, n=theta.size, step=step, dot=dot, l1=l1,
        l2=l2,
    )  # fmt: skip
    return [first, _add_up(None, costs, 0, True, costs, state)]


def finish_step(rows: int, state: Array) -> Job:
    """`Operations.finish_step`, without loss scaling."""
    return _job(job_parts.finish, 1, np.float64, state=state, rows=rows)


def lanes(work: Sequence[Sequence[Job]], states: Sequence[Array], g: Sequence[Array], threads: int) -> list[Job]:
    """`Operations.side_by_side` of lanes that have these jobs each."""
    programs = [program(mine) for mine in work]
    table = np.array([[address(lane), len(lane)] for lane in programs], np.int64)
    begin = [_job(job_parts.begin_lane, 1, np.float64, source=states[0], out=state) for state in states[1:]]
    beside = _job(job_parts.lanes, len(work), np.int64, programs=table, count=len(work))
    beside.arrays.update((f"program {i}", lane) for i, lane in enumerate(programs))
    costs = [state[Slot.COST : Slot.COST + 1] for state in states[1:]]
    end = [_add_up(None, cost, 0, True, cost, states[0]) for cost in costs]
    inner = tuple(job for mine in work for job in mine)
    return [*begin, beside._replace(inner=inner), *end, *(add(gradient, g[0], threads) for gradient in g[1:])]


def beside(work: Sequence[Job]) -> Job:
    """Jobs that do not look at each other's results, as one: nobody waits between them."""
    table = program(work)
    made = _job(job_parts.beside, sum(job.parts for job in work), np.int64, table=table, count=len(work))
    return made._replace(inner=tuple(work))


def add(g: Array, out: Array, threads: int) -> Job:
    """out ← out + g, both flat."""
    parts, step = _ranges(g.size, g.size, threads, PASS_PART)
    return _job(job_parts.add, parts, g.dtype, g=g, out=out, n=g.size, step=step)


def total(x: Array, threads: int) -> Job:
    """Σ x, in parts, into the job's array ``costs``. x: C-order."""
    parts, step = _ranges(x.size, x.size, threads, PASS_PART)
    return _job(job_parts.total, parts, x.dtype, x=x, costs=np.empty(parts), n=x.size, step=step)


def watch(x: Array, state: Array, threads: int) -> list[Job]:
    """`Operations.watch`. x: C-order."""
    sums = total(x, threads)
    costs = sums.arrays["costs"]
    return [sums, _job(job_parts.watch, 1, x.dtype, x=x, costs=costs, state=state, n=x.size, count=len(costs))]


def program(jobs: Sequence[Job]) -> Array:
    """What the crew runs: (jobs, 3) int64, of addresses in the jobs, which have to be kept."""
    return np.array([(job.function, address(job.record), job.parts) for job in jobs], np.int64).reshape(-1, 3)


def _job(function: Function, parts: int, kind: Any, *settled: Any, **arguments: Any) -> Job:
    """A job of a function for numbers of a ``kind``; arguments that are not given are 0."""
    record, arrays = np.zeros((), function.record), {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
            value = address(value)
        if value is not None:
            record[name] = value
    return Job(function.address(np.dtype(kind).type, *settled), record, parts, arrays)


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
        job_parts.sums, 1, kind, out=out, terms=terms, costs=costs, state=state, n=0 if out is None else len(out),
        stride=terms.shape[-1], first=first, count=len(terms), costs_count=0 if costs is None else len(costs),
        accumulate=accumulate,
    )  # fmt: skip


def _cut(a: Array, b: Array, out: Array, threads: int, whole_rows: bool = False) -> tuple[dict[str, Any], int]:
    """A product's numbers in a record, and its parts: of rows, or of columns where there are fewer rows.

    Every part packs the whole of the other factor for itself, which should therefore be the smaller one; but of gW, a
    sum over the batch, parts of the rows were faster even so.
    """
    (m, n), k = out.shape, a.shape[1]
    ta, tb = not a.flags.c_contiguous, not b.flags.c_contiguous
    by_rows = whole_rows or k < THIN or m >= (min(n, MANY) if ta else n)
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
