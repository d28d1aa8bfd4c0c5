"""The bytes that each streaming kernel must move and those that it does move, array by array.

Must: from shapes and types, each array once. Does: counted access by access while the kernel's own text runs on the
emulated GPU of tests/cuda_on_cpu. What a GPU's caches make of it is not counted; the kernels that go over a row twice
(softmax, cross-entropy), or read y_hat both as the output and for f', show here. Writes the table:

    python benchmarks/kernel_bytes.py benchmarks/results/kernel_bytes.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from gpu_mlp import EMA, SGD, Adam, ElasticNet
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.losses import LOSSES
from gpu_mlp.ops.interface import Dropout, Slot
from gpu_mlp.precision import PRECISIONS

ROWS, COLUMNS = 48, 128  # whole packs in every type
SIZE = 4096  # of a flat array
STORAGE = ("float64", "float32", "float16", "bfloat16")

# Arrays that are small beside the streams, and why they are moved more often than once or by no rule of their own.
BESIDES = {
    "b": "a bias vector, once by each thread that has its columns",
    "partial": "partial sums, a row for each block row",
    "partial_cost": "partial sums, one for each block",
    "state": "a few numbers of the state, by each thread",
    "coefficient": "a few numbers from prepare_update, by each thread",
    "c": "a few numbers from prepare_update, by each thread",
    "rows": "the row's number, by each thread of the row",
}


@dataclass(frozen=True)
class Moved:
    """One array of one kernel: bytes that must be read and written, and that are."""

    kernel: str
    case: str
    storage: str
    array: str
    must_read: int
    read: int
    must_write: int
    written: int


def measure() -> Iterator[Moved]:
    """Every kernel in every storage type; the emulated GPU stands in for CuPy meanwhile."""
    from cuda_on_cpu import fake_cupy

    with fake_cupy.installed() as device:
        device.reset()
        from gpu_mlp.ops.cuda_ops import CudaOperations

        for storage in STORAGE:
            bench = Bench(CudaOperations(PRECISIONS[storage]), storage)
            for kernel, case, run, must in bench.cases():
                device.traffic.clear()
                run()
                found = next(arrays for name, arrays in device.traffic if name == kernel)
                for array in sorted({*must, *(array for array, counts in found.items() if any(counts))}):
                    read, written = found.get(array, (0, 0))
                    must_read, must_write = must.get(array, (0, 0))
                    yield Moved(kernel, case, storage, array, must_read, read, must_write, written)


class Bench:
    """Arrays of one storage type, and the operations on them that launch each kernel once."""

    def __init__(self, ops: Any, storage: str) -> None:
        self.ops, self.storage = ops, storage
        self.state = ops.to_device(np.ones(len(Slot)), np.float64)
        ops.write_state(self.state, {Slot.BAD_ROUND: 0.0, Slot.CURSOR: 0.0})

    def matrix(self, dtype: Any = None) -> Any:
        """(ROWS, COLUMNS) of the storage type."""
        return self.ops.to_device(np.full((ROWS, COLUMNS), 0.5), dtype or self.ops.precision.storage_dtype)

    def flat(self, dtype: Any = None) -> Any:
        return self.ops.to_device(np.full(SIZE, 0.5), dtype or self.ops.precision.master_dtype)

    def cases(self) -> Iterator[tuple[str, str, Callable[[], None], dict[str, tuple[int, int]]]]:
        """(kernel, case, what launches it, {parameter: bytes to be (read, written)}), `BESIDES` left out."""
        yield from self._layers()
        yield from self._rows()
        yield from self._losses()
        yield from self._updates()
        yield from self._flat()

    def _layers(self) -> Iterator[Any]:
        ops, state, x, h, b = self.ops, self.state, self.matrix(), self.matrix(), self.matrix()[0]
        activate, gradient = ops.kernels.activate, ops.kernels.activation_gradient
        gb = self.flat()[:COLUMNS]
        n = x.nbytes
        relu, silu, identity = ACTIVATIONS["relu"], ACTIVATIONS["silu"], ACTIVATIONS["identity"]
        dropout = Dropout(0.5, 1, 0)
        yield "bias_activation", "relu", lambda: activate(relu, x, b, h, False, None, state), {
            "product": (n, 0), "h": (0, n)}  # fmt: skip
        yield "bias_activation", "relu in place", lambda: activate(relu, h, b, h, False, None, state), {
            "product": (n, n)}  # fmt: skip
        yield "bias_activation", "silu, z kept, dropout", lambda: activate(silu, x, b, h, True, dropout, state), {
            "product": (n, n), "h": (0, n)}  # fmt: skip
        yield "activation_gradient", "relu", lambda: gradient(relu, x, h, None, gb, False, state), {
            "g": (n, n), "saved": (n, 0)}  # fmt: skip
        yield (
            "activation_gradient",
            "silu, dropout",
            lambda: gradient(silu, x, h, dropout, gb, False, state),
            {"g": (n, n), "saved": (n, 0)},
        )
        yield (
            "activation_gradient",
            "identity",
            lambda: gradient(identity, x, None, None, gb, False, state),
            {"g": (n, 0)},
        )
        yield "finish_column_sums", "", lambda: gradient(relu, x, h, None, gb, False, state), {
            "gb": (0, gb.nbytes)}  # fmt: skip
        source, rows = self.matrix(np.float32), ops.to_device(np.arange(ROWS)[::-1].copy(), np.int64)
        yield (
            "gather",
            "from float32",
            lambda: ops.gather(source, rows, h),
            {"source": (source.nbytes, 0), "out": (0, n)},
        )

    def _rows(self) -> Iterator[Any]:
        kernels, x, h, b = self.ops.kernels, self.matrix(), self.matrix(), self.matrix()[0]
        softmax, n = ACTIVATIONS["softmax"], self.matrix().nbytes
        yield "bias_softmax", "", lambda: kernels.activate(softmax, x, b, h, False, None, self.state), {
            "product": (n, 0), "h": (0, n)}  # fmt: skip
        yield "softmax_gradient", "", lambda: kernels.rowwise_gradient(softmax, x, h), {"g": (n, n), "h": (n, 0)}

    def _losses(self) -> Iterator[Any]:
        ops, h, z, gz = self.ops, self.matrix(), self.matrix(), self.matrix()
        y, gb = self.matrix(ops.precision.master_dtype), self.flat()[:COLUMNS]
        n, tanh, softmax = h.nbytes, ACTIVATIONS["tanh"], ACTIVATIONS["softmax"]
        yield (
            "pointwise_loss",
            "mse, tanh",
            lambda: ops.loss_and_gradient(LOSSES["mse"](), tanh, False, h, z, y, None, gz, gb, False, self.state),
            {"y_hat": (n, 0), "y": (y.nbytes, 0), "gz": (0, n)},
        )
        yield (
            "softmax_cross_entropy",
            "dense targets",
            lambda: ops.loss_and_gradient(
                LOSSES["cross_entropy"](), softmax, True, h, z, y, None, gz, None, False, self.state
            ),
            {"z": (n, 0), "y": (y.nbytes, 0), "gz": (0, n)},
        )

    def _updates(self) -> Iterator[Any]:
        ops, kernels, theta, g = self.ops, self.ops.kernels, self.flat(), self.flat()
        moments, n = [self.flat(), self.flat(), self.flat()], self.flat().nbytes
        shadow = None if self.storage in ("float64", "float32") else self.flat(ops.precision.storage_dtype)
        copy = {} if shadow is None else {"shadow": (0, shadow.nbytes)}
        for rule in (SGD(0.1), SGD(0.1, momentum=0.9), Adam(0.1), Adam(0.1, amsgrad=True)):
            own = moments[: len(rule.moments)]
            must = {"theta": (n, n), "g": (n, 0), **{f"m{i}": (n, n) for i in range(len(own))}, **copy}
            yield (
                "update",
                f"{rule.name}, {len(own)} moments",
                lambda own=own, rule=rule: kernels.apply_rule(
                    theta, g, own, rule, SIZE, ElasticNet(0.1, 0.1), 1.0, shadow, self.state
                ),
                must,
            )

    def _flat(self) -> Iterator[Any]:
        ops, theta, g, net = self.ops, self.flat(), self.flat(), ElasticNet(0.1, 0.1)
        n = theta.nbytes
        yield "penalty", "", lambda: ops.penalty(theta, SIZE, net, self.state), {"theta": (n, 0)}
        yield "square_norm", "", lambda: ops.gradient_norm(theta, g, SIZE, net, self.state), {
            "theta": (n, 0), "g": (n, 0)}  # fmt: skip
        averaged = self.flat()
        yield "average", "", lambda: ops.average(theta, averaged, EMA(), self.state), {
            "theta": (n, 0), "averaged": (n, n)}  # fmt: skip


def main(path: str) -> None:
    """Write the table."""
    fields = list(Moved.__dataclass_fields__)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*fields, "besides"])
        for moved in measure():
            writer.writerow([*(getattr(moved, field) for field in fields), BESIDES.get(moved.array, "")])


if __name__ == "__main__":
    main(sys.argv[1])
