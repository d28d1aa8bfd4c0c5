"""What a step costs as width, depth and batch grow, for everybody who is ready without compiling for minutes.

A point that would take longer or more memory than the limits is not measured but recorded as cut, with the limit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import plans

from gpu_mlp.bench import steps
from gpu_mlp.bench.peers import OURS
from gpu_mlp.bench.records import Records
from gpu_mlp.bench.tasks import Task


def measure(records: Records, deadline: float, device: str, names: Sequence[str], enough: float = 25.0) -> None:
    """Every point of every axis; none is begun with fewer than ``enough`` seconds to go."""
    seconds = 4.0 if not records.rehearsal else 0.0
    limits = (3, 15) if not records.rehearsal else (1, 1)
    for axis in plans.scaling(device, records.rehearsal):
        rate: float | None = None  # floating-point operations a second of the step before
        for value, task in axis.points:
            name = f"{axis.name} {value}"
            if records.done(name):
                continue
            if time.monotonic() > deadline - enough:
                return
            told = {"axis": axis.name, "value": value}
            if why := too_much(task, rate):
                records.add(name, **told, task=task.as_json(), cut=why)
                continue
            with records.attempt(name):
                found = steps.measure(task, names, seconds, limits, records.rehearsal)
                records.add(name, **told, **found)
                rate = _rate(found)


def too_much(task: Task, rate: float | None) -> str | None:
    """Why a point is cut, or None: by the memory that is free now, and by the last point's operations a second."""
    free, needed = steps.free_bytes(task.device), steps.reckoned_bytes(task) * steps.PEER_MEMORY
    if free is not None and needed > steps.HEADROOM * free:
        return f"needs some {needed / 2**30:.1f} GiB, of which {steps.HEADROOM * free / 2**30:.1f} GiB may be taken"
    limit = plans.STEP_SECONDS[task.device]
    if rate is not None and task.flop / rate > limit:
        return f"a step would take some {task.flop / rate:.1f} s, and the limit is {limit:g} s"
    return None


def _rate(found: dict[str, Any]) -> float | None:
    if OURS not in found.get("contenders", {}):
        return None
    return found["task"]["flop"] / found["contenders"][OURS]["wall"]["median"]
