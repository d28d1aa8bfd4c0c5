"""Runs on data that is read in pieces: preprocessing as in memory, the command line, the memory, and make-data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_mlp
from gpu_mlp import cli, data, piecewise, readers, streamed, synthetic
from gpu_mlp.model import Model
from gpu_mlp.options import TrainOptions
from gpu_mlp.preprocessing import Labels, Preprocessor, TargetScaler
from gpu_mlp.runs import Run
from gpu_mlp.streamed import StreamRun, in_pieces, make
from gpu_mlp.synthetic import BLOCK_ROWS, Synthetic

QUICK = settings(max_examples=40, deadline=None, database=None)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    """The exit status of `gpu-mlp` with these words."""
    return cli.run([str(word) for word in words])


# --- preprocessing ---------------------------------------------------------------------------------------------------


def in_parts(x, y, cuts, fit, target):
    """Both fitted piece by piece, as a run does it."""
    rows = np.split(np.arange(len(y)), cuts)

    def taken(chosen):
        return x[chosen] if isinstance(x, np.ndarray) else {name: column[chosen] for name, column in x.items()}

    for chosen in rows:
        fit.look(taken(chosen))
        target.look(y[chosen])
    for chosen in rows if fit.measures or target.measures else []:
        if fit.measures:
            fit.measure(taken(chosen))
        target.measure(y[chosen])
    return fit.result(), target.result()


@QUICK
@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=5), st.floats(-1e8, 1e8), st.integers(0, 1000))
def test_numbers_in_pieces_are_fitted_as_at_once(n, cuts, offset, seed):
    rng = np.random.default_rng(seed)
    x = offset + rng.normal(size=(n, 3))
    x[:, 2] = offset  # a constant column
    y = rng.normal(size=(n, 2))
    cuts = sorted({cut for cut in cuts if 0 < cut < n})
    found, scaler = in_parts(x, y, cuts, piecewise.InputsFit(None, True, None), piecewise.ScalerFit(True))
    wanted = Preprocessor.fit(x)
    for name in ("mean", "scale"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12)
    np.testing.assert_allclose(scaler.mean, TargetScaler.fit(y).mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(scaler.scale, TargetScaler.fit(y).scale, rtol=1e-12)
    if not cuts:
        assert found.to_dict() == wanted.to_dict()


def table(n=300, seed=0):
    rng = np.random.default_rng(seed)
    size = rng.normal(5, 2, n)
    colour = rng.choice(["red", "blue", "green"], n).astype(object)
    kind = np.where(size + 3 * (colour == "red") > 6, "big", "small").astype(object)
    size[::17] = np.nan
    colour[::29] = None
    return {"size": size, "colour": colour, "other": rng.normal(size=n), "kind": kind}


@pytest.mark.parametrize("standardize", [True, False])
def test_tables_in_pieces_are_fitted_as_at_once(standardize):
    x = table()
    y = x.pop("kind")
    fit = piecewise.InputsFit(list(x), standardize, "mean")
    found, labels = in_parts(x, y, [1, 50, 51, 200], fit, piecewise.LabelsFit())
    wanted = Preprocessor.fit(x, standardize=standardize, impute="mean")
    assert found.categorical == wanted.categorical
    for name in ("mean", "scale", "fill"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-13)
    assert labels.to_dict() == Labels.fit(y).to_dict()


@pytest.mark.parametrize("y", [[3, 1, 2, 1], [True, False, True, True], [1.0, 2.0, 2.0, 1.0], ["b", "a", "é", "a"]])
def test_labels_of_any_kind_are_the_union(y):
    y = np.array(y, object if isinstance(y[0], str) else None)
    found = in_parts(np.zeros((4, 1)), y, [1, 2], piecewise.InputsFit(None, False, None), piecewise.LabelsFit())[1]
    assert found.to_dict() == Labels.fit(y).to_dict()


def test_what_pieces_cannot_say_is_refused(monkeypatch):
    x = table()
    y = x.pop("kind")
    for impute in ("median", "most_frequent"):
        with pytest.raises(ValueError, match=f"impute: '{impute}' needs all the values.*use impute='mean'"):
            piecewise.InputsFit(list(x), True, impute).look(x)
    text = {"colour": x["colour"]}
    found, _ = in_parts(text, y, [9], piecewise.InputsFit(["colour"], True, "most_frequent"), piecewise.LabelsFit())
    assert found.categorical == Preprocessor.fit(text, impute="most_frequent").categorical
    with pytest.raises(
        ValueError, match=r"missing values in column 'size' \(18 of 300\), column 'colour' \(11 of 300\)"
    ):
        in_parts(x, y, [9], piecewise.InputsFit(list(x), True, None), piecewise.LabelsFit())
    many = {"id": np.array([f"row {i}" for i in range(3000)], object)}
    with pytest.raises(ValueError, match="different texts"):
        piecewise.InputsFit(["id"], True, None).look(many)
    monkeypatch.setattr(piecewise, "MOST_LABELS", 10)
    with pytest.raises(ValueError, match="more than 10 different labels; are they values"):
        piecewise.LabelsFit().look(np.arange(11))


# --- runs ------------------------------------------------------------------------------------------------------------


def made(kind, rows=4000, shards=2, features=4, task="classification", seed=0):
    return synthetic.write(Synthetic(rows, features, task, seed=seed), f"set-{kind}", kind, shards)


def options(source, **given):
    return TrainOptions(
        **{"data": str(source), "epochs": 2, "batch_size": 64, "plots": False, "progress": False, "out": "run", **given}
    )


def test_every_format_trains_the_same_network_from_the_command_line():
    """Where the chunks are the same: npy and npz. With row groups and pieces of text the shuffles are others."""
    found = {}
    for kind in ("npy", "npz", "parquet", "csv"):
        source = made(kind)
        assert run("train", "--data", source, "--epochs", 2, "--out", f"run-{kind}", "--no-plots", "--no-progress") == 0
        model = Model.load(f"run-{kind}")
        found[kind] = model
        np.testing.assert_allclose(model.preprocessor.mean, 0, atol=0.1)
        assert run("evaluate", f"run-{kind}") == 0
    assert found["npy"].net.theta.tobytes() == found["npz"].net.theta.tobytes()
    assert found["npy"].preprocessor.to_dict() == found["npz"].preprocessor.to_dict()


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_training_reaches_what_the_rule_allows(task):
    source = made("npy", 20000, features=3, task=task)
    best = json.loads((source / "manifest.json").read_text())["made"]["best"]
    result = make(options(source, epochs=12, hidden="48,48", dropout=0.0, batch_size=128, lr=0.005)).start()
    assert isinstance(make(options(source, out=None)), StreamRun)
    figures = result.figures["test"]
    name = next(iter(best))
    assert 0.95 * best[name] < figures[name] < best[name] + 0.02


def write_table(folder, kind, n=300):
    folder = Path(folder)
    folder.mkdir()
    columns = table(n)
    if kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table(columns), folder / "a.parquet", row_group_size=40)
    else:
        lines = [",".join(columns)]
        for row in zip(*columns.values()):
            lines.append(",".join("" if v is None or v != v else str(v) for v in row))
        (folder / "a.csv").write_text("\n".join(lines) + "\n")
    return folder / f"a.{kind}"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_with_text_and_gaps_from_training_to_predictions(kind, capsys):
    path = write_table("shards", kind)
    words = ("--target", "kind", "--impute", "mean", "--epochs", 20, "--batch-size", 16, "--no-plots", "--no-progress")
    assert run("train", "--data", "shards", "--out", "run", *words, "--dropout", 0) == 0
    record = json.loads(Path("run/history.json").read_text())
    assert record["figures"]["test"]["accuracy"] > 0.75
    capsys.readouterr()
    assert run("evaluate", "run") == 0
    assert f"test accuracy: {record['figures']['test']['accuracy']:.4f}" in capsys.readouterr().out
    for ending in ("csv", "npy", "parquet"):
        assert run("predict", "run", "--data", "shards", "--out", f"pieces.{ending}", "--probabilities") == 0
        assert run("predict", "run", "--data", path, "--out", f"whole.{ending}", "--probabilities") == 0
    pieces, whole = (
        [line.split(",")[0] for line in Path(f"{name}.csv").read_text().splitlines()] for name in ("pieces", "whole")
    )
    assert (pieces[0], len(pieces), pieces) == ("prediction", 301, whole)
    np.testing.assert_allclose(np.load("pieces.npy"), np.load("whole.npy"), rtol=1e-5)
    frames = [readers.read(f"{name}.parquet", "prediction") for name in ("pieces", "whole")]
    assert frames[0].feature_names == ["p_big", "p_small"]
    assert frames[0].y.tolist() == frames[1].y.tolist() == whole[1:]
    assert run("predict", "run", "--data", "shards", "--out", "labels.npy") == 0
    assert np.load("labels.npy", allow_pickle=False).dtype == "<U5"


def test_a_whole_file_and_the_folder_it_lies_in_are_fitted_alike():
    """The preprocessing of a run in pieces over all rows is that of a run in memory."""
    path = write_table("shards", "csv")
    given = {"target": "kind", "impute": "mean", "test": 0.0, "validation": 0.0}
    pieces, whole = make(options("shards", **given)), make(options(path, out="other", **given))
    assert (type(pieces), type(whole)) == (StreamRun, Run)
    assert pieces.model.preprocessor.categorical == whole.model.preprocessor.categorical
    np.testing.assert_allclose(pieces.model.preprocessor.mean, whole.model.preprocessor.mean, rtol=1e-13)
    np.testing.assert_allclose(pieces.model.preprocessor.scale, whole.model.preprocessor.scale, rtol=1e-13)
    assert pieces.options.task == whole.options.task == "classification"


def test_what_is_read_in_pieces(monkeypatch):
    source = made("npy", 1000, 1)
    x, y = source / "x-00000.npy", source / "y-00000.npy"
    program = streamed.PROGRAM_BYTES
    assert in_pieces(str(source), None)
    assert not in_pieces(str(x), None)
    assert not in_pieces("digits", "1KiB")
    assert not in_pieces(str(x), str(program + 4 * x.stat().st_size))
    assert in_pieces(str(x), str(program + 4 * x.stat().st_size - 1))
    assert in_pieces(f"{x},{y}", str(program + 4 * (x.stat().st_size + y.stat().st_size) - 1))
    monkeypatch.setattr(streamed, "_available", lambda: program)
    assert in_pieces(str(x), None)
    monkeypatch.setattr(streamed, "_available", lambda: None)
    assert not in_pieces(str(x), None)
    assert not in_pieces("nowhere.npy", "1MiB")
    monkeypatch.undo()
    assert streamed._available() is None or streamed._available() > 0


def test_a_file_larger_than_the_memory_is_read_in_pieces_to_the_same_predictions(monkeypatch):
    source = made("npz", 3000, 1)
    path = source / "part-00000.npz"
    assert run("train", "--data", path, "--epochs", 1, "--out", "run", "--no-plots", "--no-progress") == 0
    monkeypatch.setattr(streamed, "TIMES_PACKED", 1 << 20)
    assert run("predict", "run", "--data", path, "--out", "pieces.npy", "--memory", "300MiB") == 0
    monkeypatch.setattr(streamed, "TIMES_PACKED", 1)
    assert run("predict", "run", "--data", path, "--out", "whole.npy", "--memory", "300MiB") == 0
    np.testing.assert_array_equal(np.load("pieces.npy"), np.load("whole.npy"))


REFUSED = {
    "too little memory": (("--memory", "100MiB"), "memory: of 100.0 MiB the program and the network take"),
    "no size": (("--memory", "much"), "memory: expected a size such as 512MiB"),
    "L-BFGS": (("--optimizer", "lbfgs"), "optimizer: lbfgs needs the whole data set"),
    "median": (("--impute", "median"), "impute: 'median' needs all the values"),
    "another target": (("--target", "z"), "there is no z-00000.npy beside it"),
    "a folder of IDX": (("--folder", "x"), "folder: only for the built-in set"),
    "no rows for a part": (("--test", "0.9999"), "1 row cannot be split"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_every_refusal_is_one_line(capsys, words, message):
    source = made("npy", 1000)
    status = run("train", "--data", source, "--epochs", 1, "--out", "run", "--no-plots", "--no-progress", *words)
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert error[-1].startswith("gpu-mlp: ")
    assert message in error[-1]
    assert not Path("run").exists()


def test_a_shard_that_breaks_in_a_run_leaves_the_model_and_one_line(capsys, monkeypatch):
    source = made("npy", 2000, 1)
    honest = streamed.Run._trainer

    def trainer(self):
        made = honest(self)
        fit = made.fit

        def breaking(*arguments, **named):
            def callback(trainer, row):
                os.truncate(source / "x-00000.npy", 5000)

            return fit(*arguments, **{**named, "callbacks": [callback]})

        made.fit = breaking
        return made

    monkeypatch.setattr(Run, "_trainer", trainer)
    status = run("train", "--data", source, "--epochs", 3, "--out", "run", "--no-plots", "--no-progress")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert "x-00000.npy: was changed while it was in use; start again with the files at rest" in error
    assert error.endswith("the model of the last good epoch is in run")
    assert len(Model.load("run").net.sizes) == 4
    assert json.loads(Path("run/history.json").read_text())["stopped"] == "data lost"


def test_held_out_rows_with_an_unseen_label_are_told_before_the_training(capsys):
    source = Path("set")
    source.mkdir()
    y = np.zeros(640, int)
    y[::2] = 1
    stream_rows = np.arange(640)
    np.save(source / "x.npy", stream_rows[:, None].astype(np.float32))
    np.save(source / "y.npy", y)
    run_ = make(options(source, out=None))
    held = int(run_.parts.test.chunks[0, 0])
    y[held] = 7
    np.save(source / "y.npy", y)
    assert run("train", "--data", source, "--task", "classification", "--out", "run", "--no-progress") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "x.npy, counted from row" in error
    assert "unseen label 7" in error


# --- memory ----------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import numpy as np
from gpu_mlp import MLP, SGD, Stream, Trainer
def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
net = MLP([100, 8, 3], output="softmax", device="cpu")
trainer = Trainer(net, optimizer=SGD(lr=0.1))
trainer.fit((np.zeros((64, 100), np.float32), np.zeros(64, int)), epochs=1, progress=False)  # what a first step loads
stream = Stream(sys.argv[1], memory="32MiB", buffer_rows=20000)
before = status("VmRSS")
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (int(sys.argv[2]) << 20),) * 2)
history = trainer.fit(stream, epochs=1, batch_size=1024, validation=0.1, progress=False)
print(status("VmHWM") - before, history.last["validation_accuracy"])
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc, and limits the address space as Linux does"
)
def test_a_set_several_times_larger_than_the_memory_trains_in_it():
    """200 MB in 32 MiB, with the address space limited; and the limit bites: whole, the set does not fit in it."""
    source = made("npy", 500_000, 1, features=100)
    size = (source / "x-00000.npy").stat().st_size
    folder = str(Path(gpu_mlp.__file__).parent.parent)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": folder}
    program = [sys.executable, "-c", LIMITED, str(source)]
    # beside the buffers: the stacks of four threads, of 8 MiB of address space each, and what NumPy works in
    done = subprocess.run([*program, "112"], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    taken, accuracy = map(float, done.stdout.split())
    assert taken < 48 << 20
    assert size > 4 * taken
    assert accuracy > 0.3
    program[2] = LIMITED.replace("history = ", "np.load(sys.argv[1] + '/x-00000.npy')\nhistory = ")
    done = subprocess.run([*program, "112"], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr


# --- make-data -------------------------------------------------------------------------------------------------------


def arrays_of(folder):
    stream = streamed.Stream(folder)
    pieces = [piece.arrays() for piece in stream.pieces()]
    return [np.concatenate(parts) for parts in list(zip(*pieces))[:2]]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_same_rows_in_every_format_and_any_shards(task):
    """The values of a table come as float64, and are those of the arrays."""
    data_ = Synthetic(BLOCK_ROWS + 100, 3, task, seed=5)
    x, y = (np.concatenate(parts) for parts in zip(*data_.blocks(0, data_.rows)))
    for kind in ("npy", "npz", "parquet", "csv"):
        for shards in (1, 3):
            found = arrays_of(synthetic.write(data_, f"{kind}-{shards}", kind, shards))
            np.testing.assert_array_equal(found[0], x)
            np.testing.assert_array_equal(found[1], y)
    head = np.concatenate([b[0] for b in data_.blocks(50, BLOCK_ROWS + 50)])
    np.testing.assert_array_equal(head, x[50 : BLOCK_ROWS + 50])
    assert (Synthetic(100, 3, task, seed=6).block(0)[0] != x[:100]).all()


def test_the_rule_is_what_it_says():
    """Classes are equally frequent, the best predictors reach the stated figures, and no more."""
    labelled = Synthetic(20 * BLOCK_ROWS, 5, classes=4, seed=1)
    x, y = (np.concatenate(parts) for parts in zip(*labelled.blocks(0, labelled.rows)))
    u, v = labelled.directions() @ x.T
    np.testing.assert_allclose(labelled.directions() @ labelled.directions().T, np.eye(2), atol=1e-12)
    rule = np.floor(4 * (((np.arctan2(v, u) + np.hypot(u, v)) / (2 * np.pi)) % 1))
    assert abs((rule == y).mean() - labelled.best["accuracy"]) < 0.005
    np.testing.assert_allclose(np.bincount(y) / len(y), 0.25, atol=0.01)
    valued = Synthetic(20 * BLOCK_ROWS, 5, "regression", seed=1)
    x, y = (np.concatenate(parts) for parts in zip(*valued.blocks(0, valued.rows)))
    u, v = valued.directions() @ x.T
    rule = (u + (v**2 - 1) / np.sqrt(2)) / np.sqrt(2)
    assert abs(rule.var() - 1) < 0.02
    assert abs(1 - ((y - rule) ** 2).mean() / y.var() - valued.best["r2"]) < 0.005


def test_make_data_from_the_command_line(capsys):
    assert run("make-data", "some", "--rows", 500, "--features", 3, "--format", "npz", "--shards", 2, "--seed", 4) == 0
    out, error = capsys.readouterr()
    assert out == "best possible accuracy: 0.9333\n"
    assert error == "500 rows of 3 features in 2 npz shards written to some\n"
    record = json.loads(Path("some/manifest.json").read_text())
    assert record["made"] == {
        "task": "classification", "rows": 500, "features": 3, "seed": 4, "best": {"accuracy": 1 - 0.1 * 2 / 3},
        "classes": 3,
    }  # fmt: skip
    assert sorted(path.name for path in Path().iterdir()) == ["some"]
    assert data.load("some/part-00000.npz").x.shape == (250, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("some", "--rows", 0), "rows: expected an integer of at least 1"),
        (("some", "--features", 1), "features: expected an integer of at least 2"),
        (("some", "--format", "hdf5"), "format: unknown name 'hdf5'"),
        (("some", "--task", "ranking"), "task: unknown name 'ranking'"),
        (("some", "--rows", 3, "--shards", 4), "shards: expected an integer of at most 3"),
        (("no/some",), "out: there is no folder no"),
        (("there",), "out: there exists; choose another name"),
        (("busy",), "out: .busy.partial is there: another run is writing it, or one was killed"),
        (("some", "--rows", 10**15), "out: the set takes about"),
    ],
)
def test_make_data_refuses_before_any_work(capsys, words, message):
    Path("there").mkdir()
    Path(".busy.partial").mkdir()
    assert run("make-data", *words) == 2
    assert capsys.readouterr().err.startswith(f"gpu-mlp: {message}")
    assert sorted(path.name for path in Path().iterdir()) == [".busy.partial", "there"]


def test_a_make_data_that_stops_leaves_nothing_that_looks_complete(monkeypatch):
    data_ = Synthetic(3 * BLOCK_ROWS, 3)

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.write(data_, "some", "npz", 2, stop)
    assert list(Path().iterdir()) == []
    code = (
        "import os, signal\nfrom gpu_mlp import synthetic\n"
        "synthetic.write(synthetic.Synthetic(30000, 3), 'some', 'npy', 2, lambda done: os.kill(os.getpid(), 9))"
    )
    folder = str(Path(gpu_mlp.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": folder})
    assert done.returncode != 0
    assert not Path("some").exists()
    assert not list(Path().glob("**/manifest.json"))


def test_a_sweep_searches_on_data_that_is_read_in_pieces():
    pytest.importorskip("optuna")
    source = made("npy", 1000)
    Path("sweep.toml").write_text(f'data = "{source}"\nepochs = 1\n[search]\nlr = [0.001, 0.01]\n')
    assert run("sweep", "--config", "sweep.toml", "--trials", 2, "--out", "sweep") == 0
    assert Path("sweep/best.toml").exists()
