"""Whole training steps: this library, its peers and the bare GEMMs in turn, after each has shown that it is right.

A round times everybody once, in an order that moves on from round to round; ratios are taken within a round. Nobody
whose losses or parameters are not the reference's is timed, so no ratio to them can come about.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Sequence
from typing import Any

from .. import planning
from ..activations import ACTIVATIONS
from . import floor, machine, tasks, timing
from .peers import OURS, Contender, Unavailable, named
from .tasks import Expected, Task

SAMPLE_SECONDS = 0.06  # a sample is as many steps as fit, and one at least
LONG_STEP = 0.25  # seconds; before a sample of shorter ones come steps that are not timed,
WAKE_SECONDS = 0.03  # for so long
ROUNDS = {"cpu": (9, 25), "cuda": (5, 25)}  # of one task, the fewest and the most,
SECONDS = {"cpu": 20.0, "cuda": 12.0}  # and how long there are more than the fewest
HEADROOM = 0.8  # of the free memory, for all contenders together
PEER_MEMORY = 1.6  # times the memory that this library plans for a step: what a peer is reckoned to take
FLOOR = "bare GEMMs"


def measure(
    task: Task,
    names: Sequence[str],
    seconds: float | None = None,
    rounds: tuple[int, int] | None = None,
    rehearsal: bool = False,
) -> dict[str, Any]:
    """The record of one task: what everybody took, and every ratio; seconds, rounds: None takes the device's own.

    ``contenders`` has by name the spread of seconds a step, of the host's part of them, the samples, and how right the
    result was; ``over_floor`` and ``over_ours`` by name the spreads of ratios; ``absent`` by name why somebody did not
    take part, ``wrong`` what was off, ``failed`` what was raised; ``bystanders`` is the number of processors that other
    programs kept busy. A rehearsal does all of it and keeps no time.
    """
    record: dict[str, Any] = {"task": task.as_json(), "absent": {}, "wrong": {}, "failed": {}}
    right = admit(task, named(names), record)
    if not right:
        return record
    together = _fit_together(task, len(right))
    record["interleaved"] = "in one process, all at once" if together else "in one process, one at a time"
    turns = _turns(task, right) if together else _one_at_a_time(task, right)
    others = machine.Bystanders()
    seconds = SECONDS[task.device] if seconds is None else seconds
    rounds = (rounds or ROUNDS[task.device]) if together else (3, 3)
    samples, floors = _rounds(task, turns, seconds, rounds)
    if not rehearsal:
        record |= figures(samples, floors, task) | {"bystanders": others.processors()}
        for name, told in record["contenders"].items():
            told["check"] = right[name][1]
    return record


# --- who takes part --------------------------------------------------------------------------------------------------


def admit(
    task: Task, contenders: Sequence[type[Contender]], record: dict[str, Any]
) -> dict[str, tuple[type[Contender], str]]:
    """Those whose first updates are the reference's, with how close they are; of the others the record says why."""
    checked = task.for_check()
    if checked != task:
        record["checked_at"] = checked.as_json()
    right: dict[str, tuple[type[Contender], str]] = {}
    reference = tasks.expected(checked)
    for contender in contenders:
        contender.forget()
        try:
            verdict = check(checked, contender(checked), reference)
        except Unavailable as error:
            record["absent"][contender.name] = str(error)
        except Exception:
            record["failed"][contender.name] = traceback.format_exc(limit=-4)
        else:
            if verdict["right"]:
                right[contender.name] = (contender, verdict["detail"])
            else:
                record["wrong"][contender.name] = verdict["detail"]
        gc.collect()
    return right


def check(task: Task, contender: Contender, reference: Expected) -> dict[str, Any]:
    """A fresh contender's first updates against the reference's."""
    batch = contender.put(*task.data())
    losses = [contender.number(contender.step(*batch)) for _ in range(task.check_steps)]
    return tasks.judge(task, reference, losses, contender.parameters())


def reckoned_bytes(task: Task) -> int:
    """What this library plans for a step, on whichever device."""
    names = [task.activation] * (len(task.sizes) - 2) + ["softmax"]
    assert task.activation in ACTIVATIONS
    return planning.plan_memory(task.sizes, names, task.precision, task.rule, task.batch).total


def free_bytes(device: str) -> int | None:
    """The memory that a contender can still take."""
    if device == "cpu":
        return machine.free_bytes()
    from . import device as gpu

    gpu.release()
    return gpu.free_bytes()


