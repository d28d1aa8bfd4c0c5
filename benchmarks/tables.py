"""The records of a folder of results as tables and pages in Markdown. Figures come from the records alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpu_mlp.bench.peers import OURS, PEERS
from gpu_mlp.bench.records import Record
from gpu_mlp.bench.records import current as current_records

DISTURBED = 0.1  # processors that others kept busy: from here on a row is marked
LOSING = 1.0
GOALS = {  # what this library sets itself, by device: (what, which rows, the ratio of a row, whether it is met)
    "cpu": {"floor": 1.15, "narrow_floor": 1.30, "ahead": ("PyTorch eager", "scikit-learn"),
            "half": ("torch.compile", "torch.compile max-autotune", "JAX jit"), "behind": 0.9, "epoch": 1.5},
}  # fmt: skip


class Results:
    """The records of one folder that belong together."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.all = list(records)
        self.header: Record = [r for r in records if r["part"] == "run"][-1] if records else {}
        self.current = current_records(records)
        self.rehearsal = bool(self.header.get("rehearsal"))

    def of(self, part: str) -> list[Record]:
        """The part's records without those of failures, in the order in which they were first made."""
        return [r for r in self.current if r["part"] == part and "error" not in r]

    def errors(self, part: str) -> list[Record]:
        """The part's failures."""
        return [r for r in self.current if r["part"] == part and "error" in r]

    @property
    def title(self) -> str:
        """The device, with what a reader has to know at once."""
        header, blas = self.header, self.header.get("blas") or [{}]
        clean = {True: "", False: ", with changes", None: ""}[header.get("clean")]
        where = f"{header.get('device')}"
        if not header.get("compute_capability"):
            where += f", {header.get('processors')} processors, {blas[0].get('internal_api')} {blas[0].get('version')}"
        return f"{where}; commit {str(header.get('code'))[:10]}{clean}, {str(header.get('date'))[:10]}"


# --- Markdown --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it can be."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def milliseconds(told: dict[str, float] | None) -> str:
    return "" if told is None else significant(told["median"] * 1e3)


def ratio(told: dict[str, float] | None, bold_below: float | None = None) -> str:
    """A ratio's median; in bold where it is below a bound, empty where there is none."""
    if told is None:
        return "–"
    text = f"{told['median']:.2f}"
    return f"**{text}**" if bold_below is not None and told["median"] < bold_below else text


def _head(results: Results, part: str) -> list[str]:
    return [f"{e['name']} failed: `{e['error'].strip().splitlines()[-1]}`" for e in results.errors(part)]


def _names(records: Sequence[Record], key: str = "contenders") -> list[str]:
    """The peers that were timed in any of the records, in the usual order."""
    return [name for name in PEERS if any(name in r.get(key, {}) for r in records)]


def _shape(record: Record) -> tuple[str, str, str, str]:
    network = record["name"].split(" · ")[0]
    task = record["task"]
    return network, task["activation"], task["optimizer"], task["precision"]


# --- steps -----------------------------------------------------------------------------------------------------------


def steps(results: Results, part: str = "steps") -> str:
    """Every step: its time, over its bare GEMMs, and each peer's time over ours."""
    measured = [r for r in results.of(part) if OURS in r.get("contenders", {})]
    if not measured:
        return ""
    peers = _names(measured)
    rows = []
    for r in measured:
        others = r.get("bystanders") or 0.0
        mark = " †" if others > DISTURBED else ""
        over = r.get("over_ours", {})
        rows.append([
            *_shape(r), milliseconds(r["contenders"][OURS]["wall"]) + mark, ratio(r["over_floor"][OURS]),
            *(ratio(over.get(name), LOSING) for name in peers),
        ])  # fmt: skip
    head = ["network at batch", "f", "rule", "precision", "step, ms", "over bare GEMMs", *peers]
    notes = ["A peer's column: its time over ours, so above 1 this library is faster; bold where it is slower."]
    if any("†" in row[4] for row in rows):
        notes.append(f"† other programs kept more than {DISTURBED:g} processors busy meanwhile: not to be relied on.")
    notes += [f"{name} is not timed in {r['name']}: {why}" for r in measured for name, why in r["wrong"].items()]
    notes += sorted({f"{name} failed: {_last(why)}" for r in measured for name, why in r["failed"].items()})
    return "\n\n".join([*_head(results, part), table(head, rows), " ".join(notes)])


def variety(results: Results) -> str:
    """Every activation, and every optimizer."""
    return steps(results, "variety")


