"""The bandwidth of every streaming kernel, as a share of what a copy on the same device reaches in the same run.

Bytes are counted, not measured: each array once for a read and once for a write, whatever a kernel reads again from a
cache. The arrays are several times larger than the last cache, which on a GPU is flushed before each sample as well.
On a CPU the same operations are timed, in float32, where the interface has them by themselves; its copy is NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpu_mlp import EMA, SGD, Adam, AdamW, ElasticNet, losses, precision
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.bench import device as gpu
from gpu_mlp.bench import timing
from gpu_mlp.bench.records import Records
from gpu_mlp.losses import CrossEntropy
from gpu_mlp.ops import make
from gpu_mlp.ops.interface import Layout, Slot

LAST = "copy, at the end"
ROWS = (1000, 8000)  # columns: a warp a row, and a block a row
RULES = {"SGD": SGD(), "SGD with momentum": SGD(momentum=0.9), "Adam": Adam(), "AdamW": AdamW()}


@dataclass(frozen=True)
class Case:
    """One kernel on arrays of its own. ``count``: the bytes that it has to move."""

    name: str
    shape: tuple[int, ...]
    count: int
    work: Callable[[], object]


def measure(records: Records, device: str, size: int, samples: int) -> None:
    """Time every case on arrays of ``size`` bytes, in float32 and in bfloat16, between two timings of the copy."""
    clock = gpu.on_device if device == "cuda" else on_host
    copy = _measure_copy(records, "copy", device, size, samples, clock)
    for name in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        for make_cases in MAKERS[device]:
            with records.attempt(f"{make_cases.__name__.strip('_')} {name}"):
                for case in make_cases(_operations(device, name), size):
                    _measure(records, case, name, copy, samples, clock)
    _measure_copy(records, LAST, device, size, samples, clock)


def on_host(work: Callable[[], object], samples: int) -> list[float]:
    """The seconds of each of ``samples`` calls, by the host's clock."""
    work()
    return [timing.repeated(work, lambda: None, 1)[0] for _ in range(samples)]


