"""The command `gpu-mlp` as a user meets it: what it prints where, its exit status, its files, and what it refuses."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpu_mlp import MLP, data, plots, selfcheck
from gpu_mlp.cli import run
from gpu_mlp.model import Model
from gpu_mlp.options import TrainOptions
from gpu_mlp.runs import split_parts
from gpu_mlp.training import Trainer

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")

FILES = {"model.safetensors", "history.json", "options.toml", "checkpoints"}
QUICK = ("--epochs", "2", "--hidden", "8", "--no-progress", "--no-plots")
posix = pytest.mark.skipif(os.name != "posix", reason="signals, pipes and devices as POSIX has them")


def _write(path, columns):
    """Columns as a CSV file; None is written as an empty field."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def _read(path_or_text):
    """A CSV file, or the text of one, as a header and a list of rows."""
    text = path_or_text if isinstance(path_or_text, str) else path_or_text.read_text(encoding="utf-8")
    header, *rows = csv.reader(text.splitlines())
    return header, rows


def _animals(n=60):
    rng, k = np.random.default_rng(0), np.arange(n) % 3
    return {
        "a": rng.normal(size=n) + 5 * (k == 0),
        "b": rng.normal(size=n) + 5 * (k == 1),
        "colour": np.array(["red", "green"])[np.arange(n) // 3 % 2],
        "kind": np.array(["cat", "dog", "eel"])[k],
    }


def _values(n=60):
    a, b = np.random.default_rng(1).normal(size=(2, n))
    return {"a": a, "b": b, "y": 300 * a - 100 * b + 5000, "z": a + b}


def _idx(path, array):
    """An IDX file of unsigned bytes."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    Path(path).write_bytes(header + array.astype(np.uint8).tobytes())


def _figures(out):
    """The lines that a script reads: {'test accuracy': '0.9750'}."""
    return dict(re.findall(r"^([a-z][a-z0-9 ]*): (-?\d+\.\d{4})$", out, re.MULTILINE))


def _snapshot():
    """Every file and folder below the working folder, with size and time."""
    found = {}
    for top, folders, files in os.walk("."):
        for name in folders:
            found[os.path.join(top, name)] = None
        for name in files:
            about = os.stat(os.path.join(top, name), follow_symlinks=False)
            found[os.path.join(top, name)] = about.st_size, about.st_mtime_ns
    return found


class Cli:
    """`gpu-mlp` in this process: its exit status, and what it wrote to standard output and standard error."""

    def __init__(self, capsys):
        self._capsys = capsys

    def __call__(self, *arguments):
        self._capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return status, *self._capsys.readouterr()

    def done(self, *arguments):
        """What it writes to standard output when all goes well."""
        status, out, err = self(*arguments)
        assert (status, "gpu-mlp: " in err) == (0, False), err
        return out

    def refused(self, *arguments):
        """The one line of a refusal: exit status 2, nothing on standard output, not a file touched."""
        before = _snapshot()
        status, out, err = self(*arguments)
        assert status == 2, err
        assert out == ""
        assert err.startswith("gpu-mlp: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        assert len(err) > len("gpu-mlp: \n") + 10
        assert _snapshot() == before
        return err


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return Cli(capsys)


def _environment(**extra):
    return {**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, **extra}


# Ctrl-C has to work in the process even where this one ignores it, as one in the background does.
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gpu_mlp.cli import main
main()
"""


def _process(*arguments, cwd, program=("-m", "gpu_mlp"), **options):
    """`python -m gpu_mlp` as a process of its own."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": _environment()}
    return subprocess.Popen([sys.executable, *program, *map(str, arguments)], cwd=cwd, **{**streams, **options})


def _finish(*arguments, cwd, **options):
    with _process(*arguments, cwd=cwd, **options) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# --- gpu-mlp train, with no option at all ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The installed command in an empty folder: (its folder, exit status, standard output, standard error)."""
    folder = tmp_path_factory.mktemp("default")
    command = Path(sys.executable).with_name("gpu-mlp")
    arguments = [command] if command.exists() else [sys.executable, "-m", "gpu_mlp"]
    done = subprocess.run(
        [*arguments, "train"], cwd=folder, env=_environment(), capture_output=True, encoding="utf-8", check=False
    )
    return folder, done.returncode, done.stdout, done.stderr


def test_train_without_options_learns_the_digits(default_run):
    _, status, out, err = default_run
    assert status == 0, err
    assert float(_figures(out)["test accuracy"]) >= 0.97


def test_train_without_options_leaves_everything_in_a_folder_of_its_own(default_run):
    folder, *_ = default_run
    (run_folder,) = (folder / "runs").iterdir()
    assert re.fullmatch(r"digits-\d{8}-\d{6}", run_folder.name)
    drawn = {"learning_curves.png", "confusion_matrix.png"} if plots.available() else set()
    assert {path.name for path in run_folder.iterdir()} == FILES | drawn
    for name in drawn:
        assert (run_folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in folder.iterdir()] == ["runs"]


def test_train_without_options_takes_less_than_half_a_minute(default_run):
    folder, *_ = default_run
    (file,) = folder.glob("runs/*/history.json")
    history = json.loads(file.read_text())
    assert history["stopped"] == "completed"
    assert 0 < sum(row["seconds"] for row in history["epochs"]) < 30


def test_standard_output_has_the_table_and_the_figures_and_nothing_else(default_run):
    *_, out, _ = default_run
    assert "\x1b" not in out
    assert "\r" not in out
    *table, last = out.splitlines()
    assert re.fullmatch(r"test accuracy: 0\.\d{4}|test accuracy: 1\.0000", last)
    rows = [re.findall(r"[\w.]+", line) for line in table]
    assert [row[0] for row in rows if row] == ["part", "train", "validation", "test"]
    assert all(re.fullmatch(r"[01]\.\d{4}", row[1]) for row in rows if row and row[0] != "part")
    assert rows[-2] == ["test", last.split()[-1]]


def test_standard_error_in_a_pipe_has_plain_lines(default_run):
    *_, err = default_run
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", err)
    first, second, *epochs, last = err.splitlines()
    assert first == "digits: 1294 train, 144 validation, 359 test rows"
    assert second.startswith("network: 64 ")
    assert 2 <= len(epochs) <= 60
    for line in epochs:
        assert re.fullmatch(r"epoch [ \d]\d/60  cost \S+  validation_loss \S+  validation_accuracy .* left", line)
    assert epochs[-1].startswith("epoch 60/60")
    assert re.fullmatch(r"60 epochs in \d+\.\d s, completed; written to runs\S+", last)


def test_the_printed_accuracy_is_that_of_the_model_on_rows_it_never_saw(default_run):
    folder, _, out, _ = default_run
    (run_folder,) = (folder / "runs").iterdir()
    parts = split_parts(data.load_digits(), "classification", 0.2, 0.1, 0)
    found = np.mean(Model.load(run_folder).predict(parts.test.x) == parts.test.y)
    assert _figures(out)["test accuracy"] == f"{found:.4f}"


def test_evaluate_on_a_run_folder_repeats_its_test_figures(default_run, cli):
    folder, _, out, _ = default_run
    (run_folder,) = (folder / "runs").iterdir()
    for model in (run_folder, run_folder / "model.safetensors"):
        assert cli.done("evaluate", model) == out.splitlines()[-1] + "\n"


def test_info_describes_a_run(default_run, cli):
    folder, *_ = default_run
    (run_folder,) = (folder / "runs").iterdir()
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in cli.done("info", run_folder).splitlines())
    assert facts["network"] == "64 → 256 → 128 → 10"
    assert facts["parameters"] == f"{65 * 256 + 257 * 128 + 129 * 10:,}"
    assert facts["task"] == "classification, loss cross_entropy"
    assert facts["classes"] == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert facts["trained on"] == "digits"


