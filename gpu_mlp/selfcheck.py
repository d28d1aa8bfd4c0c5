"""Checks that a user can run on their own machine: gradients, precisions, repeatability and files. Behind `gpu-mlp
check`.

Leans on `gradcheck` for finite differences; everything else is compared with the float64 network on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks, ops
from .activations import ACTIVATIONS
from .gradcheck import GradcheckReport, gradcheck
from .losses import LOSSES, Loss
from .network import MLP
from .optimizers import OPTIMIZERS
from .precision import PRECISIONS
from .precision import get as precision_of
from .regularizers import ElasticNet
from .training import Trainer

# How far J's gradient may be from float64's, in the Frobenius norm: about 30 units in the last place of the storage
# type.
TOLERANCE = {"float64": 1e-13, "float32": 4e-6, "tf32": 3e-2, "bfloat16": 0.12, "float16": 1.5e-2}

SAME = 1e-9  # float64 on two devices, whose sums run in different orders, relative to the norm

OF_EACH_ARRAY = 4  # entries tried where a loss meets its many outputs: those were checked whole as hidden layers


@dataclass(frozen=True)
class Check:
    """One check: what was checked, whether it holds, and the figure behind it."""

    name: str
    ok: bool
    detail: str


def run_checks(device: str, seed: int) -> Iterator[Check]:
    """Every check, one after the other; the arguments are checked at once, ValueError and TypeError as everywhere."""
    ops.make(device, precision_of("float32"))
    checks.integer("seed", seed, 0, 2**64 - 1)
    return _all_checks(np.random.default_rng(seed), device, seed)


def _all_checks(rng: np.random.Generator, device: str, seed: int) -> Iterator[Check]:
    chosen = MLP([1, 1], device=device).device
    why = ops.cuda_obstacle() if device == "auto" else ""
    yield Check("device", True, f"{chosen} ({why})" if why else chosen)
    yield from _gradients(rng, seed)
    if chosen == "cuda":
        yield from _agreement(rng, seed)
    yield from _precisions(rng, device, seed)
    yield _repeatable(rng, device, seed)
    yield _files(device, seed)


def _target(loss: Loss, rows: int, n: int, rng: np.random.Generator) -> NDArray[Any]:
    """Targets that a loss takes: labels where it takes them, else values in (0, 1)."""
    return rng.integers(0, n, rows) if loss.takes_labels else rng.uniform(0.1, 0.9, (rows, n))


def _gradients(rng: np.random.Generator, seed: int) -> Iterator[Check]:
    """Every activation in a hidden layer; then every loss behind every output that it allows."""
    for name in ACTIVATIONS:
        yield _difference_check(f"gradient, hidden {name}", [_report(name, "softmax", "cross_entropy", rng, seed)])
    for loss in LOSSES:
        outputs = [output for output in ACTIVATIONS if _allows(LOSSES[loss](), output)]
        reports = [_report("tanh", output, loss, rng, seed, OF_EACH_ARRAY) for output in outputs]
        yield _difference_check(f"gradient, {loss} behind {len(outputs)} output{'s' * (len(outputs) > 1)}", reports)


def _allows(loss: Loss, output: str) -> bool:
    try:
        loss.check_output(output, 3)
    except ValueError:
        return False
    return True


def _report(
    hidden: str, output: str, loss: str, rng: np.random.Generator, seed: int, max_entries: int | None = None
) -> GradcheckReport:
    """A small float64 network against finite differences, every parameter away from the penalty's kink at 0."""
    net = MLP([4, 5, 5, 3], hidden, output, precision="float64", device="cpu", seed=seed)
    for b in net.biases:
        b[...] = rng.uniform(0.1, 0.3, b.shape)
    y = _target(LOSSES[loss](), 6, 3, rng)
    return gradcheck(
        net, rng.uniform(-0.8, 0.8, (6, 4)), y, loss, ElasticNet(1e-3, 1e-2, on="all"), max_entries=max_entries
    )


