"""A model: raw rows in, labels or values out, and the same from its file; and predictions written as CSV and npy."""

from __future__ import annotations

import copy
import csv
import json
import math
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gpu_mlp import MLP
from gpu_mlp.model import OUTPUT_OF, Model
from gpu_mlp.predictions import write
from gpu_mlp.preprocessing import Labels, Preprocessor, TargetScaler

RNG = np.random.default_rng(5)
TABLE = {
    "age": np.array([20.0, 30.0, 40.0, 50.0]),
    "colour": np.array(["red", "blue", "red", "blue"], object),
    "height": np.array([1.0, 3.0, 5.0, 7.0]),
}


def _classifier(labels=("cat", "dog", "eel"), loss="cross_entropy", precision="float64"):
    """A model of TABLE's columns without hidden layers, so that its outputs can be worked out on one line."""
    preprocessor = Preprocessor.fit(TABLE, feature_names=list(TABLE))
    target = Labels.fit(np.array(list(labels), object if isinstance(labels[0], str) else None))
    net = MLP([4, len(target)], output=OUTPUT_OF["classification"][loss], precision=precision, seed=3)
    return Model(net, preprocessor, target, loss, {"data": "t.csv", "target": "kind", "seed": 0})


def _regressor(y, loss="mse", precision="float64"):
    x = RNG.normal(size=(len(y), 3))
    target = TargetScaler.fit(y, standardize=loss != "poisson")
    outputs = 1 if np.ndim(y) == 1 else y.shape[1]
    net = MLP([3, outputs], output=OUTPUT_OF["regression"][loss], precision=precision, seed=3)
    return Model(net, Preprocessor.fit(x), target, loss), x


def _prepared(table):
    """TABLE's columns as the network takes them: standardized by hand, blue and red as one-hot columns."""
    rows = []
    for age, colour, height in zip(*table.values()):
        # the ages of the fit have mean 35 and deviation √125, the heights mean 4 and deviation √5
        blue = float(colour == "blue")
        rows.append([(age - 35) / math.sqrt(125), blue, 1 - blue, (height - 4) / math.sqrt(5)])
    return np.array(rows)


def _softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# --- what comes out -------------------------------------------------------------------------------------------------


def test_the_inputs_are_standardized_and_one_hot_as_worked_out_by_hand():
    model = _classifier()
    np.testing.assert_allclose(model.inputs(TABLE), _prepared(TABLE), rtol=1e-14, atol=1e-14)
    assert model.inputs(TABLE).dtype == np.float64
    assert _classifier(precision="float32").inputs(TABLE).dtype == np.float32
    assert _classifier(precision="bfloat16").inputs(TABLE).dtype == np.float32


@pytest.mark.parametrize("loss", ["cross_entropy", "nll"])
def test_outputs_labels_and_probabilities_of_a_classifier(loss):
    model = _classifier(loss=loss)
    shares = _softmax(_prepared(TABLE) @ model.net.weights[0].T + model.net.biases[0])
    y_hat = model.outputs(TABLE)
    np.testing.assert_allclose(y_hat, shares if loss == "cross_entropy" else np.log(shares), rtol=1e-12)
    np.testing.assert_allclose(model.probabilities(y_hat), shares, rtol=1e-12)
    np.testing.assert_allclose(model.probabilities(y_hat).sum(axis=1), 1, rtol=1e-14)
    labels = np.array(["cat", "dog", "eel"])[shares.argmax(axis=1)]
    assert model.read(y_hat).tolist() == model.predict(TABLE).tolist() == labels.tolist()
    assert model.task == "classification"


def test_columns_are_taken_by_name_and_others_are_passed_over():
    model = _classifier()
    shuffled = {"note": np.array(["x"] * 4, object), "height": TABLE["height"], "colour": TABLE["colour"]}
    shuffled |= {"id": np.arange(4.0), "age": TABLE["age"]}
    np.testing.assert_array_equal(model.outputs(shuffled), model.outputs(TABLE))


def test_a_missing_column_is_named():
    model = _classifier()
    with pytest.raises(ValueError, match="no column 'colour'"):
        model.outputs({name: column for name, column in TABLE.items() if name != "colour"})


