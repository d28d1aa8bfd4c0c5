"""The three GEMMs of a layer on cuBLAS, without a transposed copy.

cuBLAS is column-major: a C-order (m, n) array is to it an (n, m) one. C = A B in C order is Cᵀ = Bᵀ Aᵀ in its eyes,
so the factors change places and nothing is moved.

Leans on nvmath-python's bindings, with handles and workspaces of our own, which a CUDA graph can hold: on `lt` for
cublasLt, and on cublasGemmEx for what that does not take. Where the package is missing on CuPy's cuBLAS, which refuses
to be captured.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import cupy
import numpy as np

from ..notices import say_once
from ..precision import Precision
from . import launch, lt
from .interface import DeviceError
from .launch import device_error
from .lt import Operands, Place, Product

_COMPUTE_32F, _COMPUTE_32F_FAST_TF32, _COMPUTE_64F = 68, 77, 70  # cublasComputeType
_DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT: cuBLAS chooses
_TRANSPOSED = {False: 0, True: 1}  # CUBLAS_OP_N, CUBLAS_OP_T
_ON_HOST, _ON_DEVICE = 0, 1  # cublasPointerMode: where alpha and beta are
# For both streams together, half of it for each: an algorithm runs in either. cuBLAS advises 32 MiB from Hopper on,
# 4 MiB before. Less leaves room for our own scratch in the memory plan: partial sums of 8.3 MiB on 132 multiprocessors,
# 10 MiB on 160. What an algorithm needs it for, the parts of sums that are split, is wanted by small results only.
WORKSPACE_BYTES = {True: 20 << 20, False: 8 << 20}


class GEMM:
    """``out = alpha · op(a) op(b) + beta · out`` at one precision; 16-bit factors are summed in float32."""

    def __init__(self, precision: Precision) -> None:
        if precision.master == "float64":
            self._compute = _COMPUTE_64F
        else:
            self._compute = _COMPUTE_32F_FAST_TF32 if precision.reduced_gemm else _COMPUTE_32F
        self.scalar = precision.master_dtype  # of alpha and beta
        self._scalar_name = self.scalar.name
        self._pairs: dict[tuple[float, float], tuple[Any, int]] = {}

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
        overwrites = factors is None and beta == 0
        transposed = transpose_a, transpose_b
        plan, at, place = self._planned(library, a, b, out, transposed, address, factors is not None, overwrites)
        try:
            if plan is not None:
                plan.run(at, place)
                return
            library.prepare(_ON_HOST if factors is None else _ON_DEVICE)
            library.gemm(
                library.handle,
                _TRANSPOSED[transpose_b],
                _TRANSPOSED[transpose_a],
                n, m, k,
                address, b.data.ptr, lt.TYPES[b.dtype.name], b.shape[1],
                a.data.ptr, lt.TYPES[a.dtype.name], a.shape[1],
                address + self.scalar.itemsize, out.data.ptr, lt.TYPES[out.dtype.name], n,
                self._compute, _DEFAULT_ALGORITHM,
            )  # fmt: skip
        except Exception as error:
            raise device_error(error, "GEMM", (a, b, out)) from error

    def fused(
        self,
        epilogue: int,
        a: Any,
        b: Any,
        out: Any,
        transpose_a: bool = False,
        transpose_b: bool = False,
        bias: Any = None,
        auxiliary: Any = None,
    ) -> Callable[[], None] | None:
        """Something that queues out = epilogue(op(a) op(b)), an epilogue of `lt`; None where cublasLt has no way to.

        bias: (n,) of out's dtype, or what the bias gradient goes to; auxiliary: the mask, or z.
        """
        library = binding()
        if 0 in (*out.shape, *a.shape) or library.lt is None:
            return None
        beside = [0 if array is None else array.data.ptr for array in (bias, auxiliary)]
        address, transposed = self._host_pair(1.0, 0.0), (transpose_a, transpose_b)
        plan, at, _ = self._planned(library, a, b, out, transposed, address, False, True, epilogue, *beside)
        if plan is None:
            return None
        arrays = a, b, out, bias, auxiliary  # stay alive with the work

        def run() -> None:
            try:
                plan.run(at, binding().place())
            except Exception as error:
                raise device_error(error, "GEMM", arrays) from error

        return run

    def product(
        self,
        a: Any,
        b: Any,
        out: Any,
        transpose_a: bool = False,
        transpose_b: bool = False,
        on_device: bool = False,
        epilogue: int = lt.DEFAULT,
    ) -> Product:
        """What a plan for out = op(a) op(b) depends on; on_device: whether alpha and beta are there."""
        (m, n), k = out.shape, a.shape[0] if transpose_a else a.shape[1]
        aligned = lt.alignment(a.data.ptr), lt.alignment(b.data.ptr), lt.alignment(out.data.ptr)
        types = _name(a.dtype), _name(out.dtype)
        return Product(
            m, n, k, transpose_a, transpose_b, types, self._compute, self._scalar_name, on_device, aligned, epilogue
        )

    def _planned(
        self,
        library: Any,
        a: Any,
        b: Any,
        out: Any,
        transposed: tuple[bool, bool],
        scalars: int,
        on_device: bool,
        overwrites: bool,
        epilogue: int = lt.DEFAULT,
        bias: int = 0,
        auxiliary: int = 0,
    ) -> tuple[Any, Operands, Any]:
        """cublasLt's plan of a product, or None; its operands; and the place where it runs."""
        at = Operands(a.data.ptr, b.data.ptr, out.data.ptr, scalars, bias, auxiliary)
        if library.lt is None:
            return None, at, None
        product = self.product(a, b, out, *transposed, on_device, epilogue)

        def rehearsal() -> Operands | None:
            if overwrites:
                return at
            try:
                library.spare = cupy.empty_like(out)  # what stands in out is needed
            except cupy.cuda.memory.OutOfMemoryError:
                return None
            return at._replace(out=library.spare.data.ptr)

        try:
            place = library.place()
            return library.lt.plan(product, place, rehearsal), at, place
        except DeviceError:
            raise
        except Exception as error:
            _without_lt(error)
            library.lt = None
            return None, at, None
        finally:
            library.spare = None

    def _host_pair(self, alpha: float, beta: float) -> int:
        """The address of two numbers in the host's memory, which stay there."""
        if (alpha, beta) not in self._pairs:
            pair = np.array([alpha, beta], self.scalar)
            self._pairs[alpha, beta] = pair, pair.ctypes.data
        return self._pairs[alpha, beta][1]

    def _scale(self, out: Any, beta: Any) -> None:
        """A sum of no products; with beta 0 what stood there is not read, not even a NaN."""
        if isinstance(beta, float) and beta == 0:
            out.fill(0)
        else:
            out *= beta


