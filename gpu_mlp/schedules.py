"""The learning rate as a function of time: PyTorch's schedulers as plain functions, and warm-up before any of them.

A leaf. Time is counted in updates, or in epochs where ``by="epoch"``; the first update is at time 0. Every schedule but
`ReduceOnPlateau` is a pure function of time, so a resumed run needs nothing but its step number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from . import checks

Unit = Literal["step", "epoch"]


@dataclass(frozen=True)
class Schedule:
    """η(t) = ``lr`` · something; ``by`` says what t counts."""

    name: ClassVar[str]
    by: Unit = field(default="step", kw_only=True)

    def __post_init__(self) -> None:
        checks.choice("by", self.by, ("step", "epoch"))

    def rate(self, lr: float, t: float) -> float:
        """The learning rate at time ``t`` (0, 1, 2, …), where the optimizer's own is ``lr``."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def over(self, steps: int, epochs: int) -> Schedule:
        """This schedule with a length that was left open set to a run of that many updates and epochs."""
        return self

    def at(self, lr: float, step: int, epoch: int) -> float:
        """The learning rate of update ``step`` in epoch ``epoch``, both counted from 0."""
        return self.rate(lr, epoch if self.by == "epoch" else step)


@dataclass(frozen=True)
class Constant(Schedule):
    """η(t) = lr."""

    name = "constant"

    def rate(self, lr: float, t: float) -> float:
        return lr


