"""The emulated device: its memory, the launch of a kernel on it, and what is said when a kernel does wrong.

`Memory` knows every live allocation by its address. `Emulator.launch` checks the arguments against the kernel's
parameters, then runs it twice from the same state: threads and blocks in ascending order, then in descending order,
with what was never written looking different. The two results must agree in every bit. Within each run `runtime.cpp`
checks every access (bounds, races, barriers); a fault becomes one of the exceptions below, with the kernel, the
argument, the block, the thread and the line named.

For each fault there is a broken kernel and its right twin in `test_emulator.py`.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import ctypes
import functools
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import compiler
from .compiler import Kernel, Parameter

ALIGNMENT = 512  # bytes, as CuPy's memory pool has it
GAP = 512  # bytes between two allocations at least, so that running off one does not end in the next
MOST_SLICES = 1 << 29
ASCENDING, DESCENDING, SHUFFLED = 0, 1, 2
BLOCK_LIMITS, GRID_LIMITS, THREADS_LIMIT = (1024, 1024, 64), (2**31 - 1, 65535, 65535), 1024


# --- what can be wrong with a kernel ---


class KernelError(RuntimeError):
    """A kernel, or the way it is launched, is wrong."""


class ArgumentError(KernelError):
    """The arguments or the geometry of a launch do not fit the kernel."""


class OutOfBounds(KernelError):
    """An access outside the arrays that were passed."""


class ReadOnlyWrite(KernelError):
    """A store to an array that the caller marked read-only."""


class Race(KernelError):
    """Two accesses, one of them a store, that nothing orders."""


class Uninitialised(KernelError):
    """Shared memory read before it is written, or a result that depends on memory that was never written."""


class BarrierError(KernelError):
    """A barrier or a warp operation that not all come to."""


class UndefinedBehaviour(KernelError):
    """Misalignment, an index outside a fixed array, integer overflow, division by zero, a shift too far."""


class Stopped(KernelError):
    """The kernel stopped itself (assert, __trap), crashed, or does not end."""


class Nondeterministic(KernelError):
    """The result depends on the order in which threads and blocks run."""


_KINDS = [None, OutOfBounds, ReadOnlyWrite, Race, Uninitialised, BarrierError, BarrierError, UndefinedBehaviour]
_KINDS += [Stopped, Stopped, Stopped]


# --- memory ---


class Allocation:
    """One piece of memory: where, how large, and the cells that `runtime.cpp` watches races with."""

    def __init__(self, address: int, size: int, dtype: np.dtype | None) -> None:
        self.address, self.size = address, size
        self.unwritten = dtype  # the dtype whose poison may still be there, or None
        self._cells: np.ndarray | None = None
        self._shift = -1

    @property
    def end(self) -> int:
        return self.address + self.size

    def cells(self, shift: int) -> int:
        """The address of a cell for every 2**shift bytes."""
        if self._cells is None or self._shift != shift:
            self._cells, self._shift = np.zeros((self.size >> shift) + 2, np.uint64), shift
        return self._cells.ctypes.data

    def forget_cells(self) -> None:
        self._cells = None


class Memory:
    """All live allocations, found by address.

    What an allocation belongs to may be collected at any moment, also in the middle of these methods; so its end is
    only noted, and looked at when the next one begins.
    """

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._allocations: dict[int, Allocation] = {}
        self._ended: collections.deque[Allocation] = collections.deque()
        self._lock = threading.RLock()

    def allocate(self, size: int, dtype: np.dtype | None = None) -> np.ndarray:
        """Aligned bytes with a gap around them; poisoned where ``dtype`` is given."""
        raw = np.empty(size + 2 * GAP + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT + GAP
        raw[:] = 0xA5
        buffer = raw[start : start + size]
        if dtype is not None and size:
            fill(buffer, dtype, 0)
        self._add(raw, Allocation(buffer.ctypes.data, size, dtype if size else None))
        return buffer

    def find(self, address: int) -> Allocation | None:
        """The live allocation that an address lies in."""
        with self._current():
            i = bisect.bisect_right(self._addresses, address) - 1
            found = self._allocations[self._addresses[i]] if i >= 0 else None
            return found if found and found.address <= address < max(found.end, found.address + 1) else None

    def adopt(self, array: np.ndarray) -> Allocation:
        """The allocation of an array, also of one that NumPy made as the result of an operation."""
        low, _ = extent(array)
        found = self.find(low)
        if found is not None:
            return found
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        low, high = extent(owner)
        allocation = Allocation(low, high - low, None)
        self._add(owner, allocation)
        return allocation

    def bytes_in_use(self) -> int:
        with self._current():
            return sum(allocation.size for allocation in self._allocations.values())

    def forget_cells(self) -> None:
        with self._current():
            for allocation in self._allocations.values():
                allocation.forget_cells()

    def _add(self, owner: np.ndarray, allocation: Allocation) -> None:
        with self._current():
            if allocation.address not in self._allocations:
                bisect.insort(self._addresses, allocation.address)
            self._allocations[allocation.address] = allocation
        weakref.finalize(owner, self._ended.append, allocation).atexit = False

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Within it no other thread looks, and all are gone that had ended."""
        with self._lock:
            while self._ended:
                allocation = self._ended.popleft()
                if self._allocations.get(allocation.address) is allocation:
                    del self._allocations[allocation.address]
                    del self._addresses[bisect.bisect_left(self._addresses, allocation.address)]
            yield


