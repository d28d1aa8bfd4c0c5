"""What the crew's threads do without Python's lock: look for parts of work, take them, and multiply matrices.

A leaf: Numba, and the address of a BLAS. What is handed out is one number in memory, the *word*, which says how many
parts there are and how many are taken; the *job* beside it describes a product. `crew` has the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

BETWEEN = 64  # looks for work, until a thread gives way to whoever else wants its processor
ASLEEP_NOW, LOOK_AGAIN = -1, -2

# Where in the control block what stands: numbers that different threads write lie 128 bytes apart.
DONE, SLEEPERS, OWN, JOB, SIZE = 16, 32, 40, 48, 64  # the word itself is at 0; OWN: parts that the caller has taken
# The word: 32 bits of ticket, 1 whether parts are calls of Python, 15 bits of parts, 16 bits of parts taken.
CALLS = 1 << 31
# The job: the words that describe a product.
_GEMM, _ITEM, _M, _N, _K, _A, _LDA, _TA, _B, _LDB, _TB, _C, _LDC, _STEP, _BY_ROWS = range(15)

intrinsic: Any = extending.intrinsic  # what it makes is called with one argument fewer than its definition has
_COMPILED: dict[str, Any] = {"nogil": True, "cache": True}
_int64, _pointer = ir.IntType(64), ir.IntType(8).as_pointer()


# --- what Numba has no word for ------------------------------------------------------------------------------------


@intrinsic
def load(typing, address):
    """The number at an address, and whatever was written before it was."""

    def code(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], _int64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def store(typing, address, value):
    """Write a number, after all that was written before it."""

    def code(context, builder, signature, arguments):
        where = builder.inttoptr(arguments[0], _int64.as_pointer())
        builder.store_atomic(arguments[1], where, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def add(typing, address, value):
    """Add to a number, in one piece."""

    def code(context, builder, signature, arguments):
        where = builder.inttoptr(arguments[0], _int64.as_pointer())
        return builder.atomic_rmw("add", where, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


@intrinsic
def exchange(typing, address, value):
    """Write a number; the one that stood there."""

    def code(context, builder, signature, arguments):
        where = builder.inttoptr(arguments[0], _int64.as_pointer())
        return builder.atomic_rmw("xchg", where, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


@intrinsic
def replace(typing, address, old, new):
    """Write ``new`` if ``old`` still stands there; whether it did."""

    def code(context, builder, signature, arguments):
        where = builder.inttoptr(arguments[0], _int64.as_pointer())
        done = builder.cmpxchg(where, arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(done, 1), _int64)

    return types.int64(types.int64, types.int64, types.int64), code


@intrinsic
def call(typing, address):
    """Call a function of C that takes nothing."""

    def code(context, builder, signature, arguments):
        function = ir.FunctionType(ir.IntType(32), []).as_pointer()
        builder.call(builder.inttoptr(arguments[0], function), [])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def blas_gemm(typing, address, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """Call ?gemm of BLAS, which takes the address of every argument. ta, tb: a letter each."""

    def code(context, builder, signature, arguments):
        function, *values = arguments
        given = []
        for place, value in enumerate(values):
            if place in (6, 8, 11):  # a, b and c are addresses themselves
                given.append(builder.inttoptr(value, _pointer))
                continue
            if place not in (5, 10):  # alpha and beta; a letter has 8 bits, an integer 32
                value = builder.trunc(value, ir.IntType(8 if place < 2 else 32))
            given.append(builder.bitcast(cgutils.alloca_once_value(builder, value), _pointer))
        kind = ir.FunctionType(ir.VoidType(), [_pointer] * len(given)).as_pointer()
        builder.call(builder.inttoptr(function, kind), given)
        return context.get_dummy_value()

    integer, real = types.int64, alpha
    before = [integer] * 6
    return types.void(*before, real, *[integer] * 4, real, integer, integer), code


# --- compiled ------------------------------------------------------------------------------------------------------


@njit(inline="always", **_COMPILED)
def do_part(job, scalars, index):
    """Part ``index`` of the product: some rows of C, or some columns. BLAS is column-major: C in C order is Cᵀ = Bᵀ Aᵀ
    in its eyes, so the factors change places. scalars: alpha, beta."""
    m, n, a, b, c, size = job[_M], job[_N], job[_A], job[_B], job[_C], job[_ITEM]
    first = index * job[_STEP]
    if job[_BY_ROWS]:
        m = min(job[_STEP], m - first)
        a += first * size * (1 if job[_TA] else job[_LDA])
        c += first * size * job[_LDC]
    else:
        n = min(job[_STEP], n - first)
        b += first * size * (job[_LDB] if job[_TB] else 1)
        c += first * size
    ta, tb = np.int64(84 if job[_TA] else 78), np.int64(84 if job[_TB] else 78)  # T, N
    blas_gemm(
        job[_GEMM], tb, ta, n, m, job[_K], scalars[0], b, job[_LDB], a, job[_LDA], scalars[1], c, job[_LDC]
    )  # fmt: skip


@njit(**_COMPILED)
def whole_product(function, a, b, c, ta, tb, alpha, beta):
    """C ← α op(A) op(B) + β C on this thread; α, β of the arrays' type."""
    k, letters = a.shape[0] if ta else a.shape[1], (np.int64(78), np.int64(84))  # N, T
    blas_gemm(
        function, letters[np.int64(tb)], letters[np.int64(ta)], c.shape[1], c.shape[0], k, alpha,
        b.ctypes.data, b.shape[1], a.ctypes.data, a.shape[1], beta, c.ctypes.data, c.shape[1],
    )  # fmt: skip


