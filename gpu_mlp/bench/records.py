"""The one format of results: a folder with results.jsonl, one JSON object a line, each on disk before the next is made.

A line is a run (part "run": what `machine.facts` found, under a number of its own) or a record: ``part``, ``name``, the
number of its ``run``, ``rehearsal`` where nothing was timed, and what was found. Lines are only ever added; of two
records of one part and name the later one counts, and only records of one state of the code are put together.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
FILE = "results.jsonl"


class Records:
    """What one run of one part writes down."""

    def __init__(self, folder: Path | None, part: str, run: int, rehearsal: bool = False, again: bool = False) -> None:
        """``folder`` None: keep the records in ``made`` alone. ``again``: what is there already is not ``done``."""
        self.folder, self.part, self.run, self.rehearsal, self.again = folder, part, run, rehearsal, again
        self.made: list[Record] = []

    def add(self, name: str, **figures: Any) -> None:
        """Write a record down."""
        record = {"part": self.part, "name": name, "run": self.run, **figures}
        if self.rehearsal:
            record["rehearsal"] = True
        self.made.append(record)
        if self.folder is not None:
            append(self.folder, record)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record what goes wrong here, and go on behind it."""
        try:
            yield
        except Exception:
            self.add(name, error=traceback.format_exc())

    def done(self, name: str) -> bool:
        """Whether an earlier run of the same code has this already, and it did not fail."""
        if self.again or self.folder is None:
            return False
        found = [r for r in current(read(self.folder)) if (r["part"], r["name"]) == (self.part, name)]
        return any("error" not in r and "cut" not in r and r["run"] != self.run for r in found)


def append(folder: Path, record: Record) -> None:
    """One line more, on a line of its own also behind one that was cut off."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with open(folder / FILE, "ab+") as file:
        size = file.seek(0, 2)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def begin(folder: Path, rehearsal: bool, facts: dict[str, Any]) -> int:
    """Note down a run; its number."""
    run = sum(record["part"] == "run" for record in read(folder))
    append(folder, {"part": "run", "name": str(run), "run": run, "rehearsal": rehearsal, **facts})
    return run


def read(folder: Path) -> list[Record]:
    """All lines so far; a last one that was cut off in writing is left out."""
    file = folder / FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def runs(records: Sequence[Record]) -> list[Record]:
    """The runs whose figures belong together: those of the same code, device and kind as the last one."""
    headers = [record for record in records if record["part"] == "run"]
    same = ("code", "clean", "device", "rehearsal")
    return [h for h in headers if all(h.get(key) == headers[-1].get(key) for key in same)]


def current(records: Sequence[Record]) -> list[Record]:
    """The records that count: of the runs that belong together, the last one of each part and name.

    One that failed or was cut short does not take the place of one that did not.
    """
    together = {header["run"] for header in runs(records)}
    kept: dict[tuple[str, str], Record] = {}
    for record in records:
        if record["part"] == "run" or record["run"] not in together:
            continue
        key = (record["part"], record["name"])
        if key in kept and _lesser(record) and not _lesser(kept[key]):
            continue
        kept[key] = record
    return list(kept.values())


def _lesser(record: Record) -> bool:
    return "error" in record or "cut" in record
