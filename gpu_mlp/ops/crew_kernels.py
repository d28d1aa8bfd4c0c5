"""What the crew's threads do without Python's lock: look for parts of jobs, take them, and do them.

A leaf: Numba. A *job* is a compiled function, the address of a record of its arguments, and a number of parts: part i
is ``function(record, i)``. What is handed out is one number in memory, the *word*, which says how many parts there are
and how many are taken; beside it stands whose they are. `crew` has the threads, `job_parts` the functions.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

BETWEEN = 64  # looks for work, until a thread gives way to whoever else wants its processor
ASLEEP_NOW, LOOK_AGAIN = -1, -2

# Where in the control block what stands: numbers that different threads write lie 128 bytes apart.
DONE, SLEEPERS, OWN, FUNCTION, RECORD, TICKET, SIZE = 16, 32, 48, 49, 50, 51, 64  # the word itself is at 0
# OWN: parts that the caller has taken; TICKET: what tells a word from the last one that said the same.
# The word: 32 bits of ticket, 1 whether parts are calls of Python, 11 of parts, 10 of those that others have taken,
# from the last one down, and 10 of those that the caller has, from the first one up: who did a part of the last job has
# in its cache what the same part of the next one reads.
CALLS, PARTS, OTHERS, MOST_PARTS = 1 << 31, 20, 10, (1 << 10) - 1

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
def pause(typing):
    """Leave the processor's units to its other thread for a moment, where it has one."""

    def code(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            hint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            builder.call(hint, [])
        elif platform.machine() in ("aarch64", "arm64"):
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), code


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


@intrinsic
def blas_dot(typing, address, n, like, x):
    """Σ x² of ``n`` numbers at the address ``x`` by ?dot of BLAS, of the type of ``like``."""

    def code(context, builder, signature, arguments):
        function, count, like, where = arguments
        integer, real = ir.IntType(32), like.type
        n = cgutils.alloca_once_value(builder, builder.trunc(count, integer))
        one = cgutils.alloca_once_value(builder, ir.Constant(integer, 1))
        x = builder.inttoptr(where, real.as_pointer())
        kinds = [integer.as_pointer(), real.as_pointer(), integer.as_pointer(), real.as_pointer(), integer.as_pointer()]
        kind = ir.FunctionType(real, kinds).as_pointer()
        return builder.call(builder.inttoptr(function, kind), [n, x, one, x, one])

    return like(types.int64, types.int64, like, types.int64), code


@intrinsic
def invoke(typing, function, record, index):
    """Call the compiled function at an address with a record's address and the number of a part."""

    def code(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [_int64, _int64]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def pointer(typing, address):
    """An address as what `numba.carray` takes."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _pointer)

    return types.voidptr(types.int64), code


# --- compiled ------------------------------------------------------------------------------------------------------


@njit(inline="always", **_COMPILED)
def parts_of(word):
    """How many parts there are."""
    return (word >> PARTS) & 0x7FF


@njit(inline="always", **_COMPILED)
def left(word):
    """How many parts nobody has taken yet."""
    return parts_of(word) - ((word >> OTHERS) & MOST_PARTS) - (word & MOST_PARTS)


@njit(**_COMPILED)
def claim(base):
    """The number of a part that nobody has taken yet, or -1; for the caller, to whom it is counted."""
    while True:
        word = load(base)
        if left(word) <= 0:
            return np.int64(-1)
        if replace(base, word, word + 1):
            add(base + 8 * OWN, np.int64(1))
            return word & MOST_PARTS


@njit(**_COMPILED)
def join(base, give_way):
    """Take what is left without doing it, and wait until all that others have taken is done."""
    while claim(base) >= 0:
        pass
    looks, parts = 0, parts_of(load(base))
    while load(base + 8 * DONE) + load(base + 8 * OWN) < parts:
        looks += 1
        pause()
        if looks % BETWEEN == 0:
            call(give_way)


@njit(**_COMPILED)
def publish(base, function, record, parts, calls):
    """Offer parts to whoever looks."""
    store(base + 8 * DONE, np.int64(0))
    store(base + 8 * OWN, np.int64(0))
    store(base + 8 * FUNCTION, function)
    store(base + 8 * RECORD, record)
    ticket = (load(base + 8 * TICKET) + 1) & 0x7FFFFFFF
    store(base + 8 * TICKET, ticket)
    store(base, (ticket << 32) | (CALLS if calls else 0) | (parts << PARTS))


@njit(**_COMPILED)
def to_be_woken(base):
    """How many threads have fallen asleep; they are counted out."""
    return exchange(base + 8 * SLEEPERS, np.int64(0))


@njit(**_COMPILED)
def run(base, program, first, offered, give_way):
    """Do the jobs of a program, (jobs, 3): function, record, parts; from number ``first`` on, one after the other.

    The number of a job that has been offered while threads are asleep, for the caller to wake them and to come back
    with ``offered``; else the number of jobs.
    """
    for i in range(first, program.shape[0]):
        function, record, parts = program[i, 0], program[i, 1], program[i, 2]
        if parts < 2:
            invoke(function, record, np.int64(0))
            continue
        if not (offered and i == first):
            publish(base, function, record, parts, False)
            if load(base + 8 * SLEEPERS):
                return i
        while True:
            index = claim(base)
            if index < 0:
                break
            invoke(function, record, index)
        join(base, give_way)
    return program.shape[0]


@njit(**_COMPILED)
def run_alone(program):
    """Do all parts of a program's jobs on this thread."""
    for i in range(program.shape[0]):
        for index in range(program[i, 2]):
            invoke(program[i, 0], program[i, 1], np.int64(index))


@njit(**_COMPILED)
def serve(base, give_way, looks):
    """Do parts of jobs as they come; the number of a part that is a call of Python, or why there is none."""
    idle = 0
    while idle < looks:
        word = load(base)
        if left(word) > 0:
            if replace(base, word, word + (1 << OTHERS)):
                index = parts_of(word) - 1 - ((word >> OTHERS) & MOST_PARTS)
                if word & CALLS:
                    return index
                invoke(load(base + 8 * FUNCTION), load(base + 8 * RECORD), index)
                add(base + 8 * DONE, np.int64(1))
            idle = 0
        else:
            idle += 1
            pause()
            if idle % BETWEEN == 0:
                call(give_way)
    add(base + 8 * SLEEPERS, np.int64(1))
    word = load(base)
    return np.int64(LOOK_AGAIN if left(word) > 0 else ASLEEP_NOW)


@njit(**_COMPILED)
def finished(base):
    """Another's part is done."""
    add(base + 8 * DONE, np.int64(1))
