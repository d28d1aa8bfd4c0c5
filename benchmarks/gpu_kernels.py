"""The bandwidth of every streaming kernel, as a share of what a device-to-device copy reaches in the same run.

Bytes are counted, not measured: each array once for a read and once for a write, whatever a kernel reads again from a
cache. The arrays are several times larger than the second-level cache. Called by `prove_on_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from timing import on_device, spread

from gpu_mlp import EMA, SGD, Adam, AdamW, losses, precision
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.losses import CrossEntropy
from gpu_mlp.ops.interface import Layout, Slot

ROWS = (1000, 8000)  # columns: a warp a row, and a block a row
RULES = {"SGD": SGD(), "SGD with momentum": SGD(momentum=0.9), "Adam": Adam(), "AdamW": AdamW()}


@dataclass(frozen=True)
class Case:
    """One kernel on arrays of its own. ``count``: the bytes that it has to move."""

    name: str
    shape: tuple[int, ...]
    count: int
    work: Callable[[], object]


def measure(records: Any, size: int = 256 << 20, samples: int = 30) -> None:
    """Time every case on arrays of ``size`` bytes, in float32 and in bfloat16, between two timings of the copy."""
    copy = _measure_copy(records, "copy", size, samples)
    for name in ("float32", "bfloat16"):
        for make in (_activations, _row_wise, _cross_entropy, _pointwise_loss, _gather, _updates):
            with records.attempt(f"{make.__name__.strip('_')} {name}"):
                for case in make(name, size):
                    _measure(records, case, name, copy, samples)
    _measure_copy(records, "copy, at the end", size, samples)


def _measure_copy(records: Any, name: str, size: int, samples: int) -> float | None:
    """Bytes a second, read and written."""
    source = _numbers((size // 4,), np.float32)
    out = source.copy()

    def work() -> None:
        out[...] = source

    return _measure(records, Case(name, source.shape, 2 * source.nbytes, work), "float32", None, samples)


def _measure(records: Any, case: Case, dtype: str, copy: float | None, samples: int) -> float | None:
    seconds = spread(on_device(case.work, samples))
    told = {"dtype": dtype, "shape": case.shape, "bytes": case.count}
    if records.rehearsal:
        records.add(case.name, **told, seconds=None, bytes_per_second=None, share_of_copy=None)
        return None
    rate = case.count / seconds["median"]
    share = None if copy is None else rate / copy
    records.add(case.name, **told, seconds=seconds, bytes_per_second=rate, share_of_copy=share)
    return rate


def _activations(name: str, size: int) -> Iterator[Case]:
    ops, n = _operations(name), 1024
    shape, state = _shape(ops, size, n), _state(ops)
    b, gb = ops.zeros(n, ops.precision.storage_dtype), ops.zeros(n, ops.precision.master_dtype)
    for f in (ACTIVATIONS["relu"], ACTIVATIONS["gelu"]):
        keeps = f.reads == "z"
        z, g = (_numbers(shape, ops.precision.storage_dtype) for _ in range(2))
        h = ops.empty(shape, z.dtype) if keeps else z
        forward = partial(ops._activate, f, z, b, h, keeps, None, state)
        backward = partial(ops._activation_gradient, f, g, z, None, gb, False, state)
        yield Case(f"bias_activation {f.name}", shape, (3 if keeps else 2) * z.nbytes, forward)
        yield Case(f"activation_gradient {f.name}, with gb", shape, 3 * z.nbytes, backward)


def _row_wise(name: str, size: int) -> Iterator[Case]:
    ops, f = _operations(name), ACTIVATIONS["softmax"]
    for n in ROWS:
        shape = _shape(ops, size, n)
        z, g = (_numbers(shape, ops.precision.storage_dtype) for _ in range(2))
        yield Case("bias_softmax", shape, 2 * z.nbytes, partial(ops.activate, f, z, z))
        yield Case("softmax_gradient", shape, 3 * z.nbytes, partial(ops._rowwise_gradient, f, g, z))


def _cross_entropy(name: str, size: int) -> Iterator[Case]:
    ops = _operations(name)
    for n in ROWS:
        shape, state = _shape(ops, size, n), _state(ops)
        z = _numbers(shape, ops.precision.storage_dtype)
        y, gz = ops.to_device(np.arange(shape[0]) % n), ops.empty(shape, z.dtype)
        work = partial(ops._cross_entropy, CrossEntropy(), z, y, None, gz, state)
        yield Case("softmax_cross_entropy", shape, 2 * z.nbytes + y.nbytes, work)


def _pointwise_loss(name: str, size: int) -> Iterator[Case]:
    ops = _operations(name)
    shape, f, loss = _shape(ops, size, 1024), ACTIVATIONS["identity"], losses.get("mse")
    h, y = (_numbers(shape, dtype) for dtype in (ops.precision.storage_dtype, ops.precision.master_dtype))
    gz, gb = ops.empty(shape, h.dtype), ops.zeros(shape[1], y.dtype)
    work = partial(ops.loss_and_gradient, loss, f, False, h, None, y, None, gz, gb, False, _state(ops))
    yield Case("pointwise_loss mse, with gb", shape, 2 * h.nbytes + y.nbytes, work)


def _gather(name: str, size: int) -> Iterator[Case]:
    ops, n = _operations(name), 1024
    source = _numbers((size // (4 * n), n), np.float32)
    out = ops.empty(source.shape, ops.precision.storage_dtype)
    rows = ops.to_device(np.random.default_rng(0).permutation(len(source)))
    moved = source.nbytes + out.nbytes + rows.nbytes
    yield Case("gather of shuffled float32 rows", source.shape, moved, partial(ops.gather, source, rows, out))


def _updates(name: str, size: int) -> Iterator[Case]:
    ops, count = _operations(name), size // 4
    for told, rule in RULES.items():
        theta, g = (_numbers((count,), np.float32) for _ in range(2))
        moments = [ops.zeros(count, np.float32) for _ in rule.moments]
        shadow = ops.empty(count, ops.precision.storage_dtype) if ops.precision.has_shadow else None
        moved = theta.nbytes * (3 + 2 * len(moments)) + (0 if shadow is None else shadow.nbytes)
        layout = Layout([1, 1], 4)  # only Muon looks at it
        work = partial(ops.update, theta, g, moments, rule, layout, 0, None, None, shadow, _state(ops))
        yield Case(f"update {told}", (count,), moved, work)
    averaged = ops.zeros(count, np.float32)
    work = partial(ops.average, theta, averaged, EMA(), _state(ops))
    yield Case("average", (count,), 3 * theta.nbytes, work)


def _operations(name: str) -> Any:
    from gpu_mlp.ops.cuda_ops import CudaOperations

    return CudaOperations(precision.get(name))


def _shape(ops: Any, size: int, n: int) -> tuple[int, int]:
    return max(1, size // (n * ops.precision.storage_dtype.itemsize)), n


def _state(ops: Any) -> Any:
    state = ops.zeros(len(Slot), np.float64)
    ops.write_state(state, {Slot.LOSS_SCALE: 1.0, Slot.TOTAL_WEIGHT: 1000.0, Slot.LEARNING_RATE: 1e-6})
    return state


def _numbers(shape: tuple[int, ...], dtype: Any) -> Any:
    """Random numbers on the device, the same in every row (of a flat array: every 4096)."""
    import cupy

    array = cupy.empty(shape, dtype)
    rows = array if array.ndim == 2 else array.reshape(-1, min(4096, array.size))
    rows[...] = cupy.asarray(np.random.default_rng(1).normal(size=rows.shape[1]).astype(dtype))
    return array