# --- options from a file --------------------------------------------------------------------------------------------


def test_the_options_of_a_run_repeat_it_to_the_bit_and_the_command_line_wins(cli):
    cli.done("train", "--epochs", 2, "--seed", 5, "--no-plots", "--no-progress", "--dropout", 0.5, "--out", "one")
    cli.done("train", "--config", "one/options.toml", "--out", "two")
    cli.done("train", "--config", "one/options.toml", "--out", "three", "--epochs", 3)
    first, second, third = (load_file(f"{name}/model.safetensors") for name in ("one", "two", "three"))
    assert {name: tensor.tobytes() for name, tensor in first.items()} == {
        name: tensor.tobytes() for name, tensor in second.items()
    }
    assert first["0.weight"].tobytes() != third["0.weight"].tobytes()
    assert len(json.loads(Path("three/history.json").read_text())["epochs"]) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch = 3", "unknown option 'epoch'; did you mean 'epochs'?"),
        ('epochs = "3"', "epochs: expected an integer, got '3'"),
        ("standardize = 1", "standardize: expected True or False"),
        ("epochs = = 3", "is not valid TOML"),
        ('optimizer = "adamm"', "did you mean 'adam'?"),
    ],
)
def test_a_bad_file_of_options_is_refused(cli, text, said):
    Path("options.toml").write_text(text)
    assert said in cli.refused("train", "--config", "options.toml")


def test_a_missing_file_of_options_is_refused(cli):
    assert "config: no file at nowhere.toml" in cli.refused("train", "--config", "nowhere.toml")


# --- every kind of data, from end to end ----------------------------------------------------------------------------


def test_a_table_with_text_and_string_labels(cli):
    _write("animals.csv", _animals(120))
    out = cli.done(
        "train", "--data", "animals.csv", "--target", "kind", *QUICK, "--epochs", 40, "--lr", 0.02, "--out", "m"
    )
    assert float(_figures(out)["test accuracy"]) > 0.9
    assert cli.done("evaluate", "m") == out.splitlines()[-1] + "\n"
    header, rows = _read(cli.done("predict", "m", "--data", "animals.csv"))
    assert header == ["prediction"]
    right = np.mean([row[0] == kind for row, kind in zip(rows, _animals(120)["kind"])])
    assert _figures(cli.done("evaluate", "m", "--data", "animals.csv"))["accuracy"] == f"{right:.4f}"


def test_missing_values_are_refused_by_name_and_imputed_on_request(cli):
    columns = {name: column.tolist() for name, column in _animals().items()}
    for row in range(0, 60, 7):
        columns["a"][row] = columns["colour"][row + 1 if row < 59 else row] = None
    _write("holes.csv", columns)
    arguments = ("train", "--data", "holes.csv", "--target", "kind", *QUICK, "--out", "m")
    said = cli.refused(*arguments)
    assert "missing values in column 'a' (" in said
    assert "column 'colour' (" in said
    assert "column 'b'" not in said
    assert "impute" in said
    for impute in ("mean", "median", "most_frequent"):
        cli.done(*arguments[:-1], f"m-{impute}", "--impute", impute)
        _, rows = _read(cli.done("predict", f"m-{impute}", "--data", "holes.csv"))
        assert {row[0] for row in rows} <= {"cat", "dog", "eel"}
        assert len(rows) == 60


def test_a_regression_is_judged_in_the_units_of_its_target(cli):
    _write("values.csv", _values())
    arguments = ("--data", "values.csv", "--target", "y", *QUICK, "--epochs", 60, "--lr", 0.05, "--dropout", 0)
    out = cli.done("train", *arguments, "--out", "m")
    test = split_parts(data.load("values.csv", "y"), "regression", 0.2, 0.1, 0).test
    _write("test.csv", {**test.x, "y": test.y})
    _, rows = _read(cli.done("predict", "m", "--data", "test.csv"))
    found = np.array(rows, float)[:, 0]
    rmse = np.sqrt(np.mean((found - test.y) ** 2))
    r2 = 1 - np.sum((found - test.y) ** 2) / np.sum((test.y - test.y.mean()) ** 2)
    assert _figures(out) == {"test rmse": f"{rmse:.4f}", "test r2": f"{r2:.4f}"}
    assert 1 < rmse < 200
    assert cli.done("evaluate", "m").splitlines() == out.splitlines()[-2:]


def test_several_targets(cli):
    _write("values.csv", _values())
    out = cli.done("train", "--data", "values.csv", "--target", "y,z", *QUICK, "--out", "m")
    assert list(_figures(out)) == ["test rmse", "test r2"]
    header, rows = _read(cli.done("predict", "m", "--data", "values.csv"))
    assert header == ["prediction_0", "prediction_1"]
    assert np.array(rows, float).shape == (60, 2)
    cli.done("predict", "m", "--data", "values.csv", "--out", "p.npy")
    np.testing.assert_array_equal(np.load("p.npy"), np.array(rows, float))


def test_counts_with_the_poisson_loss(cli):
    a = np.random.default_rng(0).normal(size=200)
    _write("counts.csv", {"a": a, "n": np.random.default_rng(1).poisson(np.exp(1 + a))})
    arguments = ("train", "--data", "counts.csv", "--target", "n", "--task", "regression", "--loss", "poisson")
    out = cli.done(*arguments, *QUICK, "--epochs", 60, "--lr", 0.02, "--dropout", 0, "--out", "m")
    assert float(_figures(out)["test r2"]) > 0.2
    _, rows = _read(cli.done("predict", "m", "--data", "counts.csv"))
    assert min(float(row[0]) for row in rows) > 0


@pytest.mark.parametrize("labels", [(3, 7), (-5, 10**12), ("no", "yes"), (True, False), ("a,b", 'c"d'), ("é", "犬")])
def test_labels_of_any_kind_come_back_as_they_stood_in_the_file(cli, labels):
    a, k = np.random.default_rng(0).normal(size=60), np.arange(60) % 2
    _write("t.csv", {"a": a + 8 * k, "label": [labels[code] for code in k]})
    arguments = ("--data", "t.csv", "--target", "label", *QUICK, "--epochs", 40, "--lr", 0.05, "--dropout", 0)
    out = cli.done("train", *arguments, "--out", "m")
    assert _figures(out)["test accuracy"] == "1.0000"
    _, rows = _read(cli.done("predict", "m", "--data", "t.csv"))
    assert [row[0] for row in rows] == [str(labels[code]) for code in k]