def _last(text: str) -> str:
    return text.strip().splitlines()[-1]


def overhead(results: Results) -> str:
    """Steps of a tiny network, in microseconds, with the host's part of them."""
    measured = [r for r in results.of("overhead") if OURS in r.get("contenders", {})]
    if not measured:
        return ""
    names = [OURS, *_names(measured)]
    rows = []
    for r in measured:
        told = r["contenders"]
        cells = [_micro(told[name]) if name in told else "–" for name in names]
        rows.append([*_shape(r), *cells])
    note = "µs a step until it is done, and in brackets until it is asked for."
    return table(["network at batch", "f", "rule", "precision", *names], rows) + "\n\n" + note


def _micro(told: Record) -> str:
    return f"{significant(told['wall']['median'] * 1e6)} ({significant(told['host']['median'] * 1e6)})"


def goals(results: Results) -> str:
    """How many of the judged rows meet what was set as a goal."""
    measured = [r for r in results.of("steps") if OURS in r.get("contenders", {})]
    if not measured or results.header.get("compute_capability"):
        return ""
    goal, rows = GOALS["cpu"], []
    plain = [r for r in measured if (r["task"]["activation"], r["task"]["optimizer"]) == ("relu", "sgd")]
    met = [r["over_floor"][OURS]["median"] <= _floor_goal(r) for r in plain]
    worst = max((r["over_floor"][OURS]["median"] for r in plain), default=float("nan"))
    rows.append([f"relu with SGD within {goal['floor']} of the bare GEMMs ({goal['narrow_floor']:.2f} where 64 wide)",
                 f"{sum(met)} of {len(met)} rows", f"{worst:.2f}"])  # fmt: skip
    for name in (*goal["ahead"], *goal["half"]):
        ratios = [r["over_ours"][name]["median"] for r in measured if name in r["over_ours"]]
        if not ratios:
            continue
        faster = sum(value > 1 for value in ratios)
        if name in goal["ahead"]:
            rows.append([f"faster than {name} in every row", f"{faster} of {len(ratios)} rows", f"{min(ratios):.2f}"])
        else:
            close = sum(value >= goal["behind"] for value in ratios)
            rows.append([f"faster than {name} in half of the rows, at most 10 % behind in any",
                         f"faster in {faster}, at most 10 % behind in {close} of {len(ratios)}",
                         f"{min(ratios):.2f}"])  # fmt: skip
    for r in (r for r in results.of("estimators") if "over_ours" in r):
        times = r["over_ours"]["scikit-learn"]["median"]
        met_in = f"{int(times >= goal['epoch'])} of 1 rows"
        rows.append([f"an epoch of MLPClassifier in scikit-learn's time over {goal['epoch']}", met_in, f"{times:.2f}"])
    return table(["goal", "met in", "worst row"], rows)


def _floor_goal(record: Record) -> float:
    widest = max(record["task"]["sizes"])
    return GOALS["cpu"]["narrow_floor" if widest <= 64 else "floor"]


def losses(results: Results) -> str:
    """The rows in which somebody is faster, worst first, with where our time goes there."""
    parts = {r["name"]: r for r in results.of("breakdown") if "seconds" in r}
    timed = ("steps", "variety", "overhead", "scaling")
    measured = [r for part in timed for r in results.of(part) if OURS in r.get("contenders", {})]
    if not measured:
        return ""
    found = []
    for r in measured:
        faster = {n: t["median"] for n, t in r.get("over_ours", {}).items() if t["median"] < LOSING}
        if faster:
            found.append((min(faster.values()), r, faster))
    if not found:
        return f"In none of the {len(measured)} rows is any peer faster."
    rows = []
    for _, r, faster in sorted(found, key=lambda item: item[0]):
        who = ", ".join(f"{name} {value:.2f}" for name, value in sorted(faster.items(), key=lambda item: item[1]))
        name = f"{r['name']} under *Scaling*" if "axis" in r else r["name"]
        rows.append([name, who, ratio(r["over_floor"][OURS]), _where(parts.get(r["name"]))])
    told = f"In {len(found)} of {len(measured)} rows somebody is faster than this library:"
    head = ["a step of", "who, and their time over ours", "ours over bare GEMMs", "where our time goes"]
    return told + "\n\n" + table(head, rows)


def _where(record: Record | None) -> str:
    if record is None:
        return ""
    total = sum(record["seconds"].values())
    return ", ".join(
        f"{part} {share / total:.0%}" for part, share in record["seconds"].items() if share / total >= 0.005
    )


