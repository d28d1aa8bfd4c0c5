"""One run from its options to its folder: what reaches the trainer, what is held out, and what a bad end leaves."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import threading

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from gpu_mlp import data, plots, runs
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.initializers import INITIALIZERS
from gpu_mlp.losses import CrossEntropy
from gpu_mlp.model import OUTPUT_OF, Model
from gpu_mlp.network import MLP
from gpu_mlp.optimizers import OPTIMIZERS
from gpu_mlp.options import TrainOptions, merged
from gpu_mlp.progress import Progress
from gpu_mlp.runs import Run, held_out, split_parts
from gpu_mlp.schedules import SCHEDULES, Warmup
from gpu_mlp.training import Diverged, Trainer

pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")

FILES = {"model.safetensors", "history.json", "options.toml", "checkpoints"}
N = 90


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _write(path, columns):
    """Columns as a CSV file; None is written as an empty field."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))
    return str(path)


def _numbers(n=N, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 2))


def _animals(n=N):
    """Three classes that numbers and a category tell apart together: colour parts dogs and eels, a parts cats."""
    x, k = _numbers(n), np.arange(n) % 3
    return {
        "a": x[:, 0] + 6 * (k == 0),
        "b": x[:, 1],
        "colour": np.where(k == 2, "green", np.where(k == 1, "red", np.where(x[:, 1] > 0, "red", "green"))),
        "kind": np.array(["cat", "dog", "eel"])[k],
    }


def _values(n=N):
    a, b = _numbers(n).T
    return {"a": a, "b": b, "y": 300 * a - 100 * b + 5000, "z": a * b}


def _options(**given):
    small = {"epochs": 2, "hidden": "8", "batch_size": 16, "progress": False, "plots": False, "out": "run"}
    return TrainOptions(**{**small, **given})


def _animal_run(**given):
    return Run(_options(data=_write("animals.csv", _animals()), target="kind", **given))


def _value_run(**given):
    return Run(_options(data=_write("values.csv", _values()), **{"target": "y", **given}))


def _history(folder="run"):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    with open(f"{folder}/history.json", encoding="utf-8") as file:
        return json.load(file, parse_constant=refuse)


def _left():
    """Every file and folder under the working folder, without the data."""
    found = {os.path.relpath(os.path.join(top, name)) for top, *lists in os.walk(".") for name in lists[0] + lists[1]}
    return {path for path in found if not path.endswith((".csv", ".npz"))}


def _weights(folder="run"):
    return {name: tensor.tobytes() for name, tensor in load_file(f"{folder}/model.safetensors").items()}


# --- a run and its folder -------------------------------------------------------------------------------------------


def test_a_classification_learns_from_numbers_and_text_together():
    result = _animal_run(epochs=60, dropout=0.0, lr=0.02).start()
    assert result.figures["test"]["accuracy"] >= 0.9  # a alone, or colour alone, gets two in three
    assert result.model.task == "classification"
    assert {path.name for path in result.folder.iterdir()} == FILES


def test_a_regression_learns_in_the_units_of_its_target():
    result = _value_run(epochs=150, dropout=0.0, lr=0.01).start()
    parts = split_parts(data.load("values.csv", "y"), "regression", 0.2, 0.1, 0)
    for name, part in parts.named().items():
        error = result.model.predict(part.x) - part.y
        assert result.figures[name]["rmse"] == pytest.approx(math.sqrt(np.mean(error**2)), rel=1e-9)
        assert result.figures[name]["r2"] == pytest.approx(1 - np.mean(error**2) / np.var(part.y), rel=1e-9)
    assert result.figures["test"]["r2"] > 0.95
    assert 1 < result.figures["test"]["rmse"] < 100  # y has a deviation of about 300: not a figure of scaled values


def test_several_targets_of_different_size_are_all_learned():
    result = _value_run(target="y,z", epochs=200, dropout=0.0, lr=0.01, hidden="32").start()
    parts = split_parts(data.load("values.csv", "y,z"), "regression", 0.2, 0.1, 0)
    found = result.model.predict(parts.train.x)
    assert found.shape == parts.train.y.shape
    residual = ((found - parts.train.y) ** 2).mean(axis=0) / parts.train.y.var(axis=0)
    assert (residual < 0.2).all()


