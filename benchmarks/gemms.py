"""Every GEMM of a layer by itself: its rate, and its share of the best that the library at hand can do.

On a CPU: the operations of this library, under the threads that they choose themselves, against `numpy.matmul` under
the best setting of the BLAS threads. On a GPU: the product that the operations queue (cuBLAS's own choice of algorithm)
against the best of the algorithms that cublasLt proposes for it, the second-level cache flushed before each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import plans
from plans import Product

from gpu_mlp import precision as precisions
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.bench import floor, timing
from gpu_mlp.bench.records import Records
from gpu_mlp.ops import make
from gpu_mlp.ops.interface import Slot

KINDS = ("fprop", "dgrad", "wgrad")
SAMPLE_SECONDS, ROUNDS = 0.02, 9
PROPOSALS = 32  # algorithms that cublasLt is asked for
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 2e-2}  # of the norm


def measure(records: Records, deadline: float, device: str, enough: float = 10.0) -> None:
    """Every product of the plans in every precision of the steps."""
    rehearsal = records.rehearsal
    names = ("float32",) if device == "cpu" else ("bfloat16", "tf32")
    for product in plans.products(device, rehearsal):
        for precision in names:
            name = f"{product.batch} × {product.n_in} → {product.n_out} · {precision}"
            if records.done(name):
                continue
            if time.monotonic() > deadline - enough:
                return
            with records.attempt(name):
                figures = (on_cpu if device == "cpu" else on_gpu)(product, precision, rehearsal)
                told = {"precision": precision, "flop": 2 * product.batch * product.n_in * product.n_out}
                records.add(name, product=product._asdict(), **told, kinds=figures)


# --- CPU -------------------------------------------------------------------------------------------------------------


def on_cpu(product: Product, precision: str, rehearsal: bool) -> dict[str, Any]:
    """By kind: seconds of ours and of every BLAS setting, and the share of the best, by rounds in turn."""
    ops, bare, settings, found = make("cpu", precisions.get(precision)), _bare(product), floor.thread_settings(), {}
    ours, flop = _operations_of(ops, product), 2 * product.batch * product.n_in * product.n_out
    for kind in KINDS:
        _same(ours[kind](), bare[kind](), precision)
        works: dict[str, Any] = {"gpu_mlp": (partial(ops.tuned_for, flop), ours[kind])}
        works |= {str(n): (partial(floor.blas_threads, n), bare[kind]) for n in settings}
        rounds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(1 if rehearsal else ROUNDS):
            for name, (context, work) in works.items():
                rounds[name].append(_sample(work, context))
        if not rehearsal:
            best = min((str(n) for n in settings), key=lambda n: timing.spread(rounds[n])["median"])
            found[kind] = {
                "seconds": {name: timing.spread(values) for name, values in rounds.items()}, "best": f"{best} threads",
                "share_of_best": timing.ratios(rounds[best], rounds["gpu_mlp"]),
            }  # fmt: skip
    return found


def _sample(work: Callable[[], object], context: Callable[[], AbstractContextManager[None]]) -> float:
    """The seconds of one product, within the context that chooses its threads."""
    timing.settle()
    with context():
        once = timing.repeated(work, _nothing, 2)[0]
        return timing.repeated(work, _nothing, max(1, int(SAMPLE_SECONDS / max(once, 1e-7))))[0]


def _nothing() -> None:
    """On a CPU there is nothing to wait for."""


def _factors(product: Product) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "h": (product.batch, product.n_in),
        "gz": (product.batch, product.n_out),
        "W": (product.n_out, product.n_in),
    }
    return {name: rng.random(shape, np.float32) - np.float32(0.5) for name, shape in shapes.items()}


def _bare(product: Product) -> dict[str, Callable[[], Any]]:
    """The three products by NumPy."""
    h, gz, W = _factors(product).values()
    out = np.empty((product.batch, product.n_out), np.float32), np.empty_like(h), np.empty_like(W)
    return {
        "fprop": partial(np.matmul, h, W.T, out=out[0]),
        "dgrad": partial(np.matmul, gz, W, out=out[1]),
        "wgrad": partial(np.matmul, gz.T, h, out=out[2]),
    }


def _operations_of(ops: Any, product: Product) -> dict[str, Callable[[], Any]]:
    """The three products as operations of the interface: fprop with a bias of zeros, for there is none without."""
    h, gz, W = _factors(product).values()
    state, b, f = ops.zeros(len(Slot), np.float64), ops.zeros(product.n_out, np.float32), ACTIVATIONS["identity"]
    out = ops.empty(gz.shape, np.float32), ops.empty(h.shape, np.float32), ops.empty(W.shape, np.float32)
    works = {
        "fprop": partial(ops.affine_activation, h, W, b, f, out[0], None, None, state),
        "dgrad": partial(ops.input_gradient, gz, W, f, None, None, out[1], None, False, state),
        "wgrad": partial(ops.weight_gradient, gz, h, out[2], False),
    }
    return {kind: partial(_and_give, work, result) for (kind, work), result in zip(works.items(), out)}


def _and_give(work: Callable[[], object], result: Any) -> Any:
    work()
    return result


def _same(ours: Any, theirs: Any, precision: str) -> None:
    """Nothing is timed that is not the same product."""
    off = float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs))
    if not off <= TOLERANCE[precision]:
        raise ArithmeticError(f"a product is off by {off:.1e} of its norm")


# --- GPU -------------------------------------------------------------------------------------------------------------


def on_gpu(product: Product, precision: str, rehearsal: bool) -> dict[str, Any]:
    """By kind: seconds of ours and of the best algorithm, and the share of it, in turn."""
    from gpu_mlp.bench.device import on_device
    from gpu_mlp.ops.gemm import GEMM

    of = precisions.get(precision)
    ops, gemm, found = make("cuda", of), GEMM(of), {}
    h, gz, W = (ops.to_device(a.astype(of.storage_dtype)) for a in _factors(product).values())
    works = {
        "fprop": (h, W, ops.empty(gz.shape, of.storage_dtype), False, True),
        "dgrad": (gz, W, ops.empty(h.shape, of.storage_dtype), False, False),
        "wgrad": (gz, h, ops.empty(W.shape, of.master_dtype), True, False),
    }
    samples = 2 if rehearsal else 20
    for kind, arguments in works.items():
        found[kind] = (
            {} if rehearsal else {"seconds": {"gpu_mlp": None}, "best": "cublasLt is not there: nvmath-python"}
        )
        gemm(*arguments)
        result = ops.to_host(arguments[2]).copy()
        try:
            algorithms = Algorithms(*arguments, of)
        except ImportError:
            if not rehearsal:
                found[kind]["seconds"]["gpu_mlp"] = timing.spread(on_device(partial(gemm, *arguments), samples))
            continue
        first = {}
        for i in range(algorithms.count):
            arguments[2].fill(0)
            algorithms.run(i)
            _same(ops.to_host(arguments[2]), result.astype(np.float64), precision)
            first[i] = min(on_device(partial(algorithms.run, i), max(2, samples // 4), 1))
        best = min(first, key=first.__getitem__)
        ours = on_device(partial(gemm, *arguments), samples)
        theirs = on_device(partial(algorithms.run, best), samples)
        if not rehearsal:
            found[kind] = {
                "seconds": {"gpu_mlp": timing.spread(ours), "cublasLt": timing.spread(theirs)},
                "best": f"cublasLt's proposal {best} of {algorithms.count}",
                "share_of_best": timing.ratios(theirs, ours),
            }
    return found


class Algorithms:
    """The algorithms that cublasLt proposes for out = op(a) op(b), and each of them to be run.

    Arguments as `ops.gemm.GEMM` has them, C-order arrays, of which cublasLt sees the transposes.
    """

    def __init__(self, a: Any, b: Any, out: Any, transpose_a: bool, transpose_b: bool, of: Any) -> None:
        import cupy
        from nvmath.bindings import cublasLt as lt

        from gpu_mlp.ops import gemm
        from gpu_mlp.ops.lt import TYPES

        self._lt, self._arrays = lt, (a, b, out)
        compute = gemm._COMPUTE_32F_FAST_TF32 if of.reduced_gemm else gemm._COMPUTE_32F
        self._handle = lt.create()
        self._operation = lt.matmul_desc_create(compute, TYPES["float32"])
        for attribute, transposed in (
            (3, transpose_b),
            (4, transpose_a),
        ):  # TRANSA and TRANSB: the factors change places
            value = np.array([int(transposed)], np.int32)
            lt.matmul_desc_set_attribute(self._operation, attribute, value.ctypes.data, value.nbytes)
        self._layouts = [
            lt.matrix_layout_create(TYPES[x.dtype.name], x.shape[1], x.shape[0], x.shape[1]) for x in (b, a, out)
        ]
        self._workspace = cupy.empty(32 << 20, cupy.uint8)
        self._scalars = np.array([1, 0], np.float32)
        preference, limit = lt.matmul_preference_create(), np.array([self._workspace.nbytes], np.uint64)
        lt.matmul_preference_set_attribute(preference, 1, limit.ctypes.data, limit.nbytes)  # MAX_WORKSPACE_BYTES
        self._results = np.zeros(PROPOSALS, lt.matmul_heuristic_result_dtype)
        count = np.zeros(1, np.int32)
        b_layout, a_layout, c_layout = self._layouts
        lt.matmul_algo_get_heuristic(
            self._handle, self._operation, b_layout, a_layout, c_layout, c_layout, preference, PROPOSALS,
            self._results.ctypes.data, count.ctypes.data,
        )  # fmt: skip
        lt.matmul_preference_destroy(preference)
        self.count = int(count[0])

    def run(self, i: int) -> None:
        """Queue the product by the i-th algorithm."""
        import cupy

        (a, b, out), (b_layout, a_layout, c_layout) = self._arrays, self._layouts
        alpha, algorithm = self._scalars.ctypes.data, self._results[i : i + 1].ctypes.data  # its first member
        self._lt.matmul(
            self._handle, self._operation, alpha, b.data.ptr, b_layout, a.data.ptr, a_layout, alpha + 4,
            out.data.ptr, c_layout, out.data.ptr, c_layout, algorithm, self._workspace.data.ptr,
            self._workspace.nbytes, cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip

    def __del__(self) -> None:
        if not hasattr(self, "_layouts"):
            return
        for layout in self._layouts:
            self._lt.matrix_layout_destroy(layout)
        self._lt.matmul_desc_destroy(self._operation)
        self._lt.destroy(self._handle)