def _matrix():
    k = np.arange(60) % 2
    return np.random.default_rng(0).normal(size=(60, 3)) + 6 * k[:, None], 3 + 4 * k


LEARN = (*QUICK, "--epochs", 30, "--lr", 0.05, "--dropout", 0, "--out", "m")


def _judged(cli, expected, *arguments):
    """Train on data that are easy to learn, evaluate on the run's own test part, and predict."""
    out = cli.done("train", *arguments, *LEARN)
    assert _figures(out)["test accuracy"] == "1.0000"
    assert cli.done("evaluate", "m") == out.splitlines()[-1] + "\n"
    return lambda file: (
        [row[0] for row in _read(cli.done("predict", "m", "--data", file))[1]] == list(map(str, expected))
    )


def test_an_npz_file(cli):
    x, y = _matrix()
    np.savez("train.npz", x=x, y=y)
    np.savez("new.npz", x=x)
    predicts = _judged(cli, y, "--data", "train.npz")
    assert predicts("train.npz")
    assert predicts("new.npz")


def test_an_npz_file_with_a_key_of_its_own_for_the_target(cli):
    x, y = _matrix()
    np.savez("train.npz", x=x, species=y)
    np.savez("new.npz", x=x)
    predicts = _judged(cli, y, "--data", "train.npz", "--target", "species")
    assert predicts("train.npz")
    assert predicts("new.npz")
    assert _figures(cli.done("evaluate", "m", "--data", "train.npz")) == {"accuracy": "1.0000"}