def _agreement(rng: np.random.Generator, seed: int) -> Iterator[Check]:
    """Every activation, loss and optimizer on the GPU against the CPU, in float64."""
    x = rng.uniform(-0.8, 0.8, (33, 5))
    for name in ACTIVATIONS:
        yield _compared(f"GPU against CPU, hidden {name}", name, "softmax", "cross_entropy", x, rng, seed)
    for loss in LOSSES:
        outputs = ("identity", "sigmoid", "softmax", "log_softmax")
        output = next(output for output in outputs if _allows(LOSSES[loss](), output))
        yield _compared(f"GPU against CPU, {loss} behind {output}", "tanh", output, loss, x, rng, seed)
    y = rng.integers(0, 3, len(x))
    for optimizer in OPTIMIZERS:
        ends = []
        for device in ("cpu", "cuda"):
            net = MLP([5, 17, 3], "tanh", "softmax", precision="float64", device=device, seed=seed)
            Trainer(net, optimizer=optimizer).fit((x, y), epochs=3, batch_size=8, progress=False)
            ends.append(net._ops.to_host(net.theta))
        off = float(np.linalg.norm(ends[1] - ends[0]) / np.linalg.norm(ends[0]))
        yield Check(f"GPU against CPU, 3 epochs of {optimizer}", off <= SAME, f"weights off by {off:.1e} of their norm")


def _compared(
    name: str, hidden: str, output: str, loss: str, x: NDArray[Any], rng: np.random.Generator, seed: int
) -> Check:
    y, found = _target(LOSSES[loss](), len(x), 3, rng), []
    for device in ("cpu", "cuda"):
        net = MLP([5, 17, 3], hidden, output, precision="float64", device=device, seed=seed)
        found.append(net.cost_and_gradients(x, y, loss)[1].theta)
    off = float(np.linalg.norm(found[1] - found[0]) / max(np.linalg.norm(found[0]), np.finfo(float).tiny))
    return Check(name, off <= SAME, f"gradient off by {off:.1e} of its norm")


def _difference_check(name: str, reports: list[GradcheckReport]) -> Check:
    error = max(row.max_abs_error for report in reports for row in report.rows)
    entries, skipped = sum(r.checked for r in reports), sum(r.skipped for r in reports)
    left_out = f", {skipped} at a kink left out" if skipped else ""
    ok = all(report.ok for report in reports)
    return Check(name, ok, f"max error {error:.1e} over {entries} entries{left_out}")


def _precisions(rng: np.random.Generator, device: str, seed: int) -> Iterator[Check]:
    """The gradient in every precision against float64's on the CPU."""
    x, y = rng.normal(size=(64, 32)), rng.integers(0, 10, 64)
    exact = MLP([32, 48, 48, 10], "gelu", "softmax", precision="float64", device="cpu", seed=seed)
    _, expected = exact.cost_and_gradients(x, y, "cross_entropy")
    for name in PRECISIONS:
        try:
            net = MLP([32, 48, 48, 10], "gelu", "softmax", precision=name, device=device, seed=seed)
        except ValueError as error:
            yield Check(f"precision {name}", True, f"not available ({error})")
            continue
        _, found = net.cost_and_gradients(x, y, "cross_entropy")
        off = float(np.linalg.norm(found.theta - _like(expected.weights, expected.biases, net)))
        off /= float(np.linalg.norm(expected.theta))
        yield Check(f"precision {name}", off <= TOLERANCE[name], f"gradient off by {off:.1e} of its norm")


def _like(weights: list[Any], biases: list[Any], net: MLP) -> NDArray[Any]:
    """The gradient of the float64 network laid out as another network's θ, whose gaps differ with its item size."""
    flat = np.zeros(net.layout.size)
    for view, source in zip([*net.layout.weights(flat), *net.layout.biases(flat)], [*weights, *biases]):
        view[...] = source
    return flat


def _repeatable(rng: np.random.Generator, device: str, seed: int) -> Check:
    """Two runs of one seed end in the same bits."""
    x, y = rng.normal(size=(200, 8)), rng.integers(0, 3, 200)
    ends = []
    for _ in range(2):
        net = MLP([8, 16, 3], output="softmax", dropout=0.2, device=device, seed=seed)
        Trainer(net).fit((x, y), epochs=3, batch_size=32, progress=False)
        ends.append(net._ops.to_host(net.theta).tobytes())
    same = ends[0] == ends[1]
    return Check("same seed, same bits", same, "two runs agree" if same else "two runs differ")


def _files(device: str, seed: int) -> Check:
    """A saved network comes back to the bit."""
    net = MLP([8, 16, 3], output="softmax", device=device, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        back = MLP.load(net.save(Path(folder) / "model.safetensors"), device)
    same = net._ops.to_host(net.theta).tobytes() == back._ops.to_host(back.theta).tobytes()
    return Check("save and load", same, "the same bits" if same else "the weights differ")