def extent(array: np.ndarray) -> tuple[int, int]:
    """The addresses of an array's first byte and of the byte after its last."""
    low = high = array.__array_interface__["data"][0]
    if array.size == 0:
        return low, low
    for n, stride in zip(array.shape, array.strides):
        low += min(0, (n - 1) * stride)
        high += max(0, (n - 1) * stride)
    return low, high + array.itemsize


def bytes_at(address: int, size: int) -> np.ndarray:
    """A view of memory as bytes."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


# --- memory that was never written ---


def poison(dtype: np.dtype, run: int) -> np.ndarray:
    """One unit of what unwritten memory holds in run 0 and in run 1, as bytes.

    Floats: a NaN that nothing computes, then an ordinary number, since some operations pass over a NaN. Integers: 0xA5
    bytes, then 0x5A; of the short ones a row of 16 bytes counts as unwritten, since one may well be 0xA5.
    """
    if dtype.kind == "f" or dtype.name == "bfloat16":
        if run:
            return np.array([1234.5]).astype(dtype).view(np.uint8)
        exponent = {"float64": 0x7FFC, "float32": 0x7FE5, "float16": 0x7EA5, "bfloat16": 0x7FE5}[dtype.name]
        high = exponent.to_bytes(2, "little")
        return np.frombuffer(b"\xa5" * (dtype.itemsize - 2) + high, np.uint8)
    return np.full(dtype.itemsize if dtype.itemsize >= 4 else 16, 0x5A if run else 0xA5, np.uint8)


def fill(buffer: np.ndarray, dtype: np.dtype, run: int) -> None:
    """Fill bytes with poison."""
    unit = poison(dtype, run)
    whole = len(buffer) // len(unit) * len(unit)
    buffer[:whole].reshape(-1, len(unit))[:] = unit
    buffer[whole:] = unit[: len(buffer) - whole]


def unwritten(buffer: np.ndarray, dtype: np.dtype, run: int = 0) -> np.ndarray:
    """For each byte, whether it belongs to a unit of poison. ``buffer`` begins where its allocation begins."""
    unit = poison(dtype, run)
    whole = len(buffer) // len(unit) * len(unit)
    found = np.zeros(len(buffer), bool)
    if len(unit) in (2, 4, 8):
        integer = np.dtype(f"u{len(unit)}")
        same = buffer[:whole].view(integer) == unit.view(integer)[0]
    else:
        same = (buffer[:whole].reshape(-1, len(unit)) == unit).all(axis=1)
    found[:whole] = np.repeat(same, len(unit))
    found[whole:] = (buffer[whole:] == unit[: len(buffer) - whole]).all()
    return found


# --- the structures of runtime.cpp ---


class _Index(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

    def __str__(self) -> str:
        return f"({self.x}, {self.y}, {self.z})"


class _Region(ctypes.Structure):
    _fields_ = [
        ("low", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("base", ctypes.c_uint64),
        ("cells", ctypes.c_uint64),
        ("grain_shift", ctypes.c_int),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
    ]


class _Range(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("invoke", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", _Index),
        ("block", _Index),
        ("regions", ctypes.POINTER(_Region)),
        ("read_only", ctypes.POINTER(_Range)),
        ("n_regions", ctypes.c_int),
        ("n_read_only", ctypes.c_int),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("races", ctypes.c_int),
        ("patience", ctypes.c_uint64),
    ]


class _Failure(ctypes.Structure):
    _fields_ = [
        ("what", ctypes.c_int),
        ("is_write", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("program_counter", ctypes.c_uint64),
        ("shared_offset", ctypes.c_int64),
        ("line", ctypes.c_int),
        ("n_threads", ctypes.c_int),
        ("block", _Index),
        ("thread", _Index),
        ("other_block", _Index),
        ("other", _Index),
        ("text", ctypes.c_char * 512),
    ]


# --- arguments ---


class Pointer:
    """An address in the device's memory that may be passed to a kernel; what `array.data` is."""

    def __init__(self, ptr: int, owner: Any = None) -> None:
        self.ptr = ptr
        self.mem = owner

    def __int__(self) -> int:
        return self.ptr

    def __add__(self, offset: int) -> Pointer:
        return type(self)(self.ptr + offset, self.mem)