def _measure_copy(records: Records, name: str, device: str, size: int, samples: int, clock: Any) -> float | None:
    """Bytes a second, read and written."""
    ops = _operations(device, "float32")
    source = _numbers(ops, (size // 4,), np.float32)
    out = ops.empty(source.shape, source.dtype)

    def work() -> None:
        out[...] = source

    return _measure(records, Case(name, source.shape, 2 * source.nbytes, work), "float32", None, samples, clock)


def _measure(
    records: Records, case: Case, dtype: str, copy: float | None, samples: int, clock: Callable[..., list[float]]
) -> float | None:
    seconds = timing.spread(clock(case.work, samples))
    told = {"kernel": case.name, "dtype": dtype, "shape": case.shape, "bytes": case.count}
    name = case.name if case.name in ("copy", LAST) else f"{case.name} · {'×'.join(map(str, case.shape))} · {dtype}"
    if records.rehearsal:
        records.add(name, **told)
        return None
    rate = case.count / seconds["median"]
    share = None if copy is None else rate / copy
    records.add(name, **told, seconds=seconds, bytes_per_second=rate, share_of_copy=share)
    return rate


def _activations(ops: Any, size: int) -> Iterator[Case]:
    n = 1024
    shape, state = _shape(ops, size, n), _state(ops)
    b, gb = ops.zeros(n, ops.precision.storage_dtype), ops.zeros(n, ops.precision.master_dtype)
    for f in (ACTIVATIONS["relu"], ACTIVATIONS["gelu"]):
        keeps = f.reads == "z"
        z, g = (_numbers(ops, shape, ops.precision.storage_dtype) for _ in range(2))
        h = ops.empty(shape, z.dtype) if keeps else z
        forward = partial(ops.kernels.activate, f, z, b, h, keeps, None, state)
        backward = partial(ops.kernels.activation_gradient, f, g, z, None, gb, False, state)
        yield Case(f"bias_activation {f.name}", shape, (3 if keeps else 2) * z.nbytes, forward)
        yield Case(f"activation_gradient {f.name}, with gb", shape, 3 * z.nbytes, backward)


def _row_wise(ops: Any, size: int) -> Iterator[Case]:
    f = ACTIVATIONS["softmax"]
    for n in ROWS:
        shape = _shape(ops, size, n)
        z, g = (_numbers(ops, shape, ops.precision.storage_dtype) for _ in range(2))
        yield Case("bias_softmax", shape, 2 * z.nbytes, partial(ops.activate, f, z, z))
        yield Case("softmax_gradient", shape, 3 * z.nbytes, partial(ops.kernels.rowwise_gradient, f, g, z))


def _cross_entropy(ops: Any, size: int) -> Iterator[Case]:
    for n in ROWS:
        shape, state = _shape(ops, size, n), _state(ops)
        z = _numbers(ops, shape, ops.precision.storage_dtype)
        y, gz = ops.to_device(np.arange(shape[0]) % n), ops.empty(shape, z.dtype)
        work = partial(ops.kernels.cross_entropy, CrossEntropy(), z, y, None, gz, state)
        yield Case("softmax_cross_entropy", shape, 2 * z.nbytes + y.nbytes, work)


def _alone(ops: Any, size: int) -> Iterator[Case]:
    """Activations by themselves, in place."""
    for name in ("relu", "gelu", "softmax"):
        shape = _shape(ops, size, 1024)
        z = _numbers(ops, shape, ops.precision.storage_dtype)
        yield Case(f"activate {name}", shape, 2 * z.nbytes, partial(ops.activate, ACTIVATIONS[name], z, z))


def _fused_loss(ops: Any, size: int) -> Iterator[Case]:
    """Softmax, cross-entropy and its gradient from z."""
    shape, f, loss, state = _shape(ops, size, 1000), ACTIVATIONS["softmax"], CrossEntropy(), _state(ops)
    z = _numbers(ops, shape, ops.precision.storage_dtype)
    y, gz = ops.to_device(np.arange(shape[0]) % shape[1]), ops.empty(shape, z.dtype)
    work = partial(ops.loss_and_gradient, loss, f, True, z, None, y, None, gz, None, False, state)
    yield Case("softmax_cross_entropy", shape, 2 * z.nbytes + y.nbytes, work)


def _pointwise_loss(ops: Any, size: int) -> Iterator[Case]:
    shape, f, loss = _shape(ops, size, 1024), ACTIVATIONS["identity"], losses.get("mse")
    h, y = (_numbers(ops, shape, dtype) for dtype in (ops.precision.storage_dtype, ops.precision.master_dtype))
    gz, gb = ops.empty(shape, h.dtype), ops.zeros(shape[1], y.dtype)
    work = partial(ops.loss_and_gradient, loss, f, False, h, None, y, None, gz, gb, False, _state(ops))
    yield Case("pointwise_loss mse, with gb", shape, 2 * h.nbytes + y.nbytes, work)


def _gather(ops: Any, size: int) -> Iterator[Case]:
    n = 1024
    source = _numbers(ops, (size // (4 * n), n), np.float32)
    out = ops.empty(source.shape, ops.precision.storage_dtype)
    rows = ops.to_device(np.random.default_rng(0).permutation(len(source)))
    moved = source.nbytes + out.nbytes + rows.nbytes
    yield Case("gather of shuffled float32 rows", source.shape, moved, partial(ops.gather, source, rows, out))


def _updates(ops: Any, size: int) -> Iterator[Case]:
    count = size // 4
    for told, rule in RULES.items():
        theta, g = (_numbers(ops, (count,), np.float32) for _ in range(2))
        moments = [ops.zeros(count, np.float32) for _ in rule.moments]
        shadow = ops.empty(count, ops.precision.storage_dtype) if ops.precision.has_shadow else None
        moved = theta.nbytes * (3 + 2 * len(moments)) + (0 if shadow is None else shadow.nbytes)
        layout = Layout([1, 1], 4)  # only Muon looks at it
        work = partial(ops.update, theta, g, moments, rule, layout, 0, None, None, shadow, _state(ops))
        yield Case(f"update {told}", (count,), moved, work)
    averaged = ops.zeros(count, np.float32)
    work = partial(ops.average, theta, averaged, EMA(), _state(ops))
    yield Case("average", (count,), 3 * theta.nbytes, work)


def _flat(ops: Any, size: int) -> Iterator[Case]:
    """The norm of the gradient, and λΩ with both its terms: they read, and write a few numbers."""
    count, state = size // 4, _state(ops)
    theta, g = (_numbers(ops, (count,), np.float32) for _ in range(2))
    yield Case("gradient_norm", (count,), g.nbytes, partial(ops.gradient_norm, theta, g, 0, None, state))
    yield Case("penalty", (count,), g.nbytes, partial(ops.penalty, theta, count, ElasticNet(1e-6, 1e-6), state))


MAKERS = {
    "cuda": (_activations, _row_wise, _cross_entropy, _pointwise_loss, _gather, _updates, _flat),
    "cpu": (_alone, _fused_loss, _pointwise_loss, _gather, _updates, _flat),
}


def _operations(device: str, name: str) -> Any:
    return make(device, precision.get(name))


def _shape(ops: Any, size: int, n: int) -> tuple[int, int]:
    return max(1, size // (n * ops.precision.storage_dtype.itemsize)), n


def _state(ops: Any) -> Any:
    state = ops.zeros(len(Slot), np.float64)
    ops.write_state(state, {Slot.LOSS_SCALE: 1.0, Slot.TOTAL_WEIGHT: 1000.0, Slot.LEARNING_RATE: 1e-6})
    return state


def _numbers(ops: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Random numbers on the device, the same in every row (of a flat array: every 4096)."""
    array = ops.empty(shape, dtype)
    rows = array if array.ndim == 2 else array.reshape(-1, min(4096, array.size))
    rows[...] = ops.to_device(np.random.default_rng(1).normal(size=rows.shape[1]).astype(dtype))
    return array
