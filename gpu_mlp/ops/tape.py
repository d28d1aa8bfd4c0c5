"""Steps of a CPU as lists of jobs: written down once, and then run without Python between them.

Leans on the crew, which runs them. The counterpart of `graphs`: what differs from one run to the next lies in the
state, and arrays stay where they are, all but those that a step is handed anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .crew import crew
from .interface import Array, Recorder
from .jobs import Job, address, program

MOST_TAPES = 32  # of one recorder; a user who sends ever new batch sizes gets every further step written anew
Entry = Job | Callable[[], object]


class Tape:
    """What is to be done in turn: jobs, and calls of Python where an operation is no job.

    moving: arrays that the next run may have others in the place of, alike in shape and type.
    """

    def __init__(self, entries: Sequence[Entry], moving: Sequence[Array]) -> None:
        self.entries = entries
        self._calls: list[Callable[[], object]] = []
        for together, run in itertools.groupby(entries, lambda entry: isinstance(entry, Job)):
            mine: list[Any] = list(run)
            self._calls += [_at_once(mine)] if together else mine
        self._places = [(address(array), max(1, array.nbytes)) for array in moving]
        self._moving = [
            (job, name, number)
            for entry in entries
            if isinstance(entry, Job)
            for job in (entry, *entry.inner)
            for name in job.arrays
            if name in (job.record.dtype.names or ())
            for number, (start, length) in enumerate(self._places)
            if 0 <= int(job.record[name]) - start < length
        ]
        for job, name, _ in self._moving:
            job.arrays.pop(name, None)  # which would be kept for as long as the tape is
        # calls have the arrays themselves, and of two in one place nobody can tell which was meant
        apart = all(a + n <= b for (a, n), (b, _) in zip(sorted(self._places), sorted(self._places)[1:]))
        self._movable = apart and all(isinstance(entry, Job) for entry in entries)

    def move(self, moving: Sequence[Array]) -> bool:
        """Take these arrays in the place of those before; whether that is possible."""
        starts = [address(array) for array in moving]
        away = [new - old for new, (old, _) in zip(starts, self._places)]
        if any(away):
            if not self._movable:
                return False
            for job, name, number in self._moving:
                job.record[name] += away[number]
            self._places = [(start, length) for start, (_, length) in zip(starts, self._places)]
        return True

    def run(self) -> None:
        """Do it all."""
        for call in self._calls:
            call()


def _at_once(jobs: Sequence[Job]) -> Callable[[], None]:
    """What does these jobs, which have to be kept."""
    written, parts = program(jobs), max(job.parts for job in jobs)
    return lambda: crew().run(written, parts)  # the crew of a forked process is another one


class TapeRecorder(Recorder):
    """Writes down what the work queues, and runs that from then on.

    writing: calls the work and gives what it has queued, of which nothing is done; settings: what the operations look
    at beside their arguments.
    """

    def __init__(
        self, writing: Callable[[Callable[[], None]], Sequence[Entry]], settings: Callable[[], Hashable]
    ) -> None:
        self._writing, self._settings = writing, settings
        self.last: Tape | None = None  # that was run
        self._tapes: dict[Hashable, Tape] = {}

    def run(self, key: Hashable, work: Callable[[], None], moving: Sequence[Array] = ()) -> None:
        key = (key, self._settings(), *((array.shape, array.dtype) for array in moving))
        tape = self._tapes.get(key)
        if tape is None or not tape.move(moving):
            tape = Tape(self._writing(work), moving)
            if key in self._tapes or len(self._tapes) < MOST_TAPES:
                self._tapes[key] = tape
        self.last = tape
        tape.run()

    def clear(self) -> None:
        self.last = None
        self._tapes.clear()