@dataclass(frozen=True)
class StepDecay(Schedule):
    """η(t) = lr · gamma^⌊t / step_size⌋ (torch's StepLR)."""

    name = "step"
    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("step_size", self.step_size, 1)
        checks.real("gamma", self.gamma, 0)

    def rate(self, lr: float, t: float) -> float:
        return lr * _power(self.gamma, t // self.step_size)


def _power(base: float, exponent: float) -> float:
    try:
        return base**exponent
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Exponential(Schedule):
    """η(t) = lr · gamma^t (torch's ExponentialLR)."""

    name = "exponential"
    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.real("gamma", self.gamma, 0)

    def rate(self, lr: float, t: float) -> float:
        return lr * _power(self.gamma, t)


@dataclass(frozen=True)
class InverseScaling(Schedule):
    """η(t) = lr / (t + 1)^power (scikit-learn's invscaling)."""

    name = "inverse_scaling"
    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.real("power", self.power, 0)

    def rate(self, lr: float, t: float) -> float:
        return lr / (t + 1) ** self.power


@dataclass(frozen=True)
class Cosine(Schedule):
    """η(t) = lr_min + (lr − lr_min)(1 + cos(π t / length)) / 2, and lr_min after it (Loshchilov and Hutter, 2017).

    Without ``length`` it spans the run. torch's CosineAnnealingLR is the same up to t = T_max (and rises again after).
    """

    name = "cosine"
    length: int | None = None
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length is not None:
            checks.integer("length", self.length, 1)
        checks.real("lr_min", self.lr_min, 0)

    def over(self, steps: int, epochs: int) -> Schedule:
        return self if self.length else replace(self, length=max(1, steps if self.by == "step" else epochs))

    def rate(self, lr: float, t: float) -> float:
        length = _known(self.length, self.name)
        return self.lr_min + (lr - self.lr_min) * (1 + math.cos(math.pi * min(t, length) / length)) / 2


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up from lr / div_factor to lr in ``pct_start`` of the length, then down to lr / div_factor / final_div_factor.

    torch's OneCycleLR with max_lr = lr and cosine (or "linear") annealing (Smith and Topin, 2018); the optimizer's
    momentum is left alone (cycle_momentum=False). Without ``length`` it spans the run.
    """

    name = "one_cycle"
    length: int | None = None
    pct_start: float = 0.3
    anneal: Literal["cosine", "linear"] = "cosine"
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length is not None:
            checks.integer("length", self.length, 2)
        checks.real("pct_start", self.pct_start, 0, 1)
        checks.choice("anneal", self.anneal, ("cosine", "linear"))
        checks.real("div_factor", self.div_factor, 1)
        checks.real("final_div_factor", self.final_div_factor, 1)

    def over(self, steps: int, epochs: int) -> Schedule:
        return self if self.length else replace(self, length=max(2, steps if self.by == "step" else epochs))

    def rate(self, lr: float, t: float) -> float:
        length = _known(self.length, self.name)
        first = lr / self.div_factor
        t, last = min(t, length - 1), length - 1
        top = self.pct_start * length - 1
        if top > 0 and t < top:  # a rise of one update begins at the top; a shorter one just past it, as torch's does
            return self._between(first, lr, t / top)
        return self._between(lr, first / self.final_div_factor, (t - top) / (last - top) if last > top else 0.0)

    def _between(self, start: float, end: float, part: float) -> float:
        if self.anneal == "linear":
            return start + (end - start) * part
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


def _known(length: int | None, name: str) -> int:
    if length is None:
        raise ValueError(f"length: schedule {name!r} needs one where there is no run to span")
    return length


@dataclass(frozen=True)
class Warmup(Schedule):
    """Linear from ``start_factor`` · η to η in ``length`` updates (torch's LinearLR), then ``then`` from its time 0."""

    name = "warmup"
    length: int
    then: Schedule = field(default_factory=Constant)
    start_factor: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("length", self.length, 1)
        checks.real("start_factor", self.start_factor, 0, 1)
        if not isinstance(self.then, Schedule):
            raise TypeError(f"then: expected a schedule, got {type(self.then).__name__}")
        if isinstance(self.then, Warmup):
            raise ValueError("then: a warm-up before a warm-up; give one of the summed length")
        if self.then.by != self.by and not isinstance(self.then, (Constant, ReduceOnPlateau)):
            raise ValueError(
                f"then: counts by {self.then.by!r} and the warm-up by {self.by!r}; give both the same `by`"
            )

    def over(self, steps: int, epochs: int) -> Schedule:
        return replace(self, then=self.then.over(max(1, steps - self.length), max(1, epochs - self.length)))

    def rate(self, lr: float, t: float) -> float:
        if t < self.length:
            return self.then.rate(lr, 0) * (self.start_factor + (1 - self.start_factor) * t / self.length)
        return self.then.rate(lr, t - self.length)


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    """η ← max(factor · η, lr_min) when the watched cost has not fallen for more than ``patience`` epochs.

    torch's ReduceLROnPlateau in mode "min": an improvement is a fall below (1 − threshold) · best ("rel") or
    best − threshold ("abs"); after a cut, ``cooldown`` epochs are not counted. What it has seen is a `PlateauState`.
    """

    name = "on_plateau"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.real("factor", self.factor, 0, 1, open_maximum=True)
        checks.integer("patience", self.patience, 0)
        checks.real("threshold", self.threshold, 0, 1 if self.threshold_mode == "rel" else None, open_maximum=True)
        checks.choice("threshold_mode", self.threshold_mode, ("rel", "abs"))
        checks.integer("cooldown", self.cooldown, 0)
        checks.real("lr_min", self.lr_min, 0)

    def rate(self, lr: float, t: float) -> float:
        return lr


@dataclass
class PlateauState:
    """What a `ReduceOnPlateau` has seen: the best cost, the epochs since it, and the cuts made so far."""

    best: float = math.inf
    bad_epochs: int = 0
    cooldown: int = 0
    cuts: int = 0

    def observe(self, schedule: ReduceOnPlateau, cost: float) -> None:
        """Take in the cost of one more epoch."""
        floor = (
            self.best * (1 - schedule.threshold) if schedule.threshold_mode == "rel" else self.best - schedule.threshold
        )
        if cost < floor:
            self.best, self.bad_epochs = cost, 0
        else:
            self.bad_epochs += 1
        if self.cooldown:
            self.cooldown -= 1
            self.bad_epochs = 0
        if self.bad_epochs > schedule.patience:
            self.cuts += 1
            self.cooldown, self.bad_epochs = schedule.cooldown, 0

    def reduce(self, schedule: ReduceOnPlateau, lr: float) -> float:
        """``lr`` after the cuts made so far, never below the schedule's floor (nor raised to it)."""
        reduced = lr * schedule.factor**self.cuts
        return min(lr, max(reduced, schedule.lr_min))


SCHEDULES: dict[str, type[Schedule]] = {
    s.name: s for s in (Constant, StepDecay, Exponential, InverseScaling, Cosine, OneCycle, ReduceOnPlateau)
}


def plateau_of(schedule: Schedule) -> ReduceOnPlateau | None:
    """The plateau rule in a schedule (itself, or behind a warm-up)."""
    if isinstance(schedule, Warmup):
        schedule = schedule.then
    return schedule if isinstance(schedule, ReduceOnPlateau) else None


def get(schedule: str | Schedule | None, **parameters: Any) -> Schedule:
    """The schedule called ``schedule`` with these parameters, or ``schedule`` itself; None means constant."""
    if schedule is None:
        return Constant()
    if isinstance(schedule, Schedule):
        return schedule
    return SCHEDULES[checks.choice("schedule", schedule, SCHEDULES)](**parameters)
