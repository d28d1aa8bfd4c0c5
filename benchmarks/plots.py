"""The pictures of a folder of results: scaling curves, and where a step's time goes. From the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tables import Results

from gpu_mlp import plots
from gpu_mlp.bench.peers import OURS, PEERS
from gpu_mlp.bench.steps import FLOOR

COLOURS = {  # told apart by every reader
    OURS: "#4053d3", FLOOR: "#8a8a8a", "PyTorch eager": "#d9762b", "PyTorch CUDA graphs": "#b51d14",
    "JAX jit": "#00897b", "scikit-learn": "#b37feb",
}  # fmt: skip
MARKERS = {OURS: "o", "PyTorch eager": "s", "PyTorch CUDA graphs": "D", "JAX jit": "^", "scikit-learn": "v"}
PARTS = {"GEMMs": "#4053d3", "activation": "#d9762b", "loss": "#00897b", "update": "#b37feb", "host": "#8a8a8a"}


def draw(folder: Path, results: Results) -> list[Path]:
    """Draw what there is into the folder; the pictures that were drawn."""
    drawn = []
    for name, picture in (("scaling.png", scaling), ("breakdown.png", breakdown)):
        figure = picture(results)
        if figure is not None:
            plots._save(figure, folder / name)
            drawn.append(folder / name)
    return drawn


def scaling(results: Results) -> Any:
    """Seconds a step over width, depth and batch, both axes logarithmic."""
    measured = [r for r in results.of("scaling") if "contenders" in r]
    axes_names = list(dict.fromkeys(r["axis"] for r in measured))
    if not axes_names:
        return None
    figure = plots._figure(4.6 * len(axes_names), 4.4)
    panels = figure.subplots(1, len(axes_names), squeeze=False)[0]
    for panel, axis in zip(panels, axes_names):
        points = sorted((r for r in measured if r["axis"] == axis), key=lambda r: r["value"])
        _curves(panel, points)
        panel.set_xlabel(axis)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter(_plain)
        panel.yaxis.set_major_formatter(_plain)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(_told(points[0]["task"], axis), fontsize=9)
    panels[0].set_ylabel("ms a step")
    handles, labels = {}, []
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    labels = [name for name in (FLOOR, OURS, *PEERS) if name in handles]
    figure.legend(
        [handles[n] for n in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 2 * len(panels)),
        frameon=False,
    )
    figure.suptitle(f"A training step on {results.header['device']}", fontsize=11)
    return figure


def _plain(value: float, position: int) -> str:
    """A tick's number in full, thousands as 16k and millions as 1M."""
    for unit, word in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:.0f}{word}"
    return f"{value:g}"


def _told(task: dict[str, Any], axis: str) -> str:
    words = {"width": f"width {task['sizes'][0]}", "depth": f"{len(task['sizes']) - 1} layers",
             "batch": f"batch {task['batch']}"}  # fmt: skip
    kept = [word for name, word in words.items() if name != axis]
    return f"{', '.join(kept)}\n{task['activation']}, {task['optimizer']}, {task['precision']}"


def _curves(panel: Any, points: list[dict[str, Any]]) -> None:
    names = [name for name in (OURS, *PEERS) if any(name in r["contenders"] for r in points)]
    panel.plot([r["value"] for r in points], [r["floor"]["median"] * 1e3 for r in points], color=COLOURS[FLOOR],
               linestyle="--", linewidth=1.5, label=FLOOR)  # fmt: skip
    for name in reversed(names):  # ours on top
        of = [(r["value"], r["contenders"][name]["wall"]) for r in points if name in r["contenders"]]
        x, wall = [value for value, _ in of], [told for _, told in of]
        width = 2.2 if name == OURS else 1.3
        panel.plot(x, [w["median"] * 1e3 for w in wall], color=COLOURS[name], marker=MARKERS[name], markersize=4,
                   linewidth=width, label=name)  # fmt: skip
        panel.fill_between(x, [w["q25"] * 1e3 for w in wall], [w["q75"] * 1e3 for w in wall], color=COLOURS[name],
                           alpha=0.15, linewidth=0)  # fmt: skip


def breakdown(results: Results) -> Any:
    """A bar for each step, as long as the step over its bare GEMMs, divided among the parts of its time."""
    timed = {r["name"]: r for r in results.of("steps") if OURS in r.get("over_floor", {})}
    over = {name: r["over_floor"][OURS]["median"] for name, r in timed.items()}
    measured = [r for r in results.of("breakdown") if "seconds" in r and r["name"] in over]
    if not measured:
        return None
    figure = plots._figure(9.5, 1.6 + 0.34 * len(measured))
    panel = figure.subplots()
    labels = [r["name"].replace(" · float32", "") for r in measured]
    left = [0.0] * len(measured)
    for part, colour in PARTS.items():
        lengths = [r["seconds"][part] / sum(r["seconds"].values()) * over[r["name"]] for r in measured]
        panel.barh(labels, lengths, left=left, color=colour, label=part, height=0.7)
        left = [start + length for start, length in zip(left, lengths)]
    for row, (r, end) in enumerate(zip(measured, left)):
        step = timed[r["name"]]["contenders"][OURS]["wall"]["median"]
        panel.text(end, row, f" {step * 1e3:.3g} ms", va="center", fontsize=8)
    panel.axvline(1, color="black", linewidth=0.9, linestyle=":")
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xlabel("time of a step over its bare GEMMs (dotted: the GEMMs alone)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=len(PARTS), frameon=False)
    return figure
