"""Products by cublasLt, planned once: descriptors, layouts and the algorithm of every product that is met.

cublasLt is column-major, as cuBLAS is: the factors change places, and every C-order array is a column-major matrix
with its row length as leading dimension. Its epilogues (a bias, an activation, the activation's gradient) want just
that order.

An algorithm is the one that cublasLt proposes first, or among its proposals the one that was fastest where
`search.tuning` lets it be looked for; `choices` keeps it. Only algorithms are admitted that add partial sums up in
the type of the accumulator and in a step of their own: neither in 16 bits nor in the order of arrival. With a
workspace of the caller's for each stream cuBLAS then promises the same bits for every run.

Leans on nvmath-python's binding, `choices` and `search`. Speaks of addresses; arrays are `gemm`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import search
from .choices import Choices

TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
PROPOSALS = 8  # that cublasLt is asked for where the fastest is searched
DEFAULT, BIAS, RELU_BIAS, RELU_AUX_BIAS, GELU_BIAS, GELU_AUX_BIAS = 1, 4, 6, 134, 36, 164  # cublasLtEpilogue_t
DRELU, DRELU_BGRAD, DGELU, DGELU_BGRAD = 136, 152, 192, 208
MASKED = (RELU_AUX_BIAS, DRELU, DRELU_BGRAD)  # whose auxiliary matrix has a bit for every element
AUXILIARY = (*MASKED, GELU_AUX_BIAS, DGELU, DGELU_BGRAD)
NOT_OVER_ONE = (DRELU, DRELU_BGRAD, DGELU, DGELU_BGRAD)  # which fail where k is 1
MASK_BITS, AUX_ELEMENTS = 128, 8  # that the auxiliary leading dimension is a multiple of

_POINTER_MODE, _TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 2, 3, 4, 7, 8, 11, 12
_MAX_WORKSPACE, _REDUCTION_SCHEMES, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t
_IN_COMPUTE_TYPE = 2  # cublasLtReductionScheme_t: partial sums; no partial sums at all is always admitted
_ALGORITHM = np.dtype([("data", "<u8", (8,))])  # cublasLtMatmulAlgo_t
_RESULT = np.dtype(  # cublasLtMatmulHeuristicResult_t
    [("algo", _ALGORITHM), ("workspace", "<u8"), ("state", "<i4"), ("waves", "<f4"), ("reserved", "<i4", (4,))]
)


class Product(NamedTuple):
    """out = epilogue(alpha · op(a) op(b) + beta · out) as far as a plan depends on it.

    m, n: the C-order shape of out; k: what is summed over; types: the dtypes of the factors and of out; compute: a
    cublasComputeType; scale: the dtype of alpha and beta, which are on the device with ``factors``; alignment: bytes
    that the addresses of a, b and out are multiples of.
    """

    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool
    types: tuple[str, str]
    compute: int
    scale: str
    factors: bool
    alignment: tuple[int, int, int]
    epilogue: int = DEFAULT

    @property
    def auxiliary_ld(self) -> int:
        """The leading dimension of the auxiliary matrix: bits of a row of the mask, or elements of a row of z."""
        return -(-self.n // MASK_BITS) * MASK_BITS if self.epilogue in MASKED else self.n

    @property
    def possible(self) -> bool:
        """Whether cublasLt takes such a product at all, by its documentation."""
        if self.epilogue == DEFAULT:
            return True
        if self.epilogue in AUXILIARY and self.epilogue not in MASKED and self.n % AUX_ELEMENTS:
            return False
        return self.scale != "float64" and not (self.epilogue in NOT_OVER_ONE and self.k == 1)

    def name(self, workspace: int) -> str:
        """What its algorithm is kept by."""
        letters = "".join("nt"[flag] for flag in (self.transpose_a, self.transpose_b))
        parts = (f"{self.m}x{self.n}x{self.k}", letters, ">".join(self.types), f"compute {self.compute}")
        aligned = ",".join(map(str, self.alignment))
        device = ("device scalars",) if self.factors else ()
        return " ".join([*parts, f"epilogue {self.epilogue}", *device, f"aligned {aligned}", f"workspace {workspace}"])


class Operands(NamedTuple):
    """The addresses of one product; alpha and beta lie one after the other at ``factors``."""

    a: int
    b: int
    out: int
    factors: int
    bias: int = 0
    auxiliary: int = 0


class Place(NamedTuple):
    """Where a product runs: a stream, and the workspace that is this stream's alone."""

    stream: int
    workspace: int
    size: int