@dataclass
class _Argument:
    """One argument of a launch: the bytes that the kernel gets, and the memory it may touch through them."""

    number: int
    parameter: Parameter
    value: bytes
    low: int = 0
    high: int = 0
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.uint8))
    allocation: Allocation | None = None

    def start_of(self, address: int) -> int:
        """Where the element begins that an address lies in."""
        return address - (address - self.low) % self.dtype.itemsize

    @property
    def name(self) -> str:
        """The parameter's name, the last word of its declaration."""
        return self.parameter.declaration.replace("*", " ").split()[-1]

    def __str__(self) -> str:
        return f"argument {self.number} ({_plain(self.parameter.declaration)})"


def _stride(a: _Argument) -> int:
    """Room for an argument's value, so that the next one is aligned."""
    return -(-len(a.value) // 64) * 64


def _plain(declaration: str) -> str:
    return " ".join(declaration.replace("__restrict__", " ").replace("__restrict", " ").split())


def _is_address(value: Any) -> bool:
    """Whether a number has the size of a pointer."""
    return isinstance(value, (int, np.uint64, np.int64)) and not isinstance(value, bool)


@functools.cache
def _letter(dtype: np.dtype) -> str:
    if dtype.name == "bfloat16":
        return "b"
    if dtype.kind == "f":
        return "h" if dtype.itemsize == 2 else "f"
    return {"b": "?", "V": "s"}.get(dtype.kind, dtype.kind)


def _pointer_takes(p: Parameter, dtype: np.dtype) -> bool:
    """Whether a pointer parameter fits an array's dtype. Bytes and void fit all, unsigned short any 16-bit type."""
    letter, size = _letter(dtype), p.size // p.lanes
    if p.letter in "cv" or (p.letter == "u" and size == 1):
        return True
    if p.letter == "s":
        return dtype.itemsize in (1, p.size)
    if p.letter == "u" and size == 2 and letter in "hb":
        return True
    return (p.letter, size) == (letter, dtype.itemsize)


def _scalar_dtype(value: Any) -> np.dtype | None:
    """The type that CuPy passes a scalar as."""
    for kind, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float64)):
        if type(value) is kind:
            return np.dtype(np.uint64 if kind is int and value >= 2**63 else dtype)
    return value.dtype if isinstance(value, np.generic) or hasattr(value, "dtype") else None


