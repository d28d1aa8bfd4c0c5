"""How a run ends before its time: a cost that is no number, a device that is gone, a file that breaks off, a signal.

A leaf; each failure carries the history up to it.
"""

from __future__ import annotations

from .history import History


class Diverged(ArithmeticError):
    """The cost or the gradient was not finite; the message says where. The network holds the last good weights.

    ``history`` is what `Trainer.fit` had recorded before; None where a single step diverged.
    """

    def __init__(self, message: str, history: History | None = None) -> None:
        super().__init__(message)
        self.history = history


class DeviceLost(RuntimeError):
    """The device failed in a run. The network is on the CPU now, with the weights of the last whole epoch.

    ``history`` is what `Trainer.fit` had recorded before. The trainer cannot be used any more.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


class BrokenData(ValueError):
    """A data set on the disk could not be read on; the message names the file and says what to do.

    ``history`` is what `Trainer.fit` had recorded before, and the network then holds the weights of the last whole
    epoch; None where nothing had been trained.
    """

    def __init__(self, message: str, history: History | None = None) -> None:
        super().__init__(message)
        self.history = history


class Terminated(SystemExit):
    """The process was told to end (SIGTERM), and a checkpoint was written; uncaught it exits with status 143.

    ``history`` is what `Trainer.fit` had recorded before.
    """

    def __init__(self, history: History) -> None:
        super().__init__(143)
        self.history = history
