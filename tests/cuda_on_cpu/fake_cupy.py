"""A stand-in for CuPy: the few names of it that the CUDA half of the package uses, on NumPy and the emulated device.

`installed()` puts it into sys.modules as `cupy` (with `cupy_backends` and `cupyx`) for the time of a `with` block. An
array is a numpy.ndarray that lives in the emulated device's memory. Where CuPy differs from NumPy in ways that hide
mistakes until the first real GPU, so does the stand-in: a NumPy array is refused in arithmetic and as a kernel
argument, copies between the two go through asarray, get and set, `empty` is full of NaN, and a reduction or an indexed
element is a 0-d array. What copies to the host or waits is counted in the emulator's `counts`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import math
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import compiler, fake_cublas, fake_cublaslt, fake_nccl, libraries, streams
from .emulator import Emulator, Pointer, fill
from .streams import CUDARuntimeError, Event, Graph, Order, Stream

device = Emulator()
Order.count = staticmethod(lambda name: device.counts.update([name]))
ATTRIBUTES = {
    "MultiProcessorCount": 3,  # few, so that grid-stride loops go round
    "MaxThreadsPerMultiProcessor": 2048,
    "MaxBlocksPerMultiprocessor": 32,
    "MaxThreadsPerBlock": 1024,
    "MaxBlockDimX": 1024,
    "MaxBlockDimY": 1024,
    "MaxBlockDimZ": 64,
    "MaxGridDimX": 2**31 - 1,
    "MaxGridDimY": 65535,
    "MaxGridDimZ": 65535,
    "WarpSize": 32,
    "MaxSharedMemoryPerBlock": 49152,
    "MaxRegistersPerBlock": 65536,
    "L2CacheSize": 50 << 20,
    "ComputeCapabilityMajor": 9,
    "ComputeCapabilityMinor": 0,
}
_RECORDED = libraries.recorded()
NUMPYS_ALONE = [name for name in dir(np.ndarray) if name[0] != "_" and f"cupy.ndarray.{name}" not in _RECORDED]
NAME = "Emulated GPU"
MEMORY = 8 << 30


# --- arrays ---


class ndarray(np.ndarray):
    """An array in the emulated device's memory."""

    on_device = True

    def __new__(cls, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: str = "C") -> Any:
        dtype = np.dtype(dtype)
        shape = (shape,) if np.ndim(shape) == 0 else tuple(int(n) for n in shape)
        size = math.prod(shape) * dtype.itemsize
        if memptr is not None:
            buffer = (ctypes.c_uint8 * size).from_address(memptr.ptr)
            array = super().__new__(cls, shape, dtype, buffer, 0, strides, order)
            array._owner = memptr
            return array
        _refuse_allocation(size)
        device.counts["allocations"] += 1
        return super().__new__(cls, shape, dtype, device.memory.allocate(size, dtype), 0, strides, order)

    @property
    def data(self) -> MemoryPointer:  # type: ignore[override]
        return MemoryPointer(self.__array_interface__["data"][0] if self.size else 0, self)

    @property
    def device(self) -> Device:  # type: ignore[override]
        return Device(0)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        strides = None if self.flags.c_contiguous else self.strides
        where = (self.data.ptr, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": where, "version": 3, "strides": strides}

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        _to_host(stream)
        if out is None:
            return np.array(self.view(np.ndarray), order=order, copy=True)
        if out.dtype != self.dtype or out.shape != self.shape:
            raise TypeError(f"out: {out.dtype} {out.shape}, the array is {self.dtype} {self.shape}")
        out[...] = self.view(np.ndarray)
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if type(arr) is not np.ndarray:
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError(f"Shape or dtype mismatch: {arr.dtype} {arr.shape} into {self.dtype} {self.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        device.counts["copies to device"] += 1
        _submit(lambda: np.copyto(self.view(np.ndarray), arr), stream)

    def fill(self, value: Any) -> None:
        _submit(lambda: self.view(np.ndarray).fill(value))

    def copy(self, order: str = "C") -> ndarray:  # type: ignore[override]
        return self.astype(self.dtype, order)

    def astype(self, dtype: Any, order: str = "K", casting: str = "unsafe", subok: Any = None, copy: Any = True) -> Any:
        if not copy and self.dtype == np.dtype(dtype):
            return self
        fortran = order == "F" or (order in "KA" and self.flags.f_contiguous and not self.flags.c_contiguous)
        made = ndarray(self.shape, dtype, order="F" if fortran else "C")
        _submit(lambda: np.copyto(made.view(np.ndarray), self.view(np.ndarray), casting=casting))
        return made

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    def __getitem__(self, key: Any) -> Any:
        _refuse_host(*(key if isinstance(key, tuple) else (key,)))
        found = super().__getitem__(key)
        if not isinstance(found, np.ndarray):
            found = super().__getitem__((*(key if isinstance(key, tuple) else (key,)), Ellipsis))
        shared = np.may_share_memory(found.view(np.ndarray), self.view(np.ndarray))
        return found if shared or not found.size else _on_device(found)

    def __setitem__(self, key: Any, value: Any) -> None:
        _refuse_host(value)
        part = self.view(np.ndarray)
        _submit(lambda: part.__setitem__(key, _host(value)))

    def item(self, *index: int) -> Any:
        _to_host()
        return self.view(np.ndarray).item(*index)

    def tolist(self) -> Any:
        _to_host()
        return self.view(np.ndarray).tolist()

    def __float__(self) -> float:
        _to_host()
        return float(self.view(np.ndarray)[()])

    def __int__(self) -> int:
        _to_host()
        return int(self.view(np.ndarray)[()])

    def __bool__(self) -> bool:
        _to_host()
        return bool(self.view(np.ndarray))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **options: Any) -> Any:
        _refuse_host(*inputs, *out)
        if out:
            options["out"] = tuple(_host(array) for array in out)
            _submit(lambda: getattr(ufunc, method)(*map(_host, inputs), **options))
            return out[0] if len(out) == 1 else out
        streams.current().drain()
        return _on_device(getattr(ufunc, method)(*map(_host, inputs), **options))

    def __array_function__(self, function: Any, types_: Any, args: Any, options: Any) -> Any:
        return _call(function, args, options)

    def __reduce__(self) -> Any:
        return asarray, (self.get(),)


def _not_cupys(self: ndarray) -> Any:
    raise AttributeError("CuPy's arrays have no such attribute")


for _name in NUMPYS_ALONE:
    setattr(ndarray, _name, property(_not_cupys))


def _to_host(stream: Stream | None = None) -> None:
    _refuse_if_broken()
    (stream or streams.current()).synchronize()
    device.counts["copies to host"] += 1


def _submit(work: Any, stream: Stream | None = None) -> None:
    (stream or streams.current()).submit(work)


def _refuse_if_broken() -> None:
    """The error of a device that has had one which it does not recover from."""
    if device.broken_after is not None:
        device.broken_after -= 1
        if device.broken_after < 0:
            raise CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")


Order.check = staticmethod(_refuse_if_broken)


def _refuse_allocation(size: int) -> None:
    streams.current().refuse_capture("allocate memory")
    if device.memory_limit is not None and device.memory.bytes_in_use() + size > device.memory_limit:
        raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes")


def _host(value: Any) -> Any:
    """The same memory as a plain NumPy array."""
    return value.view(np.ndarray) if isinstance(value, ndarray) else value


def _refuse_host(*values: Any) -> None:
    for value in values:
        if type(value) is np.ndarray and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}: CuPy takes its own arrays; use cupy.asarray, or .set()")