class Plan:
    """One product's descriptors, and the algorithm for it. Of the thread that made it."""

    def __init__(self, lt: Any, handle: int, product: Product) -> None:
        self._lt, self._handle = lt, handle
        self._handles: list[tuple[Callable[[int], None], int]] = []
        self._pointer = np.zeros(1, np.uint64)
        self._set: dict[int, int] = {}  # the addresses in the descriptor
        self.operation = self._describe(product)
        self.layouts = [self._layout(*matrix) for matrix in self._matrices(product)]
        self._algorithm: Any = None  # keeps the memory of the algorithm that is in use
        self._address = 0

    def use(self, algorithm: bytes) -> None:
        """Compute by this algorithm from now on."""
        self._algorithm = np.frombuffer(bytearray(algorithm), _ALGORITHM)
        self._address = self._algorithm.ctypes.data

    def run(self, at: Operands, place: Place) -> None:
        """Queue the product."""
        if at.bias:
            self._point(_BIAS_POINTER, at.bias)
        if at.auxiliary:
            self._point(_AUX_POINTER, at.auxiliary)
        b, a, out = self.layouts
        scalar = at.factors + self._scalar_bytes
        self._lt.matmul(
            self._handle, self.operation, at.factors, at.b, b, at.a, a, scalar, at.out, out, at.out, out,
            self._address, place.workspace, place.size, place.stream,
        )  # fmt: skip

    def proposals(
        self, product: Product, workspace: int, count: int, reductions: int = _IN_COMPUTE_TYPE
    ) -> list[bytes]:
        """The algorithms that cublasLt proposes, the one that it thinks fastest first.

        reductions: the admitted ways to add partial sums up, a mask of cublasLtReductionScheme_t.
        """
        preference = self._lt.matmul_preference_create()
        try:
            self._prefer(preference, _MAX_WORKSPACE, workspace, np.uint64)
            self._prefer(preference, _REDUCTION_SCHEMES, reductions, np.uint32)
            a, b, out = product.alignment
            for attribute, alignment in zip(_ALIGNMENTS, (b, a, out, out)):  # the factors change places
                self._prefer(preference, attribute, alignment, np.uint32)
            found, number = np.zeros(count, _RESULT), np.zeros(1, np.int32)
            first, second, third = self.layouts
            self._lt.matmul_algo_get_heuristic(
                self._handle, self.operation, first, second, third, third, preference, count,
                found.ctypes.data, number.ctypes.data,
            )  # fmt: skip
        except Exception as error:
            if refused(error):
                return []
            raise
        finally:
            self._lt.matmul_preference_destroy(preference)
        return [result["algo"].tobytes() for result in found[: int(number[0])] if not result["state"]]

    def accepts(self, algorithm: bytes, workspace: int) -> bool:
        """Whether an algorithm from a file is one for this product on this device."""
        if len(algorithm) != _ALGORITHM.itemsize:
            return False
        held, result = np.frombuffer(bytearray(algorithm), _ALGORITHM), np.zeros(1, _RESULT)
        first, second, third = self.layouts
        try:
            self._lt.matmul_algo_check(
                self._handle, self.operation, first, second, third, third, held.ctypes.data, result.ctypes.data
            )
        except Exception as error:
            if refused(error):
                return False
            raise
        return not result["state"][0] and int(result["workspace"][0]) <= workspace

    def _describe(self, product: Product) -> int:
        self._scalar_bytes = np.dtype(product.scale).itemsize
        operation: int = self._lt.matmul_desc_create(product.compute, TYPES[product.scale])
        self._handles.append((self._lt.matmul_desc_destroy, operation))
        for attribute, value, dtype in (
            (_TRANSA, product.transpose_b, np.int32),
            (_TRANSB, product.transpose_a, np.int32),
            (_POINTER_MODE, product.factors, np.int32),
            (_EPILOGUE, product.epilogue, np.uint32),
        ):
            self._attribute(operation, attribute, value, dtype)
        if product.epilogue in AUXILIARY:
            self._attribute(operation, _AUX_LD, product.auxiliary_ld, np.int64)
        return operation

    def _matrices(self, product: Product) -> list[tuple[int, int, int]]:
        """(type, rows, columns) of b, a and out, as column-major matrices that are not yet transposed."""
        m, n, k = product.m, product.n, product.k
        factor, result = (TYPES[dtype] for dtype in product.types)
        b = (k, n) if product.transpose_b else (n, k)
        a = (m, k) if product.transpose_a else (k, m)
        return [(factor, *b), (factor, *a), (result, n, m)]

    def _layout(self, dtype: int, rows: int, columns: int) -> int:
        layout: int = self._lt.matrix_layout_create(dtype, rows, columns, rows)
        self._handles.append((self._lt.matrix_layout_destroy, layout))
        return layout

    def _attribute(self, operation: int, attribute: int, value: int, dtype: Any) -> None:
        held = np.array([value], dtype)
        self._lt.matmul_desc_set_attribute(operation, attribute, held.ctypes.data, held.nbytes)

    def _prefer(self, preference: int, attribute: int, value: int, dtype: Any) -> None:
        held = np.array([value], dtype)
        self._lt.matmul_preference_set_attribute(preference, attribute, held.ctypes.data, held.nbytes)

    def _point(self, attribute: int, address: int) -> None:
        if self._set.get(attribute) != address:
            self._pointer[0] = address
            self._lt.matmul_desc_set_attribute(self.operation, attribute, self._pointer.ctypes.data, 8)
            self._set[attribute] = address

    def __del__(self) -> None:
        for destroy, handle in self._handles:
            destroy(handle)