class _Nvmath:
    """cuBLAS through nvmath-python, on handles of our own."""

    in_graphs = True

    def __init__(self) -> None:
        from nvmath.bindings import cublas

        self.gemm = cublas.gemm_ex
        self._cublas = cublas
        self.handle = cublas.create()
        hopper = int(cupy.cuda.Device().compute_capability) >= 90
        self._workspace = cupy.empty(WORKSPACE_BYTES[hopper], np.uint8)
        self._half = self._workspace.nbytes // 2
        self._aside = False
        self._placed: tuple[int, bool] | None = None
        self._mode = _ON_HOST
        self.spare: Any = None  # what a search writes to
        self.lt = self._find_lt()

    def place(self) -> Place:
        """The current stream, with the workspace that is its own."""
        start = self._workspace.data.ptr + (self._half if self._aside else 0)
        return Place(cupy.cuda.get_current_stream().ptr, start, self._half)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it products run beside those of another stream, and keep out of their workspace."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def prepare(self, mode: int) -> None:
        """Send what follows to the current stream, with alpha and beta read from where ``mode`` says."""
        place = self.place()
        if (place.stream, self._aside) != self._placed:
            self._cublas.set_stream(self.handle, place.stream)
            self._cublas.set_workspace(self.handle, place.workspace, place.size)  # it was reset
            self._placed = place.stream, self._aside
        if mode != self._mode:
            self._cublas.set_pointer_mode(self.handle, mode)
            self._mode = mode

    def _find_lt(self) -> lt.Library | None:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.device.get_device_id())
        try:
            return lt.Library(f"{properties['name'].decode()}, {launch.processors()} multiprocessors")
        except Exception as error:  # a library that is missing, or too old for the binding
            _without_lt(error)
            return None


class _CuPy:
    """cuBLAS through CuPy, on CuPy's handle, which follows CuPy's current stream."""

    in_graphs = False
    lt = None

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

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _gemm(self, handle: int, *arguments: Any) -> None:
        before = self._cublas.getPointerMode(handle)  # the handle is CuPy's, and CuPy's own products rely on its mode
        self._cublas.setPointerMode(handle, self._mode)
        try:
            self._cublas.gemmEx(handle, *arguments)
        finally:
            self._cublas.setPointerMode(handle, before)


def _without_lt(error: Exception) -> None:
    say_once(f"cublasLt cannot be used ({type(error).__name__}: {error}); cublasGemmEx takes its place")


_name = functools.cache(lambda dtype: dtype.name)  # which NumPy puts together each time
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
