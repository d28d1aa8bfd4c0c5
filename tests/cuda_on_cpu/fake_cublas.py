"""A stand-in for cuBLAS as CuPy and nvmath-python expose it: matrix products on raw pointers, column-major, with
cuBLAS's own checks.

Reads and writes the emulated device's memory only, within its allocations; with beta = 0 never reads C. Types multiply
and accumulate as on a GPU: 16-bit inputs in float32, TF32 with inputs rounded to 10 bits of mantissa.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any

import numpy as np

from . import streams
from .emulator import Emulator, OutOfBounds, ReadOnlyWrite, bytes_at

HANDLE = 0xCB1A5
DATA_TYPES = {
    **{"CUDA_R_32F": 0, "CUDA_R_64F": 1, "CUDA_R_16F": 2, "CUDA_R_8I": 3, "CUDA_C_32F": 4, "CUDA_C_64F": 5},
    **{"CUDA_R_16BF": 14},
}
CONSTANTS = {
    **{"CUBLAS_OP_N": 0, "CUBLAS_OP_T": 1, "CUBLAS_OP_C": 2},
    **{"CUBLAS_POINTER_MODE_HOST": 0, "CUBLAS_POINTER_MODE_DEVICE": 1},
    **{"CUBLAS_GEMM_DEFAULT": -1, "CUBLAS_GEMM_DEFAULT_TENSOR_OP": 99},
    **{"CUBLAS_GEMM_DFALT": -1, "CUBLAS_GEMM_DFALT_TENSOR_OP": 99},
    **{"CUBLAS_DEFAULT_MATH": 0, "CUBLAS_TENSOR_OP_MATH": 1},
    **{"CUBLAS_COMPUTE_16F": 64, "CUBLAS_COMPUTE_16F_PEDANTIC": 65},
    **{"CUBLAS_COMPUTE_32F": 68, "CUBLAS_COMPUTE_32F_PEDANTIC": 69},
    **{"CUBLAS_COMPUTE_32F_FAST_16F": 74, "CUBLAS_COMPUTE_32F_FAST_16BF": 75, "CUBLAS_COMPUTE_32F_FAST_TF32": 77},
    **{"CUBLAS_COMPUTE_64F": 70, "CUBLAS_COMPUTE_64F_PEDANTIC": 71},
    **{"CUBLAS_COMPUTE_32I": 72, "CUBLAS_COMPUTE_32I_PEDANTIC": 73},
}
TF32_MATH = 3  # CUBLAS_TF32_TENSOR_OP_MATH, a value that setMathMode takes though CuPy has no name for it
STATUS = {1: "NOT_INITIALIZED", 7: "INVALID_VALUE", 15: "NOT_SUPPORTED"}
# Which (type of A and B, type of C) a compute type takes.
SINGLE = {(2, 2), (14, 14), (2, 0), (14, 0), (0, 0)}
SUPPORTED = {68: SINGLE, 69: SINGLE, 70: {(1, 1)}, 71: {(1, 1)}, 74: {(0, 0)}, 75: {(0, 0)}, 77: {(0, 0)}}


class CUBLASError(RuntimeError):
    """An error of cuBLAS."""

    __module__ = "cupy_backends.cuda.libs.cublas"

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"CUBLAS_STATUS_{STATUS[status]}")

    def __reduce__(self) -> Any:
        return type(self), (self.status,)


def names(device: Emulator) -> dict[str, Any]:
    """The names of the module `cupy_backends.cuda.libs.cublas`."""
    library = _Library(device)
    functions = [name for name in dir(library) if not name.startswith("_")]
    return {**CONSTANTS, "CUBLASError": CUBLASError, **{name: getattr(library, name) for name in functions}}


def nvmath_names(device: Emulator) -> dict[str, Any]:
    """The names of the module `nvmath.bindings.cublas`: handles of its own, each with a stream and a workspace."""
    library = _NvmathLibrary(device)
    snake = {"gemmEx": "gemm_ex", "setStream": "set_stream", "setPointerMode": "set_pointer_mode"}
    snake |= {"create": "create", "destroy": "destroy", "setWorkspace": "set_workspace", "getVersion": "get_version"}
    return {"cuBLASError": CUBLASError, **{name: getattr(library, ours) for ours, name in snake.items()}}


def _dtype(code: int) -> np.dtype:
    if code == 14:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({0: np.float32, 1: np.float64, 2: np.float16}[code])


def _check_integers(function: Any) -> Any:
    """Every argument of cuBLAS is a C integer: a number that does not fit, or is none, is refused."""

    @functools.wraps(function)
    def checked(self: Any, *args: Any) -> Any:
        for value in args:
            if not isinstance(value, (int, np.integer)):
                raise TypeError(f"{function.__name__}: an integer is required, got {value!r}")
        return function(self, *map(int, args))

    return checked


def _check_int32(*values: int) -> None:
    if any(not -(2**31) <= value < 2**31 for value in values):
        raise OverflowError("value too large to convert to int")


class _Handle:
    """What cuBLAS keeps for a handle."""

    def __init__(self) -> None:
        self.math_mode = self.pointer_mode = self.stream = self.workspace = 0


class _Library:
    """cuBLAS through CuPy: products go to CuPy's current stream, and not into a graph."""

    def __init__(self, device: Emulator) -> None:
        self._device = device
        self._handles = {HANDLE: _Handle()}
        self._numbers = itertools.count(HANDLE + 1)

    # --- the handle and its modes ---

    def create(self) -> int:
        handle = next(self._numbers)
        self._handles[handle] = _Handle()
        return handle

    @_check_integers
    def destroy(self, handle: int) -> None:
        self._check(handle)

    @_check_integers
    def getVersion(self, handle: int) -> int:
        self._check(handle)
        return 120900

    @_check_integers
    def setStream(self, handle: int, stream: int) -> None:
        self._check(handle).stream = stream

    @_check_integers
    def getStream(self, handle: int) -> int:
        return self._check(handle).stream

    @_check_integers
    def setMathMode(self, handle: int, mode: int) -> None:
        if mode not in (0, 1, 2, TF32_MATH, 16, 18):
            raise CUBLASError(7)
        self._check(handle).math_mode = mode

    @_check_integers
    def getMathMode(self, handle: int) -> int:
        return self._check(handle).math_mode

    @_check_integers
    def setPointerMode(self, handle: int, mode: int) -> None:
        if mode not in (0, 1):
            raise CUBLASError(7)
        self._check(handle).pointer_mode = mode

    @_check_integers
    def getPointerMode(self, handle: int) -> int:
        return self._check(handle).pointer_mode

    # --- products ---

    @_check_integers
    def gemmEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, compute, algo
    ):
        """C ← alpha op(A) op(B) + beta C, with op(A): (m, k), op(B): (k, n), C: (m, n), column-major."""
        state = self._check(handle)
        _check_int32(transa, transb, m, n, k, lda, ldb, ldc, Atype, Btype, Ctype, compute, algo)
        rows_a, rows_b = (k if transa else m), (n if transb else k)
        invalid = min(m, n, k) < 0 or transa not in (0, 1, 2) or transb not in (0, 1, 2)
        if invalid or lda < max(1, rows_a) or ldb < max(1, rows_b) or ldc < max(1, m):
            raise CUBLASError(7)
        compute = {0: 68, 1: 70, 2: 64}.get(compute, compute)  # a data type, as before CUDA 11
        if Atype != Btype or (Atype, Ctype) not in SUPPORTED.get(compute, ()) or algo not in range(-1, 116):
            raise CUBLASError(15)
        self._device.counts["gemms"] += 1
        if m == 0 or n == 0:
            return
        wide = np.dtype(np.float64 if compute in (70, 71) else np.float32)
        scalars = [self._scalar(state, address, wide, name) for address, name in ((alpha, "alpha"), (beta, "beta"))]
        tf32 = compute == 77 or (compute == 68 and state.math_mode == TF32_MATH and Atype == 0)
        types = (Atype, Btype, Ctype, wide, tf32)

        def product() -> None:
            self._product(transa, transb, m, n, k, scalars[0](), A, lda, B, ldb, scalars[1](), C, ldc, *types)

        self._stream_of(state).submit(product)

    def _product(
        self,
        transa,
        transb,
        m,
        n,
        k,
        alpha,
        A,
        lda,
        B,
        ldb,
        beta,
        C,
        ldc,
        Atype,
        Btype,
        Ctype,
        wide,
        tf32,
        epilogue=lambda result, b: result,
    ) -> None:
        c = self._matrix("C", C, Ctype, m, n, ldc)
        start, end = C, C + ((n - 1) * ldc + m) * c.itemsize
        if self._device.is_read_only(start, end):
            raise ReadOnlyWrite("gemmEx: C was marked read-only by the caller")
        result, b = np.zeros((m, n), wide), np.zeros((k, n), wide)
        if k and alpha:
            a = self._matrix("A", A, Atype, k if transa else m, m if transa else k, lda)
            b = self._matrix("B", B, Btype, n if transb else k, k if transb else n, ldb)
            if any(np.may_share_memory(x, c) and np.shares_memory(x, c) for x in (a, b)):
                raise OutOfBounds("gemmEx: C overlaps A or B, which cuBLAS does not allow")
            a, b = (_rounded(x, tf32).astype(wide) for x in (a, b))
            with np.errstate(all="ignore"):
                b = b.T if transb else b
                result = alpha * ((a.T if transa else a) @ b)
        if beta:
            result = result + beta * c.astype(wide)
        with np.errstate(all="ignore"):
            c[...] = epilogue(result, b).astype(c.dtype)

    @_check_integers
    def sgemm(self, handle, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc):
        self.gemmEx(handle, transa, transb, m, n, k, alpha, A, 0, lda, B, 0, ldb, beta, C, 0, ldc, 68, -1)

    @_check_integers
    def dgemm(self, handle, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc):
        self.gemmEx(handle, transa, transb, m, n, k, alpha, A, 1, lda, B, 1, ldb, beta, C, 1, ldc, 70, -1)

    def _check(self, handle: int) -> _Handle:
        if handle not in self._handles:
            raise CUBLASError(1)
        return self._handles[handle]

    def _stream_of(self, handle: _Handle) -> streams.Stream:
        if streams.current().is_capturing():
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        return streams.current()

    def _scalar(self, handle: _Handle, address: int, dtype: np.dtype, name: str) -> Any:
        """alpha or beta, in the host's or the device's memory as the pointer mode says: read now, or when it runs."""
        on_device = self._device.memory.find(address) is not None
        if on_device != bool(handle.pointer_mode) or not address:
            mode = "device" if handle.pointer_mode else "host"
            raise OutOfBounds(f"gemmEx: {name}, 0x{address:x}, is not in the {mode}'s memory, where it is looked for")
        kind = ctypes.c_double if dtype == np.float64 else ctypes.c_float
        if on_device:
            return lambda: dtype.type(kind.from_address(address).value)
        value = dtype.type(kind.from_address(address).value)
        return lambda: value

    def _matrix(self, name: str, address: int, code: int, rows: int, columns: int, leading: int) -> np.ndarray:
        """A matrix in device memory, (rows, columns), as NumPy sees it."""
        dtype = _dtype(code)
        size = ((columns - 1) * leading + rows) * dtype.itemsize
        allocation = self._device.memory.find(address)
        if allocation is None or address + size > allocation.end:
            problem = "is not in device memory" if allocation is None else "runs over the end of its allocation"
            what = f"{columns} columns of {rows} {dtype}, leading dimension {leading}"
            raise OutOfBounds(f"gemmEx: {name} ({what}) at 0x{address:x} {problem}")
        if address % dtype.itemsize:
            raise CUBLASError(7)
        flat = bytes_at(address, size).view(dtype)
        strides = (dtype.itemsize, leading * dtype.itemsize)
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), strides, writeable=True)


