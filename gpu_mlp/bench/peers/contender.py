"""What a contender has to be able to do."""

from __future__ import annotations

import abc
import importlib
from typing import Any, ClassVar

from ..tasks import Task, Weights

PRECISIONS = {"cpu": ("float32",), "cuda": ("float32", "tf32", "bfloat16")}  # that peers are compared in


class Unavailable(RuntimeError):
    """A contender that cannot take part here, and why."""


def library(name: str, package: str) -> Any:
    """A module, imported at last; Unavailable where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed" if error.name == name.split(".")[0] else str(error)) from error


class Contender(abc.ABC):
    """One library's training step for one task: the same network, initial weights, batch, precision and update rule.

    Raises Unavailable when it is made, where it cannot take part.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def __init__(self, task: Task) -> None: ...

    @abc.abstractmethod
    def put(self, x: Any, y: Any) -> tuple[Any, Any]:
        """A batch, (batch, n_0) float32 and (batch,) int64, in arrays of the contender's own, on its device."""

    @abc.abstractmethod
    def step(self, x: Any, y: Any) -> Any:
        """One update on a batch from `put`; the loss before it, which may still be in the making."""

    def wait(self) -> None:
        """Until every step that was asked for is done."""
        return None

    def number(self, loss: Any) -> float:
        """A loss from `step`."""
        return float(loss)

    @classmethod
    def forget(cls) -> None:
        """Drop what the library keeps of earlier tasks in this process, where that would slow down the next."""
        return None

    @abc.abstractmethod
    def parameters(self) -> Weights:
        """(W, b) of every layer as NumPy arrays, W of (n_out, n_in)."""

    def device_bytes(self) -> int | None:
        """On a GPU: the most memory that this library has held, in this process; None on a CPU."""
        return None