def test_counts_with_the_poisson_loss_beat_their_mean():
    x = _numbers(300)
    counts = np.random.default_rng(1).poisson(np.exp(1 + x[:, 0]))
    path = _write("counts.csv", {"a": x[:, 0], "b": x[:, 1], "n": counts})
    result = Run(_options(data=path, target="n", task="regression", loss="poisson", epochs=60, dropout=0.0)).start()
    assert result.figures["test"]["r2"] > 0.3
    assert (result.model.predict(data.load(path, "n").x) > 0).all()


def test_making_a_run_writes_nothing():
    _animal_run()
    assert _left() == set()


def test_an_empty_folder_that_is_there_already_will_do_and_missing_parents_are_made():
    os.mkdir("run")
    assert _animal_run().start().folder.name == "run"
    assert _animal_run(out="one/two/three").start().folder.is_dir()


def test_two_runs_of_the_same_second_get_folders_of_their_own():
    first, second = _animal_run(out=None, seed=1), _animal_run(out=None, seed=2)
    folders = {first.start().folder, second.start().folder}
    assert len(folders) == 2
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == FILES
        assert folder.parent.name == "runs"
        assert folder.name.startswith("animals-")


def test_the_history_is_strict_json_and_says_what_happened():
    result = _animal_run(epochs=4, schedule="constant", lr=0.01).start()
    found = _history()
    assert found["stopped"] == "completed"
    assert found["monitor"] == "validation_loss"
    assert found["restored_best"] is False
    assert found["figures"] == result.figures
    assert list(found["figures"]) == ["train", "validation", "test"]
    rows = found["epochs"]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    steps = math.ceil(len(split_parts(data.load("animals.csv", "kind"), "classification", 0.2, 0.1, 0).train) / 16)
    assert [row["step"] for row in rows] == [steps * epoch for epoch in (1, 2, 3, 4)]
    assert {row["learning_rate"] for row in rows} == {0.01}
    assert set(rows[0]) == {
        *("epoch", "step", "cost", "learning_rate", "seconds", "samples_per_second"),
        *("validation_loss", "validation_accuracy"),
    }
    assert found["last"] == rows[-1]
    assert found["best"] == min(rows, key=lambda row: row["validation_loss"])
    assert rows[-1]["validation_accuracy"] == pytest.approx(result.figures["validation"]["accuracy"])


def test_the_figures_are_those_of_the_weights_in_the_file():
    result = _animal_run(epochs=5).start()
    back = Model.load("run")
    for name, part in split_parts(data.load("animals.csv", "kind"), "classification", 0.2, 0.1, 0).named().items():
        assert np.mean(back.predict(part.x) == part.y) == pytest.approx(result.figures[name]["accuracy"])
    name, part = held_out(back)
    assert name == "test"
    assert back.figures(back.outputs(part.x), part.y) == result.figures["test"]


# --- repeating a run ------------------------------------------------------------------------------------------------


def test_the_written_options_repeat_the_run_to_the_bit():
    _animal_run(epochs=3, dropout=0.4, l1=1e-4, clip_norm=1.0, accumulate=2, warmup=3, seed=11).start()
    again = merged("run/options.toml", {"out": "again"})
    Run(again).start()
    assert _weights("again") == _weights("run")
    first, second = _history("run"), _history("again")
    assert first["figures"] == second["figures"]
    assert [row["cost"] for row in first["epochs"]] == [row["cost"] for row in second["epochs"]]
    Run(merged("run/options.toml", {"out": "other", "seed": 12})).start()
    assert _weights("other") != _weights("run")


def test_the_written_options_have_every_default_that_waited_for_the_data():
    _animal_run().start()
    found = merged("run/options.toml", {})
    assert (found.task, found.loss, found.label_smoothing) == ("classification", "cross_entropy", 0.05)
    assert (found.lr, found.dropout, found.schedule) == (0.002, 0.3, "cosine")


def test_a_run_leaves_the_options_it_was_given_alone():
    given = _options(data=_write("animals.csv", _animals()), target="kind")
    before = repr(given)
    Run(given).start()
    assert repr(given) == before