def breakdown(results: Results) -> str:
    """Where a step's time goes."""
    measured = [r for r in results.of("breakdown") if "seconds" in r]
    if not measured:
        return ""
    parts = list(measured[0]["seconds"])
    rows = []
    for r in measured:
        total = sum(r["seconds"].values())
        shares = [f"{r['seconds'][part] / total:.0%}" for part in parts]
        rows.append([*_shape(r), *shares, significant(r["untraced"] * 1e3), f"{r['traced'] / r['untraced']:.2f}"])
    head = ["network at batch", "f", "rule", "precision", *parts, "step, ms", "watched over not"]
    return table(head, rows)


def memory(results: Results) -> str:
    """The most memory that steps take, of everybody."""
    measured = [r for r in results.of("memory") if r.get("bytes")]
    if not measured:
        return ""
    names = [OURS, *_names(measured, "bytes")]
    rows = []
    for r in measured:
        cells = [significant(r["bytes"][name] / 2**20, 4) if name in r["bytes"] else "–" for name in names]
        rows.append([*_shape(r), *cells])
    return table(["network at batch", "f", "rule", "precision", *(f"{name}, MiB" for name in names)], rows)


# --- the other parts -------------------------------------------------------------------------------------------------


def scaling(results: Results) -> str:
    """A step as width, depth and batch grow."""
    measured, blocks = [r for r in results.of("scaling") if "contenders" in r or "cut" in r], []
    for axis in dict.fromkeys(r["axis"] for r in measured):
        points = sorted((r for r in measured if r["axis"] == axis), key=lambda r: r["value"])
        peers, rows = _names(points), []
        for r in points:
            if "contenders" not in r:
                rows.append([r["value"], f"cut: {r['cut']}", *[""] * (1 + len(peers))])
                continue
            over = r.get("over_ours", {})
            rows.append([r["value"], milliseconds(r["contenders"][OURS]["wall"]), ratio(r["over_floor"][OURS]),
                         *(ratio(over.get(name), LOSING) for name in peers)])  # fmt: skip
        fixed = _fixed(points[0], axis)
        blocks.append(f"{fixed}:\n\n" + table([axis, "step, ms", "over bare GEMMs", *peers], rows))
    return "\n\n".join(blocks)


def _fixed(record: Record, axis: str) -> str:
    task = record["task"]
    layers, width = len(task["sizes"]) - 1, task["sizes"][0]
    told = {"width": f"width {width}", "depth": f"{layers} layers", "batch": f"batch {task['batch']}"}
    others = [words for name, words in told.items() if name != axis]
    others += [task["activation"], task["optimizer"], task["precision"]]
    return f"{axis.capitalize()}, with {', '.join(others)}"


def accuracy(results: Results) -> str:
    """Epochs and seconds to the goal."""
    rows = []
    for r in results.of("accuracy"):
        for name, told in r.get("contenders", {}).items():
            rows.append([
                r["name"], f"{r['goal']['accuracy']:.0%}", name, _middle(told["epochs"], "{:g}"),
                _middle(told["seconds"], "{:.2f}"), significant(told["seconds_per_epoch"]["median"]),
                significant(statistics.median(told["first_step"])),
            ])  # fmt: skip
    head = ["data", "goal", "", "epochs", "seconds", "seconds an epoch", "first step, s"]
    return table(head, rows) if rows else ""


def _middle(values: Sequence[float | None], form: str) -> str:
    """The median of the runs that came there; how many did where not all."""
    reached = [value for value in values if value is not None]
    if not reached:
        return "not reached"
    text = form.format(statistics.median(reached))
    return text if len(reached) == len(values) else f"{text} ({len(reached)} of {len(values)} runs)"


def gemms(results: Results) -> str:
    """Every product's rate and its share of the best."""
    rows = []
    for r in results.of("gemms"):
        cells = []
        for told in r["kinds"].values():
            if "share_of_best" not in told:
                cells.append("–")
                continue
            rate = r["flop"] / told["seconds"]["gpu_mlp"]["median"]
            cells.append(f"{significant(rate / 1e9)} ({told['share_of_best']['median']:.2f})")
        if cells:
            product = r["product"]
            rows.append([product["batch"], f"{product['n_in']} → {product['n_out']}", r["precision"], *cells])
    head = ["batch", "layer", "precision", *(f"{kind}, GFLOP/s (of the best)" for kind in ("fprop", "dgrad", "wgrad"))]
    return table(head, rows) if rows else ""


