"""`gpu-mlp bench`: some two minutes of the suite on the machine at hand, and what it found as a table.

The same measurements and the same format of results as `benchmarks/run.py` in the repository, on fewer tasks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import checks, ops
from . import accuracy, machine, records, steps
from .peers import OURS, PEERS
from .records import Record, Records
from .tasks import Task

TASKS = {
    "cpu": (
        Task((64, 32, 10), 32, "relu", "adam"),
        Task((784, 512, 512, 10), 128, "relu", "sgd"),
        Task((784, 512, 512, 10), 1024, "gelu", "adam"),
        Task((64, 64, 64, 64, 10), 16384, "relu", "adam"),
        Task((1024, 1024, 1024, 10), 1024, "relu", "adam"),
    ),
    "cuda": (
        Task((256,) * 5 + (16,), 256, "relu", "adamw", "bfloat16", "cuda"),
        Task((1024,) * 5 + (16,), 4096, "relu", "adamw", "bfloat16", "cuda"),
        Task((1024,) * 5 + (16,), 4096, "relu", "adamw", "tf32", "cuda"),
        Task((4096,) * 5 + (16,), 8192, "gelu", "adamw", "bfloat16", "cuda"),
    ),
}
USUAL = {  # those that are ready within seconds
    "cpu": ("PyTorch eager", "JAX jit", "scikit-learn"),
    "cuda": ("PyTorch eager", "PyTorch CUDA graphs", "JAX jit"),
}
CAPTION = (
    "Medians of ratios within this run; the floor is a step's bare matrix products, at the BLAS threads that are best\n"
    "for each. Under another library's name: its time over ours, so above 1 this library is the faster one."
)


def run(
    device: str = "auto",
    seconds: float = 120.0,
    peers: str = "usual",
    out: Path | None = None,
    say: Callable[[str], None] = print,
    rehearsal: bool = False,
) -> list[Record]:
    """Measure, tell of every task as it begins, and return the records; in the folder ``out`` too, where one is named.

    peers: "usual", "all", "none", or names with commas between them. Raises ValueError for what is not known.
    """
    chosen = ops.make(device, _float32()).device
    checks.real("seconds", seconds, 0, open_minimum=True)
    names = (OURS, *_peers(peers, chosen))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(spare) if out is None else out
        number = records.begin(folder, rehearsal, machine.facts(chosen))
        _measure(folder, number, chosen, names, time.monotonic() + seconds, say, rehearsal)
        return records.current(records.read(folder))


def _measure(
    folder: Path,
    number: int,
    device: str,
    names: Sequence[str],
    end: float,
    say: Callable[[str], None],
    rehearsal: bool,
) -> None:
    kept, tasks = Records(folder, "steps", number, rehearsal, again=True), _tasks(device, rehearsal)
    for position, task in enumerate(tasks):
        left = end - time.monotonic()
        if left <= 0:
            kept.add(task.name, task=task.as_json(), cut="the time was up before its turn")
            continue
        say(f"measuring {task.name}")
        share = left / (len(tasks) - position + 1) * 0.6  # the rest goes into imports, compilers and checks
        with kept.attempt(task.name):
            rounds = (1, 1) if rehearsal else (3, 25)
            kept.add(task.name, **steps.measure(task, names, share, rounds, rehearsal))
    goal = accuracy.GOALS["digits"]
    kept = Records(folder, "accuracy", number, rehearsal, again=True)
    if time.monotonic() >= end:
        kept.add("digits", cut="the time was up before its turn")
    else:
        say(f"measuring digits: epochs to an accuracy of {goal.accuracy:.0%}")
        short: dict[str, Any] = {"rows": 200, "epochs": 1} if rehearsal else {}
        with kept.attempt("digits"):
            kept.add("digits", **accuracy.measure(goal, names, device, 1, rehearsal, **short))


def _float32() -> Any:
    from ..precision import get

    return get("float32")


def _tasks(device: str, rehearsal: bool) -> Sequence[Task]:
    if not rehearsal:
        return TASKS[device]
    return [
        Task((8, 8, 8, 4), 6, "relu", task.optimizer, task.precision, device, rehearsal=True) for task in TASKS[device]
    ][:2]


def _peers(words: str, device: str) -> Sequence[str]:
    lists: dict[str, Sequence[str]] = {"usual": USUAL[device], "all": tuple(PEERS), "none": ()}
    names = lists.get(words, [word.strip() for word in words.split(",")])
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peers: expected usual, all, none or any of {', '.join(PEERS)}, got {name!r}")
    return names


# --- what is told ----------------------------------------------------------------------------------------------------


def rows(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The table of steps: its head, and a row for each task that was measured."""
    measured = [r for r in found if r["part"] == "steps" and "contenders" in r and not steps.faulty(r)]
    peers = [name for name in PEERS if any(name in r["contenders"] for r in measured)]
    return ["a step of", "", "ms", "GFLOP/s", "over its GEMMs", *peers], [[*_row(r, peers)] for r in measured]


def _row(record: Record, peers: Sequence[str]) -> Iterator[str]:
    median, task = record["contenders"][OURS]["wall"]["median"], record["task"]
    yield record["name"].split(" · ")[0]
    yield " ".join((task["activation"], task["optimizer"], task["precision"].replace("float32", ""))).strip()
    yield f"{median * 1e3:.3g}"
    yield f"{task['flop'] / median / 1e9:.3g}"
    yield f"{record['over_floor'][OURS]['median']:.2f}"
    for name in peers:
        yield f"{record['over_ours'][name]['median']:.2f}" if name in record["over_ours"] else ""


def remarks(found: Sequence[Record]) -> Iterator[str]:
    """The other figures, and all that is missing from the table: who was absent, wrong or failed, and what was cut."""
    for r in found:
        if r["part"] == "accuracy" and "contenders" in r:
            told = [f"{name} {_reached(of)}" for name, of in r["contenders"].items()]
            yield f"{r['name']}, {r['goal']['accuracy']:.0%} of the held-out rows right: {'; '.join(told)}"
    said = set()
    for r in found:
        if "error" in r:
            yield f"{r['name']}: {_last_line(r['error'])}"
        if "cut" in r:
            yield f"{r['name']}: {r['cut']}"
        for name, why in r.get("absent", {}).items():
            said.add(f"{name}: {why}")
        for name, why in r.get("wrong", {}).items():
            yield f"{r['name']}: {name} is not timed, its result is wrong: {why}"
        for name, why in r.get("failed", {}).items():
            said.add(f"{name} failed: {_last_line(why)}")
    yield from sorted(said)


def _reached(told: dict[str, Any]) -> str:
    if told["seconds"][0] is None:
        return f"not in {len(told['epochs'])} runs"
    return f"{told['epochs'][0]} epochs, {told['seconds'][0]:.2f} s"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def wrong(found: Sequence[Record]) -> bool:
    """Whether this library failed or was wrong anywhere."""
    measured = [r for r in found if "absent" in r]
    return any("error" in r for r in found) or any(map(steps.faulty, measured))