class Library:
    """cublasLt on the current device: a handle, and a plan for every product that was met. Of one thread.

    device: what a choice of algorithm depends on beside the product and the library's version.
    """

    def __init__(self, device: str) -> None:
        from nvmath.bindings import cublasLt

        self._lt = cublasLt
        self._handle = cublasLt.create()
        self.version = int(cublasLt.get_version())
        self.choices = Choices(f"{device}, cublasLt {self.version}")
        self._plans: dict[tuple[Product, int, bool], Plan | None] = {}
        self._open: set[tuple[Product, int, bool]] = set()  # whose algorithm is still to be searched

    def unplanned(self, product: Product) -> Plan:
        """A plan without an algorithm, for whoever chooses one."""
        return Plan(self._lt, self._handle, product)

    def plan(self, product: Product, place: Place, rehearsal: Callable[[], Operands | None]) -> Plan | None:
        """The plan of a product; None where cublasLt has no way to compute it.

        rehearsal: gives operands whose out may be overwritten, to time algorithms with; None where there is no room.
        """
        key = product, place.size, search.tuned()
        if key not in self._plans:
            self._plans[key] = self._make(key)
        plan = self._plans[key]
        if plan is not None and key in self._open and search.allowed():
            self._open.remove(key)
            self._search(plan, product, place, rehearsal)
        return plan

    def _make(self, key: tuple[Product, int, bool]) -> Plan | None:
        """A plan by the algorithm that is kept, in work that is tuned, and else by the first proposal."""
        product, workspace, tuned = key
        if not product.possible:
            return None
        try:
            plan = self.unplanned(product)
        except Exception as error:
            if refused(error):
                return None
            raise
        found = plan.proposals(product, workspace, 1)
        if not found:
            return None
        plan.use(found[0])
        if tuned and self.choices.path is not None and not self._take(plan, product, workspace):
            self._open.add(key)
        return plan

    def _take(self, plan: Plan, product: Product, workspace: int) -> bool:
        """Use the algorithm that is kept, if there is one and it fits."""
        kept = self.choices.get(product.name(workspace))
        algorithm = _unhex(kept)
        if algorithm is not None and plan.accepts(algorithm, workspace):
            plan.use(algorithm)
            return True
        if kept is not None:  # damaged, though the file is whole
            self.choices.forget(product.name(workspace))
        return False

    def _search(self, plan: Plan, product: Product, place: Place, rehearsal: Callable[[], Operands | None]) -> None:
        at = rehearsal()
        if at is None:
            return
        found = plan.proposals(product, place.size, PROPOSALS)
        runs = [self._trial(product, at, place, algorithm) for algorithm in found]
        ways = [(algorithm, run) for algorithm, run in zip(found, runs) if run is not None]
        if ways:
            best = search.fastest([run for _, run in ways]) if len(ways) > 1 else 0
            if self.choices.keep(product.name(place.size), ways[best][0].hex()) is not None:
                self._take(plan, product, place.size)

    def _trial(self, product: Product, at: Operands, place: Place, algorithm: bytes) -> Callable[[], None] | None:
        """One algorithm to be timed, in whatever stream is current; None where it does not run after all."""
        import cupy

        plan = self.unplanned(product)
        plan.use(algorithm)

        def run() -> None:
            plan.run(at, place._replace(stream=cupy.cuda.get_current_stream().ptr))

        try:
            run()
        except Exception as error:
            if refused(error):
                return None
            raise
        return run


def refused(error: Exception) -> bool:
    """Whether cublasLt says that it does not do this here (not supported, no such value), and not that it is broken."""
    return type(error).__module__.startswith("nvmath") and any(
        status in str(error) for status in ("NOT_SUPPORTED", "INVALID_VALUE", "ARCH_MISMATCH")
    )


def _unhex(kept: Any) -> bytes | None:
    try:
        return bytes.fromhex(kept)
    except (TypeError, ValueError):
        return None


def alignment(address: int, most: int = 256) -> int:
    """The bytes that an address is a multiple of: all that cublasLt asks about, 16, or what there is."""
    lowest = address & -address if address else most
    return most if lowest >= most else min(16, lowest)
