"""The pictures of a run: its learning curves, and the confusion matrix of a classifier. Needs matplotlib.

A leaf: imports matplotlib when it draws, and draws into files only.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import tensorfile
from .history import History

TRAINING, VALIDATION, BEST = "#4053d3", "#d9762b", "#8a8a8a"  # blue and orange: told apart by every reader
MOST_NUMBERS = 20  # classes up to which the cells of a confusion matrix have their counts written in


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot and its global state are left alone
    return figure


def _save(figure: Any, path: Path) -> None:
    import io

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for a letter that the font lacks
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # labels longer than the picture
        figure.savefig(buffer, format="png", dpi=144)
    tensorfile.write_bytes(path, buffer.getvalue())


def learning_curves(path: Path, history: History, title: str) -> None:
    """The cost and the validation loss over the epochs, and beside them each metric of the validation part."""
    columns = [name for name in history.last if name.startswith("validation_") and name != "validation_loss"]
    figure = _figure(4.8 * (1 + len(columns)), 3.6)
    axes = figure.subplots(1, 1 + len(columns), squeeze=False)[0]
    epochs = history["epoch"]
    axes[0].plot(epochs, history["cost"], color=TRAINING, label="cost J (training)")
    if "validation_loss" in history.last:
        axes[0].plot(epochs, history["validation_loss"], color=VALIDATION, label="loss L (validation)")
    axes[0].set_ylabel("cost, loss")
    if min(history["cost"]) > 0:
        axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    for axis, name in zip(axes[1:], columns):
        label = name.removeprefix("validation_").replace("_", " ")
        axis.plot(epochs, history[name], color=VALIDATION)
        axis.set_ylabel(f"{label} (validation)")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.axvline(history.best["epoch"], color=BEST, linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{title}  (best {history.monitor.replace('_', ' ')} at the dotted line)", fontsize=10, parse_math=False
    )
    _save(figure, path)


def confusion_matrix(
    path: Path,
    true: NDArray[Any],
    predicted: NDArray[Any],
    labels: Sequence[str],
    title: str,
    times: NDArray[Any] | int = 1,
) -> None:
    """How often each true class (row) was taken for each class (column); colours are shares of the row.

    true, predicted: (m,) codes of classes, each pair of which counts ``times``.
    """
    n = len(labels)
    counts = np.zeros((n, n), np.int64)
    np.add.at(counts, (true, predicted), times)
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(12.0, 2.5 + 0.42 * n)
    figure = _figure(side + 0.8, side)
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(title, fontsize=10, parse_math=False)
    if n <= MOST_NUMBERS:
        long = max(len(label) for label in labels) > 3
        axis.set_xticks(
            range(n), labels, rotation=45 if long else 0, ha="right" if long else "center", parse_math=False
        )
        axis.set_yticks(range(n), labels, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)