# --- launching ---


class Emulator:
    """The device: memory, launches, and what has been counted.

    ``orders``: the orders that every launch runs in; with only one of them the results are not compared (twice as
    fast, and a kernel that depends on the order is still found where it races). ``races``: whether accesses are checked
    for order. ``seed``: of the shuffled order. ``patience``: the accesses that a thread may make from one barrier to
    the next before it counts as endless. ``counts``: launches, allocations, synchronisations, copies and GEMMs so far.
    ``log``: (kernel, grid, block) of each launch. ``traffic``: (kernel, bytes) of each launch, the bytes that all its
    threads together load and store, by the name of the parameter: {"g": (read, written), ...}. Where two arguments
    share memory, the first of them has the bytes. ``products``: each product of cublasLt that was queued.
    ``memory_limit``: bytes from which an allocation fails. ``broken_after``: how many more calls succeed, before every
    one fails for good.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Everything as in the beginning, but for the memory."""
        self.orders: Sequence[int] = (ASCENDING, DESCENDING)
        self.races = True
        self.seed = 0
        self.patience = 1 << 28
        self.counts: collections.Counter[str] = collections.Counter()
        self.log: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.traffic: list[tuple[str, dict[str, tuple[int, int]]]] = []
        self.products: list[Any] = []
        self.memory_limit: int | None = None
        self.broken_after: int | None = None
        self._read_only: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def read_only(self, *arrays: np.ndarray) -> Iterator[None]:
        """Nothing may write to these arrays meanwhile: not a kernel, not a GEMM, not a copy."""
        ranges = [extent(array) for array in arrays if array.size]
        before = [array.tobytes() for array in arrays]
        self._read_only += ranges
        try:
            yield
        finally:
            for pair in ranges:
                self._read_only.remove(pair)
        for i, (array, saved) in enumerate(zip(arrays, before)):
            if array.tobytes() != saved:
                raise ReadOnlyWrite(f"array {i} of {len(arrays)} was marked read-only and has changed, by no kernel")

    def is_read_only(self, low: int, high: int) -> bool:
        return any(low < end and high > start for start, end in self._read_only)

    def launch(self, kernel: Kernel, grid: Sequence[int], block: Sequence[int], values: Sequence[Any]) -> None:
        """Run a kernel, in every order, and leave the result of the first."""
        with self._lock:
            grid3, block3 = _geometry(kernel, grid, block)
            arguments = self._arguments(kernel, values)
            self.counts["launches"] += 1
            self.log.append((kernel.name, tuple(grid), tuple(block)))
            record, keep = self._record(kernel, grid3, block3, arguments)
            if len(self.orders) == 1:
                self._run(kernel, record, arguments, self.orders[0])
            else:
                self._run_and_compare(kernel, record, arguments)
            pointing = [a for a in arguments if a.allocation is not None]
            bytes_of = {a.name: (r.read, r.written) for a, r in zip(pointing, record.regions)}
            self.traffic.append((kernel.name, bytes_of))
            del keep

    # --- arguments ---

    def _arguments(self, kernel: Kernel, values: Sequence[Any]) -> list[_Argument]:
        if len(values) != len(kernel.parameters):
            declared = ", ".join(_plain(p.declaration) for p in kernel.parameters)
            raise ArgumentError(
                f"kernel {kernel.name}: {len(values)} arguments given, it takes {len(kernel.parameters)}: ({declared})"
            )
        return [self._argument(kernel, i + 1, p, value) for i, (p, value) in enumerate(zip(kernel.parameters, values))]

    def _argument(self, kernel: Kernel, number: int, p: Parameter, value: Any) -> _Argument:
        argument = _Argument(number, p, b"")
        where = f"kernel {kernel.name}, {argument}"
        if p.is_pointer and (value is None or _is_address(value)):
            value = Pointer(int(value or 0))
        if getattr(value, "on_device", False) or isinstance(value, Pointer):
            if not p.is_pointer:
                raise ArgumentError(f"{where}: takes a value, got an array")
            self._point(argument, value, where)
            return argument
        if isinstance(value, np.ndarray) and value.size != 1:
            raise TypeError(f"{where}: got a numpy.ndarray of shape {value.shape}, which is in the host's memory")
        dtype = _scalar_dtype(value)
        if dtype is None:
            raise TypeError(f"{where}: got {value!r}, of a type that no kernel takes")
        if p.is_pointer:
            raise ArgumentError(f"{where}: takes an array, got the number {value!r} ({dtype})")
        fits = dtype.itemsize == p.size and (p.letter == "s" or _letter(dtype) == p.letter)
        if not fits:
            raise ArgumentError(f"{where}: got {value!r}, which is passed as {dtype} ({dtype.itemsize} bytes)")
        argument.value = np.asarray(value, dtype).tobytes()
        return argument

    def _point(self, argument: _Argument, value: Any, where: str) -> None:
        """Fill in an argument that points to device memory."""
        p = argument.parameter
        if isinstance(value, Pointer):
            allocation = self.memory.find(value.ptr)
            if value.ptr and allocation is None:
                raise ArgumentError(f"{where}: 0x{value.ptr:x} is no address of the device's memory")
            argument.low, argument.high = value.ptr, allocation.end if allocation else value.ptr
            argument.dtype = np.dtype(f"u{p.size // p.lanes}") if p.size // p.lanes in (1, 2, 4, 8) else argument.dtype
            address = value.ptr
        else:
            if not _pointer_takes(p, value.dtype):
                raise ArgumentError(f"{where}: got an array of {value.dtype}")
            argument.low, argument.high = extent(value)
            argument.dtype = value.dtype
            address = value.__array_interface__["data"][0]
            allocation = self.memory.adopt(value) if value.size else None
        if address % (p.size if p.lanes > 1 else 1):
            raise ArgumentError(f"{where}: the array begins at 0x{address:x}, not at a multiple of {p.size} bytes")
        argument.value = address.to_bytes(8, "little")
        argument.allocation = allocation if argument.high > argument.low else None

    def _record(
        self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], arguments: list[_Argument]
    ) -> tuple[_Launch, list[Any]]:
        """The launch as runtime.cpp takes it, and what must live as long."""
        if compiler.runtime().emu_slices() > MOST_SLICES:
            compiler.runtime().emu_restart_slices()
            self.memory.forget_cells()
        shifts: dict[int, int] = {}
        pointing = [a for a in arguments if a.allocation is not None]
        for a in pointing:
            size = a.dtype.itemsize & -a.dtype.itemsize
            shift = min(size.bit_length() - 1, 3)
            shifts[a.allocation.address] = min(shift, shifts.get(a.allocation.address, 3))
        regions = (_Region * max(1, len(pointing)))()
        for region, a in zip(regions, pointing):
            shift = shifts[a.allocation.address]
            region.low, region.size, region.base = a.low, a.high - a.low, a.allocation.address
            region.cells, region.grain_shift = a.allocation.cells(shift), shift
        ranges = (_Range * max(1, len(self._read_only)))(*self._read_only)
        values = np.zeros(sum(map(_stride, arguments)) + 64, np.uint8)
        at = -values.ctypes.data % 64
        pointers = (ctypes.c_void_p * max(1, len(arguments)))()
        for i, a in enumerate(arguments):
            values[at : at + len(a.value)] = np.frombuffer(a.value, np.uint8)
            pointers[i] = values.ctypes.data + at
            at += _stride(a)
        record = _Launch(kernel.invoke, pointers, _Index(*grid), _Index(*block), regions, ranges)
        record.n_regions, record.n_read_only = len(pointing), len(self._read_only)
        record.seed, record.races, record.patience = self.seed, self.races, self.patience
        return record, [regions, ranges, values, pointers]

    # --- running ---

    def _run_and_compare(self, kernel: Kernel, record: _Launch, arguments: list[_Argument]) -> None:
        state = [_Touched(a) for a in _allocations(arguments)]
        try:
            self._run(kernel, record, arguments, self.orders[0])
            results = [piece.now() for piece in state]
            for order in self.orders[1:]:
                for piece in state:
                    piece.restore(1)
                self._run(kernel, record, arguments, order)
                if _first_difference(state, results) is not None:
                    raise self._difference(kernel, record, arguments, state, results)
        except KernelError:
            for piece in state:
                piece.restore(0)
            raise
        for piece, result in zip(state, results):
            piece.put(result)

    def _run(self, kernel: Kernel, record: _Launch, arguments: list[_Argument], order: int) -> None:
        record.order = order
        for i in range(record.n_regions):
            record.regions[i].read = record.regions[i].written = 0
        failure = _Failure()
        if compiler.runtime().emu_launch(ctypes.byref(record), ctypes.byref(failure)):
            raise self._fault(kernel, failure, arguments)

    def _difference(
        self,
        kernel: Kernel,
        record: _Launch,
        arguments: list[_Argument],
        state: list[_Touched],
        results: list[np.ndarray],
    ) -> KernelError:
        """Which element differs, and what of: one more run, in the first order, tells order and memory apart."""
        at = _first_difference(state, results)
        argument, dtype = _nearest(at, arguments), np.dtype(np.uint8)
        if argument is not None:
            at, dtype = argument.start_of(at), argument.dtype
        second = bytes_at(at, dtype.itemsize).view(dtype)[0]
        for piece, result in zip(state, results):
            piece.put(result)
        first = bytes_at(at, dtype.itemsize).view(dtype)[0]
        for piece in state:
            piece.restore(1)
        self._run(kernel, record, arguments, self.orders[0])
        place = _place(at, argument)
        text = f"kernel {kernel.name}: {place} is {first} in one run and {second} in another, from the same state"
        if _first_difference(state, results) is not None:
            return Uninitialised(f"{text}; it depends on memory that was never written")
        return Nondeterministic(f"{text}; it depends on the order of threads and blocks")

    # --- faults ---

    def _fault(self, kernel: Kernel, failure: _Failure, arguments: list[_Argument]) -> KernelError:
        line = failure.line or kernel.module.line_of(failure.program_counter)
        where = f"kernel {kernel.name}, block {failure.block}, thread {failure.thread}"
        if line:
            lines = kernel.module.code.splitlines()
            quoted = lines[line - 1].strip() if line <= len(lines) else ""
            where += f", line {line}: {quoted}\n  "
        else:
            where += ": "
        text = failure.text.decode(errors="replace")
        kind = _KINDS[failure.what]
        if failure.size:
            place = self._describe(kernel, failure, arguments)
            text = f"{text}: {place}" if text else f"{'writes to' if failure.is_write else 'reads'} {place}"
        if failure.n_threads == 2:
            text += f"; the other is thread {failure.other}"
        elif failure.n_threads == 3:
            text += f"; the other is block {failure.other_block}"
        return kind(f"{where}{text}")

    def _describe(self, kernel: Kernel, failure: _Failure, arguments: list[_Argument]) -> str:
        """What lies at the address of a faulty access."""
        if failure.shared_offset >= 0:
            name, offset = kernel.module.shared_array_at(failure.shared_offset)
            return f"{failure.size} bytes at byte {offset} of the shared array {name}"
        argument = _nearest(failure.address, arguments)
        place = _place(failure.address, argument)
        if failure.address < 4096:
            place = "the null pointer"
        elif argument is None or not argument.low <= failure.address < argument.high:
            other = self.memory.find(failure.address)
            if other is not None and all(a.allocation is not other for a in arguments):
                place = f"an array that was not passed to this kernel (0x{failure.address:x}; counted from {place})"
        return f"{place}, {failure.size} bytes"