@pytest.mark.parametrize("labels", [(3, 7), (-5, 10**12), (False, True), ("no", "yes"), (1.0, 2.0)])
def test_labels_of_any_kind_come_back_as_they_were(labels):
    model = _classifier(labels)
    found = model.read(np.eye(2)[[1, 0, 1]])
    assert found.tolist() == [labels[1], labels[0], labels[1]]
    assert [type(label) for label in found.tolist()] == [type(labels[1]), type(labels[0]), type(labels[1])]
    np.testing.assert_array_equal(model.targets(np.array([labels[1], labels[0]])), [1, 0])


def test_the_scores_of_a_hinge_model_are_no_probabilities():
    model = _classifier(loss="hinge")
    with pytest.raises(ValueError, match=r"probabilities: .*'hinge'.*scores"):
        model.probabilities(model.outputs(TABLE))


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3)])
def test_values_come_back_in_their_own_units_and_shape(shape):
    y = RNG.normal(size=shape) * 1000 + 5e4
    model, x = _regressor(y)
    standardized = (x - x.mean(axis=0)) / x.std(axis=0)
    y_hat = standardized @ model.net.weights[0].T + model.net.biases[0]
    np.testing.assert_allclose(model.outputs(x), y_hat, rtol=1e-12)
    expected = y_hat * y.std(axis=0) + y.mean(axis=0)
    found = model.predict(x)
    assert found.shape == shape
    np.testing.assert_allclose(found.reshape(40, -1), expected.reshape(40, -1), rtol=1e-12)
    assert model.task == "regression"


def test_a_poisson_model_keeps_the_units_of_its_counts():
    y = RNG.poisson(30, 50).astype(float)
    model, x = _regressor(y, "poisson")
    z = (x - x.mean(axis=0)) / x.std(axis=0) @ model.net.weights[0].T + model.net.biases[0]
    np.testing.assert_allclose(model.predict(x), np.exp(z)[:, 0], rtol=1e-12)
    np.testing.assert_array_equal(model.targets(y)[:, 0], y)


# --- figures --------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_right_labels():
    model = _classifier()
    y_hat = np.eye(3)[[0, 1, 2, 0]]
    figures = model.figures(y_hat, np.array(["cat", "dog", "cat", "eel"], object))
    assert figures == {"accuracy": 0.5}


def test_with_many_classes_the_top_five_count_too():
    labels = np.arange(30)
    model = Model(MLP([2, 30], output="softmax"), Preprocessor.fit(RNG.normal(size=(9, 2))), Labels.fit(labels), "nll")
    y_hat = RNG.normal(size=(200, 30))
    y = RNG.integers(0, 30, 200)
    rank = (y_hat > y_hat[np.arange(200), y][:, None]).sum(axis=1)
    assert model.figures(y_hat, y) == pytest.approx(
        {"accuracy": (rank < 1).mean(), "top_5_accuracy": (rank < 5).mean()}
    )


@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_rmse_and_r2_are_in_the_units_of_the_target(shape):
    y = RNG.normal(size=shape) * [1000.0, 10.0, 0.1][: shape[-1] if len(shape) > 1 else 1] + 7
    model, x = _regressor(y)
    found = model.figures(model.outputs(x), y)
    error, spread = model.predict(x) - y, y - y.mean(axis=0)
    r2 = 1 - (error**2).sum(axis=0) / (spread**2).sum(axis=0)
    assert found == pytest.approx({"rmse": math.sqrt((error**2).mean()), "r2": np.mean(r2)}, rel=1e-12)


def test_a_label_that_was_not_there_in_training_is_named():
    model = _classifier()
    with pytest.raises(ValueError, match="unseen label 'bat'"):
        model.figures(np.eye(3), np.array(["cat", "bat", "dog"], object))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "float16"])
def test_a_model_comes_back_from_its_file_to_the_bit(tmp_path, precision):
    model = _classifier(precision=precision)
    back = Model.load(model.save(tmp_path / "model.safetensors"))
    assert back.outputs(TABLE).tobytes() == model.outputs(TABLE).tobytes()
    assert back.predict(TABLE).tolist() == model.predict(TABLE).tolist()
    assert (back.loss, back.task, back.data) == (model.loss, model.task, model.data)