def kernels(results: Results) -> str:
    """Every streaming kernel's bandwidth."""
    rows = [
        [r["kernel"], r["dtype"], "×".join(map(str, r["shape"])), f"{r['bytes'] / 2**20:.0f}",
         significant(r["seconds"]["median"] * 1e6, 4), significant(r["bytes_per_second"] / 1e9),
         "" if r["share_of_copy"] is None else f"{r['share_of_copy']:.2f}"]
        for r in results.of("kernels") if r.get("seconds")
    ]  # fmt: skip
    return table(["kernel", "type", "shape", "MiB moved", "µs", "GB/s", "of a copy"], rows) if rows else ""


def estimators(results: Results) -> str:
    """An epoch of the estimators."""
    rows = [
        [r["data"], r["rows"], *(f"{r['contenders'][name]['median']:.2f}" for name in (OURS, "scikit-learn")),
         ratio(r["over_ours"]["scikit-learn"], LOSING)]
        for r in results.of("estimators") if "contenders" in r
    ]  # fmt: skip
    return table(["data", "rows", "gpu_mlp, s", "scikit-learn, s", "ratio"], rows) if rows else ""


def facts(results: Results) -> str:
    """What everything was taken on."""
    header = results.header
    kept = ("device", "processor", "processors", "processor_mhz", "memory_bytes", "device_memory_bytes", "driver_api",
            "cuda_runtime", "nvidia_smi", "system", "python", "versions", "blas", "commit", "code", "clean",
            "date")  # fmt: skip
    return table(["", ""], [(key, _plain(header[key])) for key in kept if header.get(key) not in (None, [], {})])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return str(value)


def tests(results: Results) -> str:
    """What pytest said on the GPU."""
    blocks = []
    for r in results.of("tests"):
        told = [*r["failed"], *r["skipped"], *r["tail"]]
        blocks.append(f"`pytest -m gpu`: {r['last_line'] or r['status']}")
        blocks += ["```\n" + "\n".join(told) + "\n```"] if told else []
    return "\n\n".join(blocks)


def sanitizer(results: Results) -> str:
    """What compute-sanitizer's tools found."""
    words = {True: "clean", False: "found something", None: "did not come to its end"}
    found = results.of("sanitizer")
    rows = [
        (r["name"], words[r["clean"]], "; ".join(r["summaries"]), ", ".join(r["in_our_kernels"]),
         ", ".join(r["in_other_kernels"]))
        for r in found if "clean" in r
    ]  # fmt: skip
    alone = [f"The training without a tool: exit status {r['status']}." for r in found if "clean" not in r]
    return "\n\n".join(
        [
            *alone,
            *([table(["tool", "our kernels", "its summary", "found in ours", "found in others"], rows)] * bool(rows)),
        ]
    )


def parts(results: Results) -> str:
    """What was run."""
    status = {0: "done", 1: "something is wrong, see below"}
    rows = [(r["name"], status.get(r["status"], r["status"]), _seconds(r["seconds"])) for r in results.of("parts")]
    return table(["part", "", "seconds"], rows) if rows else ""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


PAGES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "parts": ("Parts", parts),
    "facts": ("Machine", facts),
    "tests": ("Tests", tests),
    "sanitizer": ("compute-sanitizer", sanitizer),
    "goals": ("Goals", goals),
    "steps": ("Training steps", steps),
    "losses": ("Where we lose", losses),
    "variety": ("Every activation, every optimizer", variety),
    "breakdown": ("Where the time goes", breakdown),
    "overhead": ("Overhead", overhead),
    "memory": ("Memory", memory),
    "gemms": ("GEMMs", gemms),
    "kernels": ("Streaming kernels", kernels),
    "accuracy": ("Time to accuracy", accuracy),
    "scaling": ("Scaling", scaling),
    "estimators": ("Estimators", estimators),
}


def summary(results: Results) -> str:
    """All pages of one folder as one."""
    blocks = [f"# Results: {results.title}"]
    if results.rehearsal:
        blocks.append("**A rehearsal: nothing was timed, and no figure here says anything about a device.**")
    blocks += _pages(results)
    return "\n\n".join(blocks) + "\n"


def _pages(results: Results) -> Iterator[str]:
    for name, (title, page) in PAGES.items():
        text = page(results)
        failures = [f"`{e['name']}` failed:\n\n```\n{e['error'].strip()}\n```" for e in results.errors(name)]
        if text or failures:
            yield "\n\n".join([f"## {title}", *([text] if text else []), *failures])
