"""What a training run leaves behind, epoch by epoch, and the rule that ends it early.

A leaf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks

LOWER_IS_BETTER = ("cost", "validation_loss", "validation_rmse")


def improves(monitor: str, value: float, best: float, min_delta: float = 0.0) -> bool:
    """Whether ``value`` beats ``best`` by more than ``min_delta``; NaN never does, anything beats a NaN."""
    if math.isnan(value):
        return False
    if math.isnan(best):
        return True
    return value < best - min_delta if monitor in LOWER_IS_BETTER else value > best + min_delta


@dataclass(frozen=True)
class EarlyStopping:
    """End a run after ``patience`` epochs in a row without an improvement of ``monitor`` by more than ``min_delta``.

    ``monitor`` is a column of the history; None means validation_loss, or cost where there is no validation. The
    weights of the best epoch are put back at the end, also of a run that was not ended early, unless
    ``restore_best`` is False.
    """

    patience: int = 10
    monitor: str | None = None
    min_delta: float = 0.0
    restore_best: bool = True

    def __post_init__(self) -> None:
        checks.integer("patience", self.patience, 1)
        checks.real("min_delta", self.min_delta, 0)
        checks.boolean("restore_best", self.restore_best)


class History:
    """One row an epoch, a dict: epoch, step, cost (J averaged over the epoch's samples), learning_rate, seconds,
    samples_per_second, and with validation validation_loss and validation_<metric>.

    ``history["cost"]`` is a column; ``last`` and ``best`` are rows (best by ``monitor``); ``stopped`` says what
    ended the run: "completed", "early stopping", "converged" (L-BFGS), "callback", "interrupted", "terminated",
    "diverged" or "device lost".
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.rows: list[dict[str, float]] = []
        self.stopped = "running"
        self.restored_best = False
        self._best = -1

    def append(self, row: dict[str, float], min_delta: float = 0.0) -> bool:
        """Add a row; True if it is the best so far."""
        self.rows.append(row)
        better = self._best < 0 or improves(
            self.monitor, row[self.monitor], self.rows[self._best][self.monitor], min_delta
        )
        if better:
            self._best = len(self.rows) - 1
        return better

    @property
    def last(self) -> dict[str, float]:
        """The row of the last epoch; empty before one is over."""
        return self.rows[-1] if self.rows else {}

    @property
    def best(self) -> dict[str, float]:
        """The row of the best epoch by ``monitor``; empty before one is over."""
        return self.rows[self._best] if self.rows else {}

    @property
    def best_index(self) -> int:
        """The place of the best row; -1 before one is over."""
        return self._best

    @property
    def epochs_since_best(self) -> int:
        """How many epochs have passed since the best one."""
        return len(self.rows) - 1 - self._best

    def __getitem__(self, column: str) -> list[float]:
        if self.rows and column not in self.rows[0]:
            known = list(self.rows[0])
            raise KeyError(f"no column {column!r}{checks.nearest(column, known)} (columns: {', '.join(known)})")
        return [row[column] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"History({len(self)} epochs, {self.stopped}, best {self.monitor} {self.best.get(self.monitor)})"

    def table(self) -> tuple[list[str], NDArray[np.float64]]:
        """The columns' names, and the rows as a float64 array, (epochs, columns)."""
        columns = list(self.rows[0]) if self.rows else []
        values = [[row[column] for column in columns] for row in self.rows]
        return columns, np.array(values, np.float64).reshape(len(self.rows), len(columns))

    def take(self, columns: Sequence[str], values: NDArray[np.float64], best: int) -> None:
        """Go on from such a table, whose row ``best`` is the best."""
        whole = ("epoch", "step")
        self.rows = [
            {name: int(value) if name in whole else value for name, value in zip(columns, row)}
            for row in values.tolist()
        ]
        self._best = best

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return {
            "stopped": self.stopped,
            "monitor": self.monitor,
            "restored_best": self.restored_best,
            "best": self.best,
            "last": self.last,
            "epochs": self.rows,
        }
