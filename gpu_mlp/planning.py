"""The memory plan: how much of the device a training step takes, worked out before anything is allocated.

Leans on the layout of θ and on the tables. The plan counts what `Trainer` and `Workspace` allocate, part by part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import activations, checks
from . import optimizers as rules
from . import precision as precisions
from .ops.interface import Layout
from .optimizers import Muon, Optimizer

# cuBLAS's workspace, partial sums and small change, of whatever network; the operations keep below it.
SCRATCH_BYTES = 32 << 20


@dataclass(frozen=True)
class Plan:
    """Bytes of device memory by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    def summary(self) -> str:
        """The total and its largest parts, in a line."""
        largest = sorted(self.parts.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {checks.shown_size(count)}" for name, count in largest)
        return f"{checks.shown_size(self.total)} planned, {parts}"

    def lines(self) -> dict[str, str]:
        """Every part that takes memory, and the total, for a table."""
        return {
            **{name: checks.shown_size(count) for name, count in self.parts.items() if count},
            "in all": checks.shown_size(self.total),
        }


def plan_memory(
    sizes: Sequence[int],
    names: Sequence[str],
    precision: str,
    optimizer: str | Optimizer,
    batch_size: int,
    fused: bool = True,
    accumulate: int = 1,
    stores_gradient: bool = True,
    layer_gradient: bool = False,
    averaged: bool = False,
    sharers: int = 1,
) -> Plan:
    """The memory of a step on ``batch_size`` rows.

    sizes: n_0, n_1, …, n_L; names: the activation of every layer, the output's last; fused: whether the loss is
    computed from z of the output layer; accumulate: the number of micro-batches; stores_gradient: False where plain SGD
    applies each layer's gradient at once, layer_gradient: which L1 makes it keep one layer's of; averaged: whether an
    average of θ is kept; sharers: how many ranks divide the moments among themselves. The data set itself is not in it.
    """
    batch_size, accumulate = checks.integer("batch_size", batch_size, 1), checks.integer("accumulate", accumulate, 1)
    of, rule = precisions.get(precision), rules.get(optimizer)
    storage, master = of.storage_dtype.itemsize, of.master_dtype.itemsize
    layout = Layout(sizes, master)
    rows, outputs = -(-batch_size // accumulate), list(zip(sizes[1:], map(activations.get, names)))
    keeps_z = [n for l, (n, f) in enumerate(outputs) if f.reads == "z" and not (fused and l == len(outputs) - 1)]
    parts = {
        "θ": layout.size * master,
        f"θ in {of.storage}": layout.size * storage if of.has_shadow else 0,
        "gradient": (layout.size if stores_gradient else layout.size - layout.n_weights) * master,
        "moments": len(rule.moments) * -(-layout.size // sharers) * master,
        "average of θ": layout.size * master if averaged else 0,
        "minibatch": batch_size * (sizes[0] * storage + sizes[-1] * master + 16),
        "h": rows * sum(sizes[1:]) * storage,
        "z": rows * sum(keeps_z) * storage,
        "masks": rows * sum(-(-n // 128) * 16 for n, f in outputs[:-1] if f.name == "relu" and of.storage != "float64"),
        "gz": min(2, len(sizes) - 1) * rows * max(sizes[1:]) * storage,
    }
    if isinstance(rule, Muon):
        parts["Muon's products"] = _muon(sizes) * master
    if layer_gradient and not stores_gradient:
        parts["a layer's gradient"] = max(n_in * n_out for n_in, n_out in zip(sizes, sizes[1:])) * master
    parts["scratch"] = SCRATCH_BYTES
    return Plan(parts)


def _muon(sizes: Sequence[int]) -> int:
    """The numbers in the buffers of the Newton-Schulz iteration: two like the largest W, two like its smaller side."""
    shapes = list(zip(sizes[1:], sizes))
    return 2 * max(map(math.prod, shapes)) + 2 * max(min(shape) ** 2 for shape in shapes)