# --- the parts ------------------------------------------------------------------------------------------------------


def test_the_parts_are_disjoint_cover_everything_and_keep_the_classes_in_proportion():
    raw = data.load(_write("animals.csv", {"id": np.arange(N), **_animals()}), "kind")
    parts = split_parts(raw, "classification", 0.2, 0.125, 7).named()
    rows = [part.x["id"].astype(int) for part in parts.values()]
    assert [len(ids) for ids in rows] == [63, 9, 18]
    assert sorted(np.concatenate(rows).tolist()) == list(range(N))
    for part in parts.values():
        assert set(np.unique(part.y, return_counts=True)[1].tolist()) == {len(part) // 3}
        np.testing.assert_array_equal(part.y, raw.y[part.x["id"].astype(int)])
    other = split_parts(raw, "classification", 0.2, 0.125, 8).named()
    assert not np.array_equal(other["test"].x["id"], parts["test"].x["id"])


@pytest.mark.parametrize(
    ("test", "validation", "names"),
    [(0.0, 0.0, ["train"]), (0.0, 0.2, ["train", "validation"]), (0.2, 0.0, ["train", "test"])],
)
def test_a_fraction_of_0_means_no_such_part(test, validation, names):
    result = _animal_run(test=test, validation=validation).start()
    assert list(result.figures) == names
    assert any("validation" in column for column in result.history.last) is bool(validation)
    assert held_out(Model.load("run"))[0] == names[-1]


def test_a_test_part_of_the_data_s_own_is_used_whole_and_not_cut():
    x, y = _numbers(60), np.arange(60) % 2
    np.savez("own.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    parts = split_parts(data.load("own.npz"), "classification", 0.5, 0.1, 0)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (36, 4, 20)
    np.testing.assert_array_equal(parts.test.x, x[40:])
    result = Run(_options(data="own.npz")).start()
    name, part = held_out(result.model)
    assert name == "test"
    np.testing.assert_array_equal(part.x, x[40:])


def test_standardization_is_fitted_on_the_training_rows_and_no_others():
    columns = _values()
    run = _value_run(seed=5)
    run.start()
    with safe_open("run/model.safetensors", framework="numpy") as file:
        described = json.loads(file.metadata()["header"])["metadata"]
    raw = data.load(_write("numbered.csv", {"id": np.arange(N), **columns}), "y")
    rows = split_parts(raw, "regression", 0.2, 0.1, 5).train.x["id"].astype(int)
    assert len(rows) == N - 18 - 7
    for j, name in enumerate(("a", "b", "z")):
        trained = columns[name][rows]
        assert described["preprocessor"]["mean"][j] == pytest.approx(trained.mean(), rel=1e-12)
        assert described["preprocessor"]["scale"][j] == pytest.approx(trained.std(), rel=1e-12)
        assert described["preprocessor"]["mean"][j] != pytest.approx(columns[name].mean(), rel=1e-3)
    assert described["target"]["mean"] == [pytest.approx(columns["y"][rows].mean(), rel=1e-12)]
    assert described["target"]["scale"] == [pytest.approx(columns["y"][rows].std(), rel=1e-12)]


def test_imputed_values_come_from_the_training_rows_too():
    columns = _values()
    missing = np.arange(N) % 4 == 1
    columns["a"] = [None if gone else a for gone, a in zip(missing, columns["a"])]
    raw = data.load(_write("numbered.csv", {"id": np.arange(N), **columns}), "y")
    rows = split_parts(raw, "regression", 0.2, 0.1, 0).train.x["id"].astype(int)
    Run(_options(data="numbered.csv", target="y", impute="median")).start()
    filled = Model.load("run").preprocessor.fill
    assert filled[1] == np.median([columns["a"][row] for row in rows if not missing[row]])


def test_without_standardize_the_numbers_reach_the_network_as_they_are():
    run = _value_run(standardize=False, precision="float64")
    raw = run.parts.train.x
    np.testing.assert_array_equal(run.model.inputs(raw), np.column_stack([raw["a"], raw["b"], raw["z"]]))


# --- options reach the trainer --------------------------------------------------------------------------------------


def test_every_number_reaches_its_place():
    run = _animal_run(
        optimizer="sgd", lr=0.125, momentum=0.25, weight_decay=0.5, l1=1e-3, l2=2e-3, schedule="one_cycle", warmup=7,
        clip_norm=3.0, accumulate=2, label_smoothing=0.125, dropout=0.5, hidden="6,5", activation="tanh,gelu",
        precision="float64", seed=9, patience=4,
    )  # fmt: skip
    trainer, net = run.trainer, run.model.net
    assert (trainer.optimizer.name, trainer.optimizer.lr, trainer.optimizer.momentum) == ("sgd", 0.125, 0.25)
    assert trainer.optimizer.weight_decay == 0.5
    assert (trainer.regularizer.l1, trainer.regularizer.l2) == (1e-3, 2e-3)
    assert isinstance(trainer.schedule, Warmup)
    assert (trainer.schedule.length, trainer.schedule.then.name) == (7, "one_cycle")
    assert (trainer.clip_norm, trainer.accumulate) == (3.0, 2)
    assert trainer.loss == CrossEntropy(label_smoothing=0.125)
    assert (net.sizes, net.activation, net.output) == ((4, 6, 5, 3), ("tanh", "gelu"), "softmax")
    assert (net.dropout, net.precision, net.seed) == ((0.5, 0.5), "float64", 9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_by_name(name):
    run = _animal_run(optimizer=name, precision="float64", dropout=0.0, epochs=5)
    start = run.model.net.theta.copy()
    result = run.start()
    assert run.trainer.optimizer.name == name
    assert np.isfinite(run.model.net.theta).all()
    assert not np.array_equal(run.model.net.theta, start)
    assert result.history.stopped in ("completed", "converged")
    assert result.history["cost"][-1] < result.history["cost"][0]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("step", "exponential")])
def test_every_schedule_by_name(name):
    run = _animal_run(schedule=name, epochs=3, lr=0.01)
    result = run.start()
    assert run.trainer.schedule.name == name
    rates = result.history["learning_rate"]
    assert max(rates) <= 0.01 + 1e-9
    assert (len(set(rates)) == 1) is (name in ("constant", "on_plateau"))


@pytest.mark.parametrize("name", ["step", "exponential"])
def test_a_schedule_that_the_command_cannot_set_says_where_it_can_be(name):
    with pytest.raises(ValueError, match=f"schedule: '{name}' needs parameters that only the Python interface takes"):
        _animal_run(schedule=name)


@pytest.mark.parametrize(("task", "loss"), [(task, loss) for task, losses in OUTPUT_OF.items() for loss in losses])
def test_every_loss_by_name(task, loss):
    columns = _animals() if task == "classification" else {**_values(), "y": _values()["y"] ** 2 / 1e6}
    path = _write("any.csv", columns)
    run = Run(_options(data=path, target="kind" if task == "classification" else "y", loss=loss, epochs=15))
    result = run.start()
    assert run.trainer.loss.name == loss
    assert run.model.net.output == OUTPUT_OF[task][loss]
    assert result.history["cost"][-1] < result.history["cost"][0]
    assert all(math.isfinite(value) for row in result.figures.values() for value in row.values())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_by_name(name):
    run = _animal_run(activation=name, dropout=0.0, epochs=1)
    run.start()
    assert run.model.net.activation == (name,)
    assert np.isfinite(run.model.net.theta).all()


@pytest.mark.parametrize("name", ["auto", *INITIALIZERS])
def test_every_initializer_by_name(name):
    run = _animal_run(init=name, epochs=1)
    expected = MLP([4, 8, 3], output="softmax", init=name, seed=0)
    np.testing.assert_array_equal(run.model.net.weights[0], expected.weights[0])
    if name == "orthogonal":
        W = expected.weights[0].astype(np.float64)
        np.testing.assert_allclose(W.T @ W, np.eye(4), atol=1e-6)
    run.start()
    assert Model.load("run").net.sizes == (4, 8, 3)


@pytest.mark.parametrize("name", ["float64", "float32", "tf32", "bfloat16", "float16"])
def test_every_precision_by_name(name):
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    result = _animal_run(precision=name, epochs=40, dropout=0.0, lr=0.02).start()
    assert result.model.net.precision == Model.load("run").net.precision == name
    assert result.figures["train"]["accuracy"] > 0.8


def test_no_hidden_layer_is_a_linear_model():
    run = _value_run(hidden="none", target="y", epochs=300, lr=0.05)
    result = run.start()
    assert run.model.net.sizes == (3, 1)
    assert result.figures["test"]["r2"] > 0.999  # y is linear in the columns


def test_lbfgs_from_end_to_end():
    result = _animal_run(optimizer="lbfgs", epochs=100, hidden="none", l2=1e-3, label_smoothing=0.0).start()
    assert result.history.stopped in ("completed", "converged")
    assert result.figures["test"]["accuracy"] >= 0.9
    costs = result.history["cost"]
    assert all(later <= earlier for earlier, later in zip(costs, costs[1:]))  # a line search never goes up
    found = merged("run/options.toml", {})
    assert (found.dropout, found.schedule, found.lr) == (0.0, "constant", None)
    Run(merged("run/options.toml", {"out": "again"})).start()
    assert _weights("again") == _weights("run")


def test_patience_ends_the_run_and_puts_the_best_weights_back():
    run = _animal_run(patience=3, epochs=50, lr=0.0)  # nothing is learned: the first epoch stays the best
    start = run.model.net.theta.tobytes()
    result = run.start()
    assert (result.history.stopped, len(result.history)) == ("early stopping", 4)
    found = _history()
    assert found["restored_best"] is True
    assert found["best"]["epoch"] == 1
    assert run.model.net.theta.tobytes() == start


def test_patience_without_validation_watches_the_cost():
    result = _animal_run(patience=2, validation=0.0, epochs=50, lr=0.0, dropout=0.0).start()
    assert result.history.monitor == "cost"
    assert _history()["stopped"] == "early stopping"


# --- what is refused, and when --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adamm"}, r"optimizer: unknown name 'adamm'; did you mean 'adam'\?"),
        ({"task": "clasification"}, r"task: .*did you mean 'classification'\?"),
        ({"loss": "cross_entropi"}, r"loss: .*did you mean 'cross_entropy'\?"),
        ({"loss": "mse"}, r"loss: 'mse' does not fit classification; use one of cross_entropy, nll, hinge"),
        ({"loss": "hinge", "label_smoothing": 0.1}, r"label_smoothing: only for loss 'cross_entropy', not 'hinge'"),
        ({"momentum": 0.9}, r"momentum: optimizer 'adamw' has none"),
        ({"optimizer": "lbfgs", "weight_decay": 0.1}, r"weight_decay: optimizer 'lbfgs' has none"),
        ({"optimizer": "lbfgs", "lr": 0.1}, r"lr: L-BFGS"),
        ({"optimizer": "lbfgs", "dropout": 0.1}, r"dropout: L-BFGS"),
        ({"optimizer": "lbfgs", "schedule": "cosine"}, r"schedule: L-BFGS"),
        ({"optimizer": "lbfgs", "clip_norm": 1.0}, r"clip_norm: L-BFGS"),
        ({"optimizer": "lbfgs", "precision": "float16"}, r"precision: L-BFGS"),
        ({"test": 1.0}, r"test: expected a finite number in \[0, 1\), got 1"),
        ({"validation": -0.1}, r"validation: expected a finite number in \[0, 1\)"),
        ({"epochs": 0}, r"epochs: expected an integer of at least 1, got 0"),
        ({"batch_size": 0}, r"batch_size: "),
        ({"accumulate": 0}, r"accumulate: "),
        ({"warmup": -1}, r"warmup: "),
        ({"seed": -1}, r"seed: "),
        ({"patience": 0}, r"patience: expected an integer of at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout: "),
        ({"clip_norm": 0.0}, r"clip_norm: "),
        ({"l2": -1.0}, r"l2: "),
        ({"label_smoothing": -0.1}, r"label_smoothing: "),
        ({"activation": "relu,tanh"}, r"activation: expected one value or 1"),
        ({"activation": "softmax"}, r"dropout: not on a softmax layer"),
        ({"device": "cuda"}, r"device: "),
        ({"init": "he_uniforn"}, r"init: .*did you mean 'he_uniform'\?"),
        ({"impute": "mode"}, r"impute: .*did you mean 'mean'\?"),
        ({"target": "kid"}, r"no column 'kid'; did you mean 'kind'\?"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_written(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Run(_options(**{"data": _write("animals.csv", _animals()), "target": "kind", **given})).start()
    assert _left() == set()


def test_label_smoothing_does_not_fit_a_regression():
    with pytest.raises(ValueError, match="label_smoothing: only for loss 'cross_entropy', not 'mse'"):
        _value_run(label_smoothing=0.1)


PARTS = ("train", "validation", "test")


def _row_of(part, n=N, task="regression"):
    """The number of a row that the split of seed 0 puts into a part."""
    ids = data.load(_write("ids.csv", {"id": np.arange(n), "y": _values(n)["y"]}), "y")
    return int(split_parts(ids, task, 0.2, 0.1, 0).named()[part].x["id"][0])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("a", None, "missing value.*column 'a'|column 'a'.*missing value"),
        ("colour", None, "missing value.*column 'colour'|column 'colour'.*missing value"),
        ("y", None, "missing target"),
    ],
)
def test_bad_data_in_any_part_is_found_before_the_training(monkeypatch, part, column, value, message):
    columns = {
        name: values.tolist() for name, values in (_values() | {"colour": np.array(["red", "blue"] * 45)}).items()
    }
    columns[column][_row_of(part)] = value
    monkeypatch.setattr(Trainer, "fit", lambda *arguments, **options: pytest.fail("the training began"))
    with pytest.raises(ValueError, match=message):
        Run(_options(data=_write("bad.csv", columns), target="y")).start()
    assert _left() == set()


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_category_that_only_a_held_out_part_has_is_found_before_the_training(monkeypatch, part):
    columns = _values() | {"colour": np.array(["red", "blue"] * 45, object)}
    columns["colour"][_row_of(part)] = "green"
    monkeypatch.setattr(Trainer, "fit", lambda *arguments, **options: pytest.fail("the training began"))
    with pytest.raises(ValueError, match=r"column 'colour': unseen category 'green'.*impute"):
        Run(_options(data=_write("bad.csv", columns), target="y")).start()
    assert _left() == set()


def test_a_label_that_only_the_test_part_has_is_found_before_the_training(monkeypatch):
    x, y = _numbers(60), np.arange(60) % 2
    np.savez("own.npz", x_train=x, y_train=y, x_test=x, y_test=np.arange(60) % 3)
    monkeypatch.setattr(Trainer, "fit", lambda *arguments, **options: pytest.fail("the training began"))
    with pytest.raises(ValueError, match="unseen label 2"):
        Run(_options(data="own.npz")).start()
    assert _left() == set()


def test_a_bad_target_is_named_by_its_row_in_the_file():
    columns = {name: values.tolist() for name, values in _values().items()}
    columns["y"][53] = None
    with pytest.raises(ValueError, match="row 53 "):
        Run(_options(data=_write("bad.csv", columns), target="y"))


def test_missing_values_are_counted_over_the_whole_file():
    columns = {name: values.tolist() for name, values in _values().items()}
    for row in (3, 30, 60, 89):
        columns["a"][row] = None
    with pytest.raises(ValueError, match=rf"column 'a' \(4 of {N}\)"):
        Run(_options(data=_write("bad.csv", columns), target="y"))


@pytest.mark.parametrize("out", ["file", "file/below", "file/below/below", "full"])
def test_a_run_folder_that_cannot_be_is_refused_before_the_data_are_read(monkeypatch, out):
    with open("file", "w", encoding="utf-8"):
        pass
    os.mkdir("full")
    with open("full/something", "w", encoding="utf-8"):
        pass
    monkeypatch.setattr(data, "load", lambda *arguments, **options: pytest.fail("the data were read"))
    with pytest.raises((ValueError, OSError), match="out: "):
        Run(_options(out=out)).start()
    assert _left() == {"file", "full", "full/something"}


def test_folders_made_on_the_way_are_taken_back():
    long = "x" * 300  # longer than any file system's names
    with pytest.raises((ValueError, OSError), match="out: cannot write to"):
        _animal_run(out=f"one/two/{long}").start()
    assert _left() == set()


# --- a run that ends before its time --------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c(monkeypatch):
    """A function that makes Ctrl-C be pressed after so many minibatches, then after so many more, ..."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    plan, advance = [], Progress.advance

    def watch(self, rows):
        advance(self, rows)
        if plan:
            plan[0] -= 1
            if not plan[0]:
                plan.pop(0)
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "advance", watch)
    yield plan.extend
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("minibatches", [1, 3, 9, 17])
def test_ctrl_c_keeps_what_was_learned(ctrl_c, minibatches):
    run = _animal_run(epochs=1000)
    start = run.model.net.theta.tobytes()
    steps = math.ceil(len(run.parts.train) / 16)
    ctrl_c([minibatches])
    result = run.start()
    assert {path.name for path in result.folder.iterdir()} == FILES
    found = _history()
    assert found["stopped"] == "interrupted"
    assert len(found["epochs"]) == (minibatches - 1) // steps
    assert Model.load("run").net.theta.tobytes() == run.model.net.theta.tobytes() != start
    assert run.trainer.rounds == minibatches
    assert found["figures"]["test"] == result.figures["test"]


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
@pytest.mark.parametrize("minibatches", [1, 9])
def test_ctrl_c_in_any_epoch_leaves_whole_plots(ctrl_c, minibatches):
    ctrl_c([minibatches])
    result = _animal_run(epochs=1000, plots=True).start()
    drawn = {path.name for path in result.folder.iterdir()} - FILES
    assert drawn == {"confusion_matrix.png"} | ({"learning_curves.png"} if len(result.history) else set())


def test_ctrl_c_with_patience_puts_the_best_weights_back(ctrl_c):
    run = _animal_run(epochs=1000, patience=500, lr=0.01)
    kept = {}
    evaluate = run.trainer._evaluate

    def watch(*arguments):
        figures = evaluate(*arguments)
        if figures["loss"] < min(kept, default=math.inf):
            kept[figures["loss"]] = run.model.net.theta.tobytes()
        return figures

    run.trainer._evaluate = watch
    ctrl_c([23])
    run.start()
    found = _history()
    assert (found["stopped"], found["restored_best"]) == ("interrupted", True)
    assert Model.load("run").net.theta.tobytes() == kept[min(kept)]


def test_ctrl_c_during_lbfgs(ctrl_c):
    ctrl_c([3])
    _animal_run(epochs=1000, optimizer="lbfgs").start()
    assert _history()["stopped"] == "interrupted"
    assert Model.load("run").net.n_parameters > 0


def test_a_second_ctrl_c_while_the_run_is_written_does_not_lose_the_model(ctrl_c, monkeypatch):
    run = _animal_run(epochs=1000)
    ctrl_c([9])

    def press(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Model, "figures", press)
        run.start()
    assert Model.load("run").net.theta.tobytes() == run.model.net.theta.tobytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_a_run_that_ends_before_its_first_step_leaves_nothing(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(error):
        _animal_run(out="one/two").start()
    assert _left() == set()


def test_the_handler_of_ctrl_c_is_put_back(ctrl_c):
    ctrl_c([2])
    _animal_run(epochs=1000).start()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_a_thread_of_its_own_ends_well():
    run = _animal_run()
    results = []
    thread = threading.Thread(target=lambda: results.append(run.start()))
    thread.start()
    thread.join()
    assert results[0].history.stopped == "completed"


def test_a_run_that_diverges_in_its_first_epoch_leaves_nothing():
    run = Run(_options(data="digits", optimizer="sgd", lr=1e6, schedule="constant", hidden="64,64"))
    with pytest.raises(Diverged, match=r"epoch 1, step \d+: the cost is not finite, first in (layer \d|the loss)"):
        run.start()
    assert _left() == set()


def test_a_run_that_diverges_later_leaves_the_last_good_epoch():
    run = _value_run(
        optimizer="sgd", lr=3.0, schedule="constant", batch_size=100, epochs=500, dropout=0.0, hidden="8,8"
    )
    with pytest.raises(Diverged, match=r"^epoch \d+, step \d+: .*; the model of the last good epoch is in run$"):
        run.start()
    found = _history()
    assert found["stopped"] == "diverged"
    assert 1 <= len(found["epochs"]) < 500
    assert all(np.isfinite(tensor).all() for tensor in load_file("run/model.safetensors").values())
    assert Model.load("run").net.theta.tobytes() == run.model.net.theta.tobytes()


@pytest.mark.parametrize("epochs", [1, 3])
def test_weights_that_the_last_update_of_an_epoch_made_infinite_are_never_kept(epochs):
    """The cost comes before the update, so that no cost has seen them yet."""
    run = _value_run(optimizer="sgd", lr=3e38, schedule="constant", batch_size=100, epochs=epochs)
    start = run.model.net.theta.tobytes()
    with pytest.raises(Diverged, match=r"epoch 1\b.*not finite"):
        run.start()
    assert run.model.net.theta.tobytes() == start
    assert _left() == set()


# --- plots ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
def test_plots_are_drawn_where_they_make_sense():
    assert {path.name for path in _animal_run(plots=True).start().folder.iterdir()} == {
        *FILES, "learning_curves.png", "confusion_matrix.png",
    }  # fmt: skip
    assert {path.name for path in _value_run(plots=True, out="r").start().folder.iterdir()} == {
        *FILES, "learning_curves.png",
    }  # fmt: skip


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
def test_the_confusion_matrix_is_that_of_the_held_out_part(monkeypatch):
    drawn = {}

    def keep(path, true, predicted, labels, title, times=1):
        drawn.update(true=true, predicted=predicted, labels=labels, title=title)

    monkeypatch.setattr(plots, "confusion_matrix", keep)
    result = _animal_run(plots=True, epochs=10).start()
    assert drawn["labels"] == ["cat", "dog", "eel"]
    assert len(drawn["true"]) == 18
    assert np.mean(drawn["true"] == drawn["predicted"]) == pytest.approx(result.figures["test"]["accuracy"])
    assert "test part" in drawn["title"]


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib")
@pytest.mark.parametrize("name", ["$\\frac$", "犬", "100%"])
def test_labels_and_file_names_of_any_text_can_be_drawn(name):
    columns = _animals()
    columns["kind"] = [f"{name} {kind}$" for kind in columns["kind"]]
    result = Run(_options(data=_write(f"{name}.csv", columns), target="kind", plots=True)).start()
    assert (result.folder / "confusion_matrix.png").stat().st_size > 0


def test_without_matplotlib_a_run_succeeds_and_draws_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python itself uses for "not to be imported"
    result = _animal_run(plots=True).start()
    assert {path.name for path in result.folder.iterdir()} == FILES
    assert runs.plots.available() is False


# --- averaged weights -----------------------------------------------------------------------------------------------


def test_averaged_weights_are_what_is_saved():
    plain, averaged = _animal_run(out="plain"), _animal_run(out="averaged", average=0.9)
    plain.start()
    result = averaged.start()
    assert Model.load("averaged").net.theta.tobytes() == averaged.model.net.theta.tobytes()
    assert averaged.model.net.theta.tobytes() != plain.model.net.theta.tobytes()
    assert result.history["cost"] == pytest.approx([row["cost"] for row in _history("plain")["epochs"]], rel=1e-12)
    with pytest.raises(ValueError, match=r"^average: "):
        _animal_run(average=1.0)


# --- logs ------------------------------------------------------------------------------------------------------------


def test_the_logs_of_a_run_are_in_its_folder():
    _animal_run(log="csv,jsonl", epochs=3).start()
    assert set(os.listdir("run")) == FILES | {"log.csv", "log.jsonl"}
    with open("run/history.json") as file:
        epochs = json.load(file)["epochs"]
    with open("run/log.jsonl") as file:
        assert [json.loads(line) for line in file] == epochs
    with open("run/log.csv", newline="") as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == epochs


def test_an_unknown_log_is_refused_before_the_data_are_read():
    with pytest.raises(ValueError, match=r"log: unknown name 'json'; did you mean 'jsonl'\?"):
        Run(_options(data="nowhere.csv", log="csv,json"))
    assert not os.path.exists("run")
