"""A stand-in for cublasLt as nvmath-python exposes it: descriptors, layouts, proposed algorithms, and products.

Only what the benchmarks use. Products are those of `fake_cublas`, column-major, with its checks; every algorithm that
is proposed computes the same, and one that was not proposed is refused.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from . import streams
from .emulator import Emulator, bytes_at
from .fake_cublas import SUPPORTED, CUBLASError, _check_integers, _Library

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
TRANSA, TRANSB, MAX_WORKSPACE_BYTES = 3, 4, 1
PROPOSED = 3
MAGIC = 0xA160


def names(device: Emulator) -> dict[str, Any]:
    """The names of the module `nvmath.bindings.cublasLt`."""
    library = _LtLibrary(device)
    functions = [name for name in dir(library) if not name.startswith("_") and name.islower()]
    return {"matmul_heuristic_result_dtype": RESULT, **{name: getattr(library, name) for name in functions}}


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
            raise CUBLASError(7)
        return thing

    def create(self) -> int:
        return self._new(handle=1)

    @_check_integers
    def destroy(self, handle: int) -> None:
        self._thing(handle, "handle")
        del self._things[handle]

    @_check_integers
    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        if compute_type not in SUPPORTED:
            raise CUBLASError(15)
        return self._new(compute=compute_type, scale=scale_type)

    @_check_integers
    def matmul_desc_set_attribute(self, desc: int, attribute: int, address: int, size: int) -> None:
        if attribute not in (TRANSA, TRANSB) or size != 4:
            raise CUBLASError(7)
        self._thing(desc, "compute")[attribute] = int(bytes_at(address, size).view(np.int32)[0])

    @_check_integers
    def matmul_desc_destroy(self, desc: int) -> None:
        self._thing(desc, "compute")
        del self._things[desc]

    @_check_integers
    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        if ld < max(1, rows):
            raise CUBLASError(7)
        return self._new(type=type, rows=rows, columns=cols, leading=ld)

    @_check_integers
    def matrix_layout_destroy(self, layout: int) -> None:
        self._thing(layout, "type")
        del self._things[layout]

    def matmul_preference_create(self) -> int:
        return self._new(preference=1)

    @_check_integers
    def matmul_preference_set_attribute(self, preference: int, attribute: int, address: int, size: int) -> None:
        if attribute != MAX_WORKSPACE_BYTES or size != 8:
            raise CUBLASError(7)
        self._thing(preference, "preference")["workspace"] = int(bytes_at(address, size).view(np.uint64)[0])

    @_check_integers
    def matmul_preference_destroy(self, preference: int) -> None:
        self._thing(preference, "preference")
        del self._things[preference]

    @_check_integers
    def matmul_algo_get_heuristic(
        self, handle, desc, a_layout, b_layout, c_layout, d_layout, preference, requested, results, count
    ):
        self._thing(handle, "handle"), self._thing(preference, "preference")
        self._sizes(desc, a_layout, b_layout, d_layout)
        found = min(requested, PROPOSED)
        array = bytes_at(results, found * RESULT.itemsize).view(RESULT)
        for i in range(found):
            array[i]["algo"]["data_"][:2] = MAGIC, i
        bytes_at(count, 4).view(np.int32)[0] = found

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
        if bytes_at(algo, ALGORITHM.itemsize).view(np.uint64)[0] != MAGIC or C != D:
            raise CUBLASError(7)
        if size and self._device.memory.find(workspace) is None:
            raise CUBLASError(7)
        transa, transb, m, n, k = self._sizes(desc, a_layout, b_layout, d_layout)
        a, b, d = (self._things[layout] for layout in (a_layout, b_layout, d_layout))
        compute = self._things[desc]["compute"]
        if a["type"] != b["type"] or (a["type"], d["type"]) not in SUPPORTED[compute]:
            raise CUBLASError(15)
        wide = np.dtype(np.float64 if compute in (70, 71) else np.float32)
        factors = [float(bytes_at(address, wide.itemsize).view(wide)[0]) for address in (alpha, beta)]
        types = (a["type"], b["type"], d["type"], wide, compute == 77)
        left, right = (wide.type(factors[0]), A, a["leading"]), (B, b["leading"], wide.type(factors[1]))
        arguments = (transa, transb, m, n, k, *left, *right, D, d["leading"], *types)
        streams.Stream.living[stream].submit(lambda: self._product(*arguments))

    def _sizes(self, desc: int, a_layout: int, b_layout: int, d_layout: int) -> tuple[int, int, int, int, int]:
        """(transa, transb, m, n, k), if the matrices belong together."""
        of = self._thing(desc, "compute")
        a, b, d = (self._thing(layout, "type") for layout in (a_layout, b_layout, d_layout))
        transa, transb = of.get(TRANSA, 0), of.get(TRANSB, 0)
        m, k = (a["columns"], a["rows"]) if transa else (a["rows"], a["columns"])
        k_b, n = (b["columns"], b["rows"]) if transb else (b["rows"], b["columns"])
        if (k_b, m, n) != (k, d["rows"], d["columns"]):
            raise CUBLASError(7)
        return transa, transb, m, n, k