def _geometry(kernel: Kernel, grid: Sequence[int], block: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block with three axes each, within what a GPU takes."""
    full = []
    for name, given, limits in (("grid", grid, GRID_LIMITS), ("block", block, BLOCK_LIMITS)):
        if not isinstance(given, tuple) or not 1 <= len(given) <= 3:
            raise TypeError(f"kernel {kernel.name}: {name} must be a tuple of 1 to 3 numbers, got {given!r}")
        sizes = tuple(int(n) for n in (*given, 1, 1)[:3])
        if any(n < 1 or n > limit for n, limit in zip(sizes, limits)):
            raise ArgumentError(f"kernel {kernel.name}: {name} {sizes} is not within (1, 1, 1) and {limits}")
        full.append(sizes)
    threads = full[1][0] * full[1][1] * full[1][2]
    if threads > min(THREADS_LIMIT, kernel.max_threads):
        raise ArgumentError(
            f"kernel {kernel.name}: a block of {threads} threads, the limit is {min(THREADS_LIMIT, kernel.max_threads)}"
        )
    return full[0], full[1]


def _nearest(address: int, arguments: list[_Argument]) -> _Argument | None:
    """The argument that an address lies in or, within a megabyte, lies next to."""

    def distance(a: _Argument) -> int:
        return max(a.low - address, address - a.high + 1, 0)

    near = [a for a in arguments if a.parameter.is_pointer and a.low and distance(a) < 1 << 20]
    return min(near, key=distance, default=None)


def _place(address: int, a: _Argument | None) -> str:
    """An address, as an index into an argument."""
    if a is None:
        return f"0x{address:x}, which is in no array of this launch"
    index, rest = divmod(address - a.low, a.dtype.itemsize)
    within = f" + {rest} bytes" if rest else ""
    return f"{a} at index {index}{within} of {(a.high - a.low) // a.dtype.itemsize} ({a.dtype})"


# --- the state that a launch may change ---


def _allocations(arguments: list[_Argument]) -> list[tuple[Allocation, int, int]]:
    """Each allocation that arguments point into, with the range of addresses they cover there."""
    pointing = [a for a in arguments if a.allocation is not None]
    pointing.sort(key=lambda a: a.allocation.address)
    groups = itertools.groupby(pointing, key=lambda a: a.allocation.address)
    found = []
    for _, group in groups:
        members = list(group)
        found.append((members[0].allocation, min(a.low for a in members), max(a.high for a in members)))
    return found


def _first_difference(state: list[_Touched], results: list[np.ndarray]) -> int | None:
    found = (piece.difference(result) for piece, result in zip(state, results))
    return next((address for address in found if address is not None), None)


class _Touched:
    """A range of an allocation before a launch: its contents, and which bytes nobody has written yet."""

    def __init__(self, place: tuple[Allocation, int, int]) -> None:
        allocation, low, high = place
        self.low, self.view = low, bytes_at(low, high - low)
        self.dtype = allocation.unwritten
        self.mask: np.ndarray | None = None
        self.before = self.view.copy()
        if self.dtype is not None:
            whole = bytes_at(allocation.address, allocation.size)
            mask = unwritten(whole, self.dtype)
            if mask.any():
                self.mask = mask[low - allocation.address : high - allocation.address]
                self._other = np.empty(allocation.size, np.uint8)
                fill(self._other, self.dtype, 1)
                self._other = self._other[low - allocation.address : high - allocation.address]
            else:
                allocation.unwritten = None  # poison never comes back

    def now(self) -> np.ndarray:
        return self.view.copy()

    def put(self, contents: np.ndarray) -> None:
        self.view[:] = contents

    def restore(self, run: int) -> None:
        """The state before the launch, with the poison of a run where nothing was written."""
        self.view[:] = self.before
        if run and self.mask is not None:
            self.view[self.mask] = self._other[self.mask]

    def difference(self, result: np.ndarray) -> int | None:
        """The address where the memory differs from an earlier run's result, apart from what neither run wrote."""
        differs = self.view != result
        if self.mask is not None:
            differs &= ~(self.mask & (result == self.before) & (self.view == self._other))
        return self.low + int(differs.argmax()) if differs.any() else None
