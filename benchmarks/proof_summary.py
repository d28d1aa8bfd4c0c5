"""The records of `prove_on_gpu.py` as a page to read: what was done, what was found, and the figures in tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def summary(records: Sequence[Record]) -> str:
    """The page, in Markdown."""
    of = {part: [r for r in records if r["part"] == part] for part in dict.fromkeys(r["part"] for r in records)}
    blocks = ["# Proof on a GPU"]
    if any(record.get("rehearsal") for record in records):
        blocks.append("**A rehearsal on a stand-in, without a GPU: no figure here says anything about one.**")
    for part, page in PAGES.items():
        if part in of:
            errors = [f"`{r['name']}` failed:\n\n```\n{r['error'].strip()}\n```" for r in of[part] if "error" in r]
            blocks += [page([r for r in of[part] if "error" not in r]), *errors]
    return "\n\n".join(blocks) + "\n"


def _table(head: str, rows: Sequence[Sequence[Any]]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _parts(records: Sequence[Record]) -> str:
    status = {0: "done", 1: "something is wrong, see below"}
    rows = [(r["name"], status.get(r["status"], r["status"]), _number(r["seconds"], ".0f")) for r in records]
    return _table("| part | | seconds |", rows)


def _facts(records: Sequence[Record]) -> str:
    rows = [(key, value) for r in records for key, value in r.items() if key not in ("part", "name", "rehearsal")]
    return "## Facts\n\n" + _table("| | |", rows)


def _tests(records: Sequence[Record]) -> str:
    lines = ["## Tests", *(f"`pytest -m gpu`: {r['last_line'] or r['status']}" for r in records)]
    told = [line for r in records for line in (*r["failed"], *r["skipped"], *r["tail"])]
    return "\n\n".join([*lines, *(["```\n" + "\n".join(told) + "\n```"] if told else [])])


def _sanitizer(records: Sequence[Record]) -> str:
    words = {True: "clean", False: "found something", None: "did not come to its end"}
    rows = [
        (r["name"], words[r["clean"]], "; ".join(r["summaries"]), ", ".join(r["in_our_kernels"]),
         ", ".join(r["in_other_kernels"]), _number(r["seconds"], ".0f"))
        for r in records if "clean" in r
    ]  # fmt: skip
    alone = [f"The training without a tool: exit status {r['status']}." for r in records if "clean" not in r]
    table = _table("| tool | our kernels | its summary | found in ours | found in others | seconds |", rows)
    return "\n\n".join(["## compute-sanitizer", *alone, *([table] if rows else [])])


def _kernels(records: Sequence[Record]) -> str:
    rows = [
        (r["name"], r["dtype"], "x".join(map(str, r["shape"])), f"{r['bytes'] / 2**20:.0f}",
         _microseconds(r["seconds"]), _scaled(r["bytes_per_second"], 1e9, ".0f"), _number(r["share_of_copy"], ".2f"))
        for r in records
    ]  # fmt: skip
    head = "| kernel | type | shape | MiB moved | µs, median (10 % to 90 %) | GB/s | of a copy |"
    return "## Streaming kernels\n\n" + _table(head, rows)


def _steps(records: Sequence[Record]) -> str:
    rows, absent = [], sorted({f"{r['name']}: {r['unavailable']}" for r in records if "unavailable" in r})
    for r in (record for record in records if "unavailable" not in record):
        times = [_microseconds(r[kind]) for kind in ("host", "device", "wall")]
        ratios = [_number(r[name], ".2f") for name in ("over_gemms", "over_pytorch")]
        memory = _scaled(r["peak_bytes"], 2**20, ".0f")
        rows.append((r["width"], r["batch"], r["precision"], r["name"], *times, *ratios, memory))
    head = "| width | batch | precision | | host µs | device µs | wall µs | over GEMMs | over PyTorch | peak MiB |"
    return "\n\n".join(["## Training steps", *absent, _table(head, rows)])


def _microseconds(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "rehearsal"
    return f"{spread['median'] * 1e6:.1f} ({spread['q10'] * 1e6:.1f} to {spread['q90'] * 1e6:.1f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _scaled(value: float | None, unit: float, form: str) -> str:
    return "rehearsal" if value is None else format(value / unit, form)


PAGES = {
    "parts": _parts,
    "facts": _facts,
    "tests": _tests,
    "sanitizer": _sanitizer,
    "kernels": _kernels,
    "steps": _steps,
}