@njit(**_COMPILED)
def claim(base):
    """The number of a part that nobody has taken yet, or -1; for the caller, to whom it is counted."""
    while True:
        word = load(base)
        if word & 0xFFFF >= (word >> 16) & 0x7FFF:
            return np.int64(-1)
        if replace(base, word, word + 1):
            add(base + 8 * OWN, np.int64(1))
            return word & 0xFFFF


@njit(**_COMPILED)
def join(base, parts, give_way):
    """Take what is left without doing it, and wait until all that others have taken is done."""
    while claim(base) >= 0:
        pass
    looks = 0
    while load(base + 8 * DONE) + load(base + 8 * OWN) < parts:
        looks += 1
        if looks % BETWEEN == 0:
            call(give_way)


@njit(**_COMPILED)
def publish(base, ticket, parts, calls):
    """Offer parts to whoever looks; how many are asleep and to be woken."""
    store(base + 8 * DONE, np.int64(0))
    store(base + 8 * OWN, np.int64(0))
    store(base, (ticket << 32) | (CALLS if calls else 0) | (parts << 16))
    return exchange(base + 8 * SLEEPERS, np.int64(0)) if load(base + 8 * SLEEPERS) else np.int64(0)


@njit(**_COMPILED)
def offer_product(base, job, function, a, b, c, ta, tb, step, by_rows, ticket, parts):
    """Offer the parts of C = α op(A) op(B) + β C; how many are asleep and to be woken."""
    job[_GEMM], job[_ITEM] = function, c.itemsize
    job[_M], job[_N], job[_K] = c.shape[0], c.shape[1], a.shape[0] if ta else a.shape[1]
    job[_A], job[_LDA], job[_TA] = a.ctypes.data, a.shape[1], ta
    job[_B], job[_LDB], job[_TB] = b.ctypes.data, b.shape[1], tb
    job[_C], job[_LDC], job[_STEP], job[_BY_ROWS] = c.ctypes.data, c.shape[1], step, by_rows
    return publish(base, ticket, parts, False)


@njit(**_COMPILED)
def do_product(base, job, scalars, parts, give_way):
    """Do the parts that nobody else takes, and wait for the others."""
    while True:
        index = claim(base)
        if index < 0:
            break
        do_part(job, scalars, index)
    join(base, parts, give_way)


@njit(**_COMPILED)
def serve(base, job, singles, doubles, give_way, looks):
    """Do parts of products as they come; the number of a part that is a call, or why there is none."""
    idle = 0
    while idle < looks:
        word = load(base)
        if word & 0xFFFF < (word >> 16) & 0x7FFF:
            if replace(base, word, word + 1):
                if word & CALLS:
                    return word & 0xFFFF
                if job[_ITEM] == 4:
                    do_part(job, singles, word & 0xFFFF)
                else:
                    do_part(job, doubles, word & 0xFFFF)
                add(base + 8 * DONE, np.int64(1))
            idle = 0
        else:
            idle += 1
            if idle % BETWEEN == 0:
                call(give_way)
    add(base + 8 * SLEEPERS, np.int64(1))
    word = load(base)
    return np.int64(LOOK_AGAIN if word & 0xFFFF < (word >> 16) & 0x7FFF else ASLEEP_NOW)


@njit(**_COMPILED)
def finished(base):
    """Another's part is done."""
    add(base + 8 * DONE, np.int64(1))