def _on_device(value: Any) -> Any:
    """A result of NumPy as an array of its own in the device's memory."""
    if isinstance(value, tuple):
        return tuple(map(_on_device, value))
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    value = np.asarray(value)
    strides = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    array = ndarray(value.shape, value.dtype, order=strides)
    array.view(np.ndarray)[...] = value
    return array


def _call(function: Any, args: Any, options: Any) -> Any:
    """A NumPy function on device arrays: the result is one as well."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(plain, value))
        _refuse_host(value)
        return _host(value)

    out = options.get("out")
    streams.current().refuse_capture("allocate memory")
    streams.current().drain()
    result = function(*map(plain, args), **{name: plain(value) for name, value in options.items()})
    return out if out is not None else _on_device(result)


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def empty_like(prototype: Any, dtype: Any = None) -> ndarray:
    return ndarray(prototype.shape, prototype.dtype if dtype is None else dtype)


def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    array = ndarray(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order=order)
    array.view(np.ndarray)[...] = _host(fill_value)
    return array


def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype, order)


def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


def zeros_like(a: Any, dtype: Any = None) -> ndarray:
    return zeros(a.shape, a.dtype if dtype is None else dtype)


def _adopted(foreign: Any) -> ndarray:
    """Another library's device array, in the memory that it has."""
    told = foreign.__cuda_array_interface__
    memory = MemoryPointer(told["data"][0], foreign)
    return ndarray(told["shape"], np.dtype(told["typestr"]), memory, told["strides"])


