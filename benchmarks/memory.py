"""The most memory that a step takes, of every contender in a process of its own.

On a CPU: by how much the process has grown, at most, from before the network was made until after some steps. Before
that the library has taken a step of a tiny network, so that what it loads for itself is not counted; a compiler has had
two steps of the real one before the peak is taken. Linux alone tells. On a GPU: what each library's own allocator has
held at most.

    python benchmarks/memory.py '{"sizes": [784, 512, 10], "batch": 128, …}' gpu_mlp      # prints the bytes as JSON
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import plans  # noqa: E402

from gpu_mlp.bench.peers import CONTENDERS, OURS, Contender, Unavailable  # noqa: E402
from gpu_mlp.bench.records import Records  # noqa: E402
from gpu_mlp.bench.tasks import Task  # noqa: E402

STEPS = 3
FIELDS = ("sizes", "batch", "activation", "optimizer", "precision", "device")


def measure(records: Records, deadline: float, device: str, names: Sequence[str], enough: float = 40.0) -> None:
    """The steps that are broken down too, with relu: one contender after the other."""
    for task in plans.broken_down(device, records.rehearsal):
        if task.activation != "relu" or records.done(task.name):
            continue
        if time.monotonic() > deadline - enough:
            return
        figures: dict[str, Any] = {"bytes": {}, "absent": {}, "failed": {}}
        for name in names:
            kind, value = in_a_process(task, name, records.rehearsal)
            figures[kind][name] = value
        if not records.rehearsal and OURS in figures["bytes"]:
            ours = figures["bytes"][OURS]
            figures["over_ours"] = {name: count / ours for name, count in figures["bytes"].items() if name != OURS}
        records.add(task.name, task=task.as_json(), **(figures | ({"bytes": {}} if records.rehearsal else {})))


def in_a_process(task: Task, name: str, rehearsal: bool) -> tuple[str, Any]:
    """("bytes", n), ("absent", why) or ("failed", what it printed last)."""
    words = json.dumps({key: value for key, value in task.as_json().items() if key in FIELDS})
    command = [sys.executable, __file__, words, name, *["--rehearse"] * rehearsal]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return "failed", (done.stderr.strip().splitlines() or [str(done.returncode)])[-1]
    answer = json.loads(done.stdout.splitlines()[-1])
    return next(iter(answer.items()))


def _child(words: str, name: str, rehearsal: bool) -> dict[str, Any]:
    if rehearsal:
        from rehearsal import rehearse

        if json.loads(words)["device"] == "cuda":
            rehearse()
    told = json.loads(words)
    task = Task(**{**told, "sizes": tuple(told["sizes"])}, rehearsal=rehearsal)
    try:
        small = dataclasses.replace(task, sizes=(8, 8, task.sizes[-1]), batch=8)
        _steps(CONTENDERS[name](small), small, 2)
        before = _resident("VmRSS")
        contender = CONTENDERS[name](task)
    except Unavailable as error:
        return {"absent": str(error)}
    _steps(contender, task, 2)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    _steps(contender, task, STEPS)
    on_device = contender.device_bytes()
    return {"bytes": _resident("VmHWM") - before if on_device is None else on_device}


def _steps(contender: Contender, task: Task, count: int) -> None:
    batch = contender.put(*task.data())
    for _ in range(count):
        contender.step(*batch)
    contender.wait()


def _resident(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], sys.argv[2], "--rehearse" in sys.argv)))