@pytest.mark.parametrize("y", [RNG.normal(size=30) * 1e6, RNG.normal(size=(30, 2)) * 1e-6])
def test_a_regression_comes_back_to_the_bit(tmp_path, y):
    model, x = _regressor(y)
    model.save(tmp_path / "model.safetensors")
    back = Model.load(tmp_path)  # the run folder will do
    assert back.predict(x).tobytes() == model.predict(x).tobytes()
    assert back.predict(x).shape == y.shape


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model: no file at .*model\.safetensors"):
        Model.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Model.load(tmp_path / "nowhere")


def test_a_bare_network_is_told_from_a_model(tmp_path):
    path = MLP([2, 3]).save(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare\.safetensors has a network but no 'task'; use MLP\.load"):
        Model.load(path)


def _changed(tmp_path, change):
    """The path of a model file after ``change`` has had its way with the metadata."""
    path = _classifier().save(tmp_path / "model.safetensors")
    return _rewritten(path, lambda header: change(header["metadata"]))


def _rewritten(path, change):
    with safe_open(path, framework="numpy") as file:
        described = file.metadata()
    header = json.loads(described["header"])
    change(header)
    save_file(load_file(path), path, {**described, "header": json.dumps(header)})
    return path


CHANGES = {
    "no preprocessor": lambda m: m.pop("preprocessor"),
    "no target": lambda m: m.pop("target"),
    "no data": lambda m: m.pop("data"),
    "another task": lambda m: m.update(task="ranking"),
    "a task that is a number": lambda m: m.update(task=3),
    "a loss of another task": lambda m: m.update(loss="mse"),
    "a loss that is a list": lambda m: m.update(loss=[]),
    "an empty preprocessor": lambda m: m.update(preprocessor={}),
    "a preprocessor that is a number": lambda m: m.update(preprocessor=3),
    "a deviation of 0": lambda m: m["preprocessor"].update(scale=[0.0, 1.0]),
    "a mean that is text": lambda m: m["preprocessor"].update(mean=["a", "b"]),
    "fewer inputs than the network": lambda m: m["preprocessor"]["categorical"][0].update(categories=["red"]),
    "labels without a type": lambda m: m["target"].pop("dtype"),
    "labels out of order": lambda m: m["target"].update(classes=["eel", "dog", "cat"]),
    "fewer labels than outputs": lambda m: m["target"].update(classes=["cat", "dog"]),
    "more labels than outputs": lambda m: m["target"].update(classes=["ant", "cat", "dog", "eel"]),
    "a source that is a number": lambda m: m.update(data=3),
    "a source that is pairs": lambda m: m.update(data=[["data", "t.csv"]]),
    "a source with an unknown option": lambda m: m["data"].update(command="rm"),
    "a source whose file is a number": lambda m: m["data"].update(data=3),
    "a source whose file has an endless name": lambda m: m["data"].update(data="x" * 5000),
    "a source with a seed of text": lambda m: m["data"].update(seed="0"),
    "a source that holds all out": lambda m: m["data"].update(test=1.0),
    "an unknown field": lambda m: m.update(note="mine"),
    "a loss that is not this output's": lambda m: m.update(loss="nll"),
    "a task of many lines": lambda m: m.update(task="a\nb" * 10**6),
    "a preprocessor of many columns": lambda m: m["preprocessor"].update(n_features_in=10**12),
    "a preprocessor with endless lists": lambda m: m["preprocessor"].update(fill=[[[1.0]] * 10**5]),
    "a category of another column": lambda m: m["preprocessor"]["categorical"][0].update(column=10**12),
    "labels that are lists": lambda m: m["target"].update(classes=[["cat"], ["dog"], ["eel"]]),
    "labels that are numbers": lambda m: m["target"].update(classes=[1, 2, 3]),
    "labels that fit no type": lambda m: m["target"].update(dtype="int8", classes=[1, 2, 300]),
    "labels of an object of Python": lambda m: m["target"].update(dtype="O"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_with_a_broken_description_is_refused_by_name(tmp_path, change):
    path = _changed(tmp_path, change)
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        Model.load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 500


def test_as_many_scales_as_outputs(tmp_path):
    model, _ = _regressor(RNG.normal(size=(20, 2)))
    model.target = TargetScaler.fit(RNG.normal(size=(20, 3)))
    with pytest.raises(ValueError, match="it has 3 scales for 2 outputs"):
        Model.load(model.save(tmp_path / "model.safetensors"))


def test_one_long_label_among_many_takes_no_room_for_each(tmp_path):
    """NumPy's text arrays give every entry the room of the longest: here 8 GB."""
    labels = [*(f"{n:05}" for n in range(2000)), "x" * 10**6]
    net = MLP([2, len(labels)], output="softmax")
    model = Model(net, Preprocessor.fit(RNG.normal(size=(9, 2))), Labels(np.array(labels, object)), "cross_entropy")
    path = model.save(tmp_path / "model.safetensors")

    def as_text(header):
        header["metadata"]["target"]["dtype"] = "str"

    _rewritten(path, as_text)
    tracemalloc.start()
    try:
        back = Model.load(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert back.read(np.eye(len(labels))[[3, 2000]]).tolist() == [labels[3], labels[2000]]


def test_an_unchanged_description_is_accepted(tmp_path):
    described = []
    path = _changed(tmp_path, lambda m: described.append(copy.deepcopy(m)))
    assert Model.load(path).predict(TABLE).tolist() == _classifier().predict(TABLE).tolist()
    assert described[0]["preprocessor"]["mean"] == pytest.approx([35, 4])


def test_a_device_that_is_not_there_is_no_fault_of_the_file(tmp_path):
    path = _classifier().save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^device: "):
        Model.load(path, "cuda")
    with pytest.raises(ValueError, match=r"^device: .*did you mean 'cpu'"):
        Model.load(path, "gpu")


# --- predictions ----------------------------------------------------------------------------------------------------


def _read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("labels", [("a,b", 'c"d', "e\nf"), ("é", "犬", " "), (3, 7, 11), (False, True)])
def test_labels_and_probabilities_as_csv(tmp_path, labels):
    model = _classifier(labels)
    y_hat = _softmax(RNG.normal(size=(50, len(labels))))
    write(tmp_path / "p.csv", model, [y_hat], len(y_hat), True)
    header, *rows = _read_csv(tmp_path / "p.csv")
    expected = sorted(labels)
    assert header == ["prediction", *(f"p_{label}" for label in expected)]
    assert [row[0] for row in rows] == [str(expected[k]) for k in y_hat.argmax(axis=1)]
    shares = np.array([[float(value) for value in row[1:]] for row in rows])
    np.testing.assert_allclose(shares, y_hat, rtol=5e-6)  # six digits are written
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=5e-6)


def test_values_as_csv_keep_every_digit(tmp_path):
    for shape, header in (((20,), ["prediction"]), ((20, 2), ["prediction_0", "prediction_1"])):
        model, x = _regressor(RNG.normal(size=shape) * 1e3)
        write(tmp_path / "p.csv", model, [model.outputs(x)], len(x), False)
        found = _read_csv(tmp_path / "p.csv")
        assert found[0] == header
        values = np.array([[float(value) for value in row] for row in found[1:]])
        assert values.reshape(shape).tobytes() == model.predict(x).tobytes()


def test_to_the_screen_as_to_a_file(tmp_path, capsys):
    model = _classifier()
    y_hat = model.outputs(TABLE)
    write(None, model, [y_hat], len(y_hat), True)
    write(tmp_path / "p.csv", model, [y_hat], len(y_hat), True)
    assert capsys.readouterr().out == (tmp_path / "p.csv").read_text()


@pytest.mark.parametrize("labels", [("cat", "dog"), (3, 7), (False, True)])
def test_labels_as_npy_load_without_pickle(tmp_path, labels):
    model = _classifier(labels)
    y_hat = np.eye(2)[[0, 1, 1]]
    write(tmp_path / "p.npy", model, [y_hat], len(y_hat), False)
    found = np.load(tmp_path / "p.npy", allow_pickle=False)
    assert found.tolist() == [labels[0], labels[1], labels[1]]


def test_values_and_probabilities_as_npy(tmp_path):
    model, x = _regressor(RNG.normal(size=(20, 2)))
    write(tmp_path / "p.npy", model, [model.outputs(x)], len(x), False)
    assert np.load(tmp_path / "p.npy").tobytes() == model.predict(x).tobytes()
    classifier = _classifier()
    shares = classifier.probabilities(classifier.outputs(TABLE))
    write(tmp_path / "p.npy", classifier, [classifier.outputs(TABLE)], len(shares), True)
    assert np.load(tmp_path / "p.npy").tobytes() == shares.tobytes()