def _fit_together(task: Task, count: int) -> bool:
    free = free_bytes(task.device)
    return free is None or reckoned_bytes(task) * (1 + PEER_MEMORY * count) <= HEADROOM * free


# --- rounds ----------------------------------------------------------------------------------------------------------


class Turn:
    """A contender that is ready to be timed."""

    def __init__(self, task: Task, contender: type[Contender]) -> None:
        self.contender = contender(task)
        self.batch = self.contender.put(*task.data())
        warm = [self._of(1)[0], self._of(1)[0]]  # the first ones compile
        while len(warm) < 4 and warm[-1] < 0.5:
            warm.append(self._of(1)[0])
        self.seconds = min(warm)
        self.repeats = max(1, int(SAMPLE_SECONDS / max(self.seconds, 1e-7)))

    def sample(self) -> tuple[float, float]:
        """Seconds of a step, and the host's part of them; once all is quiet, and after steps to wake up."""
        timing.settle()
        if self.seconds < LONG_STEP:
            self._of(max(1, int(WAKE_SECONDS / max(self.seconds, 1e-7))))
        return self._of(self.repeats)

    def _of(self, repeats: int) -> tuple[float, float]:
        return timing.repeated(lambda: self.contender.step(*self.batch), self.contender.wait, repeats)


def _turns(task: Task, right: dict[str, tuple[type[Contender], str]]) -> dict[str, Any]:
    """Everybody at once, each to be sampled many times."""
    return {name: Turn(task, contender).sample for name, (contender, _) in right.items()}


def _one_at_a_time(task: Task, right: dict[str, tuple[type[Contender], str]]) -> dict[str, Any]:
    """Each is made for its sample and gone after it: for what does not fit the memory together."""

    def once(contender: type[Contender]) -> Any:
        def sample() -> tuple[float, float]:
            try:
                return Turn(task, contender).sample()
            finally:
                gc.collect()
                free_bytes(task.device)

        return sample

    return {name: once(contender) for name, (contender, _) in right.items()}


def _rounds(
    task: Task, turns: dict[str, Any], seconds: float, limits: tuple[int, int]
) -> tuple[dict[str, list[tuple[float, float]]], list[floor.Samples]]:
    """Samples by name, and of the floor; as many rounds as ``seconds`` have room for, within the limits."""
    gemms = floor.make(task)
    warm = gemms.sample(1, timing.settle)
    repeats = max(1, int(SAMPLE_SECONDS / max(1e-7, min(sum(times) for times in warm.values()))))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    floors: list[floor.Samples] = []
    names, end = [FLOOR, *turns], time.monotonic() + seconds
    while len(floors) < limits[0] or (len(floors) < limits[1] and time.monotonic() < end):
        first = len(floors) % len(names)
        for name in names[first:] + names[:first]:
            if name == FLOOR:
                floors.append(gemms.sample(repeats, timing.settle))
            else:
                samples[name].append(turns[name]())
    return samples, floors


def figures(samples: dict[str, list[tuple[float, float]]], floors: list[floor.Samples], task: Task) -> dict[str, Any]:
    """What is kept of the rounds."""
    base, chosen = floor.best(floors)
    wall = {name: [sample[0] for sample in rounds] for name, rounds in samples.items()}
    settings = {setting: timing.spread([sum(r[setting]) for r in floors]) for setting in floors[0]}
    told: dict[str, Any] = {
        "floor": {
            **timing.spread(base), "flop_per_second": task.flop / timing.spread(base)["median"],
            "settings": settings, "chosen": chosen, "values": _short(base),
        },
        "contenders": {
            name: {
                "wall": timing.spread(wall[name]),
                "host": timing.spread([sample[1] for sample in rounds]),
                "values": _short(wall[name]),
            }
            for name, rounds in samples.items()
        },
        "over_floor": {name: timing.ratios(values, base) for name, values in wall.items()},
    }  # fmt: skip
    if OURS in wall:
        told["over_ours"] = {name: timing.ratios(values, wall[OURS]) for name, values in wall.items() if name != OURS}
    return told


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def faulty(record: dict[str, Any]) -> bool:
    """Whether this library was wrong or failed in a record of `measure`: then nothing else in it matters."""
    return OURS in record["wrong"] or OURS in record["failed"] or OURS in record["absent"]
