"""How far a training run is: a live bar in a terminal, one plain line an epoch in a pipe or a log.

A leaf of the trainer; imports rich, and only where there is a terminal to draw in. Everything goes to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 0.5


class Progress:
    """Shows epochs, samples per second, the time that remains and the latest figures.

    ``samples`` is the number of rows of one epoch; a run may end before ``epochs``. Of a run that was resumed,
    ``epoch`` epochs and ``rows`` rows in all were done before.
    """

    def __init__(
        self,
        epochs: int,
        samples: int,
        enabled: bool = True,
        stream: TextIO | None = None,
        epoch: int = 0,
        rows: int = 0,
    ) -> None:
        self._epochs, self._samples = epochs, samples
        self._stream = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (pythonw has no standard error)
        self._started = time.perf_counter()
        self._before = self._done = rows
        self._epoch = epoch
        self._last_line = float("-inf")
        self._pending = ""
        self._bar: Any = None
        self._lines = enabled
        if enabled and self._stream.isatty():
            self._lines = False
            self._bar, self._task = _terminal_bar(self._stream, epochs * samples, epochs)
            self._bar.update(self._task, completed=rows, epoch=epoch)
            self._bar.start()

    def advance(self, rows: int) -> None:
        """``rows`` more samples have been trained on."""
        self._done += rows
        if self._bar is not None:
            self._bar.update(self._task, advance=rows, rate=_rate(self.samples_per_second))

    def end_epoch(self, figures: Mapping[str, float]) -> None:
        """An epoch is over, with these figures to show."""
        self._epoch += 1
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, epoch=self._epoch, figures=text)
        if self._lines:
            width = len(str(self._epochs))
            line = f"epoch {self._epoch:>{width}}/{self._epochs}  {text}  {_rate(self.samples_per_second)}"
            self._line(f"{line}  {_clock(self._remaining())} left", self._epoch == self._epochs)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._pending:
            self._line(self._pending, True)

    @property
    def samples_per_second(self) -> float:
        """The rate since the run began, or was resumed."""
        return (self._done - self._before) / max(time.perf_counter() - self._started, 1e-9)

    def _remaining(self) -> float:
        """Seconds to the end at the present rate."""
        return max(0, self._epochs * self._samples - self._done) / max(self.samples_per_second, 1e-9)

    def _line(self, line: str, always: bool) -> None:
        """Write a line, unless one was written a moment ago; the last line of a run is always written."""
        now = time.perf_counter()
        if always or now - self._last_line >= SECONDS_BETWEEN_LINES:
            with contextlib.suppress(OSError):  # a run goes on when nobody reads its progress any more
                print(line, file=self._stream, flush=True)
            self._last_line, self._pending = now, ""
        else:
            self._pending = line


def _terminal_bar(stream: TextIO, total: int, epochs: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(file=stream),
    )
    return bar, bar.add_task("train", total=total, epoch=0, epochs=epochs, rate="", figures="")


def _rate(samples_per_second: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if samples_per_second >= size:
            return f"{samples_per_second / size:.3g}{unit} samples/s"
    return f"{samples_per_second:.3g} samples/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