def from_dlpack(array: Any) -> ndarray:
    held = array._array
    return ndarray(held.shape, held.dtype, MemoryPointer(held.data.ptr, array), held.strides)


def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K", **_: Any) -> ndarray:
    if not isinstance(obj, ndarray) and hasattr(obj, "__cuda_array_interface__"):
        obj = _adopted(obj)
    if isinstance(obj, ndarray) and not copy and (dtype is None or obj.dtype == np.dtype(dtype)):
        return obj
    if not isinstance(obj, ndarray):
        device.counts["copies to device"] += 1
    return _on_device(np.array(_host(obj), dtype, order="C" if order in "KA" else order))


def asarray(a: Any, dtype: Any = None, order: str | None = None, *, blocking: bool = False) -> ndarray:
    return array(a, dtype, copy=False, order=order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else _on_device(np.ascontiguousarray(_host(a)))


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> np.ndarray:
    return a.get(stream, order, out) if isinstance(a, ndarray) else np.asarray(a)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    if type(src) is np.ndarray and src.size != 1:
        raise ValueError("non-scalar numpy.ndarray cannot be used for copyto")
    _submit(lambda: np.copyto(_host(dst), _host(src), casting=casting, where=True if where is None else _host(where)))


def matmul(x1: ndarray, x2: ndarray, /, out: ndarray | None = None, **options: Any) -> ndarray:
    """With 16-bit types the sums run in float32, as on a GPU."""
    _refuse_host(x1, x2)
    device.counts["gemms"] += 1
    dtype = np.result_type(x1.dtype, x2.dtype)
    wide = np.float32 if dtype.itemsize == 2 else dtype
    product = np.matmul(_host(x1).astype(wide), _host(x2).astype(wide), **options).astype(dtype)
    if out is None:
        return _on_device(product)
    _host(out)[...] = product
    return out


def get_array_module(*args: Any) -> Any:
    return sys.modules["cupy"] if any(isinstance(a, ndarray) for a in args) else np


# --- kernels ---


class RawKernel:
    """A kernel; calling it launches it."""

    def __init__(self, code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc", **_: Any) -> None:
        self._of(RawModule(code=code, options=options, backend=backend), name)

    def _of(self, module: RawModule, name: str) -> RawKernel:
        self.name, self._kernel = name, module._find(name)
        self.max_threads_per_block = self._kernel.max_threads
        self.attributes = {"max_threads_per_block": self._kernel.max_threads, "num_regs": 32, "local_size_bytes": 0}
        return self

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0, stream: Any = None) -> None:
        if shared_mem:
            raise ValueError(f"kernel {self.name}: dynamic shared memory is not emulated")
        if streams.current().is_capturing():  # a graph holds addresses and values, and keeps no array alive
            args = tuple(Pointer(a.data.ptr) if isinstance(a, ndarray) else a for a in args)
        _submit(lambda: device.launch(self._kernel, grid, block, args))

    def compile(self, log_stream: Any = None) -> None:
        pass


class RawModule:
    """Kernel text, compiled when the first kernel of it is asked for."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...] = (),
        backend: str = "nvrtc",
        name_expressions: Any = None,
        **_: Any,
    ) -> None:
        if not isinstance(code, str) or not isinstance(options, tuple):
            raise TypeError("code must be a str, options a tuple")
        if backend != "nvrtc":
            raise ValueError(f"backend {backend!r} is not emulated")
        self.code, self.options, self.backend = code, options, backend
        self.name_expressions = tuple(name_expressions or ())
        self._module: compiler.Module | None = None

    def compile(self, log_stream: Any = None) -> None:
        if self._module is None:
            self._module = compiler.Module(self.code, self.options, self.name_expressions)

    def get_function(self, name: str) -> RawKernel:
        return RawKernel.__new__(RawKernel)._of(self, name)

    def _find(self, name: str) -> compiler.Kernel:
        self.compile()
        assert self._module is not None
        if name not in self._module.kernels:
            found = ", ".join(self._module.kernels) or "none"
            raise CUDADriverError(
                f'CUDA_ERROR_NOT_FOUND: named symbol not found: {name!r} is not extern "C", nor in name_expressions; '
                f"there is: {found}"
            )
        return self._module.kernels[name]


class ElementwiseKernel:
    """An operation on every element of arrays that are broadcast together; X is the one type of all of them."""

    def __init__(
        self, in_params: str, out_params: str, operation: str, name: str = "kernel", *, preamble: str = "", **_: Any
    ) -> None:
        self._inputs, self._outputs = _parameters(in_params), _parameters(out_params)
        self._operation, self._name, self._preamble = operation, name, preamble
        self._kernels: dict[str, RawKernel] = {}

    def __call__(self, *args: Any, size: int | None = None) -> Any:
        if len(args) not in (len(self._inputs), len(self._inputs) + len(self._outputs)):
            raise TypeError(f"Wrong number of arguments: {len(args)}")
        dtypes = {a.dtype for a in args if isinstance(a, ndarray)}
        if len(dtypes) != 1:
            raise TypeError(f"Type is mismatched. X {dtypes}")
        (dtype,) = dtypes
        inputs = [a if isinstance(a, ndarray) else asarray(a, dtype) for a in args[: len(self._inputs)]]
        outputs = list(args[len(self._inputs) :])
        shape = np.broadcast_shapes(*(a.shape for a in (*inputs, *outputs)))
        outputs = outputs or [empty(shape, dtype) for _ in self._outputs]
        plain = [
            a if a.shape == shape and a.flags.c_contiguous
            else _on_device(np.ascontiguousarray(np.broadcast_to(_host(a), shape)))
            for a in inputs
        ]  # fmt: skip
        targets = [a if a.flags.c_contiguous else a.copy() for a in outputs]
        count = math.prod(shape)
        if count:
            self._kernel(dtype.name)((min(2, -(-count // 128)),), (128,), (*plain, *targets, np.int64(count)))
        for target, a in zip(targets, outputs):
            if target is not a:
                a[...] = target
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _kernel(self, dtype: str) -> RawKernel:
        if dtype not in self._kernels:
            pointers = [f"const X* _{p}" for p in self._inputs] + [f"X* _{p}" for p in self._outputs]
            elements = [f"const X {p} = _{p}[i];" for p in self._inputs] + [f"X& {p} = _{p}[i];" for p in self._outputs]
            code = f"""{_INCLUDES.get(dtype, "")}
typedef {_C_TYPE[dtype]} X;
{self._preamble}
extern "C" __global__ void {self._name}({", ".join(pointers)}, long long n) {{
    long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, stride = (long long)gridDim.x * blockDim.x;
    for (long long i = first; i < n; i += stride) {{
        {" ".join([*elements, self._operation])};
    }}
}}"""
            self._kernels[dtype] = RawKernel(code, self._name)
        return self._kernels[dtype]


_C_TYPE = {"float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


_INCLUDES = {"float16": "#include <cuda_fp16.h>", "bfloat16": "#include <cuda_bf16.h>"}


def _parameters(declared: str) -> list[str]:
    pairs = [part.split() for part in declared.split(",") if part.strip()]
    if any(letter != "X" for letter, _ in pairs):
        raise TypeError(f"only the type X is emulated: {declared}")
    return [name for _, name in pairs]


# --- cupy.cuda ---


class MemoryPointer(Pointer):
    """An address in device memory, with the array it belongs to."""

    @property
    def device(self) -> Device:
        return Device(0)

    def memset(self, value: int, size: int) -> None:
        ctypes.memset(self.ptr, value, size)

    memset_async = memset


def alloc(size: int) -> MemoryPointer:
    array = ndarray(size, np.uint8)
    return MemoryPointer(array.__array_interface__["data"][0], array)


class Device:
    """The one device there is."""

    def __init__(self, device: Any = None) -> None:
        self.id = 0 if device is None else int(device)
        if self.id:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    attributes = ATTRIBUTES
    compute_capability = "90"
    mem_info = (MEMORY, MEMORY)
    cublas_handle = fake_cublas.HANDLE
    pci_bus_id = f"0000:{int(os.environ.get('MPI_LOCALRANKID', 0)):02x}:00.0"  # each process has its own device

    def __int__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> Device:
        return self

    def synchronize(self) -> None:
        streams.current().refuse_capture("synchronise")
        device.counts["synchronisations"] += 1
        streams.drain_all()


def _current_stream(device_id: int = -1) -> Stream:
    return streams.current()


class PinnedMemoryPointer(bytearray):
    """Page-locked memory of the host: a buffer, for numpy.frombuffer."""

    @property
    def ptr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self)) if self else 0

    def size(self) -> int:
        return len(self)


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    return PinnedMemoryPointer(b"\xa5" * size)


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    buffer = np.empty(math.prod(np.atleast_1d(shape)) * np.dtype(dtype).itemsize, np.uint8)
    fill(buffer, np.dtype(dtype), 0)
    return buffer.view(dtype).reshape(shape, order=order)


class _MemoryPool:
    def used_bytes(self) -> int:
        return device.memory.bytes_in_use()

    total_bytes = used_bytes

    def free_all_blocks(self) -> None:
        pass

    def set_limit(self, size: Any = None, fraction: Any = None) -> None:
        pass

    def get_limit(self) -> int:
        return 0

    def n_free_blocks(self) -> int:
        return 0


class OutOfMemoryError(MemoryError):
    """What CuPy's memory pool says when there is none left."""


class CUDADriverError(RuntimeError):
    """An error of the CUDA driver."""


def _properties(device_id: int) -> dict[str, Any]:
    Device(device_id)
    return {
        "name": NAME.encode(),
        "totalGlobalMem": MEMORY,
        "multiProcessorCount": ATTRIBUTES["MultiProcessorCount"],
        "major": 9,
        "minor": 0,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "sharedMemPerBlock": ATTRIBUTES["MaxSharedMemoryPerBlock"],
    }


# --- the modules ---


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name, f"A stand-in for {name}.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__.update(contents)
    return module


runtime = _module(
    "cupy_backends.cuda.api.runtime",
    getDeviceCount=lambda: 1,
    getDevice=lambda: 0,
    setDevice=lambda device_id: Device(device_id) and None,
    deviceSynchronize=lambda: Device().synchronize(),
    getDeviceProperties=_properties,
    driverGetVersion=lambda: 12090,
    runtimeGetVersion=lambda: 12090,
    memGetInfo=lambda: (MEMORY, MEMORY),
    is_hip=False,
    CUDARuntimeError=CUDARuntimeError,
    **fake_cublas.DATA_TYPES,
)
driver = _module("cupy_backends.cuda.api.driver", CUDADriverError=CUDADriverError, get_build_version=lambda: 12090)
cublas = _module("cupy_backends.cuda.libs.cublas", **fake_cublas.names(device))
nvmath_cublas = _module("nvmath.bindings.cublas", **fake_cublas.nvmath_names(device))
nvmath_cublaslt = _module("nvmath.bindings.cublasLt", **fake_cublaslt.names(device))
nvmath_bindings = _module("nvmath.bindings", cublas=nvmath_cublas, cublasLt=nvmath_cublaslt)
nccl = _module("cupy.cuda.nccl", **fake_nccl.names(device))
cuda = _module(
    "cupy.cuda",
    nccl=nccl,
    runtime=runtime,
    driver=driver,
    cublas=cublas,
    Device=Device,
    Stream=Stream,
    Event=Event,
    Graph=Graph,
    MemoryPointer=MemoryPointer,
    PinnedMemoryPointer=PinnedMemoryPointer,
    alloc=alloc,
    alloc_pinned_memory=alloc_pinned_memory,
    get_current_stream=_current_stream,
    get_elapsed_time=streams.elapsed,
    set_allocator=lambda allocator=None: None,
    get_cublas_handle=lambda: fake_cublas.HANDLE,
    get_device_id=lambda: 0,
    is_available=lambda: True,
    device=_module(
        "cupy.cuda.device",
        Device=Device,
        get_cublas_handle=lambda: fake_cublas.HANDLE,
        get_device_id=lambda: 0,
        get_compute_capability=lambda: "90",
    ),
    stream=_module("cupy.cuda.stream", Stream=Stream, Event=Event, get_current_stream=_current_stream),
    memory=_module("cupy.cuda.memory", MemoryPointer=MemoryPointer, alloc=alloc, OutOfMemoryError=OutOfMemoryError),
    pinned_memory=_module("cupy.cuda.pinned_memory", alloc_pinned_memory=alloc_pinned_memory),
    compiler=_module("cupy.cuda.compiler", CompileException=compiler.CompileError),
)


def _of_numpy(name: str) -> Any:
    """What CuPy has by the same name as NumPy: types and constants as they are, functions on device arrays."""
    if name.startswith("_") or not hasattr(np, name):
        raise AttributeError(f"module 'cupy' (the stand-in) has no attribute {name!r}")
    value = getattr(np, name)
    if isinstance(value, type) or not callable(value):
        return value

    def function(*args: Any, **options: Any) -> Any:
        return _call(value, args, options)

    function.__name__ = name
    return function


_pool = _MemoryPool()
_NAMES = (
    *(
        ndarray,
        RawKernel,
        RawModule,
        ElementwiseKernel,
        empty,
        empty_like,
        full,
        zeros,
        zeros_like,
        ones,
        array,
        asarray,
    ),
    *(from_dlpack, ascontiguousarray, asnumpy, copyto, matmul, get_array_module),
)
cupy = _module(
    "cupy",
    **{value.__name__: value for value in _NAMES},
    cuda=cuda,
    get_default_memory_pool=lambda: _pool,
    get_default_pinned_memory_pool=lambda: _pool,
    __version__="14.0.0",
    __getattr__=_of_numpy,
    is_stand_in=True,
)
_libs = _module("cupy_backends.cuda.libs", cublas=cublas)
_api = _module("cupy_backends.cuda.api", runtime=runtime, driver=driver)
_backends_cuda = _module("cupy_backends.cuda", libs=_libs, api=_api)
MODULES = {
    "cupy": cupy,
    "cupy.cuda": cuda,
    "cupy.cuda.runtime": runtime,
    "cupy.cuda.driver": driver,
    "cupy.cuda.cublas": cublas,
    "cupy.cuda.nccl": nccl,
    **{
        f"cupy.cuda.{name}": getattr(cuda, name) for name in ("compiler", "device", "stream", "memory", "pinned_memory")
    },
    "cupy_backends": _module("cupy_backends", cuda=_backends_cuda),
    "cupy_backends.cuda": _backends_cuda,
    "cupy_backends.cuda.libs": _libs,
    "cupy_backends.cuda.libs.cublas": cublas,
    "cupy_backends.cuda.api": _api,
    "cupy_backends.cuda.api.runtime": runtime,
    "cupy_backends.cuda.api.driver": driver,
    "nvmath": _module("nvmath", bindings=nvmath_bindings),
    "nvmath.bindings": nvmath_bindings,
    "nvmath.bindings.cublas": nvmath_cublas,
    "nvmath.bindings.cublasLt": nvmath_cublaslt,
    "cupyx": _module("cupyx", empty_pinned=empty_pinned),
}
# Modules that import CuPy when they are imported: forgotten before and after, so that they see the right one.
_GPU_ROOMS = ("beside", "cuda", "cuda_kernels", "cuda_ops", "device", "epilogues", "gemm", "graphs", "launch", "lt")
USERS = tuple(f"gpu_mlp.ops.{name}" for name in (*_GPU_ROOMS, "nccl", "search", "staging", "ways"))


@contextlib.contextmanager
def installed() -> Iterator[Emulator]:
    """The stand-in as `cupy` in sys.modules; gives the emulated device. Refused where real CuPy is in use."""
    found = sys.modules.get("cupy")
    if found is cupy:
        yield device
        return
    if found is not None:
        raise RuntimeError("the real CuPy has been imported already; its stand-in would get in its way")
    rest = [name for name in sys.modules if name.split(".")[0] in ("cupy_backends", "cupyx", "nvmath")]
    before = {name: sys.modules.pop(name) for name in rest}
    _forget(USERS)
    sys.modules.update(MODULES)
    try:
        yield device
    finally:
        _forget(USERS)
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _forget(names: tuple[str, ...]) -> None:
    for name in names:
        sys.modules.pop(name, None)
        package, _, attribute = name.rpartition(".")
        if package in sys.modules:
            sys.modules[package].__dict__.pop(attribute, None)
