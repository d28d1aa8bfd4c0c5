"""The three GEMMs of a layer on cuBLAS, without a transposed copy.

cuBLAS is column-major: a C-order (m, n) array is to it an (n, m) one. C = A B in C order is Cᵀ = Bᵀ Aᵀ in its eyes,
so the factors change places and nothing is moved.

Leans on nvmath-python's binding of cublasGemmEx, with a handle and a workspace of our own, which a CUDA graph can hold;
where that package is missing on CuPy's, which refuses to be captured.
"""

from __future__ import annotations

import threading
from typing import Any

import cupy
import numpy as np

from ..precision import Precision
from .launch import device_error

_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32, _COMPUTE_64F = 68, 77, 70  # cublasComputeType
_DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT: cuBLAS chooses
_TRANSPOSED = {False: 0, True: 1}  # CUBLAS_OP_N, CUBLAS_OP_T
_ON_HOST, _ON_DEVICE = 0, 1  # cublasPointerMode: where alpha and beta are
# cuBLAS advises 32 MiB from Hopper on, 4 MiB before. Less leaves room for our own scratch in the memory plan: partial
# sums of 8.3 MiB on 132 multiprocessors, 10 MiB on 160.
WORKSPACE_BYTES = {True: 20 << 20, False: 4 << 20}


class GEMM:
    """``out = alpha · op(a) op(b) + beta · out`` at one precision; 16-bit factors are summed in float32."""

    def __init__(self, precision: Precision) -> None:
        if precision.master == "float64":
            self._compute = _COMPUTE_64F
        else:
            self._compute = _COMPUTE_32F_FAST_TF32 if precision.reduced_gemm else _COMPUTE_32F
        self.scalar = precision.master_dtype  # of alpha and beta
        self._pairs: dict[tuple[float, float], Any] = {}

    def __call__(
        self,
        a: Any,
        b: Any,
        out: Any,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        beta: float = 0.0,
        factors: Any = None,
    ) -> None:
        """a, b, out: C-order matrices of the precision's storage type, or of float32; out: (m, n).

        factors: a device array with alpha and beta in it, (2,) of type ``scalar``, read when the product runs; it
        takes the place of the two numbers.
        """
        m, n = out.shape
        k = a.shape[0] if transpose_a else a.shape[1]
        if m == 0 or n == 0:
            return
        if k == 0:
            self._scale(out, beta if factors is None else factors[1])
            return
        address = self._host_pair(alpha, beta) if factors is None else factors.data.ptr
        library = binding()
        library.prepare(_ON_HOST if factors is None else _ON_DEVICE)
        try:
            library.gemm(
                library.handle,
                _TRANSPOSED[transpose_b],
                _TRANSPOSED[transpose_a],
                n, m, k,
                address, b.data.ptr, _TYPES[b.dtype.name], b.shape[1],
                a.data.ptr, _TYPES[a.dtype.name], a.shape[1],
                address + self.scalar.itemsize, out.data.ptr, _TYPES[out.dtype.name], n,
                self._compute, _DEFAULT_ALGORITHM,
            )  # fmt: skip
        except Exception as error:
            raise device_error(error, "GEMM", (a, b, out)) from error

    def _host_pair(self, alpha: float, beta: float) -> int:
        """The address of two numbers in the host's memory, which stay there."""
        if (alpha, beta) not in self._pairs:
            self._pairs[alpha, beta] = np.array([alpha, beta], self.scalar)
        return self._pairs[alpha, beta].ctypes.data

    def _scale(self, out: Any, beta: Any) -> None:
        """A sum of no products; with beta 0 what stood there is not read, not even a NaN."""
        if isinstance(beta, float) and beta == 0:
            out.fill(0)
        else:
            out *= beta


class _Nvmath:
    """cuBLAS through nvmath-python, on a handle of our own."""

    in_graphs = True

    def __init__(self) -> None:
        from nvmath.bindings import cublas

        self.gemm = cublas.gemm_ex
        self._cublas = cublas
        self.handle = cublas.create()
        hopper = int(cupy.cuda.Device().compute_capability) >= 90
        self._workspace = cupy.empty(WORKSPACE_BYTES[hopper], np.uint8)
        self._stream: int | None = None
        self._mode = _ON_HOST

    def prepare(self, mode: int) -> None:
        """Send what follows to the current stream, with alpha and beta read from where ``mode`` says."""
        stream = cupy.cuda.get_current_stream().ptr
        if stream != self._stream:
            self._cublas.set_stream(self.handle, stream)
            self._cublas.set_workspace(self.handle, self._workspace.data.ptr, self._workspace.nbytes)  # it was reset
            self._stream = stream
        if mode != self._mode:
            self._cublas.set_pointer_mode(self.handle, mode)
            self._mode = mode


class _CuPy:
    """cuBLAS through CuPy, on CuPy's handle, which follows CuPy's current stream."""

    in_graphs = False

    def __init__(self) -> None:
        from cupy_backends.cuda.libs import cublas

        self.gemm = self._gemm
        self._cublas = cublas
        self._mode = _ON_HOST

    @property
    def handle(self) -> int:
        return cupy.cuda.device.get_cublas_handle()

    def prepare(self, mode: int) -> None:
        self._mode = mode

    def _gemm(self, handle: int, *arguments: Any) -> None:
        before = self._cublas.getPointerMode(handle)  # the handle is CuPy's, and CuPy's own products rely on its mode
        self._cublas.setPointerMode(handle, self._mode)
        try:
            self._cublas.gemmEx(handle, *arguments)
        finally:
            self._cublas.setPointerMode(handle, before)


_bindings = threading.local()


def binding() -> Any:
    """This thread's way to cuBLAS on the current device."""
    by_device = _bindings.__dict__.setdefault("by_device", {})
    device = cupy.cuda.device.get_device_id()
    if device not in by_device:
        try:
            by_device[device] = _Nvmath()
        except (ImportError, RuntimeError):  # not installed; or installed, and it does not find cuBLAS
            by_device[device] = _CuPy()
    return by_device[device]