def test_an_npz_file_with_a_test_part(cli):
    x, y = _matrix()
    y[-5:] = 10 - y[-5:]  # five labels of the test part are wrong, so that its accuracy is another than the rest's
    np.savez("train.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    out = cli.done("train", "--data", "train.npz", *LEARN)
    assert _figures(out) == {"test accuracy": "0.7500"}
    assert cli.done("evaluate", "m") == out.splitlines()[-1] + "\n"
    assert _figures(cli.done("evaluate", "m", "--data", "train.npz")) == {"accuracy": "0.7500"}


@pytest.mark.parametrize("arguments", [("--data", "x.npy,y.npy"), ("--data", "x.npy", "--target", "y.npy")])
def test_a_pair_of_npy_files(cli, arguments):
    x, y = _matrix()
    np.save("x.npy", x)
    np.save("y.npy", y)
    predicts = _judged(cli, y, *arguments)
    assert predicts("x.npy")
    assert predicts("x.npy,y.npy")
    np.save("new.npy", x[:7])  # other rows have another target, or none
    assert len(_read(cli.done("predict", "m", "--data", "new.npy"))[1]) == 7
    np.save("new-y.npy", y[:7])
    for new in (("new.npy,new-y.npy",), ("new.npy", "--target", "new-y.npy")):
        assert _figures(cli.done("evaluate", "m", "--data", *new)) == {"accuracy": "1.0000"}


def test_a_parquet_file(cli):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    x, y = _matrix()
    table = arrow.table({"a": x[:, 0], "b": x[:, 1], "colour": ["red", "blue", "red"] * 20, "seven": y == 7})
    parquet.write_table(table, "train.parquet")
    parquet.write_table(table.select(["colour", "a", "b"]), "new.parquet")
    predicts = _judged(cli, y == 7, "--data", "train.parquet", "--target", "seven")
    assert predicts("train.parquet")
    assert predicts("new.parquet")


def test_a_folder_of_idx_files(cli):
    rng, y = np.random.default_rng(0), np.arange(60) % 3
    images = rng.integers(0, 50, (60, 4, 4))
    for k in range(3):
        images[y == k, k] += 200
    os.mkdir("images")
    for stem, rows in (("train", slice(None)), ("t10k", slice(0, 15))):
        _idx(f"images/{stem}-images-idx3-ubyte", images[rows])
        _idx(f"images/{stem}-labels-idx1-ubyte", y[rows])
    predicts = _judged(cli, y, "--data", "images")
    assert predicts("images")
    assert predicts("images/train-images-idx3-ubyte")
    _idx("new.idx", images)
    assert predicts("new.idx")


def test_idx_files_with_labels_named_apart(cli):
    images, y = np.random.default_rng(0).integers(0, 50, (60, 2, 2)), np.arange(60) % 2
    images[y == 1] += 200
    _idx("images.idx", images)
    _idx("labels.idx", y)
    predicts = _judged(cli, y, "--data", "images.idx", "--target", "labels.idx")
    assert predicts("images.idx")
    _idx("new.idx", images[:5])
    assert len(_read(cli.done("predict", "m", "--data", "new.idx"))[1]) == 5


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with data and models, for tests that only read: m (classes), values (a regression), hinge, bare, …"""
    folder = tmp_path_factory.mktemp("shop")
    _write(folder / "animals.csv", _animals())
    _write(folder / "values.csv", _values())
    x, y = _matrix()
    np.savez(folder / "matrix.npz", x=x, y=y)
    before = os.getcwd()
    os.chdir(folder)
    try:
        for name, *arguments in (
            ("m", "--data", "animals.csv", "--target", "kind"),
            ("hinge", "--data", "animals.csv", "--target", "kind", "--loss", "hinge"),
            ("values", "--data", "values.csv", "--target", "y"),
            ("matrix", "--data", "matrix.npz"),
        ):
            assert run(["train", *arguments, *QUICK, "--out", name]) == 0
        MLP([4, 3]).save("bare.safetensors")
        save_file({"w": np.zeros(3)}, "foreign.safetensors")
        whole = Path("m/model.safetensors").read_bytes()
        for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
            Path(f"cut-{cut}.safetensors").write_bytes(whole[:cut])
        Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
        os.mkdir("empty")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def in_shop(shop, cli, monkeypatch):
    monkeypatch.chdir(shop)
    return cli


def test_probabilities_add_up_to_1_and_the_largest_is_the_prediction(in_shop, tmp_path):
    header, rows = _read(in_shop.done("predict", "m", "--data", "animals.csv", "--probabilities"))
    assert header == ["prediction", "p_cat", "p_dog", "p_eel"]
    shares = np.array([row[1:] for row in rows], float)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=5e-6)  # six digits are written
    assert [row[0] for row in rows] == [("cat", "dog", "eel")[k] for k in shares.argmax(axis=1)]
    in_shop.done("predict", "m", "--data", "animals.csv", "--probabilities", "--out", tmp_path / "p.npy")
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), shares, rtol=5e-6)


def test_to_the_screen_to_csv_and_to_npy_alike(in_shop, tmp_path):
    screen = in_shop.done("predict", "m", "--data", "animals.csv")
    assert in_shop.done("predict", "m", "--data", "animals.csv", "--out", tmp_path / "p.csv") == ""
    in_shop.done("predict", "m", "--data", "animals.csv", "--out", tmp_path / "p.npy")
    assert (tmp_path / "p.csv").read_text() == screen
    assert np.load(tmp_path / "p.npy", allow_pickle=False).tolist() == [row[0] for row in _read(screen)[1]]
    assert {path.name for path in tmp_path.iterdir()} == {"p.csv", "p.npy"}


def test_columns_go_by_name_and_a_target_is_not_needed(in_shop, tmp_path):
    whole = in_shop.done("predict", "m", "--data", "animals.csv", "--probabilities")
    columns = _animals()
    del columns["kind"]
    _write(tmp_path / "no-target.csv", columns)
    _write(tmp_path / "more.csv", {"id": range(60), **dict(reversed(columns.items())), "note": ["x, y"] * 60})
    for name in ("no-target.csv", "more.csv"):
        assert in_shop.done("predict", "m", "--data", tmp_path / name, "--probabilities") == whole


@pytest.mark.parametrize("column", ["a", "b", "colour"])
def test_a_missing_column_is_named(in_shop, tmp_path, column):
    columns = _animals()
    del columns[column]
    _write(tmp_path / "less.csv", columns)
    assert f"no column '{column}'" in in_shop.refused("predict", "m", "--data", tmp_path / "less.csv")
    assert f"no column '{column}'" in in_shop.refused("evaluate", "m", "--data", tmp_path / "less.csv")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("a", "x", "row 4 (counting from 0), column 'a': expected a number"),
        ("b", None, "row 4 (counting from 0), column 'b': missing value"),
        ("colour", "blue", "row 4 (counting from 0), column 'colour': unseen category 'blue'"),
        ("colour", None, "row 4 (counting from 0), column 'colour': missing value"),
        ("a", 1e300, "row 4 (counting from 0), column 'a': 1e+300 is too large"),
    ],
)
def test_a_value_that_the_model_cannot_take_is_named_by_row_and_column(in_shop, tmp_path, column, value, said):
    columns = {name: values.tolist() for name, values in _animals().items()}
    columns[column][4] = value
    _write(tmp_path / "bad.csv", columns)
    assert said in in_shop.refused("predict", "m", "--data", tmp_path / "bad.csv")


def test_the_digits_can_be_predicted_and_judged_by_name(cli):
    out = cli.done("train", *QUICK, "--out", "m")
    _, rows = _read(cli.done("predict", "m", "--data", "digits"))
    truth = data.load_digits().y
    right = np.mean([int(row[0]) == label for row, label in zip(rows, truth)])
    assert len(rows) == len(truth) == 1797
    assert _figures(cli.done("evaluate", "m", "--data", "digits"))["accuracy"] == f"{right:.4f}"
    assert cli.done("evaluate", "m") == out.splitlines()[-1] + "\n"


def test_a_built_in_set_has_its_own_target_whatever_the_model_was_trained_on(in_shop):
    for command in ("evaluate", "predict"):
        said = in_shop.refused(command, "matrix", "--data", "digits")
        assert "expected 3 columns" in said


# --- a graph for other runtimes --------------------------------------------------------------------------------------


def test_an_exported_graph_predicts_what_the_model_does(in_shop, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    assert in_shop.done("export", "m", tmp_path / "m.onnx") == ""
    table = _animals()
    inputs = {name: np.asarray(table[name]).reshape(-1, 1) for name in ("a", "b", "colour")}
    made = onnx.load(tmp_path / "m.onnx")
    kinds = {value.name: value.type.tensor_type.elem_type for value in made.graph.input}
    assert set(kinds) == set(inputs)
    inputs["colour"] = inputs["colour"].astype(object)
    found = dict(zip((value.name for value in made.graph.output), ReferenceEvaluator(made).run(None, inputs)))
    _, rows = _read(in_shop.done("predict", "m", "--data", "animals.csv"))
    assert found["label"].tolist() == [row[0] for row in rows]


def test_an_export_tells_what_goes_in_and_comes_out(in_shop, tmp_path):
    pytest.importorskip("onnx")
    status, out, err = in_shop("export", "m", tmp_path / "m.onnx", "--dtype", "float64")
    assert (status, out) == (0, "")
    assert err == f"{tmp_path / 'm.onnx'}: from a, b, colour to label, probabilities\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("m", "m.pt"), "out: expected a file name that ends in .onnx, got m.pt"),
        (("nowhere", "m.onnx"), "nowhere"),
        (("m", "m.onnx", "--dtype", "float16"), "dtype: unknown name 'float16'"),
        (("m", "nowhere/m.onnx"), "No such file or directory"),
    ],
)
def test_an_export_that_is_refused(words, told, in_shop):
    pytest.importorskip("onnx")
    assert told in in_shop.refused("export", *words)


def test_an_export_without_onnx_says_what_to_install(in_shop, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'gpu-mlp[onnx]'" in in_shop.refused("export", "m", "m.onnx")


# --- what is refused: exit status 2, one line, nothing left ---------------------------------------------------------


REFUSED = {
    # words
    "a command": (("trian",), "No such command 'trian'. Did you mean 'train'?"),
    "an option": (("train", "--epoch", "3"), "--epochs"),
    "a misspelt option": (("train", "--hiden", "3"), "--hidden"),
    "a word too many": (("train", "digits"), "digits"),
    "an option without its value": (("train", "--epochs"), "--epochs"),
    "text for an integer": (("train", "--epochs", "many"), "--epochs"),
    "a fraction for an integer": (("train", "--epochs", "1.5"), "--epochs"),
    "text for a real": (("train", "--lr", "fast"), "--lr"),
    "evaluate without a model": (("evaluate",), "model"),
    "predict without data": (("predict", "m"), "--data"),
    # names
    "activation": (("train", "--activation", "rellu"), "activation: unknown name 'rellu'; did you mean 'relu'?"),
    "one activation of two": (("train", "--activation", "relu,tan"), "did you mean 'tanh'?"),
    "optimizer": (("train", "--optimizer", "adamm"), "optimizer: unknown name 'adamm'; did you mean 'adam'?"),
    "loss": (("train", "--loss", "cross_entropi"), "loss: unknown name 'cross_entropi'; did you mean 'cross_entropy'?"),
    "schedule": (("train", "--schedule", "cosin"), "schedule: unknown name 'cosin'; did you mean 'cosine'?"),
    "task": (("train", "--task", "regresion"), "task: unknown name 'regresion'; did you mean 'regression'?"),
    "precision": (("train", "--precision", "floot32"), "precision: unknown name 'floot32'; did you mean 'float32'?"),
    "device": (("train", "--device", "gpu"), "device: unknown name 'gpu'; did you mean 'cpu'?"),
    "init": (("train", "--init", "he_norm"), "init: unknown name 'he_norm'; did you mean 'he_normal'?"),
    "impute": (("train", "--impute", "avg"), "impute: unknown name 'avg'"),
    "a built-in set": (("train", "--data", "digit"), "did you mean 'digits'?"),
    # numbers
    **{
        f"{option} {value}": (("train", f"--{option}", value), f"{option.replace('-', '_')}: expected")
        for option, values in {
            "epochs": ("-1", "0"),
            "batch-size": ("0", "-3"),
            "accumulate": ("0",),
            "warmup": ("-1",),
            "seed": ("-1",),
            "patience": ("0", "-2"),
            "dropout": ("1", "-0.1", "nan"),
            "test": ("1.5", "1", "-1", "nan"),
            "validation": ("1", "-0.5"),
            "lr": ("nan", "inf", "-1"),
            "clip-norm": ("0", "-1", "nan"),
            "l1": ("-1",),
            "l2": ("nan",),
            "weight-decay": ("-1",),
            "label-smoothing": ("-0.1", "2"),
            "hidden": ("a,b", "0,3", "-3", "256,"),
        }.items()
        for value in values
    },
    "momentum of 2": (("train", "--optimizer", "sgd", "--momentum", "2"), "momentum: expected"),
    # options that contradict each other
    "label smoothing of a regression": (
        ("train", "--data", "values.csv", "--target", "y", "--label-smoothing", "0.1"),
        "label_smoothing: only for loss 'cross_entropy'",
    ),
    "a loss of classes for values": (
        ("train", "--data", "values.csv", "--target", "y", "--loss", "nll"),
        "loss: 'nll' does not fit regression; use one of mse",
    ),
    "a loss of values for classes": (("train", "--loss", "mae"), "loss: 'mae' does not fit classification; use one of"),
    "momentum of adam": (("train", "--optimizer", "adam", "--momentum", "0.9"), "momentum: optimizer 'adam' has none"),
    "lbfgs with dropout": (("train", "--optimizer", "lbfgs", "--dropout", "0.1"), "dropout: L-BFGS"),
    "lbfgs with a schedule": (("train", "--optimizer", "lbfgs", "--schedule", "cosine"), "schedule: L-BFGS"),
    "lbfgs with a learning rate": (("train", "--optimizer", "lbfgs", "--lr", "0.1"), "lr: L-BFGS"),
    "a target with a built-in set": (("train", "--target", "label"), "target: the built-in set 'digits'"),
    "a folder without fashion-mnist": (("train", "--folder", "."), "folder: only for"),
    "text as values": (
        ("train", "--data", "animals.csv", "--target", "kind", "--task", "regression"),
        "real numbers",
    ),
    "fractions as classes": (
        ("train", "--data", "values.csv", "--target", "y", "--task", "classification"),
        "fractions are for regression",
    ),
    "negative counts": (("train", "--data", "values.csv", "--target", "z", "--loss", "poisson"), "negative"),
    # data
    "no such file": (("train", "--data", "nowhere.csv", "--target", "y"), "nowhere.csv: no such file"),
    "no target named": (("train", "--data", "animals.csv"), "which column is the target?"),
    "no such target": (
        ("train", "--data", "animals.csv", "--target", "kin"),
        "no column 'kin'; did you mean 'kind'? (its columns: a, b, colour, kind)",
    ),
    "no such key": (("train", "--data", "matrix.npz", "--target", "labels"), "(its keys: x, y)"),
    "an unknown kind of file": (("train", "--data", "bare.safetensors"), "accepted endings"),
    "a folder without IDX files": (("train", "--data", "empty"), "train-images"),
    "fashion-mnist that is not there": (("train", "--data", "fashion-mnist", "--folder", "empty"), "apt-get install"),
    # run folders
    "a full run folder": (("train", "--out", "m"), "out: m exists and is not an empty folder"),
    "a run folder that is a file": (("train", "--out", "animals.csv"), "out: animals.csv exists"),
    "a run folder under a file": (("train", "--out", "animals.csv/run"), "out: cannot write to animals.csv/run"),
    "a run folder far under a file": (("train", "--out", "animals.csv/a/b"), "out: cannot write to animals.csv/a/b"),
    # models
    "evaluate no model": (("evaluate", "nowhere"), "model: no file at nowhere"),
    "evaluate an empty folder": (("evaluate", "empty"), "model: no file at empty"),
    "evaluate a table": (("evaluate", "animals.csv"), "model: animals.csv is not a readable safetensors file"),
    "evaluate a stranger": (("evaluate", "foreign.safetensors"), "not one that gpu_mlp wrote"),
    "evaluate a bare network": (("evaluate", "bare.safetensors"), "bare.safetensors has a network but no 'task'"),
    "evaluate a torn model": (("evaluate", "cut.safetensors"), "model: cut.safetensors is not a readable"),
    "info on no model": (("info", "nowhere"), "model: no file at nowhere"),
    "info on a stranger": (("info", "foreign.safetensors"), "not one that gpu_mlp wrote"),
    "a target without data": (("evaluate", "m", "--target", "kind"), "target: goes with --data"),
    "evaluate on data without the target": (("evaluate", "m", "--data", "values.csv"), "no column 'kind'"),
    "evaluate on another kind of target": (
        ("evaluate", "m", "--data", "values.csv", "--target", "y"),
        "column 'colour'",
    ),
    "evaluate on text for values": (
        ("evaluate", "values", "--data", "animals.csv", "--target", "kind"),
        "no column 'z'",
    ),
    "an array for a model of a table": (("predict", "m", "--data", "matrix.npz"), "text columns"),
    "a table for a model of an array": (("predict", "matrix", "--data", "values.csv"), "without column names"),
    "predict for no file": (("predict", "m", "--data", "nowhere.csv"), "nowhere.csv: no such file"),
    "predict from no model": (("predict", "nowhere", "--data", "animals.csv"), "model: no file at nowhere"),
    "predict from a torn model": (("predict", "cut.safetensors", "--data", "animals.csv"), "model: cut.safetensors"),
    "probabilities of hinge": (("predict", "hinge", "--data", "animals.csv", "--probabilities"), "scores"),
    "probabilities of a regression": (
        ("predict", "values", "--data", "values.csv", "--probabilities"),
        "probabilities",
    ),
    "predictions of another kind": (
        ("predict", "m", "--data", "animals.csv", "--out", "p.txt"),
        ".csv, .npy or .parquet",
    ),
    "predictions into no folder": (("predict", "m", "--data", "animals.csv", "--out", "no/p.csv"), "out: "),
    "predictions under a file": (("predict", "m", "--data", "animals.csv", "--out", "animals.csv/p.csv"), "out: "),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_that_says_what_is_wrong(in_shop, arguments, said):
    line = in_shop.refused(*arguments)
    assert said in line
    assert ".tmp" not in line  # the name of a temporary file helps nobody


def _has_cuda():
    try:
        MLP([1, 1], device="cuda")
    except Exception:  # whatever it lacks
        return False
    return True


@pytest.mark.skipif(_has_cuda(), reason="this machine has CUDA")
@pytest.mark.parametrize(
    "arguments", [("train",), ("evaluate", "m"), ("predict", "m", "--data", "animals.csv"), ("check",)]
)
def test_a_device_that_is_not_there(in_shop, arguments):
    assert in_shop.refused(*arguments, "--device", "cuda").startswith("gpu-mlp: device: ")


@pytest.mark.parametrize("command", ["evaluate", "predict", "info"])
def test_a_torn_model_at_any_length(in_shop, command):
    for path in sorted(Path().glob("cut-*.safetensors")):
        arguments = ("--data", "animals.csv") if command == "predict" else ()
        assert f"model: {path} is not a readable safetensors file" in in_shop.refused(command, path, *arguments)


@posix
@pytest.mark.parametrize("out", ["/proc/run", "/dev/null/run", "/proc/1/nowhere/run"])
def test_a_run_folder_that_nobody_can_make(in_shop, out):
    assert f"out: cannot write to {out}" in in_shop.refused("train", "--out", out)


BROKEN = {
    "empty.csv": (b"", "empty.csv: an empty file"),
    "header.csv": (b"a,y\n", "header.csv: only a header row"),
    "ragged.csv": (b"a,b,y\n1,2,x\n1,2\n", "ragged.csv, line 3: 2 fields"),
    "quote.csv": (b'a,y\n1,x\n2,"y\n', "quote.csv, line"),
    "binary.csv": (bytes(range(256)) * 3, "binary.csv, line"),
    "infinite.csv": (b"a,y\n1,x\ninf,y\n", "infinite.csv, line 3, column 'a': inf"),
    "one-class.csv": (b"a,y\n1,x\n2,x\n3,x\n", "only one class, 'x'"),
    "one-row.csv": (b"a,y\n1,x\n", "1 row cannot be split; use test=0 and validation=0"),
    "no-label.csv": (b"a,y\n" + b"1,x\n2,y\n" * 10 + b"3,\n", "y: row 20 (counting from 0): missing label"),
    "no-value.csv": (b"a,y\n" + b"1,.5\n2,.25\n" * 10 + b"3,\n", "y: row 20 (counting from 0), output 0: missing"),
    "only-target.csv": (b"y\n1\n2\n", "no column is left for the features"),
    "missing.csv": (b"a,y\n" + b"1,x\n,y\n" * 10, "missing values in column 'a'"),
    "torn.npz": (None, "torn.npz: cut short or not a valid NPZ file"),
    "nan.npz": (None, "missing values in column 1"),
    "inf.npz": (None, "row 5 (counting from 0), column 1: inf"),
    "pickle.npz": (None, "pickled Python objects"),
    "short-y.npz": (None, "x has 20 rows and y has 19"),
    "torn.idx": (None, "torn.idx: a header of 16 bytes"),
    "not.idx": (b"no IDX file", "not.idx: not an IDX file"),
    "torn.parquet": (b"PAR1 and no more", "torn.parquet: cut short or not a valid Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_data_that_are_broken(cli, name):
    content, said = BROKEN[name]
    x, y = np.ones((20, 2)), np.arange(20) % 2
    if content is not None:
        if name.endswith(".parquet"):
            pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
        Path(name).write_bytes(content)
    elif name == "torn.idx":
        _idx(name, np.ones((5, 2, 2)))
        Path(name).write_bytes(Path(name).read_bytes()[:-3])
    else:
        x[5, 1] = {"nan.npz": np.nan, "inf.npz": np.inf}.get(name, 1)
        pickled = np.array([None] * 20, object)
        np.savez(name, x=x, y=pickled if name == "pickle.npz" else y[:19] if name == "short-y.npz" else y)
        if name == "torn.npz":
            Path(name).write_bytes(Path(name).read_bytes()[:-50])
    if name.endswith(".idx"):
        _idx("labels.idx", np.arange(5) % 2)
    target = {".csv": ["--target", "y"], ".parquet": ["--target", "y"], ".idx": ["--target", "labels.idx"]}
    assert said in cli.refused("train", "--data", name, *target.get(Path(name).suffix, []), *QUICK)


def test_a_bad_row_of_the_test_part_is_found_before_the_training(cli, monkeypatch):
    columns = {name: column.tolist() for name, column in _values().items()}
    ids = {"id": np.arange(60), "y": columns["y"]}
    _write("ids.csv", ids)
    row = int(split_parts(data.load("ids.csv", "y"), "regression", 0.2, 0.1, 0).test.x["id"][0])
    columns["a"][row] = None
    _write("values.csv", columns)
    monkeypatch.setattr(Trainer, "fit", lambda *arguments, **options: pytest.fail("the training began"))
    assert "column 'a'" in cli.refused("train", "--data", "values.csv", "--target", "y", *QUICK)


def test_a_traceback_on_request(in_shop, monkeypatch):
    monkeypatch.setenv("GPU_MLP_TRACEBACK", "1")
    status, _, err = in_shop("info", "nowhere")
    assert status == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == "gpu-mlp: model: no file at nowhere"


# --- a run that ends badly ------------------------------------------------------------------------------------------


def test_a_run_that_diverges_in_one_line_with_exit_status_1(cli):
    arguments = ("--optimizer", "sgd", "--lr", "1e6", "--schedule", "constant", *QUICK, "--hidden", "64,64")
    status, out, err = cli("train", *arguments, "--out", "m")
    assert (status, out) == (1, "")
    *_, last = err.splitlines()
    assert re.match(r"gpu-mlp: epoch 1, step \d+: the cost is not finite, first in (layer \d|the loss); .*lower", last)
    assert err.count("gpu-mlp: ") == 1
    assert err.count("\n") == 3  # the rows, the network, and this
    assert _snapshot() == {}


def test_a_run_that_diverges_later_keeps_the_last_good_epoch(cli):
    _write("values.csv", _values())
    arguments = ("--optimizer", "sgd", "--lr", "3", "--schedule", "constant", "--batch-size", "100", "--dropout", "0")
    arguments = ("train", "--data", "values.csv", "--target", "y", *QUICK, *arguments, "--epochs", "500", "--out", "m")
    status, out, err = cli(*arguments)
    assert (status, out) == (1, "")
    assert re.match(r"gpu-mlp: epoch \d+, step \d+: .*the model of the last good epoch is in m$", err.splitlines()[-1])
    assert all(np.isfinite(tensor).all() for tensor in load_file("m/model.safetensors").values())
    assert json.loads(Path("m/history.json").read_text())["stopped"] == "diverged"
    assert cli("info", "m")[0] == 0


def test_out_of_memory_is_said_in_one_line(in_shop, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("gpu_mlp.training.Trainer.fit", fail)
    status, out, err = in_shop("train", *QUICK, "--out", "new")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("gpu-mlp: not enough memory; try a smaller --batch-size")
    assert not Path("new").exists()


# --- signals --------------------------------------------------------------------------------------------------------

FOR_EVER = ("train", "--epochs", 10**6, "--hidden", 8, "--no-plots", "--out", "m")


def _wait_for(process, text):
    """Read standard error up to a line with ``text``; what was read."""
    read = ""
    while text not in read:
        line = process.stderr.readline()
        assert line, f"it ended: {read}"
        read += line
    return read


@posix
def test_ctrl_c_ends_a_run_and_keeps_what_was_learned(tmp_path):
    with _process(*FOR_EVER, cwd=tmp_path, program=("-c", INTERRUPTIBLE)) as process:
        _wait_for(process, "epoch")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert {path.name for path in (tmp_path / "m").iterdir()} == FILES
    assert "Traceback" not in err
    goes_on = "; gpu-mlp train --resume m goes on from here"
    assert re.fullmatch(rf"\d+ epochs in .* s, interrupted; written to m{goes_on}", err.splitlines()[-1])
    history = json.loads((tmp_path / "m/history.json").read_text())
    assert history["stopped"] == "interrupted"
    assert 1 <= len(history["epochs"]) < 10**6
    assert float(_figures(out)["test accuracy"]) == pytest.approx(history["figures"]["test"]["accuracy"], abs=5e-5)
    assert Model.load(tmp_path / "m").net.sizes == (64, 8, 10)


@posix
def test_ctrl_c_while_the_data_are_read_leaves_nothing(tmp_path):
    """The data come from a pipe that nobody writes to, so that reading them never ends."""
    os.mkfifo(tmp_path / "slow.csv")
    arguments = ("train", "--data", "slow.csv", "--target", "y")
    with _process(*arguments, cwd=tmp_path, program=("-c", INTERRUPTIBLE)) as process:
        writer, deadline = None, time.monotonic() + 60
        while writer is None:  # it can be opened without waiting once the other end is open
            assert process.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                writer = os.open(tmp_path / "slow.csv", os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        os.close(writer)
    assert process.returncode == 130, err
    assert (out, err) == ("", "gpu-mlp: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["slow.csv"]


def test_ctrl_c_before_the_first_step_leaves_nothing(cli, monkeypatch):
    def press(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpu_mlp.training.Trainer.fit", press)
    status, out, err = cli("train", *QUICK)
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "gpu-mlp: interrupted"
    assert _snapshot() == {}


# --- runs that are resumed ------------------------------------------------------------------------------------------

SLOW = ("train", "--epochs", 40, "--hidden", 8, "--no-plots", "--average", 0.99, "--checkpoint-every", "3 steps")


def _model_bytes(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


@posix
@pytest.mark.parametrize(
    ("number", "status", "last"),
    [
        (signal.SIGKILL, -signal.SIGKILL, r"epoch "),
        (signal.SIGTERM, 143, r"gpu-mlp: terminated; "),
        (
            signal.SIGINT,
            130,
            r"\d+ epochs in .* s, interrupted; written to m; ",
        ),
    ],
    ids=["killed", "terminated", "interrupted"],
)
def test_a_run_that_was_ended_goes_on_to_the_same_model(cli, tmp_path, number, status, last):
    with _process(*SLOW, "--out", "m", cwd=tmp_path, program=("-c", INTERRUPTIBLE)) as process:
        _wait_for(process, "epoch")
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == status, err
    if number == signal.SIGKILL:
        assert not err or re.match(last, err.splitlines()[-1])
    else:
        assert re.fullmatch(last + "gpu-mlp train --resume m goes on from here", err.splitlines()[-1])
    assert (tmp_path / "m/options.toml").exists()
    assert list((tmp_path / "m/checkpoints").glob("step-*.safetensors"))
    os.chdir(tmp_path)
    cli.done(*SLOW, "--out", "whole", "--no-progress")
    err = cli("train", "--resume", "m", "--no-progress")[2]
    assert re.search(r"^resume: from m/checkpoints/step-\d{9}\.safetensors$", err, re.MULTILINE)
    assert _model_bytes("m") == _model_bytes("whole")
    assert json.loads(Path("m/history.json").read_text())["stopped"] == "completed"


def test_a_run_folder_without_a_checkpoint_is_begun_anew(cli):
    cli.done("train", *QUICK, "--checkpoint-every", "never", "--out", "m")
    assert not Path("m/checkpoints").exists()
    whole = _model_bytes("m")
    for name in ("model.safetensors", "history.json"):
        Path("m", name).unlink()
    err = cli("train", "--resume", "m", "--checkpoint-every", "1 epoch")[2]
    assert "resume: m has no checkpoint yet; the run begins anew" in err.splitlines()
    assert _model_bytes("m") == whole


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--resume", "nothing"), "resume: nothing is no run folder: it has no options.toml"),
        (("--resume", "m", "--batch-size", 32, "--seed", 3), "resume: the run in m has batch_size 64 (given: 32)"),
        (("--resume", "m", "--out", "n"), "out: a run that is resumed goes on in its own folder, m"),
        (("--checkpoint-every", "often"), "checkpoint_every: expected such as '500 steps', '2 epochs' or"),
        (("--checkpoint-keep", 0), "checkpoint_keep: expected an integer of at least 1, got 0"),
        (("--optimizer", "lbfgs", "--checkpoint-every", "1 epoch"), "checkpoint_every: a run of L-BFGS cannot be"),
    ],
)  # fmt: skip
def test_a_resume_that_cannot_be_is_refused_in_one_line(cli, arguments, said):
    cli.done("train", "--epochs", 2, "--hidden", 8, "--no-plots", "--no-progress", "--out", "m")
    before = _snapshot()
    assert said in cli.refused("train", *arguments)
    assert _snapshot() == before


def test_other_data_are_refused_by_a_resume(cli):
    columns = _animals()
    _write("animals.csv", columns)
    cli.done("train", "--data", "animals.csv", "--target", "kind", *QUICK, "--out", "m")
    name = next(name for name, values in columns.items() if name != "kind" and not isinstance(values[0], str))
    columns[name] = [*columns[name][:-1], columns[name][-1] + 1]
    _write("animals.csv", columns)
    before = _snapshot()
    status, out, err = cli("train", "--resume", "m")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        "gpu-mlp: resume: the checkpoint is of another run: data.hash: the values are"
    )
    assert _snapshot() == before


def test_more_epochs_than_the_run_was_begun_with(cli):
    constant = ("train", "--hidden", 8, "--no-plots", "--no-progress", "--schedule", "constant")
    cli.done(*constant, "--epochs", 2, "--out", "m")
    cli.done(*constant, "--epochs", 4, "--out", "whole")
    cli.done("train", "--resume", "m", "--epochs", 4)
    assert _model_bytes("m") == _model_bytes("whole")
    cli.done("train", *QUICK, "--out", "cosine")
    before = _snapshot()
    status, out, err = cli("train", "--resume", "cosine", "--epochs", 99)
    assert (status, out) == (2, "")
    assert re.match(r"gpu-mlp: resume: epochs was \d+ and is 99 now, but the schedule spans", err.splitlines()[-1])
    assert _snapshot() == before


def test_a_run_can_be_resumed_from_another_folder_and_keeps_its_log(cli, tmp_path, monkeypatch):
    _write("animals.csv", _animals())
    arguments = ("train", "--data", "animals.csv", "--target", "kind", *QUICK, "--log", "csv")
    cli.done(*arguments, "--out", "m", "--checkpoint-every", "1 epoch")
    log = Path("m/log.csv").read_text().splitlines()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.done("train", "--resume", tmp_path / "m", "--no-progress")
    assert (tmp_path / "m/log.csv").read_text().splitlines() == log


def test_a_full_disk_is_said_in_one_line_and_the_checkpoint_stands(cli, monkeypatch):
    from gpu_mlp import tensorfile

    cli.done("train", *QUICK, "--out", "whole")
    honest = tensorfile.write

    def full(path, *arguments):
        if Path(path).name == "model.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return honest(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tensorfile, "write", full)
        status, out, err = cli("train", *QUICK, "--out", "m")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == (
        "gpu-mlp: m/model.safetensors: No space left on device; make room, then: gpu-mlp train --resume m"
    )
    cli.done("train", "--resume", "m")
    assert _model_bytes("m") == _model_bytes("whole")


# --- pipes, devices and terminals -----------------------------------------------------------------------------------


@posix
def test_a_reader_that_stops_reading_is_no_error(shop, tmp_path):
    rows = 20_000  # more than a pipe holds
    columns = _animals()
    _write(tmp_path / "many.csv", {name: np.resize(column, rows) for name, column in columns.items()})
    with _process("predict", shop / "m", "--data", "many.csv", "--probabilities", cwd=tmp_path) as process:
        assert process.stdout.readline() == "prediction,p_cat,p_dog,p_eel\n"
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert (process.returncode, err) == (0, "")


@posix
@pytest.mark.parametrize("arguments", [("info",), ("train", "--help"), ("train", *QUICK, "--out", "m")])
def test_nobody_reading_at_all_is_no_error_either(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with _process(*arguments, cwd=tmp_path, stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Error" not in err
    if "--out" in arguments:
        assert {path.name for path in (tmp_path / "m").iterdir()} == FILES


@posix
def test_a_run_goes_on_when_nobody_reads_its_progress(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ("train", "--epochs", 3, "--hidden", 8, "--no-plots", "--out", "m")
    with _process(*arguments, cwd=tmp_path, stderr=writer) as process:
        os.close(writer)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "test accuracy" in _figures(out)
    assert {path.name for path in (tmp_path / "m").iterdir()} == FILES


@posix
def test_without_standard_output_there_is_no_traceback(shop, tmp_path):
    command = [sys.executable, "-m", "gpu_mlp", "evaluate", str(shop / "m"), "--data", str(shop / "animals.csv")]
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&-', "sh", *command], cwd=tmp_path, env=_environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "60 rows\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_in_one_line(shop):
    with open("/dev/full", "w") as full:
        status, _, err = _finish("predict", "m", "--data", "animals.csv", cwd=shop, stdout=full)
    assert (status, err) == (2, "gpu-mlp: No space left on device\n")


@pytest.mark.parametrize("arguments", [("info", "m"), ("train", "--help")])
def test_a_locale_without_arrows_does_not_end_the_command(shop, arguments):
    status, out, err = _finish(*arguments, cwd=shop, env=_environment(PYTHONIOENCODING="ascii"))
    assert (status, err) == (0, "")
    assert len(out.splitlines()) > 5


# --- help, info, check ----------------------------------------------------------------------------------------------


@functools.cache
def _help_of(*command):
    """The help text of a command on a screen of 250 columns."""
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as out:
        patched.setenv("COLUMNS", "250")
        assert run([*command, "--help"]) == 0
    return out.getvalue()


def _about(text, flag):
    """What a help text says of one option: its entry, as long as it is, on one line."""
    entries = re.split(r"^│ [ *]? *(?=--)", text, flags=re.MULTILINE)
    (found,) = [entry for entry in entries if re.match(rf"{flag} ", entry)]
    return " ".join(re.sub(r"│|╰.*|╭.*", " ", found).split())


@pytest.mark.parametrize("option", dataclasses.fields(TrainOptions), ids=lambda option: option.name)
def test_the_help_of_train_has_every_option_with_its_meaning_and_its_default(option):
    flag = "--" + option.name.replace("_", "-")
    entry = _about(_help_of("train"), flag)
    assert " ".join(option.metadata["help"].split()) in entry
    default = option.metadata["shown"] or str(option.default)
    if isinstance(option.default, bool):
        default = "on" if option.default else "off"
        assert f"--no-{flag[2:]}" in entry
    assert f"[default: ({default})]" in entry


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["--config"]),
        ("evaluate", ["--data", "--target", "--device"]),
        ("predict", ["--data", "--out", "--probabilities", "--device"]),
        ("info", []),
        ("check", ["--device", "--seed"]),
    ],
)
def test_the_help_of_every_command(command, options):
    text = _help_of(command)
    assert f"gpu-mlp {command}" in text
    for option in (*options, "--help"):
        assert option in text
    assert command in _help_of()


def test_a_short_h_will_do(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert cli.done("-h") == _help_of()
    assert cli.done("predict", "-h") == _help_of("predict")


def test_a_paragraph_of_help_flows_to_the_width_of_the_screen():
    above, *_ = _help_of("train").split("╭")
    (line,) = [line for line in above.splitlines() if "(--config)" in line]
    assert not line.strip().startswith("(--config)"), above


def test_no_command_at_all_shows_the_help_and_no_empty_complaint(cli):
    status, out, err = cli()
    assert status in (0, 2)
    assert "train" in out + err
    assert "gpu-mlp:  (" not in err


def test_info_says_what_the_machine_computes_with(cli):
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in cli.done("info").splitlines())
    assert facts["numpy"] == np.__version__
    assert facts["Python"].startswith(sys.version.split()[0])
    for name in ("gpu_mlp", "scipy", "BLAS", "processors", "NVIDIA driver", "device='cuda'"):
        assert facts[name].strip(), name
    assert facts["device='auto'"] in ("means cpu", "means cuda")


def test_info_plans_the_memory_of_a_step(cli):
    options = ("--batch-size", 8192, "--precision", "bfloat16", "--optimizer", "adamw", "--activation", "gelu")
    lines = cli.done("info", "--plan", "784,4096,10", *options).splitlines()
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert facts["a step of"] == "8192 rows, 784 → 4096 → 10, bfloat16, adamw"
    assert (facts["h"], facts["z"]) == ("64.2 MiB", "64.0 MiB")
    parts = {"θ", "θ in bfloat16", "gradient", "moments", "minibatch", "h", "z", "gz", "scratch"}
    assert set(facts) == {"a step of", "in all", *parts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("784,x",), "plan: expected widths such as 784,4096,10, got '784,x'"),
        (("784",), "plan: expected at least an input and an output width, all positive, got '784'"),
        (("784,10", "--optimizer", "addam"), "optimizer: unknown name 'addam'; did you mean 'adam'?"),
        (("784,10", "--batch-size", "0"), "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(cli, arguments, message):
    assert message in cli.refused("info", "--plan", *arguments)


def test_info_of_a_regression_names_its_inputs_and_no_classes(in_shop):
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in in_shop.done("info", "values").splitlines())
    assert facts["network"] == "3 → 8 → 1"
    assert facts["task"] == "regression, loss mse"
    assert facts["inputs"] == "3 columns"
    assert facts["trained on"] == os.path.abspath("values.csv")
    assert "classes" not in facts


def test_check_as_a_command_of_its_own(cli, monkeypatch):
    """Cut short here; test_selfcheck.py runs it whole."""
    for table, names in (("ACTIVATIONS", ("tanh", "softmax")), ("LOSSES", ("cross_entropy",))):
        monkeypatch.setattr(selfcheck, table, {name: getattr(selfcheck, table)[name] for name in names})
    monkeypatch.setattr(selfcheck, "PRECISIONS", ("float64", "float32"))
    out = cli.done("check")
    assert out.splitlines()[-1] == "8 of 8 checks passed"
    assert _snapshot() == {}
    assert cli.done("check", "--seed", 3) != out


def test_the_module_runs_like_the_command(tmp_path):
    status, out, err = _finish("trian", cwd=tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("gpu-mlp: No such command 'trian'. Did you mean 'train'?")
    status, out, _ = _finish("info", "--help", cwd=tmp_path)
    assert status == 0
    assert "gpu-mlp info" in out
