"""Epochs and seconds to an accuracy on real data: everybody with the same minibatches, weights and rule, in turn.

An epoch is a loop over shuffled minibatches of one size, each copied out of the data by NumPy and handed over; the rows
that are left over wait for another epoch. The accuracy on the held-out part is worked out by NumPy from the parameters,
for everybody alike and outside the time. The first step of all, in which compilers are at work, is told separately.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import data
from . import steps, timing
from .peers import Contender, named
from .tasks import Task, Weights


@dataclass(frozen=True)
class Goal:
    """A data set, the network for it and the accuracy to reach on the rows that are held out."""

    data: str
    hidden: tuple[int, ...]
    batch: int
    lr: float
    accuracy: float
    epochs: int  # at most


GOALS = {
    "digits": Goal("digits", (128, 64), 64, 2e-3, 0.97, 30),
    "fashion-mnist": Goal("fashion-mnist", (256, 128, 100), 128, 1e-3, 0.88, 12),
}


@dataclass(frozen=True)
class Parts:
    """x: (n, d) float32 in [0, 1]; y: (n,) int64; and the like held out."""

    x: NDArray[Any]
    y: NDArray[Any]
    x_held_out: NDArray[Any]
    y_held_out: NDArray[Any]


def load(name: str, rows: int | None = None) -> Parts:
    """A built-in set, cut to its first ``rows``; what it holds out itself, or a fifth of the rows."""
    raw = data.load(name)
    x, y = _scaled(raw.x, raw.x), np.asarray(raw.y, np.int64)
    if raw.test is not None:
        held_out = _scaled(raw.test.x, raw.x), np.asarray(raw.test.y, np.int64)
        return Parts(x[:rows], y[:rows], held_out[0][:rows], held_out[1][:rows])
    first, second = data.split(len(x), 0.2, 0, y)
    return Parts(x[first][:rows], y[first][:rows], x[second][:rows], y[second][:rows])


def _scaled(x: Any, of: Any) -> NDArray[Any]:
    return np.asarray(x.reshape(len(x), -1), np.float32) / np.float32(of.max())


def measure(
    goal: Goal,
    names: Sequence[str],
    device: str,
    seeds: int = 3,
    rehearsal: bool = False,
    rows: int | None = None,
    epochs: int | None = None,
) -> dict[str, Any]:
    """The record of one goal: by contender its epochs and seconds of every seed, None where it was not reached.

    Each contender's first updates are checked against the reference before; ``absent``, ``wrong`` and ``failed`` are as
    in `steps.measure`.
    """
    parts = load(goal.data, rows)
    sizes = (parts.x.shape[1], *goal.hidden, int(parts.y.max()) + 1)
    task = Task(sizes, goal.batch, "relu", "adam", "float32", device, lr=goal.lr, rehearsal=rehearsal)
    record: dict[str, Any] = {
        "goal": {**goal.__dict__},
        "task": task.as_json(),
        "absent": {},
        "wrong": {},
        "failed": {},
    }
    record["rows"] = [len(parts.y), len(parts.y_held_out)]
    right = steps.admit(task, named(names), record)
    runs: dict[str, list[_Run]] = {name: [] for name in right}
    for seed in range(seeds):
        of_seed = Task(**{**task.__dict__, "seed": seed})
        for name, (contender, _) in right.items():
            runs[name].append(_Run(contender(of_seed)))
        for epoch in range(epochs or goal.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(parts.y))
            for name in right:
                runs[name][seed].epoch(parts, goal, order)
            if all(runs[name][seed].reached for name in right):
                break
    if not rehearsal:
        record["contenders"] = {name: _told(of) for name, of in runs.items()}
    return record


class _Run:
    """A contender on its way to the goal, and how long it has been."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.seconds, self.epochs, self.first_step, self.accuracy = 0.0, 0, 0.0, 0.0
        self.reached = False

    def epoch(self, parts: Parts, goal: Goal, order: NDArray[Any]) -> None:
        """Train on the rows in this order, unless the goal is reached; then look at the accuracy."""
        if self.reached:
            return
        timing.settle()
        batches = [order[i : i + goal.batch] for i in range(0, len(order) - goal.batch + 1, goal.batch)]
        started = time.perf_counter()
        if not self.epochs:
            self._step(parts, batches.pop(0))
            self.contender.wait()
            self.first_step = time.perf_counter() - started
            started = time.perf_counter()
        for rows in batches:
            self._step(parts, rows)
        self.contender.wait()
        self.seconds += time.perf_counter() - started
        self.epochs += 1
        self.accuracy = accuracy(self.contender.parameters(), parts.x_held_out, parts.y_held_out)
        self.reached = self.accuracy >= goal.accuracy

    def _step(self, parts: Parts, rows: NDArray[Any]) -> None:
        self.contender.step(*self.contender.put(parts.x[rows], parts.y[rows]))


def _told(runs: Sequence[_Run]) -> dict[str, Any]:
    return {
        "epochs": [run.epochs if run.reached else None for run in runs],
        "seconds": [run.seconds if run.reached else None for run in runs],
        "seconds_per_epoch": timing.spread([run.seconds / max(1, run.epochs) for run in runs]),
        "first_step": [run.first_step for run in runs],
        "accuracy": [run.accuracy for run in runs],
    }


def accuracy(parameters: Weights, x: NDArray[Any], y: NDArray[Any]) -> float:
    """The share of the rows whose largest output of a relu network is their label's."""
    h = x
    for l, (W, b) in enumerate(parameters):
        h = h @ W.T + b
        if l < len(parameters) - 1:
            np.maximum(h, 0, out=h)
    return float((h.argmax(axis=1) == y).mean())
