"""Every GEMM of a layer by itself: its rate, and its share of the best that the library at hand can do.

On a CPU: the operations of this library, under the threads that they choose themselves, against `numpy.matmul` under
the best setting of the BLAS threads. On a GPU: the product that a step queues, by the algorithm that was searched and
kept, against the best of all that cublasLt proposes for it (with more workspace, and in whatever order it adds up), the
second-level cache flushed before each.
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
WORKSPACE = 32 << 20  # bytes, as cuBLAS advises from Hopper on
ANY_REDUCTION = 7  # CUBLASLT_REDUCTION_SCHEME_MASK
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
    from gpu_mlp.ops import search
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
        with search.tuning(searching=True):
            gemm(*arguments)
        queued = partial(_tuned, gemm, arguments)
        result = ops.to_host(arguments[2]).copy()
        algorithms = Algorithms(gemm, *arguments)
        if not algorithms.count:
            if not rehearsal:
                found[kind]["seconds"]["gpu_mlp"] = timing.spread(on_device(queued, samples))
            continue
        first = {}
        for i in range(algorithms.count):
            arguments[2].fill(0)
            algorithms.run(i)
            _same(ops.to_host(arguments[2]), result.astype(np.float64), precision)
            first[i] = min(on_device(partial(algorithms.run, i), max(2, samples // 4), 1))
        best = min(first, key=first.__getitem__)
        ours = on_device(queued, samples)
        theirs = on_device(partial(algorithms.run, best), samples)
        if not rehearsal:
            found[kind] = {
                "seconds": {"gpu_mlp": timing.spread(ours), "cublasLt": timing.spread(theirs)},
                "best": f"cublasLt's proposal {best} of {algorithms.count}",
                "share_of_best": timing.ratios(theirs, ours),
            }
    return found


def _tuned(gemm: Any, arguments: tuple[Any, ...]) -> None:
    """The product as a step queues it."""
    from gpu_mlp.ops import search

    with search.tuning():
        gemm(*arguments)


class Algorithms:
    """The algorithms that cublasLt proposes for out = op(a) op(b), and each of them to be run; none without cublasLt.

    Arguments as `ops.gemm.GEMM` has them.
    """

    def __init__(self, gemm: Any, a: Any, b: Any, out: Any, transpose_a: bool, transpose_b: bool) -> None:
        import cupy

        from gpu_mlp.ops.gemm import binding
        from gpu_mlp.ops.lt import Operands

        self._arrays, self._found = (a, b, out), []
        library = binding().lt
        if library is not None:
            product = gemm.product(a, b, out, transpose_a, transpose_b)
            self._workspace, self._scalars = cupy.empty(WORKSPACE, cupy.uint8), np.array([1, 0], gemm.scalar)
            self._plan = library.unplanned(product)
            self._found = self._plan.proposals(product, WORKSPACE, PROPOSALS, ANY_REDUCTION)
            self._at = Operands(a.data.ptr, b.data.ptr, out.data.ptr, self._scalars.ctypes.data)
        self.count = len(self._found)

    def run(self, i: int) -> None:
        """Queue the product by the i-th algorithm."""
        import cupy

        from gpu_mlp.ops.lt import Place

        self._plan.use(self._found[i])
        stream = cupy.cuda.get_current_stream().ptr
        self._plan.run(self._at, Place(stream, self._workspace.data.ptr, WORKSPACE))
