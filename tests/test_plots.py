"""The plots: whole PNG files that show the numbers given, whatever the labels, and that leave matplotlib alone."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from gpu_mlp import plots
from gpu_mlp.history import History

matplotlib = pytest.importorskip("matplotlib", reason="the plots need matplotlib")

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")


def _png_size(path):
    """Width and height of a PNG file, once every chunk and the length of its pixels have been checked."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, pixels = 8, [], b""
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        kinds.append(kind)
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    assert (depth, colour) == (8, 6)
    assert len(zlib.decompress(pixels)) == height * (1 + 4 * width)
    return width, height


def _history(epochs, **columns):
    """A history with these columns, each a function of the epoch (counted from 1)."""
    history = History("validation_loss" if "validation_loss" in columns else "cost")
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "step": 10 * epoch, "cost": 1 / epoch, "learning_rate": 0.1}
        history.append({**row, **{name: column(epoch) for name, column in columns.items()}})
    return history


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, beside being written."""
    figures, save = [], plots._save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def _assert_sane(path):
    width, height = _png_size(path)
    assert 300 <= width <= 4000
    assert 300 <= height <= 2500
    assert 2_000 < path.stat().st_size < 2_000_000


# --- learning curves ------------------------------------------------------------------------------------------------


def test_the_curves_are_the_columns_of_the_history(tmp_path, drawn):
    def loss(epoch):
        return abs(epoch - 6) + 0.5

    history = _history(
        9, validation_loss=loss, validation_accuracy=lambda e: e / 10, validation_top_5_accuracy=lambda e: 1
    )
    plots.learning_curves(tmp_path / "curves.png", history, "a title")
    _assert_sane(tmp_path / "curves.png")
    (figure,) = drawn
    first, *rest = figure.axes
    lines = {line.get_label(): line for line in first.lines}
    np.testing.assert_array_equal(lines["cost J (training)"].get_xdata(), range(1, 10))
    np.testing.assert_array_equal(lines["cost J (training)"].get_ydata(), [1 / e for e in range(1, 10)])
    np.testing.assert_array_equal(lines["loss L (validation)"].get_ydata(), [loss(e) for e in range(1, 10)])
    assert [axis.get_ylabel() for axis in rest] == ["accuracy (validation)", "top 5 accuracy (validation)"]
    np.testing.assert_array_equal(rest[0].lines[0].get_ydata(), [e / 10 for e in range(1, 10)])
    for axis in figure.axes:  # the dotted line stands at the best epoch
        assert list(axis.lines[-1].get_xdata()) == [6, 6]
    assert "a title" in figure.get_suptitle()


def test_without_validation_there_is_the_cost_alone(tmp_path, drawn):
    plots.learning_curves(tmp_path / "curves.png", _history(3), "t")
    _assert_sane(tmp_path / "curves.png")
    assert len(drawn[0].axes) == 1
    assert "best cost" in drawn[0].get_suptitle()


@pytest.mark.parametrize("epochs", [1, 500])
def test_any_number_of_epochs(tmp_path, epochs):
    plots.learning_curves(tmp_path / "curves.png", _history(epochs, validation_loss=lambda e: 1.0), "t")
    _assert_sane(tmp_path / "curves.png")


@pytest.mark.parametrize("cost", [0.0, -3.0])
def test_a_cost_that_is_not_positive_is_drawn_on_a_linear_axis(tmp_path, drawn, cost):
    history = _history(4)
    history.rows[2]["cost"] = cost
    plots.learning_curves(tmp_path / "curves.png", history, "t")
    assert drawn[0].axes[0].get_yscale() == "linear"
    plots.learning_curves(tmp_path / "curves.png", _history(4), "t")
    assert drawn[1].axes[0].get_yscale() == "log"


def test_figures_that_are_not_finite_do_not_stop_the_drawing(tmp_path):
    history = _history(
        4, validation_loss=lambda e: float("nan") if e % 2 else float("inf"), validation_r2=lambda e: -1e300
    )
    plots.learning_curves(tmp_path / "curves.png", history, "t")
    _assert_sane(tmp_path / "curves.png")


# --- confusion matrix -----------------------------------------------------------------------------------------------


def test_the_cells_count_rows_as_the_true_class(tmp_path, drawn):
    true, predicted = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 2, 1, 0, 2])
    plots.confusion_matrix(tmp_path / "matrix.png", true, predicted, ["cat", "dog", "eel"], "t")
    _assert_sane(tmp_path / "matrix.png")
    axis = drawn[0].axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[3 / 4, 0, 1 / 4], [1 / 2, 1 / 2, 0], [0, 0, 1]])
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axis.texts}
    assert written == {(0, 0): "3", (0, 2): "1", (1, 0): "1", (1, 1): "1", (2, 2): "1"}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog", "eel"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog", "eel"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true")


def test_a_class_that_never_occurs_and_no_rows_at_all(tmp_path, drawn):
    plots.confusion_matrix(tmp_path / "matrix.png", np.array([0, 0]), np.array([0, 1]), ["a", "b", "c"], "t")
    plots.confusion_matrix(tmp_path / "none.png", np.zeros(0, int), np.zeros(0, int), ["a", "b"], "t")
    _assert_sane(tmp_path / "none.png")
    for figure in drawn:
        assert np.isfinite(np.asarray(figure.axes[0].images[0].get_array())).all()


@pytest.mark.parametrize("n", [2, 20, 300])
def test_the_picture_stays_a_sane_size_for_any_number_of_classes(tmp_path, drawn, n):
    codes = np.arange(2 * n) % n
    plots.confusion_matrix(tmp_path / "matrix.png", codes, codes, [str(i) for i in range(n)], "t")
    _assert_sane(tmp_path / "matrix.png")
    assert len(drawn[0].axes[0].texts) == (n if n <= plots.MOST_NUMBERS else 0)


AWKWARD = [
    "$5",
    "$\\frac$",
    "$x_$",
    "a_b^c",
    "\\",
    "%",
    "{",
    "犬",
    "é",
    "\x07",
    "<b>",
    "",
    " ",
    "x" * 300,
    "a\nb",
    "_hidden",
]


def test_any_text_will_do_as_a_label(tmp_path):
    codes = np.arange(len(AWKWARD))
    plots.confusion_matrix(tmp_path / "matrix.png", codes, codes, AWKWARD, "t")
    _assert_sane(tmp_path / "matrix.png")


@pytest.mark.parametrize("title", ["$\\frac$: 3 → 2", "$x_$.csv: 3 → 2", "犬.csv: 3 → 2", "x" * 200])
def test_any_text_will_do_as_a_title(tmp_path, title):
    codes = np.array([0, 1, 1])
    plots.confusion_matrix(tmp_path / "matrix.png", codes, codes, ["a", "b"], title)
    _assert_sane(tmp_path / "matrix.png")
    plots.learning_curves(tmp_path / "curves.png", _history(2), title)
    _assert_sane(tmp_path / "curves.png")


def test_dollar_signs_stay_dollar_signs(tmp_path, drawn):
    codes = np.array([0, 1])
    plots.confusion_matrix(tmp_path / "matrix.png", codes, codes, ["$1$", "$2$"], "t")
    labels = drawn[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["$1$", "$2$"]
    assert not any(label.get_parse_math() for label in labels)


# --- files and surroundings -----------------------------------------------------------------------------------------


def test_a_plot_replaces_an_old_one_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    plots.learning_curves(path, _history(2), "t")
    _assert_sane(path)
    assert [found.name for found in tmp_path.iterdir()] == ["curves.png"]


def test_drawing_leaves_pyplot_and_the_settings_alone(tmp_path):
    program = """
import sys
from pathlib import Path
import matplotlib, numpy as np
from gpu_mlp import plots
from gpu_mlp.history import History
settings = list(dict.items(matplotlib.rcParams))  # looking one up by name would choose a backend
history = History("cost")
for epoch in (1, 2):
    history.append({"epoch": epoch, "cost": 1 / epoch})
plots.learning_curves(Path("curves.png"), history, "t")
plots.confusion_matrix(Path("matrix.png"), np.array([0, 1]), np.array([0, 1]), ["a", "b"], "t")
assert "matplotlib.pyplot" not in sys.modules
assert list(dict.items(matplotlib.rcParams)) == settings
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "matrix.png"}


def test_available_says_whether_matplotlib_is_there_without_importing_it(monkeypatch):
    assert plots.available()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python itself uses for "not to be imported"
    assert not plots.available()