class _NvmathLibrary(_Library):
    """cuBLAS through nvmath-python: products go to the handle's stream; a graph needs a workspace of the caller's."""

    def __init__(self, device: Emulator) -> None:
        super().__init__(device)
        self._handles, self._numbers = {}, itertools.count(2 * HANDLE)

    @_check_integers
    def destroy(self, handle: int) -> None:
        self._check(handle)
        del self._handles[handle]

    @_check_integers
    def setStream(self, handle: int, stream: int) -> None:
        state = self._check(handle)
        state.stream, state.workspace = stream, 0  # cuBLAS goes back to its own workspace

    @_check_integers
    def setWorkspace(self, handle: int, workspace: int, size: int) -> None:
        state = self._check(handle)
        if workspace % 256 or self._device.memory.find(workspace) is None:
            raise CUBLASError(7)
        state.workspace = workspace

    def _stream_of(self, handle: _Handle) -> streams.Stream:
        stream = streams.Stream.living[handle.stream]
        if stream.is_capturing() and not handle.workspace:
            raise CUBLASError(15)
        return stream


def _rounded(x: np.ndarray, tf32: bool) -> np.ndarray:
    """With TF32, float32 rounded to 10 bits of mantissa (to nearest, ties to even)."""
    if not tf32:
        return x
    bits = np.ascontiguousarray(x).view(np.uint32)
    even = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return np.where(np.isfinite(x), (even & np.uint32(0xFFFFE000)).view(np.float32), x)
