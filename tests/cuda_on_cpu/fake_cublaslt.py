"""A stand-in for cublasLt as nvmath-python exposes it: descriptors, layouts, proposed algorithms, products, epilogues.

Products are those of `fake_cublas`, column-major, with its checks. What the library's header and documentation demand
is demanded here: the size of every attribute, the alignment that an algorithm was chosen for, the leading dimension of
the auxiliary matrix, room for it and for the bias, k > 1 for a gradient. An algorithm is for the product that it was
proposed for, and refused for another. All of them compute the same; how long each takes is what a test says.

Every product that is queued is in the emulator's ``products``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import streams
from .emulator import Emulator, OutOfBounds, bytes_at
from .fake_cublas import SUPPORTED, _check_integers, _dtype, _Library

ALGORITHM = np.dtype([("data_", "<u8", (8,))])
RESULT = np.dtype(
    [
        ("algo", ALGORITHM),
        ("workspace_size", "<u8"),
        ("state", "<i4"),
        ("waves_count", "<f4"),
        ("reserved", "<i4", (4,)),
    ]
)
POINTER_MODE, TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 2, 3, 4, 7, 8, 11, 12
ATTRIBUTES = {2: np.int32, 3: np.int32, 4: np.int32, 7: np.uint32, 8: np.uint64, 11: np.uint64, 12: np.int64}
MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK = 1, 3
PREFERENCES = {1: np.uint64, 3: np.uint32, 5: np.uint32, 6: np.uint32, 7: np.uint32, 8: np.uint32}
RELU, BIAS, DRELU, BGRAD, GELU, DGELU, AUX, BGRADA, BGRADB = 2, 4, 8, 16, 32, 64, 128, 256, 512
EPILOGUES = {1, 2, 130, 4, 6, 134, 136, 152, 32, 160, 36, 164, 192, 208, 256, 512}
COMPUTE_TYPE = 2
PROPOSED = 3
MAGIC = 0xA160
NEEDED = 1 << 20  # bytes of workspace that every algorithm but the first needs, times its number
ALIGNED = 16  # bytes that every algorithm but the first needs its matrices aligned to
VERSION = 120903


class cuBLASLtError(Exception):
    """An error of cublasLt."""

    __module__ = "nvmath.bindings.cublasLt"

    def __init__(self, status: int) -> None:
        self.status = status
        names = {1: "NOT_INITIALIZED", 7: "INVALID_VALUE", 15: "NOT_SUPPORTED"}
        super().__init__(f"something is wrong (CUBLAS_STATUS_{names[status]})")


class Queued(NamedTuple):
    """A product that was queued: sizes and types as cublasLt sees them, the number of its algorithm, and where."""

    m: int
    n: int
    k: int
    epilogue: int
    algorithm: int
    stream: int
    workspace: int


class Behaviour:
    """What a test may say about the library."""

    seconds: Callable[[Queued], float] = staticmethod(lambda product: 0.0)  # that a product takes
    hides_nan = False  # whether a relu epilogue makes a NaN 0
    refuses: Callable[[int], bool] = staticmethod(lambda epilogue: False)  # which epilogues have no algorithm


def names(device: Emulator) -> dict[str, Any]:
    """The names of the module `nvmath.bindings.cublasLt`."""
    library = _LtLibrary(device)
    functions = [name for name in dir(library) if name in vars(_LtLibrary) and not name.startswith("_")]
    classes = {"matmul_heuristic_result_dtype": RESULT, "cuBLASLtError": cuBLASLtError}
    return {**classes, **{name: getattr(library, name) for name in functions}}


class _LtLibrary(_Library):
    """Objects by number: handles, descriptors of a product, layouts, preferences."""

    def __init__(self, device: Emulator) -> None:
        super().__init__(device)
        self._numbers = itertools.count(0x17A00)
        self._things: dict[int, dict[Any, int]] = {}

    def _new(self, **what: int) -> int:
        number = next(self._numbers)
        self._things[number] = dict(what)
        return number

    def _thing(self, number: int, kind: str) -> dict[Any, int]:
        thing = self._things.get(number)
        if thing is None or kind not in thing:
            raise cuBLASLtError(7)
        return thing

    def create(self) -> int:
        return self._new(handle=1)

    def get_version(self) -> int:
        return VERSION

    @_check_integers
    def destroy(self, handle: int) -> None:
        self._thing(handle, "handle")
        del self._things[handle]

    @_check_integers
    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        if compute_type not in SUPPORTED or scale_type != (1 if compute_type in (70, 71) else 0):
            raise cuBLASLtError(15)
        return self._new(compute=compute_type, scale=scale_type)

    @_check_integers
    def matmul_desc_set_attribute(self, desc: int, attribute: int, address: int, size: int) -> None:
        self._set(self._thing(desc, "compute"), ATTRIBUTES, attribute, address, size)

    @_check_integers
    def matmul_desc_destroy(self, desc: int) -> None:
        self._thing(desc, "compute")
        del self._things[desc]

    @_check_integers
    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        if ld < max(1, rows):
            raise cuBLASLtError(7)
        return self._new(type=type, rows=rows, columns=cols, leading=ld)

    @_check_integers
    def matrix_layout_destroy(self, layout: int) -> None:
        self._thing(layout, "type")
        del self._things[layout]

    def matmul_preference_create(self) -> int:
        return self._new(preference=1)

    @_check_integers
    def matmul_preference_set_attribute(self, preference: int, attribute: int, address: int, size: int) -> None:
        self._set(self._thing(preference, "preference"), PREFERENCES, attribute, address, size)

    @_check_integers
    def matmul_preference_destroy(self, preference: int) -> None:
        self._thing(preference, "preference")
        del self._things[preference]

    @_check_integers
    def matmul_algo_get_heuristic(
        self, handle, desc, a_layout, b_layout, c_layout, d_layout, preference, requested, results, count
    ):
        self._thing(handle, "handle")
        wanted = self._thing(preference, "preference")
        if requested < 1:
            raise cuBLASLtError(7)
        mark = self._supported(desc, a_layout, b_layout, d_layout)
        alignment = min(wanted.get(attribute, 256) for attribute in (5, 6, 7, 8))
        room = wanted.get(MAX_WORKSPACE_BYTES, 0)
        fitting = [
            i for i in range(PROPOSED) if i == 0 or (alignment >= ALIGNED and i * NEEDED <= room)
        ]  # no algorithm of these splits a sum but by COMPUTE_TYPE
        if not wanted.get(REDUCTION_SCHEME_MASK, 7) & COMPUTE_TYPE:
            fitting = fitting[:1]
        fitting = fitting[:requested]
        array = bytes_at(results, requested * RESULT.itemsize).view(RESULT)
        for place, i in enumerate(fitting):
            array[place]["algo"]["data_"][:3] = MAGIC, i, mark
            array[place]["workspace_size"], array[place]["state"], array[place]["waves_count"] = i * NEEDED, 0, 1
        bytes_at(count, 4).view(np.int32)[0] = len(fitting)

    @_check_integers
    def matmul_algo_check(self, handle, desc, a_layout, b_layout, c_layout, d_layout, algo, result):
        self._thing(handle, "handle")
        i = self._chosen(algo, self._supported(desc, a_layout, b_layout, d_layout))
        found = bytes_at(result, RESULT.itemsize).view(RESULT)[0]
        found["workspace_size"], found["state"] = i * NEEDED, 0

    @_check_integers
    def matmul(
        self,
        handle,
        desc,
        alpha,
        A,
        a_layout,
        B,
        b_layout,
        beta,
        C,
        c_layout,
        D,
        d_layout,
        algo,
        workspace,
        size,
        stream,
    ):
        self._thing(handle, "handle")
        i = self._chosen(algo, self._supported(desc, a_layout, b_layout, d_layout))
        if C != D or size < i * NEEDED or (i and any(address % ALIGNED for address in (A, B, D))):
            raise cuBLASLtError(7)
        held = self._device.memory.find(workspace)
        if size and (held is None or workspace + size > held.end or workspace % 256):
            raise cuBLASLtError(7)
        transa, transb, m, n, k = self._sizes(desc, a_layout, b_layout, d_layout)
        a, b, d = (self._things[layout] for layout in (a_layout, b_layout, d_layout))
        of = dict(self._things[desc])
        wide = np.dtype(np.float64 if of["compute"] in (70, 71) else np.float32)
        mode = _Mode(of.get(POINTER_MODE, 0))
        factors = [self._scalar(mode, address, wide, name) for address, name in ((alpha, "alpha"), (beta, "beta"))]
        epilogue = self._epilogue(of, m, n, k, d["type"])
        self._device.counts["gemms"] += 1
        queued = Queued(m, n, k, of.get(EPILOGUE, 1), i, stream, workspace)
        self._device.products.append(queued)

        def product() -> None:
            types = (a["type"], b["type"], d["type"], wide, of["compute"] == 77)
            left, right = (factors[0](), A, a["leading"]), (B, b["leading"], factors[1]())
            self._product(transa, transb, m, n, k, *left, *right, D, d["leading"], *types, epilogue)
            streams.Order.clock += Behaviour.seconds(queued)

        streams.Stream.living[stream].submit(product)

    def _set(self, thing: dict[Any, int], known: dict[int, Any], attribute: int, address: int, size: int) -> None:
        if attribute not in known or size != np.dtype(known[attribute]).itemsize:
            raise cuBLASLtError(7)
        thing[attribute] = int(bytes_at(address, size).view(known[attribute])[0])

    def _chosen(self, algo: int, mark: int) -> int:
        """The number of an algorithm, if it is for this product."""
        magic, i, of = bytes_at(algo, ALGORITHM.itemsize).view(np.uint64)[:3]
        if magic != MAGIC or of != mark or i >= PROPOSED:
            raise cuBLASLtError(7)
        return int(i)

    def _supported(self, desc: int, a_layout: int, b_layout: int, d_layout: int) -> int:
        """A number that stands for the product, if it is one that the library has algorithms for."""
        sizes = self._sizes(desc, a_layout, b_layout, d_layout)
        of = self._things[desc]
        a, b, d = (self._things[layout]["type"] for layout in (a_layout, b_layout, d_layout))
        if a != b or (a, d) not in SUPPORTED[of["compute"]]:
            raise cuBLASLtError(15)
        epilogue, m, k = of.get(EPILOGUE, 1), sizes[2], sizes[4]
        if epilogue not in EPILOGUES:
            raise cuBLASLtError(7)
        if Behaviour.refuses(epilogue) or (epilogue != 1 and of["compute"] in (70, 71)):
            raise cuBLASLtError(15)
        if epilogue & (DRELU | DGELU) and k == 1:
            raise cuBLASLtError(15)
        if epilogue & AUX:
            unit = 128 if epilogue & (RELU | DRELU) else 8
            if of.get(AUX_LD, 0) % unit or of.get(AUX_LD, 0) < m:
                raise cuBLASLtError(7)
        kept = [of.get(attribute, 0) for attribute in (POINTER_MODE, EPILOGUE, AUX_LD)]
        return zlib.crc32(repr((sizes, a, d, of["compute"], kept)).encode())

    def _sizes(self, desc: int, a_layout: int, b_layout: int, d_layout: int) -> tuple[int, int, int, int, int]:
        """(transa, transb, m, n, k), if the matrices belong together."""
        of = self._thing(desc, "compute")
        a, b, d = (self._thing(layout, "type") for layout in (a_layout, b_layout, d_layout))
        transa, transb = of.get(TRANSA, 0), of.get(TRANSB, 0)
        m, k = (a["columns"], a["rows"]) if transa else (a["rows"], a["columns"])
        k_b, n = (b["columns"], b["rows"]) if transb else (b["rows"], b["columns"])
        if (k_b, m, n) != (k, d["rows"], d["columns"]) or 0 in (m, n, k):
            raise cuBLASLtError(7)
        return transa, transb, m, n, k

    # --- epilogues ---

    def _epilogue(self, of: dict[Any, int], m: int, n: int, k: int, type: int) -> Callable[[Any, Any], Any]:
        """What is done to alpha op(A) op(B) + beta C, (m, n), before it is stored, from op(B) too."""
        kind, dtype = of.get(EPILOGUE, 1), _dtype(type)
        length = {BGRADB: n}.get(kind, m)
        vector = None
        if kind & (BIAS | BGRAD | BGRADA | BGRADB):
            vector = self._vector("the bias", of.get(BIAS_POINTER, 0), length, dtype)
        auxiliary, ld = None, of.get(AUX_LD, 0)
        if kind & AUX and kind & (RELU | DRELU):
            auxiliary = self._vector("the mask", of.get(AUX_POINTER, 0), ld * n // 8, np.dtype(np.uint8))
            auxiliary = auxiliary.reshape(n, ld // 8)
        elif kind & AUX:
            flat = self._vector("z", of.get(AUX_POINTER, 0), ld * (n - 1) + m, dtype)
            auxiliary = np.lib.stride_tricks.as_strided(flat, (m, n), (dtype.itemsize, ld * dtype.itemsize))

        def apply(result: Any, b: Any) -> Any:
            if kind & BIAS:
                result = result + vector.astype(result.dtype)[:, None]
            if kind & RELU:
                if kind & AUX:
                    bits = np.packbits((result > 0).T, axis=1, bitorder="little")
                    auxiliary[:, : bits.shape[1]] = bits
                result = (np.fmax if Behaviour.hides_nan else np.maximum)(result, 0)
            elif kind & GELU:
                if kind & AUX:
                    auxiliary[...] = result.astype(dtype)
                    result = auxiliary.astype(result.dtype)
                result = _gelu(result)
            elif kind & DRELU:
                result = np.where(np.unpackbits(auxiliary, axis=1, bitorder="little")[:, :m].T, result, 0)
            elif kind & DGELU:
                result = result * _gelu_slope(auxiliary.astype(result.dtype))
            if kind & BGRAD:
                vector[...] = result.sum(axis=1)
            elif kind & BGRADB:
                vector[...] = b.sum(axis=0)
            return result.astype(np.float64 if type == 1 else np.float32)

        if kind & BGRADA:
            raise NotImplementedError("BGRADA is not emulated")
        return apply

    def _vector(self, name: str, address: int, length: int, dtype: np.dtype) -> np.ndarray:
        """Numbers in device memory, with room for them."""
        if address == 0 or address % max(16 if name != "the bias" else 1, dtype.itemsize):
            raise cuBLASLtError(7)
        allocation = self._device.memory.find(address)
        if allocation is None or address + length * dtype.itemsize > allocation.end:
            raise OutOfBounds(f"matmul: {name}, {length} of {dtype} at 0x{address:x}, is not within device memory")
        return bytes_at(address, length * dtype.itemsize).view(dtype)


class _Mode:
    def __init__(self, mode: int) -> None:
        self.pointer_mode = mode


def _gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def _gelu_slope(z: np.ndarray) -> np.ndarray:
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
