"""What is measured: a training step of a network on a batch, with its data, initial weights and expected numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import MLP, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, Muon, NAdam, RAdam, RMSprop, Trainer
from ..optimizers import Optimizer

Weights = list[tuple[NDArray[Any], NDArray[Any]]]

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(lr=0.05),
    "momentum": SGD(lr=0.005, momentum=0.9),
    "adam": Adam(lr=1e-4),
    "adamw": AdamW(lr=1e-4, weight_decay=0.01),
    "nadam": NAdam(lr=1e-4),
    "radam": RAdam(lr=1e-4),
    "adamax": Adamax(lr=1e-4),
    "adagrad": Adagrad(lr=1e-4),
    "adadelta": Adadelta(lr=0.1),
    "rmsprop": RMSprop(lr=1e-4),
    "lion": Lion(lr=1e-4),
    "muon": Muon(lr=1e-3),
}
TAME = {"sgd": 256, "momentum": 256}  # the width beyond which a rule overshoots unless its rate shrinks; else:
TAME_ELSE = 2048
CHECK_STEPS = 4  # updates that are compared with the reference's,
DEEP = 32  # and one of more layers than these: without shortcuts they enlarge rounding from update to update
CHECK_FLOP = 1e11  # of one step of a network in float64 that is waited for
# How far losses, and the way that all parameters have come by then, may be from the reference: relative errors.
# Adam divides a gradient by its own size, so where one is all rounding its direction is chance; hence the wide second.
TOLERANCE = {
    "float64": (1e-10, 1e-6),
    "float32": (1e-4, 5e-2),
    "tf32": (5e-3, 0.2),
    "bfloat16": (3e-2, 0.5),
    "float16": (1e-2, 0.3),
}


@dataclass(frozen=True)
class Task:
    """A step: forward, softmax with cross-entropy, backward, update, on a batch that is on the device already."""

    sizes: tuple[int, ...]
    batch: int
    activation: str = "relu"
    optimizer: str = "sgd"
    precision: str = "float32"
    device: str = "cpu"
    lr: float | None = None  # None: the rule's own in OPTIMIZERS, less in wide networks
    seed: int = 0  # of the initial weights
    rehearsal: bool = False  # peers take the CPU for the GPU that is not there

    @property
    def peers_device(self) -> str:
        """Where another library computes."""
        return "cpu" if self.rehearsal else self.device

    @property
    def name(self) -> str:
        """What tells it apart, in words."""
        return f"{self.shape} · {self.activation} · {self.optimizer} · {self.precision}"

    @property
    def shape(self) -> str:
        """Widths and batch; equal widths in a row are counted."""
        runs: list[list[int]] = []
        for size in self.sizes:
            if runs and runs[-1][0] == size:
                runs[-1][1] += 1
            else:
                runs.append([size, 1])
        words = [f"{size}×{count}" if count > 4 else "-".join([str(size)] * count) for size, count in runs]
        return f"{'-'.join(words)} at {self.batch}"

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(n_in, n_out) of every layer."""
        return list(zip(self.sizes, self.sizes[1:]))

    @property
    def parameters(self) -> int:
        """The number of weights and biases."""
        return sum(n_out * (n_in + 1) for n_in, n_out in self.layers)

    @property
    def flop(self) -> int:
        """Operations of the GEMMs of one step: three a layer, two in the first, which needs no gh."""
        products = [(3 if l else 2) * n_in * n_out for l, (n_in, n_out) in enumerate(self.layers)]
        return 2 * self.batch * sum(products)

    @property
    def rule(self) -> Optimizer:
        """The update rule, the same for everybody."""
        rule, tame = OPTIMIZERS[self.optimizer], TAME.get(self.optimizer, TAME_ELSE)
        lr = rule.lr * min(1.0, tame / max(self.sizes)) if self.lr is None else self.lr
        return dataclasses.replace(rule, lr=lr)

    @property
    def check_steps(self) -> int:
        """How many updates are compared with the reference's."""
        return CHECK_STEPS if len(self.layers) <= DEEP else 1

    def as_json(self) -> dict[str, Any]:
        """What a record says of it."""
        kept = ("sizes", "batch", "activation", "optimizer", "precision", "device")
        return {key: getattr(self, key) for key in kept} | {"parameters": self.parameters, "flop": self.flop}

    def data(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """x, (batch, n_0) float32, and labels, (batch,) int64.

        The second half of the rows repeats the first with other labels: no network can learn them, so that gradients
        keep an ordinary size however many steps are timed (numbers too small for a processor would slow it down).
        """
        rng = np.random.default_rng(0)
        half = -(-self.batch // 2)
        x = rng.standard_normal((half, self.sizes[0]), np.float32)
        y = rng.integers(0, self.sizes[-1], half)
        return np.concatenate([x, x])[: self.batch], np.concatenate([y, (y + 1) % self.sizes[-1]])[: self.batch]

    def weights(self) -> Weights:
        """(W, b) of every layer, float32: W as He's uniform initialisation draws it, b zero."""
        rng, drawn = np.random.default_rng([self.seed, 1]), []
        for n_in, n_out in self.layers:
            W = rng.random((n_out, n_in), np.float32)
            W -= np.float32(0.5)
            W *= np.float32(2 * (6 / n_in) ** 0.5 if n_out != self.sizes[-1] else 2 * (1 / n_in) ** 0.5)
            drawn.append((W, np.zeros(n_out, np.float32)))
        return drawn

    def network(self, device: str | None = None, precision: str | None = None) -> MLP:
        """This library's network with those weights."""
        drawn: Iterator[Any] = iter([W for W, _ in self.weights()])
        return MLP(
            self.sizes, self.activation, "softmax", init=lambda rng, shape: next(drawn),
            precision=precision or self.precision, device=device or self.device,
        )  # fmt: skip

    def for_check(self) -> Task:
        """The task itself, or one with fewer rows and at last thinner layers, if the reference would take too long."""
        task = self
        while task.flop > CHECK_FLOP and task.batch > 256:
            task = dataclasses.replace(task, batch=task.batch // 2)
        while task.flop > CHECK_FLOP and max(task.sizes[:-1]) > 256:
            thinner = tuple(max(1, size // 2) for size in task.sizes[:-1])
            task = dataclasses.replace(task, sizes=(*thinner, task.sizes[-1]))
        return task


@dataclass(frozen=True)
class Expected:
    """The reference's losses before each of the first updates, and its parameters after them."""

    losses: list[float]
    before: Weights
    after: Weights


def expected(task: Task) -> Expected:
    """What the NumPy implementation finds in float64."""
    net = task.network("cpu", "float64")
    trainer = Trainer(net, "cross_entropy", task.rule)
    x, y = task.data()
    losses = [float(trainer.step(x, y)) for _ in range(task.check_steps)]
    return Expected(losses, task.weights(), list(zip(net.weights, net.biases)))


def judge(task: Task, reference: Expected, losses: list[float], after: Weights) -> dict[str, Any]:
    """How far somebody's losses and parameters are off, and whether that is ``right``; a NaN never is."""
    loss_tolerance, way_tolerance = TOLERANCE[task.precision]
    loss_error = max(abs(a - b) / abs(b) for a, b in zip(losses, reference.losses))
    loss_error = loss_error if len(losses) == len(reference.losses) else float("inf")
    off = way = 0.0
    for before, expected_, found in zip(reference.before, reference.after, after):
        for b, e, f in zip(before, expected_, found):
            if np.shape(f) != e.shape:
                return {"right": False, "detail": f"a parameter of shape {np.shape(f)}, not {e.shape}"}
            off += float(np.square(np.asarray(f, np.float64) - e).sum())
            way += float(np.square(e - b).sum())
    way_error = (off / way) ** 0.5
    right = loss_error <= loss_tolerance and way_error <= way_tolerance
    detail = f"losses off by {loss_error:.1e} (allowed {loss_tolerance:g}), updates by {way_error:.1e} (allowed "
    return {"right": bool(right), "detail": f"{detail}{way_tolerance:g})"}
